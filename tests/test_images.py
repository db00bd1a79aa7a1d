"""Images become the arrays that the libraries make of them, and damaged ones are named."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_files import image_bytes, photo
from profiling_agent.acquisition.data import UnreadableSample
from profiling_agent.acquisition.images import load_image
from profiling_agent.errors import DataError
from profiling_agent.records.workload import ImageTransform

PLAIN = ImageTransform()


MODES = ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16")


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 2)
    if mode == "P":
        return image.quantize(32)
    return image.convert("RGB").convert(mode)


@pytest.fixture(scope="module")
def vision() -> Any:
    from profiling_agent.acquisition.hubs.torchvision_repair import make_torchvision_importable

    make_torchvision_importable()
    pytest.importorskip("torchvision")
    return pytest.importorskip("torchvision.transforms")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_transforms_are_torchvisions_to_the_bit(vision: Any, interpolation: Any) -> None:
    sizes = ((41, 67), (67, 41), (50, 50), (33, 32), (16, 200))
    crops = ((24, 24), (31, 28), (48, 20), (64, 65), None)
    for size, resize, crop in itertools.product(sizes, (32, 33, (40, 30), None), crops):
        steps = []
        if resize is not None:
            steps.append(vision.Resize(resize, vision.InterpolationMode(interpolation)))
        if crop is not None:
            steps.append(vision.CenterCrop(crop))
        ours = ImageTransform(resize=resize, crop=crop, interpolation=interpolation)
        expected = np.array(vision.Compose(steps)(photo(*size)))
        assert np.array_equal(load_image(photo(*size), ours), expected), (size, resize, crop)


def test_the_second_version_of_torchvisions_transforms_agrees(vision: Any) -> None:
    from torchvision.transforms import v2

    theirs = v2.Compose([v2.Resize(35, v2.InterpolationMode.BICUBIC), v2.CenterCrop((31, 52))])
    ours = ImageTransform(resize=35, crop=(31, 52), interpolation="bicubic")
    for size in ((41, 67), (67, 41), (35, 35)):
        assert np.array_equal(load_image(photo(*size), ours), np.array(theirs(photo(*size))))


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_converted_as_torchvisions_loader_does(
    vision: Any, tmp_path: Path, mode: str
) -> None:
    from torchvision.datasets.folder import pil_loader

    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    in_mode(photo(20, 30), mode).save(path)
    loaded = load_image(path, PLAIN)
    assert loaded.dtype == np.uint8 and loaded.shape == (20, 30, 3)
    assert np.array_equal(loaded, np.array(pil_loader(path)))
    assert np.array_equal(load_image(path.read_bytes(), PLAIN), loaded)
    grey = load_image(path, ImageTransform(mode="L"))
    assert np.array_equal(grey, np.array(Image.open(path).convert("L")))


def test_a_palette_with_alpha_raises_no_warning() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 4)).astype(np.uint8)
    data = image_bytes(Image.fromarray(pixels).quantize(16))
    image = Image.open(io.BytesIO(data))
    assert isinstance(image.info["transparency"], bytes)
    image.info.pop("transparency")
    assert np.array_equal(load_image(data, PLAIN), np.array(image.convert("RGB")))


def test_arrays_bgr_and_exif() -> None:
    pixels = np.array(photo(6, 9))
    assert np.array_equal(load_image(pixels, PLAIN), pixels)
    assert np.array_equal(load_image(pixels, ImageTransform(mode="BGR")), pixels[..., ::-1])
    assert load_image(pixels[..., :1], PLAIN).shape == (6, 9, 3)
    assert load_image(pixels[..., 0], ImageTransform(mode="L")).shape == (6, 9)
    assert load_image(pixels, PLAIN).flags.writeable
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    photo(6, 9).save(file, "PNG", exif=turned)
    assert load_image(file.getvalue(), PLAIN).shape == (6, 9, 3)
    for wrong in (pixels.astype(np.float32), pixels[None], np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(DataError, match="uint8"):
            load_image(wrong, PLAIN)


def test_damaged_images_are_named(tmp_path: Path) -> None:
    whole = image_bytes(photo(64, 64), "JPEG")
    cases = {"cut.jpg": whole[: len(whole) // 2], "text.png": b"no image", "empty.png": b""}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableSample, match=name):
            load_image(tmp_path / name, PLAIN)
    with pytest.raises(UnreadableSample, match=r"not-there\.png"):
        load_image(tmp_path / "not-there.png", PLAIN)
    with pytest.raises(UnreadableSample, match="image of 8 bytes"):
        load_image(b"no image", PLAIN)


def bomb(width: int, height: int) -> bytes:
    """A PNG of the given size that has hardly any data."""
    small = image_bytes(Image.new("L", (1, 1)))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def test_an_image_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableSample, match="too many pixels"):
        load_image(bomb(60_000, 60_000), PLAIN)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some programs do
    with pytest.raises(UnreadableSample, match="too many pixels"):
        load_image(bomb(60_000, 60_000), PLAIN)
    with pytest.raises(UnreadableSample, match="after the resize"):
        load_image(Image.new("RGB", (100_000, 1)), ImageTransform(resize=224))
