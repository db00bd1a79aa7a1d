"""Image files to arrays of bytes, exactly as the libraries do it that models were trained with.

A model's accuracy is published for one way of decoding, resizing and cropping. Half a pixel of
difference costs tenths of a point, which would look like a loss of the compressed model or of the
data; so this follows torchvision's and timm's evaluation transforms on Pillow images bit for bit.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from profiling_agent.acquisition.data import UnreadableSample
from profiling_agent.errors import DataError
from profiling_agent.records.workload import ImageTransform

MAX_PIXELS = 178_956_970
"""Pillow's own limit for what it calls a decompression bomb: half a gigabyte of RGB."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

ImageSource = Path | bytes | Image.Image | np.ndarray


def load_image(source: ImageSource, transform: ImageTransform) -> np.ndarray:
    """Decode, resize and crop one image; uint8, (height, width) for L, else (height, width, 3).

    Modes are converted as ``Image.convert`` does (palettes looked up, alpha dropped, 16 bits
    clipped) and EXIF's orientation is not applied: both as torchvision's loader. Arrays are uint8,
    (height, width) or (height, width, 1, 3 or 4). Raises ``UnreadableSample`` for what can't be
    decoded or is too large, ``DataError`` for an array that is no image.
    """
    mode = "L" if transform.mode == "L" else "RGB"
    if isinstance(source, np.ndarray):
        image = _from_array(source).convert(mode)
    else:
        image = _decode(source, mode)
    if transform.resize is not None:
        image = _resize(image, transform, source)
    if transform.crop is not None:
        image = _crop(image, *transform.crop)
    pixels = np.array(image)
    return np.ascontiguousarray(pixels[..., ::-1]) if transform.mode == "BGR" else pixels


def resized_size(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) after a resize; a number is the shorter side, the longer is rounded down."""
    if isinstance(resize, tuple):
        return resize
    height, width = size
    longer = int(resize * max(size) / min(size))
    return (longer, resize) if width <= height else (resize, longer)


def _decode(source: Path | bytes | Image.Image, mode: str) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            return _convert(source, mode)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _convert(image, mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableSample(
            f"{_name(source)} has too many pixels ({error}); remove it or make it smaller."
        ) from None
    except Exception as error:  # Pillow's plugins raise many kinds at damaged files
        raise UnreadableSample(
            f"{_name(source)} can't be decoded ({type(error).__name__}: {error}); replace or "
            "remove it."
        ) from None


def _convert(image: Image.Image, mode: str) -> Image.Image:
    _refuse_bomb(image.width * image.height)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same pixels, without Pillow's warning
    return image.convert(mode)


def _refuse_bomb(num_pixels: int) -> None:
    # Image.open has its own check, which the user's program may have switched off.
    if num_pixels > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{num_pixels:,} pixels, {MAX_PIXELS:,} are the limit")


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image or array.size == 0:
        raise DataError(
            f"An image given as an array is {array.dtype} of the shape {array.shape}; give uint8 "
            "(height, width) or (height, width, 3)."
        )
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(squeezed))


def _resize(image: Image.Image, transform: ImageTransform, source: ImageSource) -> Image.Image:
    assert transform.resize is not None
    size = (image.height, image.width)
    height, width = resized_size(size, transform.resize)
    if (height, width) == size:
        return image
    if height * width > MAX_PIXELS:
        raise UnreadableSample(
            f"{_name(source)} is {image.width} x {image.height} and would be {width} x {height} "
            "after the resize; remove it."
        )
    return image.resize((width, height), resample=RESAMPLING[transform.interpolation])


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle, rounded as torchvision does; Pillow fills with zeros beyond the border."""
    top, left = _margin(image.height, height), _margin(image.width, width)
    return image.crop((left, top, left + width, top + height))


def _margin(length: int, wanted: int) -> int:
    return -((wanted - length) // 2) if wanted > length else round((length - wanted) / 2)


def _name(source: ImageSource) -> str:
    if isinstance(source, Path):
        return f"The image {str(source)!r}"
    if isinstance(source, bytes):
        return f"An image of {len(source):,} bytes"
    return "An image"
