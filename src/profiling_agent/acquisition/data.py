"""Samples that can be read one at a time, whatever form the data have.

Every format becomes ``Source``: nothing is held in memory that wasn't already, and nothing is
unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

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


class UnreadableSample(DataError):
    """One sample that can't be read, such as a damaged image; a few of them are left out."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as its source has it.

    ``inputs`` by name: numeric arrays, or what is yet to be read: a PIL image, a file's path or
    bytes, a text or a pair of texts. ``label`` is a class, a target of the user's metric, or None.
    """

    inputs: dict[str, Any]
    label: Any


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples: ``get`` by index when ``length`` is known, otherwise one pass of ``stream``.

    ``is_read`` says that images are decoded and texts tokenized already, which took ``seconds``.
    """

    length: int | None
    get: Callable[[int], Sample]
    stream: Callable[[], Iterator[Sample]]
    notes: list[str] = field(default_factory=list)
    is_threadsafe: bool = False
    is_read: bool = False
    seconds: float = 0.0
    num_unreadable: int = 0


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
        label = None if labels is None else labels[index]
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
        raise DataError(f"The label {short(value)} is not an integer; map classes to 0, 1, 2, ...")
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


def as_target(value: Any) -> np.ndarray | None:
    """What a metric of the user's own gets for one sample: numbers of any shape."""
    if value is None:
        return None
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iufb":
        raise DataError(
            f"The target {short(value)} is not numeric; give numbers, padded to one shape."
        )
    return array


def _is_distribution(array: np.ndarray) -> bool:
    """One-hot or soft labels; a batch of labels is not to be taken for them."""
    return bool(array.min() >= 0 and array.max() <= 1 and abs(float(array.sum()) - 1) < 1e-3)


def as_array(value: Any) -> np.ndarray | None:
    """A raw input as a numeric array; None when it isn't numeric (a text, a path)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float().numpy() if value.is_floating_point() else value.numpy()
    if hasattr(value, "convert") and hasattr(value, "getbands"):
        return image_array(value)
    try:
        array = np.asarray(value)
    except ValueError:  # ragged lists
        return None
    if array.dtype.kind not in "iufb":
        return None
    if array.dtype.kind == "f" and array.dtype != np.float32:
        array = array.astype(np.float32)
    return array


def image_array(image: Any) -> np.ndarray:
    """A PIL image as bytes, (height, width) when grey and (height, width, 3) otherwise."""
    grey = image.mode in ("1", "L", "LA")
    return np.asarray(image.convert("L" if grey else "RGB"))


def short(value: Any) -> str:
    """A value for a message: its repr, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(value: Any) -> Any:
    """Numbers, strings or tuples of numbers, from arrays, tensors or lists."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "US":
        return str(array.reshape(-1)[0]) if array.size else ""
    return array.item() if array.ndim == 0 else tuple(float(each) for each in array.reshape(-1))
