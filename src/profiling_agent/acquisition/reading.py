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
STREAM_LENGTH = 128
AHEAD = 4
"""Samples in work for each worker."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns a sample's inputs into arrays; notes collect what a user should know.

    ``image`` None leaves images in their own size. ``transforms_arrays`` applies ``image`` to
    arrays of bytes too; of those that have its size already only the channels are changed.
    """

    image: ImageTransform | None = None
    transforms_arrays: bool = False
    tokenizer: Tokenizer | None = None
    length: int = 0
    notes: list[str] = field(default_factory=list)
    applied: list[ImageTransform] = field(default_factory=list)

    def read(self, sample: Sample) -> Sample:
        """The sample with numeric inputs; ``DataError`` when it has none."""
        texts = [name for name, value in sample.inputs.items() if is_text(value)]
        if texts and self.tokenizer is not None:
            return self._tokenize(self.tokenizer, sample, texts)
        inputs: dict[str, np.ndarray] = {}
        for name, value in sample.inputs.items():
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

    def _tokenize(self, tokenizer: Tokenizer, sample: Sample, names: list[str]) -> Sample:
        """One text, or two as a pair in their order; what else the sample has is left out."""
        values = [sample.inputs[name] for name in names]
        if len(values) > 2 or (len(values) == 2 and not all(isinstance(v, str) for v in values)):
            raise DataError(
                f"A sample has {len(values)} texts ({', '.join(map(repr, names))}); give one, or "
                "two that make a pair."
            )
        for name in sample.inputs:
            if name not in names:
                self._note(f"the data's entry {name!r} stands beside a text and was left out")
        text = values[0] if len(values) == 1 else (values[0], values[1])
        return Sample(inputs=tokenizer.encode(text, self.length), label=sample.label)

    def _read(self, value: Any) -> np.ndarray | None:
        if is_image(value):
            return self._load(value, self.image or PLAIN_IMAGE)
        array = as_array(value)
        if array is None or self.image is None or not self.transforms_arrays:
            return array
        if not _is_picture(array):
            return array
        if array.shape[:2] != output_size(self.image):
            return self._load(array, self.image)
        has_channels = array.ndim == 3 and array.shape[-1] > 1
        if self.image.mode == "BGR" or has_channels == (self.image.mode == "L"):
            only_channels = ImageTransform(mode=self.image.mode, source=self.image.source)
            return self._load(array, only_channels)
        return array

    def _load(self, value: Any, transform: ImageTransform) -> np.ndarray:
        if transform not in self.applied:
            self.applied.append(transform)
        return load_image(value, transform)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _is_picture(array: np.ndarray) -> bool:
    """Bytes (height, width) or (height, width, 1, 3 or 4)."""
    return array.dtype == np.uint8 and (
        array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    )


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
        tokenizer.count(text)
        for source in sources
        if source.length
        for index in np.linspace(0, source.length - 1, min(share, source.length), dtype=int)
        for text in _texts_of(source, int(index))
    ]
    if not counts:  # streams are read once, so nothing can be counted beforehand
        length = min(limit, max_length or STREAM_LENGTH)
        return length, f"texts are padded or cut to {length} tokens (--max-length)"
    longest = max(counts)
    length = min(limit, -(-longest // LENGTH_STEP) * LENGTH_STEP)
    words = f"texts are padded to {length} tokens"
    cut = sum(count > length for count in counts)
    if cut:
        words += f"; {cut / len(counts):.1%} of them are longer and are cut (--max-length)"
    return length, words


def _texts_of(source: Source, index: int) -> list[str | tuple[str, str]]:
    """The text of a sample, or the pair of its two; empty when it can't be read."""
    try:
        texts = [value for value in source.get(index).inputs.values() if is_text(value)]
    except UnreadableSample:
        return []
    return [(texts[0], texts[1])] if len(texts) == 2 else texts


def read_one(source: Source, index: int, reader: Reader) -> Sample:
    """One sample with numeric inputs; ``UnreadableSample`` or ``DataError`` when it has none."""
    sample = source.get(index)
    return sample if source.is_read else reader.read(sample)


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
            return read_one(source, index, reader)
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


def with_overrides(transform: ImageTransform, changes: Mapping[str, Any]) -> ImageTransform:
    """A transform with what the user asked for in place of what it says itself."""
    wanted = {key: value for key, value in changes.items() if value is not None}
    stated = transform.source
    source = f"{stated}, changed by the user" if stated else "asked for by the user"
    return transform.model_copy(update={**wanted, "source": source})


def _refusal(value: Any) -> str:
    if is_text(value):
        return (
            f"A sample's input is the text {short(value)}, and the model brings no tokenizer; give "
            "a model by 'hf:NAME', or tokenize in the data's factory."
        )
    return (
        f"A sample's input is {short(value)}, which is not numeric; give arrays, tensors or images."
    )
