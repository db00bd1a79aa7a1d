"""How the samples are read: the one reader that holds for this model and these data.

Images get the transform that the model states, the user's flags changing it; without one they stay
as they are where forward takes them, else they get the size that probing finds. Texts get the
model's tokenizer and one length.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from profiling_agent.acquisition.data import Bundle, Sample, UnreadableSample
from profiling_agent.acquisition.hubs.found import FoundModel
from profiling_agent.acquisition.inputs import (
    Resolved,
    Suggest,
    resolve_from_data,
    resolve_without_data,
)
from profiling_agent.acquisition.metrics import wants_classes
from profiling_agent.acquisition.reading import (
    Reader,
    is_image,
    is_text,
    output_size,
    settle_length,
    with_overrides,
)
from profiling_agent.errors import DataError, ModelError
from profiling_agent.records.workload import ImageMode, ImageTransform, Overrides, WorkloadSource

NUM_LOOKED_AT = 8
TRANSFORM_KEYS = ("mode", "resize", "crop", "interpolation")


def choose_reader(
    model: FoundModel, source: WorkloadSource, bundle: Bundle, suggest: Suggest | None = None
) -> tuple[Reader, list[str]]:
    """The reader of these data for this model, and what a user should know of the choice."""
    notes: list[str] = []
    first = _first_input(bundle)
    length = 0
    if model.tokenizer is not None and (first is None or _has_text(bundle)):
        parts = list(bundle.parts.values())
        length, words = settle_length(model.tokenizer, parts, source.max_length)
        notes.append(words)
    overrides = source.overrides
    changes = {key: getattr(overrides, key) for key in TRANSFORM_KEYS}
    transform = None if bundle.preprocessing else model.image
    sized = overrides.resize is not None or overrides.crop is not None
    if transform is None and first is not None and is_image(first) and not sized:
        transform, found = _own_transform(model, source, bundle, suggest)
        notes += found
    if any(value is not None for value in changes.values()):
        base = transform or ImageTransform(mode=_mode_for(model.module, bundle), source="")
        transform = with_overrides(base, changes)
    chosen = Reader(
        image=transform,
        transforms_arrays=transform is not None,
        tokenizer=model.tokenizer,
        length=length,
    )
    return chosen, notes


def check_transform_flags(
    overrides: Overrides, first: Mapping[str, np.ndarray], reader: Reader
) -> None:
    """``DataError`` when the user asked for what can't be done to these data."""
    asked = [key for key in TRANSFORM_KEYS if getattr(overrides, key) is not None]
    if not asked or reader.applied:
        return
    array = next(iter(first.values()))
    size = output_size(reader.image)
    if array.dtype == np.uint8 and array.ndim >= 2 and array.shape[:2] == size:
        return  # they have what was asked for
    flags = " and ".join(f"--{key}" for key in asked)
    raise DataError(
        f"{flags} can't be applied: it acts on image files and on bytes (height, width, "
        f"channels), and these samples are {array.dtype} {array.shape}. Leave it away, or do "
        "it where the data are made."
    )


def likely_shape(transform: ImageTransform | None) -> tuple[int, ...] | None:
    """The shape (channels, height, width) of what the transform gives, where it states a size."""
    size = output_size(transform)
    if transform is None or size is None:
        return None
    return (1 if transform.mode == "L" else 3, *size)


def stated_normalisation(
    model: FoundModel, source: WorkloadSource, bundle: Bundle
) -> dict[str, Any]:
    """The normalisation that holds: the user's, else the data's, else the model's."""
    overrides = source.overrides
    asked = {
        key: value
        for key in ("mean", "std", "scale")
        if (value := getattr(overrides, key)) is not None
    }
    stated = dict(bundle.preprocessing or model.normalisation)
    if not asked:
        return stated
    return {**stated, **asked, "source": "asked for by the user"}


def with_transform(resolved: Resolved, reader: Reader) -> Resolved:
    """The record of the transform that images really went through."""
    if not reader.applied or resolved.preprocessing.layout == "none":
        return resolved
    preprocessing = resolved.preprocessing.model_copy(update={"image": reader.applied[0]})
    return replace(resolved, preprocessing=preprocessing)


def _own_transform(
    model: FoundModel, source: WorkloadSource, bundle: Bundle, suggest: Suggest | None
) -> tuple[ImageTransform | None, list[str]]:
    """For a model that states nothing: images as they are if they have one size that its
    forward takes, else at the size that is found by its configuration or by probing."""
    plain = ImageTransform(mode=_mode_for(model.module, bundle), source="as they are")
    inputs = list(itertools.islice(_inputs_of(bundle, Reader(image=plain)), NUM_LOOKED_AT))
    if len({next(iter(each.values())).shape for each in inputs}) == 1:
        with contextlib.suppress(ModelError):
            stated = stated_normalisation(model, source, bundle)
            resolve_from_data(
                model.module, inputs, stated, wants_classes=wants_classes(source.metric)
            )
            return plain, []
    return _probed_transform(model, source, plain.mode, suggest)


def _probed_transform(
    model: FoundModel, source: WorkloadSource, mode: ImageMode, suggest: Suggest | None
) -> tuple[ImageTransform | None, list[str]]:
    resolved = resolve_without_data(
        model.module, wants_classes=wants_classes(source.metric), suggest=suggest
    )
    shape = resolved.inputs[0].shape
    if len(shape) != 3:
        return None, []
    size = (shape[1], shape[2])
    how = f"the model's input size, found by {resolved.inputs[0].found_by}"
    words = (
        f"images are resized and cropped to {size[0]}x{size[1]} ({how}); state --resize and "
        "--crop to have another"
    )
    return ImageTransform(mode=mode, resize=min(size), crop=size, source=how), [words]


def _first_input(bundle: Bundle) -> Any:
    """The first raw input of the data, to see of what kind they are; None for a stream."""
    for sample in _samples_of(bundle):
        return next(iter(sample.inputs.values()))
    return None


def _has_text(bundle: Bundle) -> bool:
    first = next(_samples_of(bundle), None)
    return first is not None and any(is_text(value) for value in first.inputs.values())


def _samples_of(bundle: Bundle) -> Iterator[Sample]:
    """Samples of every part whose length is known, those that can't be read left out."""
    for part in bundle.parts.values():
        for index in range(part.length or 0):
            with contextlib.suppress(UnreadableSample):
                yield part.get(index)


def _inputs_of(bundle: Bundle, reader: Reader) -> Iterator[dict[str, np.ndarray]]:
    for sample in _samples_of(bundle):
        with contextlib.suppress(UnreadableSample):
            yield reader.read(sample).inputs


def _mode_for(model: nn.Module, bundle: Bundle) -> ImageMode:
    """Grey or colour as the model's first convolution takes it, else as the first image is."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels in (1, 3):
        return "L" if first.in_channels == 1 else "RGB"
    image = _first_input(bundle)
    return "L" if getattr(image, "mode", "RGB") in ("1", "L", "LA") else "RGB"
