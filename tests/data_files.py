"""Images and folders that the tests of data write, and the assets they look up."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from profiling_agent.acquisition.data import UNNAMED, Source


def asset(name: str) -> Path:
    path = Path(os.environ.get("PROFILING_AGENT_ASSETS", ""), name)
    if not os.environ.get("PROFILING_AGENT_ASSETS") or not path.exists():
        pytest.skip(f"{name} is not there (PROFILING_AGENT_ASSETS)")
    return path


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that both interpolation and rounding show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 80 * np.sin(x / (5 + c) + c) * np.cos(y / (7 - c)) for c in range(3)]
    pixels = np.stack(waves, axis=-1) + rng.normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def image_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_images(folder: Path, names: Sequence[str], size: int = 8) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(size, size, number).save(path)


def labels_of(source: Source) -> list[Any]:
    return [sample.label for sample in source.stream()]


def inputs_of(source: Source) -> list[Any]:
    return [sample.inputs[UNNAMED] for sample in source.stream()]
