"""From raw arrays to what the model's forward takes, in numpy alone.

The same arithmetic in the same order stands in every artefact's ``serve.py``, so that what is
measured here and what is served there agree to the bit. Change both or neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profiling_agent.records.workload import InputSpec, Preprocessing


def preprocess(
    raw: Mapping[str, np.ndarray], inputs: Sequence[InputSpec], preprocessing: Preprocessing
) -> dict[str, np.ndarray]:
    """Fresh C-contiguous arrays by input name, first axis samples, in the order of ``inputs``.

    ``preprocessing`` applies to the first input only; the others, and all with layout ``none``,
    are cast to their dtype. Images become float32 ``(samples, channels, height, width)``.
    """
    prepared: dict[str, np.ndarray] = {}
    for position, spec in enumerate(inputs):
        array = raw[spec.name]
        if position == 0 and preprocessing.layout != "none":
            prepared[spec.name] = _image(array, preprocessing)
        else:
            prepared[spec.name] = np.array(array, dtype=np.dtype(spec.dtype), order="C")
    return prepared


def _image(array: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    x = array.astype(np.float32) * np.float32(preprocessing.scale)
    if preprocessing.mean:
        x = x - _per_channel(preprocessing.mean, preprocessing.layout)
    if preprocessing.std:
        x = x / _per_channel(preprocessing.std, preprocessing.layout)
    if preprocessing.layout == "hw":
        x = x[:, None]
    elif preprocessing.layout == "hwc":
        x = x.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x)


def _per_channel(values: tuple[float, ...], layout: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float32)
    return array.reshape(-1, 1, 1) if layout == "chw" else array
