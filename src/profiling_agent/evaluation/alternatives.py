"""The preprocessing people usually mean, to be tried against the one that is stated.

Normalisations are arithmetic on the raw arrays, so trying one costs a forward and no reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from profiling_agent.records.workload import Preprocessing


@dataclass(frozen=True, kw_only=True, eq=False)
class Alternative:
    """Another preprocessing; ``reverses`` the channels of the raw images first."""

    name: str
    preprocessing: Preprocessing
    reverses: bool = False
    next_step: str


IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CAFFE_MEAN: Final = (103.939, 116.779, 123.68)


def alternatives(stated: Preprocessing, images: np.ndarray) -> list[Alternative]:
    """What people usually mean, other than what is stated; ``images`` are raw (samples, ...).

    Empty for inputs without a layout: they are no images, or were prepared by the user.
    """
    if stated.layout == "none":
        return []
    channels = _by_channel(images, stated.layout)
    unit = 1 / 255 if images.dtype == np.uint8 or channels.max() > 1.5 else 1.0
    mean = tuple(float(round(each, 3)) for each in channels.mean(axis=1) * unit)
    std = tuple(float(round(max(each, 0.01), 3)) for each in channels.std(axis=1) * unit)
    has_colour = len(channels) == 3
    settings: dict[str, tuple[float, tuple[float, ...], tuple[float, ...]]] = {}
    if has_colour:  # first, since of two that do equally well the first is named
        settings["ImageNet's mean and std"] = (unit, *IMAGENET)
    settings |= {
        "mean and std 0.5 (-1 to 1)": (unit, (0.5,), (0.5,)),
        "values from 0 to 1": (unit, (), ()),
        "values from 0 to 255": (255 * unit, (), ()),
        "mean and std of these images": (unit, mean, std),
    }
    found = [alternative_of(stated, name, *values) for name, values in settings.items()]
    if has_colour:
        found.append(_reversed(stated))
        found.append(_caffe(stated, 255 * unit))
    top = 1.0 / unit
    return [each for each in found if each.reverses or not _is_same(stated, each, top)]


def alternative_of(
    stated: Preprocessing,
    name: str,
    scale: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    reverses: bool = False,
) -> Alternative:
    """One with other numbers; ``reverses`` the channels of what is stated."""
    changed = stated.model_copy(update={"scale": scale, "mean": mean, "std": std})
    step = f"Pass {_flags(changed)}."
    if reverses:
        wanted = "RGB" if stated.image is not None and stated.image.mode == "BGR" else "BGR"
        is_flag = stated.layout == "hwc"
        step = f"Pass --mode {wanted} {_flags(changed)}." if is_flag else (
            f"{_reverse_words(wanted)} {step}"
        )  # fmt: skip
    return Alternative(name=name, preprocessing=changed, reverses=reverses, next_step=step)


def is_another(known: Alternative, other: Alternative, top: float) -> bool:
    """Whether the two do not give about the same for raw values from 0 to ``top``."""
    if known.reverses != other.reverses:
        return True
    return not _is_same(known.preprocessing, other, top)


def _flags(changed: Preprocessing) -> str:
    mean = ",".join(f"{each:g}" for each in changed.mean or (0.0,))
    std = ",".join(f"{each:g}" for each in changed.std or (1.0,))
    return f"--scale {changed.scale:.6g} --mean {mean} --std {std}"


def _reversed(stated: Preprocessing) -> Alternative:
    is_bgr = stated.image is not None and stated.image.mode == "BGR"
    wanted = "RGB" if is_bgr else "BGR"
    return Alternative(
        name="the channels reversed (BGR for RGB)",
        preprocessing=stated,
        reverses=True,
        next_step=f"Pass --mode {wanted}." if stated.layout == "hwc" else _reverse_words(wanted),
    )


def _caffe(stated: Preprocessing, scale: float) -> Alternative:
    changed = stated.model_copy(update={"scale": scale, "mean": CAFFE_MEAN, "std": ()})
    is_bgr = stated.image is not None and stated.image.mode == "BGR"
    step = f"Pass {_flags(changed)}."
    return Alternative(
        name="BGR from 0 to 255 less its mean (Caffe's)",
        preprocessing=changed,
        reverses=not is_bgr,
        next_step=step if is_bgr else f"Pass --mode BGR {_flags(changed)}.",
    )


def _reverse_words(wanted: str) -> str:
    return f"Reverse the channels where the arrays are made, so that they are {wanted}."


def _by_channel(images: np.ndarray, layout: str) -> np.ndarray:
    """Float64 (channels, values)."""
    if layout == "hw":
        return images.reshape(1, -1).astype(np.float64)
    axis = 1 if layout == "chw" else -1
    moved = np.moveaxis(images, axis, 0)
    return moved.reshape(len(moved), -1).astype(np.float64)


def _is_same(stated: Preprocessing, other: Alternative, top: float) -> bool:
    """Whether both map raw values from 0 to ``top`` to about the same, to a twentieth."""
    both = (stated, other.preprocessing)
    count = max(len(values) for each in both for values in (each.mean, each.std, (0.0,)))
    one, two = (_ends(each, top, count) for each in both)
    return bool(np.abs(one - two).max() <= 0.05 * np.abs(one[1] - one[0]).max())


def _ends(preprocessing: Preprocessing, top: float, num_channels: int) -> np.ndarray:
    """What the darkest and the brightest value become, (2, channels)."""
    raw = np.array([[0.0], [top]]) * preprocessing.scale
    mean = np.array(preprocessing.mean or (0.0,))
    std = np.array(preprocessing.std or (1.0,))
    values = (raw - mean) / std
    return np.broadcast_to(values, (2, num_channels)) if values.shape[1] == 1 else values
