"""Which sample serves what, and the splits on disk.

Calibration needs no labels, search is what the loop looks at, test is opened once at the end: no
sample is ever in two of them. Splits are raw ``.npy`` files, written as a stream and read as
memory maps, so neither the data's size nor a worker's start costs memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib.format import open_memmap

from profiling_agent.acquisition.data import Sample, Source, UnreadableSample, as_label
from profiling_agent.acquisition.reading import Reader, read_all
from profiling_agent.acquisition.workload import Split
from profiling_agent.errors import DataError
from profiling_agent.machine.clock import now
from profiling_agent.records.workload import SplitInfo, SplitName

MAX_CALIBRATION = 512
LABELS_FILE = "labels.npy"
PLAIN_READER = Reader()
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Share:
    """The samples of one source that make up one split, in their order on disk."""

    split: SplitName
    source: Source
    indices: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Division:
    """Shares of the splits, notes on what was decided, and the sizes before any thinning."""

    shares: list[Share]
    notes: list[str]
    available: dict[SplitName, int]


def divide(parts: Mapping[str, Source], seed: int, max_samples: int) -> Division:
    """Shares for the three splits, drawn at random by ``seed``.

    One labelled source is divided into calibration (a tenth, at most 512), and 4 : 5 of the rest
    for search and test; not stratified. With a test set given, calibration is 15 % (at most 512)
    and search the rest. Parts that were given stay as they are. Above ``max_samples`` in the whole
    samples are left out at random: of search first, since test samples are what proves, and of test
    down to half of ``max_samples``. Calibration and search are shuffled, since their first samples
    must stand for all of them and data often come sorted by class. Raises ``DataError`` when
    samples or labels don't suffice.
    """
    rng = np.random.default_rng(seed)
    parts = {name: source for name, source in parts.items() if source.length != 0}
    if not parts:
        raise DataError("The data are empty; give samples with labels.")
    notes: list[str] = []
    shares = _assign(parts, rng, notes)
    available: dict[SplitName, int] = {share.split: len(share.indices) for share in shares}
    total = sum(available.values())
    if total > max_samples:
        notes.append(f"{total} samples were thinned at random to {max_samples} (max_samples)")
        shares = _thin_all(shares, max_samples, rng)
    shares = [share if share.split == "test" else _shuffled(share, rng) for share in shares]
    return Division(shares=shares, notes=notes, available=available)


def thinned(sizes: Mapping[SplitName, int], max_samples: int) -> dict[SplitName, int]:
    """Sizes of the splits that together are at most ``max_samples``; as they are when they fit."""
    if sum(sizes.values()) <= max_samples:
        return dict(sizes)
    if len(sizes) == 1:
        return dict.fromkeys(sizes, max_samples)
    search, test = sizes.get("search", 0), sizes.get("test", 0)
    calibration = min(sizes.get("calibration", 0), MAX_CALIBRATION, max_samples // 4)
    left = max_samples - calibration
    kept = min(test, max(left // 2, left - search))
    wanted: dict[SplitName, int] = {
        "calibration": calibration,
        "search": min(search, left - kept),
        "test": kept,
    }
    return {name: wanted[name] for name in sizes}


def _thin_all(shares: list[Share], max_samples: int, rng: np.random.Generator) -> list[Share]:
    sizes: dict[SplitName, int] = {share.split: len(share.indices) for share in shares}
    wanted = thinned(sizes, max_samples)
    return [
        _thin(share, wanted[share.split] / sizes[share.split], rng)
        if wanted[share.split] < sizes[share.split]
        else share
        for share in shares
    ]


def _assign(parts: dict[str, Source], rng: np.random.Generator, notes: list[str]) -> list[Share]:
    given = dict(parts)
    train = given.pop("train", None)
    if train is not None and "calibration" not in given:
        if {"search", "all"} & given.keys():
            notes.append("calibration samples come from the training part of the data")
            order = rng.permutation(_length(train))[:MAX_CALIBRATION]
            calibration = [Share(split="calibration", source=train, indices=order)]
            return calibration + _assign_rest(given, rng, notes)
        notes.append("calibration and search samples come from the training part of the data")
        given["all"] = train
    if "calibration" in given:
        source = given.pop("calibration")
        if not given and not _labelled(source):
            notes.append("the data have no labels: calibration only")
            return [_whole("calibration", source)]
        if given.keys() & {"search", "all"}:
            return [_whole("calibration", source), *_assign_rest(given, rng, notes)]
        given["all"] = source
    return _assign_all(given, rng)


def _assign_rest(
    given: dict[str, Source], rng: np.random.Generator, notes: list[str]
) -> list[Share]:
    """Search and test from what is left once calibration has its samples."""
    if "all" in given and "search" not in given:
        given["search"] = given.pop("all")
    if "test" in given:
        return [_whole("search", given["search"]), _whole("test", given["test"])]
    notes.append("search and test samples come from the same part of the data")
    order = rng.permutation(_length(given["search"]))
    return _cut(given["search"], order, {"search": len(order) * 4 // 9, "test": len(order)})


def _assign_all(given: dict[str, Source], rng: np.random.Generator) -> list[Share]:
    """Calibration and search (and test, when there is none) from one source."""
    test = given.pop("test", None)
    if not given:
        assert test is not None
        given, test = {"all": test}, None
    source = given.get("all") or given["search"]
    total = _length(source)
    if total < 3:
        raise DataError(f"The data have {total} samples; calibration, search and test need more.")
    order = rng.permutation(total)
    if test is not None:
        calibration = max(1, min(MAX_CALIBRATION, total * 15 // 100))
        cut = _cut(source, order, {"calibration": calibration, "search": total})
        return [*cut, _whole("test", test)]
    calibration = max(1, min(MAX_CALIBRATION, total // 10))
    search = calibration + max(1, (total - calibration) * 4 // 9)
    return _cut(source, order, {"calibration": calibration, "search": search, "test": total})


def _cut(source: Source, order: np.ndarray, ends: dict[str, int]) -> list[Share]:
    shares, start = [], 0
    for name, end in ends.items():
        split = cast(SplitName, name)
        shares.append(Share(split=split, source=source, indices=order[start:end]))
        start = end
    return shares


def _whole(split: SplitName, source: Source) -> Share:
    return Share(split=split, source=source, indices=np.arange(_length(source)))


def _thin(share: Share, ratio: float, rng: np.random.Generator) -> Share:
    kept = max(1, int(len(share.indices) * ratio))
    rows = np.sort(rng.permutation(len(share.indices))[:kept])
    return Share(split=share.split, source=share.source, indices=share.indices[rows])


def _shuffled(share: Share, rng: np.random.Generator) -> Share:
    return replace(share, indices=rng.permutation(share.indices))


def _length(source: Source) -> int:
    assert source.length is not None, "streams are staged before they are divided"
    return source.length


def _labelled(source: Source) -> bool:
    return source.get(0).label is not None


LabelReader = Callable[[Any], Any]
"""From what the data call a label to an int, or an array for a metric of the user's."""


def stage(
    source: Source,
    folder: Path,
    max_samples: int,
    seed: int,
    reader: Reader = PLAIN_READER,
    *,
    reads_all: bool = True,
) -> Source:
    """A stream as a source that can be read by index: at most ``max_samples``, drawn evenly.

    Reads the stream once to its end (reservoir sampling, Vitter 1985), or without ``reads_all``
    only its first samples. Raises ``DataError`` for samples of different shapes.
    """
    start = now()
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    labels: list[Any] = []
    unreadable: list[str] = []
    num_seen = 0
    for raw in source.stream():
        if not reads_all and num_seen == max_samples:
            source.notes.append(f"only the first {max_samples} samples of a stream were looked at")
            break
        num_seen += 1
        row = len(labels) if len(labels) < max_samples else int(rng.integers(num_seen))
        if row >= max_samples:
            continue
        try:
            sample = reader.read(raw)
        except UnreadableSample as error:
            num_seen -= 1
            unreadable.append(str(error))
            continue
        if not arrays:
            arrays = _create(folder, sample, max_samples)
        _store(arrays, row, sample, num_seen - 1)
        labels[row : row + 1] = [sample.label]
    if unreadable:
        source.notes.append(
            f"{len(unreadable)} samples can't be read and are left out (the first: {unreadable[0]})"
        )
    seconds = now() - start
    if num_seen > len(labels):
        source.notes.append(f"{num_seen} samples were thinned at random to {len(labels)}")

    def get(index: int) -> Sample:
        inputs = {name: np.array(array[index]) for name, array in arrays.items()}
        return Sample(inputs=inputs, label=labels[index])

    length = len(labels)
    return Source(
        length=length,
        get=get,
        stream=lambda: (get(i) for i in range(length)),
        notes=source.notes,
        is_read=True,
        seconds=seconds,
        num_unreadable=len(unreadable),
    )


@dataclass(frozen=True, kw_only=True)
class Written:
    """A split on disk, and what it took: samples left out, each with its reason, and seconds."""

    info: SplitInfo
    unreadable: tuple[str, ...]
    seconds: float


def write_split(
    share: Share,
    folder: Path,
    names: Mapping[str, str],
    reader: Reader = PLAIN_READER,
    label_of: LabelReader | None = None,
) -> Written:
    """Stream one split to ``folder/<input>.npy`` and ``folder/labels.npy``.

    ``names`` maps the data's names of inputs to the model's; ``label_of`` reads labels (by default
    as classes). Samples that can't be read are left out and reported. Raises ``DataError`` for
    samples of different shapes, NaN inputs, or labels that some samples have and some don't.
    """
    start = now()
    label_of = label_of or (lambda value: as_label(value, share.source.notes))
    total = len(share.indices)
    arrays: dict[str, np.ndarray] = {}
    labels: list[Any] = [None] * total
    unreadable: dict[int, str] = {}
    # Rows are read in the order of the source, which files like better than a random one.
    rows = np.argsort(share.indices, kind="stable")
    found = read_all(share.source, share.indices[rows], reader)
    for row, (index, raw) in zip(rows.tolist(), found, strict=True):
        if isinstance(raw, UnreadableSample):
            unreadable[row] = str(raw)
            continue
        sample = Sample(inputs=_rename(raw.inputs, names, index), label=label_of(raw.label))
        if not arrays:
            arrays = _create(folder, sample, total)
            _reserve(folder, arrays)
        _store(arrays, row, sample, index)
        labels[row] = sample.label
    kept = [row for row in range(total) if row not in unreadable]
    if not kept:
        reason = next(iter(unreadable.values()), "there are none")
        raise DataError(f"None of the {total} {share.split} samples can be read: {reason}")
    for name, array in arrays.items():
        cast(np.memmap, array).flush()
        if unreadable:
            _keep_rows(folder / f"{name}.npy", kept)
    labelled = _write_labels(folder / LABELS_FILE, [labels[row] for row in kept], share.split)
    info = SplitInfo(
        name=share.split,
        num_samples=len(kept),
        labelled=labelled,
        sha256=hash_split(folder, list(arrays)),
    )
    return Written(
        info=info,
        unreadable=tuple(unreadable[row] for row in sorted(unreadable)),
        seconds=now() - start,
    )


def _keep_rows(path: Path, rows: list[int]) -> None:
    """Take the rows of samples that were left out from an array on disk."""
    array = np.load(path, mmap_mode="r")
    draft = path.with_suffix(".draft.npy")
    kept = open_memmap(draft, mode="w+", dtype=array.dtype, shape=(len(rows), *array.shape[1:]))
    for start in range(0, len(rows), 256):
        kept[start : start + 256] = array[rows[start : start + 256]]
    kept.flush()
    draft.replace(path)


def _write_labels(path: Path, labels: list[Any], split: str) -> bool:
    """Write the labels when there are any; ``DataError`` when only some samples have one."""
    path.unlink(missing_ok=True)
    num_missing = sum(label is None for label in labels)
    if num_missing == len(labels):
        return False
    if num_missing:
        raise DataError(
            f"{num_missing} of the {len(labels)} samples of {split!r} have no label and the others "
            "have one; label all or none."
        )
    np.save(path, _stack(labels, split))
    return True


def _stack(labels: list[Any], split: str) -> np.ndarray:
    """Classes as int64 (samples,), targets in the kind they have (samples, ...)."""
    if all(isinstance(label, int) for label in labels):
        return np.asarray(labels, dtype=np.int64)
    shapes = {np.shape(label) for label in labels}
    if len(shapes) > 1:
        some = " and ".join(str(shape) for shape in sorted(shapes)[:2])
        raise DataError(
            f"The targets of the {split} samples have different shapes ({some}); pad them to one."
        )
    return np.stack(labels)


def open_split(info: SplitInfo, folder: Path, names: Sequence[str]) -> Split:
    """The split as memory maps; ``DataError`` when files are gone or sizes differ."""
    try:
        inputs = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
        labels = np.load(folder / LABELS_FILE) if info.labelled else None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"The split {info.name!r} in {str(folder)!r} can't be read ({error}); acquire it again."
        ) from None
    arrays = [*inputs.values(), *([] if labels is None else [labels])]
    if any(len(array) != info.num_samples for array in arrays):
        raise DataError(
            f"The split {info.name!r} in {str(folder)!r} has not the {info.num_samples} samples "
            "of its record; acquire it again."
        )
    return Split(info=info, inputs=inputs, labels=labels)


def hash_split(folder: Path, names: Sequence[str]) -> str:
    """SHA-256 over the bytes of the inputs in order, then of the labels."""
    digest = hashlib.sha256()
    for name in names:
        array = np.load(folder / f"{name}.npy", mmap_mode="r")
        rows = max(1, _CHUNK_BYTES // max(1, array.nbytes // max(1, len(array))))
        for start in range(0, len(array), rows):
            digest.update(np.ascontiguousarray(array[start : start + rows]).tobytes())
    if (folder / LABELS_FILE).exists():
        digest.update(np.load(folder / LABELS_FILE).tobytes())
    return digest.hexdigest()


def count_duplicates(first: Split, second: Split) -> int:
    """Samples of ``second`` whose inputs are, byte for byte, also in ``first``."""
    known = set(_fingerprints(first))
    return sum(print_ in known for print_ in _fingerprints(second))


def check_labels(split: Split, num_classes: int) -> None:
    """``DataError`` for labels the model can't give, or (but in calibration) of a single class."""
    if split.labels is None:
        raise DataError(
            f"The {split.info.name} samples have no labels; give them, or compare with the "
            "original's own answers by --metric agreement."
        )
    if split.labels.ndim != 1:
        raise DataError(f"The labels have the shape {split.labels.shape}; accuracy needs classes.")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"The {split.info.name} labels range from {low} to {high}, but the model has "
            f"{num_classes} classes (0 to {num_classes - 1}); {_remedy(low, high, num_classes)}."
        )
    if low == high and split.info.name != "calibration":
        raise DataError(
            f"All {split.info.num_samples} {split.info.name} samples are of class {low}; an "
            "accuracy on one class says nothing. Give samples of several classes."
        )


def _remedy(low: int, high: int, num_classes: int) -> str:
    if (low, high) == (1, num_classes):
        return "they are numbered from 1, so subtract 1"
    if low == -1:
        return "-1 often stands for an unknown label, so leave these samples out"
    return "map the labels or check the model"


def _fingerprints(split: Split) -> Iterable[bytes]:
    for row in range(split.info.num_samples):
        digest = hashlib.blake2b(digest_size=16)
        for array in split.inputs.values():
            digest.update(np.ascontiguousarray(array[row]).tobytes())
        yield digest.digest()


def _create(folder: Path, sample: Sample, num_samples: int) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for name, value in sample.inputs.items():
        shape = (num_samples, *value.shape)
        path = folder / f"{name or 'input'}.npy"
        arrays[name] = open_memmap(
            path, mode="w+", dtype=value.dtype.newbyteorder("="), shape=shape
        )
    return arrays


def _reserve(folder: Path, names: Iterable[str]) -> None:
    """Take the space at once: a disk that fills up under a memory map kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    for name in names:
        with (folder / f"{name}.npy").open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _store(arrays: dict[str, np.ndarray], row: int, sample: Sample, index: int) -> None:
    if sample.inputs.keys() != arrays.keys():
        raise DataError(
            f"Sample {index} has the inputs {sorted(sample.inputs)} and earlier ones "
            f"{sorted(arrays)}; give every sample the same."
        )
    for name, value in sample.inputs.items():
        array = arrays[name]
        if value.shape != array.shape[1:]:
            raise DataError(
                f"Sample {index} has the shape {value.shape} and an earlier one {array.shape[1:]}; "
                "bring all samples to one shape."
            )
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise DataError(f"The input of sample {index} has NaN values; remove or repair it.")
        if value.dtype != array.dtype and not np.can_cast(value.dtype, array.dtype, "same_kind"):
            raise DataError(
                f"Sample {index} is {value.dtype} and an earlier one {array.dtype}; give one kind."
            )
        array[row] = value


def _rename(
    inputs: dict[str, np.ndarray], names: Mapping[str, str], index: int
) -> dict[str, np.ndarray]:
    unknown = [name for name in inputs if name not in names]
    if unknown:
        raise DataError(
            f"Sample {index} has the inputs {sorted(inputs)} and the first one {sorted(names)}; "
            "give every sample the same."
        )
    return {names[name]: value for name, value in inputs.items()}
