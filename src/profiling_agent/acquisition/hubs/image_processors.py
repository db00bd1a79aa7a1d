"""A Hugging Face image processor as a transform of Pillow images and the arithmetic after it.

The processors state their steps as settings, but some classes do more than these say (ConvNeXT and
LeViT resize to more than ``size``, EfficientNet normalises twice). So what was read is proven: the
processor's own result on two images must be ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from profiling_agent.acquisition.images import load_image
from profiling_agent.acquisition.preprocess import preprocess
from profiling_agent.errors import DataError
from profiling_agent.records.workload import (
    ImageTransform,
    InputSpec,
    Interpolation,
    Preprocessing,
)

TOLERANCE = 2.0
"""Mean absolute difference allowed, in steps of a byte: what tensors and Pillow differ by."""

_PILLOW_NAMES: Mapping[int, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
_PHOTO_SIZES = ((300, 400), (420, 310))


@dataclass(frozen=True, kw_only=True)
class Translation:
    """What a processor does, in our words; ``image`` None when it can't be said in them."""

    image: ImageTransform | None
    normalisation: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def translate(processor: Any) -> Translation:
    """The processor's steps, proven on two synthetic photos; the notes say where they differ."""
    kind = type(processor).__name__
    if hasattr(processor, "data_config"):  # the wrapper around timm's models
        from profiling_agent.acquisition.hubs.timm_models import data_transform

        image, normalisation, notes = data_transform(processor.data_config)
    else:
        stated = processor.to_dict()
        image = _transform(stated, kind)
        normalisation, notes = _normalisation(stated, kind), ()
    try:
        mean, largest = compare(processor, image, normalisation)
    except Exception as error:  # a processor of others, perhaps remote code, on our images
        return Translation(image=None, normalisation={}, notes=(_not_an_image(kind, error),))
    if mean >= TOLERANCE:
        notes = (*notes, _differs(kind, mean, largest))
    return Translation(image=image, normalisation=normalisation, notes=notes)


def compare(
    processor: Any, image: ImageTransform, normalisation: Mapping[str, Any]
) -> tuple[float, float]:
    """Mean and largest absolute difference to the processor's own result, in steps of a byte.

    A crop may sit one pixel aside, for libraries round the half pixel of an odd margin up or down.
    Infinite when the shapes differ; ``DataError`` when the processor makes no image.
    """
    differences = [np.zeros(1)]
    for size in _PHOTO_SIZES:
        photo = synthetic_photo(*size)
        theirs = np.asarray(processor(photo, return_tensors="pt")["pixel_values"][0])
        if theirs.ndim != 3:
            raise DataError(f"it makes arrays of the shape {theirs.shape}")
        ours = _arithmetic(load_image(photo, image), normalisation)
        if ours.shape != theirs.shape:
            return float("inf"), float("inf")
        steps = np.reshape(normalisation["std"] or (1.0,), (-1, 1, 1)) / normalisation["scale"]
        differences.append(_difference(ours, theirs) * steps)
    means = [float(each.mean()) for each in differences]
    return max(means), max(float(each.max()) for each in differences)


def _difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Absolute differences, (channels, height, width), where the two lie on each other best."""
    height, width = ours.shape[1:]
    overlaps = [
        np.abs(ours[:, : height - down, : width - right] - theirs[:, down:, right:])
        for down, right in ((0, 0), (0, 1), (1, 0))
    ]
    return min(overlaps, key=lambda each: float(each.mean()))


def synthetic_photo(height: int, width: int) -> Image.Image:
    """An RGB image with the soft shapes, edges and grain of a photo; the same at each call."""
    noise = np.random.default_rng(0)
    photo = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 120), (24, 60), (96, 20)):
        shape = (cells, cells * width // height, 3)
        layer = Image.fromarray(noise.integers(0, 256, shape, np.uint8))
        wide = np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        photo += (wide / 255 - 0.5) * strength
    photo[height // 3 : height // 2, width // 4 : width // 2] += 60
    return Image.fromarray(np.clip(photo + 120, 0, 255).astype(np.uint8))


def _arithmetic(raw: np.ndarray, normalisation: Mapping[str, Any]) -> np.ndarray:
    values = {key: normalisation[key] for key in ("scale", "mean", "std")}
    how = Preprocessing(layout="hwc" if raw.ndim == 3 else "hw", **values)
    spec = InputSpec(name="image", shape=raw.shape, dtype="float32")
    return preprocess({"image": raw[None]}, [spec], how)["image"][0]


def _transform(stated: Mapping[str, Any], kind: str) -> ImageTransform:
    resize, crop = _geometry(stated, kind)
    return ImageTransform(
        mode="BGR" if stated.get("do_flip_channel_order") else "RGB",
        resize=resize,
        crop=crop,
        interpolation=_interpolation(stated.get("resample")),
        source=f"the model's {kind}",
    )


def _interpolation(resample: Any) -> Interpolation:
    """Pillow's number for a filter, or the name that torchvision gives it."""
    if isinstance(resample, int):
        return _PILLOW_NAMES.get(int(resample), "bilinear")
    name = str(getattr(resample, "value", resample))
    known: dict[str, Interpolation] = {str(each): each for each in _PILLOW_NAMES.values()}
    return known.get(name, "bilinear")


def _geometry(
    stated: Mapping[str, Any], kind: str
) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None]:
    """Resize and crop; the classes that don't do what they state are named here."""
    size, crop = stated.get("size") or {}, _crop(stated)
    if not stated.get("do_resize"):
        return None, crop
    shorter, ratio = size.get("shortest_edge"), stated.get("crop_pct")
    if kind.startswith("ConvNext") and shorter:
        if shorter >= 384:
            return (shorter, shorter), crop
        return int(shorter / (ratio or 224 / 256)), (shorter, shorter)
    if kind.startswith("Perceiver") and crop and size.get("height"):
        # It cuts this share from the middle before it resizes: the same in the other order.
        return min(crop), (size["height"], size["width"])
    if kind.startswith("PoolFormer") and ratio:
        return int((shorter or size["height"]) / ratio), crop
    if shorter:
        return (int(256 / 224 * shorter) if kind.startswith("Levit") else shorter), crop
    if size.get("height") and size.get("width"):
        return (size["height"], size["width"]), crop
    return None, crop


def _crop(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    size = stated.get("crop_size") or {}
    is_cut = stated.get("do_center_crop") and size.get("height") and size.get("width")
    return (size["height"], size["width"]) if is_cut else None


def _normalisation(stated: Mapping[str, Any], kind: str) -> dict[str, Any]:
    scale = float(stated.get("rescale_factor") or 1 / 255) if stated.get("do_rescale") else 1.0
    mean, std = (), ()
    if stated.get("do_normalize"):
        mean, std = _per_channel(stated["image_mean"]), _per_channel(stated["image_std"])
    if stated.get("rescale_offset"):  # EfficientNet: bytes to -1 ... 1
        mean = tuple(value + 1 for value in mean or (0.0, 0.0, 0.0))
    if stated.get("include_top"):  # EfficientNet: divided by the deviation once more
        again = _per_channel(stated["image_std"])
        std = tuple(a * b for a, b in zip(std or (1.0,) * len(again), again, strict=True))
    return {"scale": scale, "mean": mean, "std": std, "source": f"the model's {kind}"}


def _per_channel(values: Any) -> tuple[float, ...]:
    if isinstance(values, int | float):
        return (float(values),) * 3
    return tuple(float(value) for value in values)


def _differs(kind: str, mean: float, largest: float) -> str:
    if mean == float("inf"):
        size = "makes images of another size than its settings say"
    else:
        size = f"differs from its settings by {mean:.1f}/255 on average, at most {largest:.0f}/255"
    return (
        f"the model's {kind} {size}, so accuracies may be lower than with it; state --resize, "
        "--crop, --mean and --std, or pass arrays that it made"
    )


def _not_an_image(kind: str, error: Exception) -> str:
    return (
        f"the model's {kind} can't be put as resize, crop and normalisation "
        f"({type(error).__name__}: {error}); state these yourself, or pass arrays that it made"
    )
