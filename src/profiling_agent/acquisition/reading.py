"""From samples as their source has them to numeric arrays: images decoded, texts tokenized.

Decoding runs in several threads (Pillow gives up the interpreter's lock) ahead of whoever writes;
a sample that can't be read comes back as its error, so that one damaged file doesn't end a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.acquisition.data import Sample, Source, UnreadableSample, as_array, short
from profiling_agent.acquisition.hubs.found import Tokenizer
from profiling_agent.acquisition.images import load_image
from profiling_agent.errors import DataError
from profiling_agent.machine.threads import default_threads
from profiling_agent.records.workload import ImageTransform

PLAIN_IMAGE = ImageTransform(source="as it is")
MAX_COUNTED = 2_000
LENGTH_STEP = 8
AHEAD = 4
"""Samples in work for each worker."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns a sample's inputs into arrays; notes collect what a user should know.

    ``image`` None leaves images in their own size. ``resizes_arrays`` applies ``image`` to arrays
    of bytes too, unless they already have its size.
    """

    image: ImageTransform | None = None
    resizes_arrays: bool = False
    tokenizer: Tokenizer | None = None
    length: int = 0
    notes: list[str] = field(default_factory=list)

    def read(self, sample: Sample) -> Sample:
        """The sample with numeric inputs; ``DataError`` when it has none."""
        inputs: dict[str, np.ndarray] = {}
        for name, value in sample.inputs.items():
            if is_text(value) and self.tokenizer is not None:
                inputs.update(self.tokenizer.encode(value, self.length))
                continue
            array = self._read(value)
            if array is not None:
                inputs[name] = array
            elif len(sample.inputs) == 1:
                raise DataError(_refusal(value))
            else:
                self._note(f"the data's entry {name!r} is not numeric and was left out")
        if not inputs:
            raise DataError(
                f"A sample has no numeric input (its entries: {sorted(sample.inputs)})."
            )
        return Sample(inputs=inputs, label=sample.label)

    def _read(self, value: Any) -> np.ndarray | None:
        if is_image(value):
            return load_image(value, self.image or PLAIN_IMAGE)
        array = as_array(value)
        if array is not None and self.resizes_arrays and self._is_other_size(array):
            assert self.image is not None
            return load_image(array, self.image)
        return array

    def _is_other_size(self, array: np.ndarray) -> bool:
        size = output_size(self.image)
        is_image = array.dtype == np.uint8 and (
            array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
        )
        return is_image and size is not None and array.shape[:2] != size

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def is_text(value: Any) -> bool:
    """A text, or a pair of them."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    return isinstance(value, str) or (is_pair and all(isinstance(each, str) for each in value))


def is_image(value: Any) -> bool:
    """An image that is yet to be decoded: a path, bytes, or Pillow's own."""
    return isinstance(value, Path | bytes) or (
        hasattr(value, "convert") and hasattr(value, "getbands")
    )


def output_size(transform: ImageTransform | None) -> tuple[int, int] | None:
    """(height, width) that every image has after a transform; None when that depends on it."""
    if transform is None:
        return None
    return transform.crop or (transform.resize if isinstance(transform.resize, tuple) else None)


def settle_length(
    tokenizer: Tokenizer, sources: Sequence[Source], max_length: int | None
) -> tuple[int, str]:
    """Tokens of every sample, so that all have one shape: the longest text's, in steps of eight.

    At most the model's own limit or ``max_length``; also in words, from 2,000 texts at most.
    """
    limit = min(tokenizer.limit, max_length) if max_length else tokenizer.max_length
    share = MAX_COUNTED // max(1, len(sources))
    counts = [
        tokenizer.count(value)
        for source in sources
        if source.length
        for index in np.linspace(0, source.length - 1, min(share, source.length), dtype=int)
        for value in source.get(int(index)).inputs.values()
        if is_text(value)
    ]
    longest = max(counts, default=limit)
    length = min(limit, -(-longest // LENGTH_STEP) * LENGTH_STEP)
    words = f"texts are padded to {length} tokens"
    cut = sum(count > length for count in counts)
    if cut:
        words += f"; {cut / len(counts):.1%} of them are longer and are cut (--max-length)"
    return length, words


def read_all(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    reader: Reader,
    num_workers: int | None = None,
) -> Iterator[tuple[int, Sample | UnreadableSample]]:
    """Read samples in the order of ``indices``, each with its index; damaged ones as their error.

    Sources that are not safe for threads (the user's own code) are read one after another.
    """

    def read(index: int) -> Sample | UnreadableSample:
        try:
            return reader.read(source.get(index))
        except UnreadableSample as error:
            return error

    workers = (num_workers or default_threads()) if source.is_threadsafe else 0
    if workers == 0:
        for index in indices:
            yield int(index), read(int(index))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="reader") as pool:
        pending: deque[tuple[int, Future[Sample | UnreadableSample]]] = deque()
        try:
            for index in indices:
                pending.append((int(index), pool.submit(read, int(index))))
                if len(pending) >= AHEAD * workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()


def with_overrides(
    transform: ImageTransform | None, changes: Mapping[str, Any]
) -> ImageTransform | None:
    """A transform with what the user asked for; made from nothing when there was none."""
    wanted = {key: value for key, value in changes.items() if value is not None}
    if not wanted:
        return transform
    base = transform or ImageTransform()
    source = f"{base.source}, changed by the user" if transform else "asked for by the user"
    return base.model_copy(update={**wanted, "source": source})


def _refusal(value: Any) -> str:
    if is_text(value):
        return (
            f"A sample's input is the text {short(value)}, and the model brings no tokenizer; give "
            "a model by 'hf:NAME', or tokenize in the data's factory."
        )
    return (
        f"A sample's input is {short(value)}, which is not numeric; give arrays, tensors or images."
    )
