"""Whatever the user calls data, as samples that can be read one at a time.

Arrays, ``.npz`` files, datasets, loaders, sequences and plain iterables all become ``Source``:
nothing is held in memory that wasn't already, and nothing is unpickled.
"""

from __future__ import annotations

import copy
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from profiling_agent.acquisition.factories import build_data
from profiling_agent.errors import DataError

UNNAMED = ""  # the one input of samples given as (x, y); acquisition names it after forward's

LABEL_KEYS = ("label", "labels", "y", "target", "targets")
INPUT_KEYS = ("x", "images", "image", "data", "inputs")
PART_NAMES = {
    "calibration": "calibration",
    "calib": "calibration",
    "search": "search",
    "val": "search",
    "valid": "search",
    "validation": "search",
    "test": "test",
    "train": "train",
}
ONE_HOT_NOTE = "labels were given as one value per class; the largest is taken as the class"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample: raw inputs by name, and its class when it has one."""

    inputs: dict[str, np.ndarray]
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples: ``get`` by index when ``length`` is known, otherwise one pass of ``stream``."""

    length: int | None
    get: Callable[[int], Sample]
    stream: Callable[[], Iterator[Sample]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What one data reference gave.

    ``parts`` has the key ``all`` for data without parts, else some of ``calibration``, ``search``,
    ``test``, ``train``. ``preprocessing`` has some of the keys mean, std, scale, layout.
    """

    parts: dict[str, Source]
    preprocessing: dict[str, Any]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_data(data: object, staging: Path) -> Bundle:
    """Understand a reference (``.npz``, ``path/file.py:factory``) or live data.

    ``staging`` is a folder for arrays unpacked on the way. Raises ``DataError``.
    """
    if isinstance(data, Path):
        data = str(data)
    if not isinstance(data, str):
        return _from_object(data, data)
    if data.endswith(".npz"):
        return open_npz(Path(data).expanduser(), staging)
    made, factory = build_data(data)
    return _from_object(made, factory)


def open_npz(path: Path, staging: Path) -> Bundle:
    """Arrays of an ``.npz`` file, unpacked to ``staging`` and memory-mapped."""
    if not path.is_file():
        raise DataError(f"The data {str(path)!r} don't exist; check the path after --data.")
    arrays = _unpack(path, staging)
    settings = {key: arrays.pop(key) for key in ("mean", "std", "scale", "layout") if key in arrays}
    class_names = arrays.pop("class_names", None)
    groups: dict[str, dict[str, np.ndarray]] = {}
    unknown: list[str] = []
    for key, array in arrays.items():
        place = _npz_place(key)
        if place is None:
            unknown.append(key)
        else:
            groups.setdefault(place[0], {})[place[1]] = array
    _add_named_inputs(groups, {key: arrays[key] for key in unknown})
    parts = {
        part: array_source(_inputs_of(group), group.get("y"))
        for part, group in groups.items()
        if _inputs_of(group)
    }
    if not parts:
        raise DataError(
            f"{str(path)!r} has the arrays {sorted(arrays)}; it needs x and y, or x_calibration, "
            "y_calibration, x_search, y_search, x_test, y_test."
        )
    return Bundle(
        parts=parts,
        preprocessing={key: _plain(value) for key, value in settings.items()},
        class_names=() if class_names is None else tuple(str(name) for name in class_names),
    )


def array_source(inputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> Source:
    """Samples along the first axis of arrays; ``DataError`` when the lengths differ."""
    lengths = {name or "x": len(array) for name, array in inputs.items()}
    if labels is not None:
        lengths["labels"] = len(labels)
    if len(set(lengths.values())) != 1:
        words = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"The arrays have different numbers of samples ({words}); align them.")
    notes: list[str] = []

    def get(index: int) -> Sample:
        label = None if labels is None else as_label(labels[index], notes)
        return Sample(inputs={k: np.array(v[index]) for k, v in inputs.items()}, label=label)

    length = next(iter(lengths.values()))
    return Source(
        length=length, get=get, stream=lambda: (get(i) for i in range(length)), notes=notes
    )


def as_label(value: Any, notes: list[str]) -> int | None:
    """The class of one sample; ``(1,)`` is squeezed, one value per class becomes its argmax."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "iufb":
        raise DataError(f"The label {_short(value)} is not an integer; map classes to 0, 1, 2, ...")
    if array.ndim == 1 and array.size > 1 and _is_distribution(array):
        if ONE_HOT_NOTE not in notes:
            notes.append(ONE_HOT_NOTE)
        return int(array.argmax())
    if array.size != 1:
        raise DataError(
            f"A label has the shape {array.shape}; give one integer per sample, and samples one by "
            "one or by a DataLoader."
        )
    if array.dtype.kind == "f":
        raise DataError(
            f"The label {float(array.reshape(()))!r} is a float; labels must be integers."
        )
    return int(array.reshape(()))


def _is_distribution(array: np.ndarray) -> bool:
    """One-hot or soft labels; a batch of labels is not to be taken for them."""
    return bool(array.min() >= 0 and array.max() <= 1 and abs(float(array.sum()) - 1) < 1e-3)


def as_array(value: Any) -> np.ndarray | None:
    """A raw input as a numeric array; None when it isn't numeric (a text, a path)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float().numpy() if value.is_floating_point() else value.numpy()
    if hasattr(value, "convert") and hasattr(value, "getbands"):
        return _image_array(value)
    try:
        array = np.asarray(value)
    except ValueError:  # ragged lists
        return None
    if array.dtype.kind not in "iufb":
        return None
    if array.dtype.kind == "f" and array.dtype != np.float32:
        array = array.astype(np.float32)
    return array


def _image_array(image: Any) -> np.ndarray:
    """A PIL image as bytes, (height, width) when grey and (height, width, 3) otherwise."""
    grey = image.mode in ("1", "L", "LA")
    return np.asarray(image.convert("L" if grey else "RGB"))


def _from_object(data: object, factory: object) -> Bundle:
    """Live data; attributes are looked up on it, its parts, their datasets, and what made it."""
    named = _by_part(data)
    parts = {"all": data} if named is None else named
    owners = (data, *(parts.values() if named is not None else ()), factory)
    holders = [h for owner in owners for h in (owner, getattr(owner, "dataset", None))]
    found = [value for h in holders if (value := _stated(h, "preprocessing")) is not None]
    stated: Any = found[0] if found else {}
    if any(value != stated for value in found[1:]):
        raise DataError(
            f"The parts of the data state different preprocessing ({stated} and "
            f"{next(value for value in found if value != stated)}); one must hold for all."
        )
    if not isinstance(stated, Mapping) and hasattr(stated, "model_dump"):
        stated = cast(Any, stated).model_dump()
    if not isinstance(stated, Mapping):
        raise DataError("'preprocessing' of the data must be a dict of mean, std, scale, layout.")
    names = next(
        (
            value
            for holder in holders
            for value in (_stated(holder, "class_names"), _stated(holder, "classes"))
            if isinstance(value, list | tuple)
        ),
        (),
    )
    return Bundle(
        parts={part: _source(each) for part, each in parts.items()},
        preprocessing={str(key): _plain(value) for key, value in stated.items()},
        class_names=tuple(str(name) for name in names),
    )


def _stated(holder: object, name: str) -> Any:
    # Not on dicts: a key of that name would be a sample's or a part's.
    return None if isinstance(holder, dict) else getattr(holder, name, None)


def _by_part(data: object) -> dict[str, Any] | None:
    """The parts of a dict such as {"search": ..., "test": ...}; None for anything else."""
    if not isinstance(data, Mapping) or not data:
        return None
    if not all(isinstance(key, str) and key in PART_NAMES for key in data):
        return None
    return {PART_NAMES[str(key)]: value for key, value in data.items()}


def _source(data: Any) -> Source:
    if _is_array_pair(data):
        return array_source({UNNAMED: _numeric(data[0])}, _numeric_labels(data[1]))
    if isinstance(data, Mapping) and data and all(_is_array(value) for value in data.values()):
        inputs = {str(k): _numeric(v) for k, v in data.items() if str(k) not in LABEL_KEYS}
        labels = [v for k, v in data.items() if str(k) in LABEL_KEYS]
        return array_source(inputs, _numeric_labels(labels[0]) if labels else None)
    if _is_array(data):
        return array_source({UNNAMED: _numeric(data)}, None)
    if isinstance(data, str | bytes | Mapping) or data is None:
        raise DataError(
            f"The data are a {type(data).__name__!r}; give a Dataset, a DataLoader, or a sequence "
            "of (x, y) or of dicts."
        )
    if isinstance(data, DataLoader):
        is_batched = data.batch_sampler is not None
        return _stream_source(lambda: _loader_samples(data), is_batched=is_batched)
    if isinstance(data, Sized) and hasattr(data, "__getitem__"):
        return _sequence_source(cast(Any, data))
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise DataError(
            f"A {type(data).__name__!r} can't be read as data; give a Dataset, a DataLoader, or a "
            "sequence of (x, y) or of dicts."
        )
    return _stream_source(lambda: iter(cast(Any, data)))


def _sequence_source(data: Sequence[Any]) -> Source:
    notes: list[str] = []

    def get(index: int) -> Sample:
        try:
            item = data[index]
        except Exception as error:  # the user's code may raise anything
            raise DataError(
                f"Reading sample {index} raised {type(error).__name__}: {error}."
            ) from error
        return as_sample(item, notes)

    try:
        length = len(data)
    except TypeError as error:  # a loader over a stream has no length
        raise DataError(f"The data's length is unknown ({error}); give an iterable.") from None
    return Source(
        length=length, get=get, stream=lambda: (get(i) for i in range(length)), notes=notes
    )


def _stream_source(items: Callable[[], Iterator[Any]], *, is_batched: bool | None = None) -> Source:
    """``is_batched`` None: batches are told from samples by their labels."""
    notes: list[str] = []

    def stream() -> Iterator[Sample]:
        position = 0
        try:
            iterator = items()
            while True:
                item = next(iterator)
                for each in _unbatch(item, is_batched):
                    yield as_sample(each, notes)
                position += 1
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise DataError(
                f"Reading item {position} of the data raised {type(error).__name__}: {error}."
            ) from error

    def get(index: int) -> Sample:
        raise AssertionError(f"sample {index} of a stream that was not staged")

    return Source(length=None, get=get, stream=stream, notes=notes)


def _loader_samples(loader: DataLoader[Any]) -> Iterator[Any]:
    # Worker processes are forked, and a fork after a torch operation can hang.
    single = copy.copy(loader)
    single.num_workers = 0
    single.timeout = 0
    return iter(single)


def _unbatch(item: Any, is_batched: bool | None) -> Iterator[Any]:
    """The samples of a batch, or the item itself when it is one sample."""
    values, labels = _parse(item)
    first = next(iter(values.values()))
    if not (_is_batch(first, labels) if is_batched is None else is_batched):
        yield item
        return
    for row in range(len(first)):
        label = None if labels is None else labels[row]
        yield {name: value[row] for name, value in values.items()}, label


def _is_batch(first: Any, labels: Any) -> bool:
    if not _is_array(first):
        return False
    if not _is_array(labels):  # the usual batch of images can be told without labels
        return labels is None and first.ndim >= 4
    if np.asarray(labels).dtype.kind not in "iu" or len(labels) != len(first):
        return False
    return len(labels) > 1 or first.ndim >= 4


def as_sample(item: Any, notes: list[str]) -> Sample:
    """One sample from (x, y), a dict, or a bare x; ``DataError`` for anything else."""
    values, label = _parse(item)
    inputs: dict[str, np.ndarray] = {}
    for name, value in values.items():
        array = as_array(value)
        if array is not None:
            inputs[name] = array
            continue
        if len(values) == 1:
            raise DataError(
                f"A sample's input is {_short(value)}, which is not numeric; give arrays, tensors "
                "or PIL images."
            )
        note = f"the data's entry {name!r} is not numeric and was left out"
        if note not in notes:
            notes.append(note)
    if not inputs:
        raise DataError(f"A sample has no numeric input (its entries: {sorted(values)}).")
    return Sample(inputs=inputs, label=as_label(label, notes))


def _parse(item: Any) -> tuple[dict[str, Any], Any]:
    if isinstance(item, Mapping):
        labels = [key for key in item if str(key) in LABEL_KEYS]
        inputs = {str(key): value for key, value in item.items() if key not in labels}
        if not inputs:
            raise DataError(f"A sample has the entries {sorted(map(str, item))} and no input.")
        return inputs, item[labels[0]] if labels else None
    if isinstance(item, tuple | list):
        if len(item) == 1:
            return {UNNAMED: item[0]}, None
        if len(item) != 2:
            raise DataError(
                f"A sample is a {type(item).__name__} of {len(item)} things; give (x, y) or a dict."
            )
        if isinstance(item[0], Mapping):
            return {str(key): value for key, value in item[0].items()}, item[1]
        return {UNNAMED: item[0]}, item[1]
    return {UNNAMED: item}, None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor) and value.ndim >= 1


def _is_array_pair(data: Any) -> bool:
    return (
        isinstance(data, tuple)
        and len(data) == 2
        and all(_is_array(each) for each in data)
        and data[0].ndim >= 2
    )


def _numeric(value: Any) -> np.ndarray:
    array = as_array(value)
    if array is None:
        raise DataError(f"An input array holds {np.asarray(value).dtype}; it must be numeric.")
    return array


def _numeric_labels(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _plain(value: Any) -> Any:
    """Numbers, strings or tuples of numbers, from arrays, tensors or lists."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "US":
        return str(array.reshape(-1)[0]) if array.size else ""
    return array.item() if array.ndim == 0 else tuple(float(each) for each in array.reshape(-1))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unpack(path: Path, staging: Path) -> dict[str, np.ndarray]:
    staging = staging / path.stem
    staging.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            for position, name in enumerate(names):
                target = staging / f"{position}.npy"
                with archive.open(name) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file)
                arrays[name.removesuffix(".npy")] = _map_array(target, name, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(path)!r} is damaged or no .npz file ({error}).") from None
    return arrays


def _map_array(target: Path, name: str, path: Path) -> np.ndarray:
    with target.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            f"The array {name.removesuffix('.npy')!r} of {str(path)!r} holds Python objects, which "
            "would have to be unpickled; save numbers of one shape."
        )
    # Arrays without elements and scalars can't be mapped.
    small = 0 in shape or not shape
    return np.load(target, mmap_mode=None if small else "r", allow_pickle=False)


def _npz_place(key: str) -> tuple[str, str] | None:
    """The part and the role (x or y) that an array's name tells."""
    name = key.lower()
    for role, words in (("x", INPUT_KEYS), ("y", LABEL_KEYS)):
        if name in words:
            return "all", role
        for part, meant in PART_NAMES.items():
            if any(name in (f"{word}_{part}", f"{part}_{word}") for word in words):
                return meant, role
    return None


def _inputs_of(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {UNNAMED if name == "x" else name: array for name, array in group.items() if name != "y"}


def _add_named_inputs(
    groups: dict[str, dict[str, np.ndarray]], others: dict[str, np.ndarray]
) -> None:
    """Without an ``x``, arrays as long as the labels are inputs by their own names."""
    plain = groups.get("all")
    if plain is None or "x" in plain or "y" not in plain:
        return
    plain.update({key: v for key, v in others.items() if v.ndim and len(v) == len(plain["y"])})
