"""Live data: datasets, loaders, arrays, sequences and plain iterables of the user's own making."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from profiling_agent.acquisition.data import (
    LABEL_KEYS,
    PART_NAMES,
    UNNAMED,
    Bundle,
    Sample,
    Source,
    UnreadableSample,
    array_source,
    as_array,
    plain,
)
from profiling_agent.errors import DataError


def open_object(data: object, factory: object) -> Bundle:
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
        preprocessing={str(key): plain(value) for key, value in stated.items()},
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
        except UnreadableSample:
            raise
        except Exception as error:  # the user's code may raise anything
            raise DataError(
                f"Reading sample {index} raised {type(error).__name__}: {error}."
            ) from error
        return as_sample(item)

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
                    yield as_sample(each)
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


def as_sample(item: Any) -> Sample:
    """One sample from (x, y), a dict, or a bare x; ``DataError`` for anything else."""
    values, label = _parse(item)
    return Sample(inputs=values, label=label)


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
