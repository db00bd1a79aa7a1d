"""Your data: a function without arguments that returns samples ``(x, class)``, each read on demand.

Pass it as ``data.py:data``, or leave this file out for a folder of images, an ``.npz`` file,
``cifar10:PATH``, parquet, or a saved Hugging Face dataset. Use samples the model was not trained
on. Return a dict such as {"search": ..., "test": ...} if you have parts of your own.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch.utils.data import Dataset

CLASSES = ("red", "green", "blue")
NUM_SAMPLES = 5_000
SIDE = 32


class Samples(Dataset[tuple[np.ndarray, int]]):
    """Replace ``__len__`` and ``__getitem__`` by your own.

    x: an image as bytes (height, width, 3), or a Pillow image; then ``preprocessing`` is
    applied to it. Floats (channels, height, width) and other arrays are passed on as they are.
    A dict gives several named inputs: {"input_ids": ..., "attention_mask": ..., "label": 1}.
    """

    classes = CLASSES
    # What the model was trained with, after x / 255. Leave it out when the model needs none.
    preprocessing: ClassVar = {"mean": (0.45, 0.45, 0.45), "std": (0.25, 0.25, 0.25)}

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < NUM_SAMPLES:
            raise IndexError(index)
        rng = np.random.default_rng(index)
        label = int(rng.integers(len(CLASSES)))
        image = rng.normal(110.0, 60.0, (SIDE, SIDE, 3))
        image[..., label] += rng.uniform(0.0, 20.0)  # the class is the brightest colour
        return np.clip(image, 0, 255).astype(np.uint8), label


def data() -> Samples:
    """All samples; calibration, search and test are drawn from them and never overlap."""
    return Samples()
