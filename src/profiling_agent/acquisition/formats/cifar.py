"""CIFAR-10 and CIFAR-100 as published: the archives or what they unpack to, pickled or binary."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from profiling_agent.acquisition.data import UNNAMED, Bundle, Sample, Source
from profiling_agent.acquisition.formats.pickles import load_plain_pickle
from profiling_agent.errors import DataError

NUM_VALUES = 3 * 32 * 32
MAX_FILE_BYTES = 400 * 2**20
"""The largest of the published files has 155 MB."""

CifarName = Literal["cifar10", "cifar100"]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The files of one published version by part, and how they name things."""

    parts: dict[str, str]
    names_file: str
    num_classes: int
    num_label_bytes: int
    labels_key: bytes = b""
    names_key: bytes = b""

    @property
    def is_pickled(self) -> bool:
        return bool(self.labels_key)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS: dict[str, tuple[_Layout, ...]] = {
    "cifar10": (
        _Layout(
            parts={**dict.fromkeys(_BATCHES, "train"), "test_batch": "test"},
            names_file="batches.meta",
            num_classes=10,
            num_label_bytes=1,
            labels_key=b"labels",
            names_key=b"label_names",
        ),
        _Layout(
            parts={**{f"{each}.bin": "train" for each in _BATCHES}, "test_batch.bin": "test"},
            names_file="batches.meta.txt",
            num_classes=10,
            num_label_bytes=1,
        ),
    ),
    "cifar100": (
        _Layout(
            parts={"train": "train", "test": "test"},
            names_file="meta",
            num_classes=100,
            num_label_bytes=2,
            labels_key=b"fine_labels",
            names_key=b"fine_label_names",
        ),
        _Layout(
            parts={"train.bin": "train", "test.bin": "test"},
            names_file="fine_label_names.txt",
            num_classes=100,
            num_label_bytes=2,
        ),
    ),
}
FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
ARCHIVES = {
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-binary.tar.gz"),
}


def open_cifar(name: str, path: Path) -> Bundle:
    """The parts train and test: images uint8 (32, 32, 3), labels 0 to 9 (0 to 99, the fine ones).

    ``path`` is the published archive, the folder it unpacks to, the folder around either, or
    parquet. All images are held in memory, 184 MB. Raises ``DataError`` for anything else.
    """
    if name not in LAYOUTS:
        raise DataError(f"There is no data set {name!r}; pass cifar10:PATH or cifar100:PATH.")
    if not path.exists():
        raise DataError(
            f"{str(path)!r} doesn't exist; pass {name}:PATH with the published "
            f"{ARCHIVES[name][0]!r} or the folder it unpacks to."
        )
    place = _place(name, path)
    if _is_parquet(place):
        from profiling_agent.acquisition.formats.table import open_table

        return open_table(place, None)
    files: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    class_names: tuple[str, ...] = ()
    wanted = {each: layout for layout in LAYOUTS[name] for each in layout.parts}
    names = {layout.names_file: layout for layout in LAYOUTS[name]}
    for file, data in _contents(place, {*wanted, *names}):
        if file in wanted:
            files[file] = _parse(data, wanted[file], str(place / file))
        else:
            class_names = _class_names(data, names[file], str(place / file))
    if not files:
        raise DataError(_nothing_found(name, place))
    layout = wanted[next(iter(files))]
    parts, notes = _parts(files, layout)
    return Bundle(parts=parts, preprocessing={}, class_names=class_names, notes=notes)


def _place(name: str, path: Path) -> Path:
    if path.is_dir():
        for inner in (*FOLDERS[name], *ARCHIVES[name]):
            if (path / inner).exists():
                return path / inner
    return path


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet")))


def _contents(place: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """The wanted files one after another; an archive is read once, and never unpacked."""
    try:
        if place.is_dir():
            for name in sorted(wanted):
                if (place / name).is_file():
                    _refuse_large((place / name).stat().st_size, place / name)
                    yield name, (place / name).read_bytes()
            return
        with tarfile.open(place) as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                if name in wanted and member.isfile():
                    _refuse_large(member.size, place / name)
                    file = archive.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(
            f"{str(place)!r} is damaged or no archive ({error}); download it again."
        ) from None


def _refuse_large(num_bytes: int, path: Path) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise DataError(
            f"{str(path)!r} has {num_bytes:,} bytes, far more than the published file; pass the "
            "published archive."
        )


def _parse(data: bytes, layout: _Layout, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072) and labels (n,) of one file."""
    if layout.is_pickled:
        pixels, labels = _from_pickle(data, layout, name)
    else:
        width = layout.num_label_bytes + NUM_VALUES
        if len(data) % width or not data:
            raise DataError(
                f"{name!r} has {len(data):,} bytes, not a multiple of {width:,}; download it again."
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, width)
        # Of CIFAR-100's two labels the second is the fine one.
        pixels = rows[:, layout.num_label_bytes :]
        labels = rows[:, layout.num_label_bytes - 1].astype(np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < layout.num_classes):
        raise DataError(
            f"{name!r} has labels from {labels.min()} to {labels.max()}, which is not "
            f"0 to {layout.num_classes - 1}; download it again."
        )
    return pixels, labels


def _from_pickle(data: bytes, layout: _Layout, name: str) -> tuple[np.ndarray, np.ndarray]:
    content = _entries(load_plain_pickle(data, name), name)
    pixels, labels = content.get(b"data"), content.get(layout.labels_key)
    if not isinstance(pixels, np.ndarray) or not _is_images(pixels):
        raise DataError(f"{name!r} has no array 'data' of bytes (n, {NUM_VALUES:,}).")
    try:
        numbers = np.asarray(labels)
    except ValueError:  # lists of different lengths
        numbers = np.empty((0, 0))
    if numbers.dtype.kind not in "iu" or numbers.shape != (len(pixels),):
        key = layout.labels_key.decode()
        raise DataError(f"{name!r} has no {key!r}, one integer for each of {len(pixels):,} images.")
    return pixels, numbers.astype(np.int64)


def _is_images(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 2 and array.shape[1] == NUM_VALUES


def _entries(content: Any, name: str) -> dict[bytes, Any]:
    if not isinstance(content, dict):
        raise DataError(f"{name!r} holds a {type(content).__name__}, not a dict; see the archive.")
    return {key.encode() if isinstance(key, str) else key: each for key, each in content.items()}


def _class_names(data: bytes, layout: _Layout, name: str) -> tuple[str, ...]:
    if not layout.is_pickled:
        return tuple(data.decode("utf-8", errors="replace").split())
    names = _entries(load_plain_pickle(data, name), name).get(layout.names_key)
    found = names if isinstance(names, list) else []
    return tuple(
        each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in found
    )


def _parts(
    files: dict[str, tuple[np.ndarray, np.ndarray]], layout: _Layout
) -> tuple[dict[str, Source], tuple[str, ...]]:
    notes = [f"{name} is not there" for name in layout.parts if name not in files]
    parts: dict[str, Source] = {}
    for part in dict.fromkeys(layout.parts.values()):
        found = [
            files[name] for name in layout.parts if layout.parts[name] == part and name in files
        ]
        if found:
            parts[part] = _source([pixels for pixels, _ in found], [labels for _, labels in found])
    return parts, tuple(notes)


def _source(pixels: list[np.ndarray], labels: list[np.ndarray]) -> Source:
    starts = np.cumsum([0, *(len(each) for each in labels)])
    numbers = np.concatenate(labels)

    def get(index: int) -> Sample:
        batch = int(np.searchsorted(starts, index, side="right")) - 1
        image = pixels[batch][index - starts[batch]].reshape(3, 32, 32).transpose(1, 2, 0)
        return Sample(inputs={UNNAMED: np.ascontiguousarray(image)}, label=int(numbers[index]))

    return Source(
        length=len(numbers),
        get=get,
        stream=lambda: (get(index) for index in range(len(numbers))),
        is_threadsafe=True,
    )


def _nothing_found(name: str, place: Path) -> str:
    other = "cifar100" if name == "cifar10" else "cifar10"
    files = ", ".join(list(LAYOUTS[name][0].parts)[-2:])
    return (
        f"{str(place)!r} has none of {name}'s files ({files}, ...); pass the published "
        f"{ARCHIVES[name][0]!r} or what it unpacks to, or {other}:PATH if it is that one."
    )
