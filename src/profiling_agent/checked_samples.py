"""The samples that check shows: what the model says of each, and what it looks like.

People see at once what no statistic tells: a wrong label, swapped channels, a picture cut badly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from profiling_agent.evaluation.judge import classes
from profiling_agent.records.check import CheckedSample
from profiling_agent.records.workload import Preprocessing, Task
from profiling_agent.sampled_split import SampledSplit

NUM_SHOWN: Final = 16


def show_samples(
    sampled: SampledSplit, outputs: np.ndarray, labels: np.ndarray | None
) -> tuple[CheckedSample, ...]:
    """The first sixteen rows: their classes, and what the outputs (rows, ...) say of them."""
    task = sampled.workload.record.task
    has_classes = task.num_classes is not None and outputs.ndim == 2
    has_labels = labels is not None and labels.ndim == 1 and task.metric == "accuracy"
    answers = classes(np.nan_to_num(outputs), task) if has_classes else None
    samples: list[CheckedSample] = []
    for i, row in enumerate(sampled.rows[:NUM_SHOWN]):
        answer = None if answers is None else int(answers[i])
        true = int(labels[i]) if has_labels and labels is not None else None
        samples.append(
            CheckedSample(
                split=sampled.name,
                row=int(row),
                true=_name(true, task),
                predicted=_name(answer, task),
                is_right=None if answer is None or true is None else answer == true,
                confidence=None if answer is None else confidence(outputs[i], answer),
            )
        )
    return tuple(samples)


def pictures_of(samples: Sequence[CheckedSample], sampled: SampledSplit) -> list[np.ndarray]:
    """The samples as bytes (h, w) or (h, w, 3); empty when they are no images."""
    preprocessing = sampled.workload.record.preprocessing
    raw = sampled.first_input(np.array([sample.row for sample in samples], dtype=int))
    drawn = [as_picture(each, preprocessing) for each in raw]
    return [each for each in drawn if each is not None]


def confidence(logits: np.ndarray, answer: int) -> float | None:
    """Softmax of the answer, from logits (classes,); None when they are not finite."""
    if not np.isfinite(logits).all():
        return None
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return float(shifted[answer] / shifted.sum())


def as_picture(raw: np.ndarray, preprocessing: Preprocessing) -> np.ndarray | None:
    """One raw sample as bytes (h, w) or (h, w, 3) in RGB; None when it is no image.

    Floats prepared by the user are stretched from their least to their largest value.
    """
    layout = preprocessing.layout
    if layout == "none":
        if raw.ndim != 3 or raw.shape[0] not in (1, 3) or raw.dtype.kind != "f":
            return None
        layout = "chw"
    image = np.moveaxis(raw, 0, -1) if layout == "chw" else raw
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = (255 * (image - low) / max(high - low, 1e-12)).astype(np.uint8)
    if image.ndim == 3:
        image = image[..., 0] if image.shape[-1] in (1, 2) else image[..., :3]
    if image.ndim == 3 and preprocessing.image is not None and preprocessing.image.mode == "BGR":
        image = image[..., ::-1]
    return np.ascontiguousarray(image)


def _name(index: int | None, task: Task) -> str | None:
    if index is None:
        return None
    return task.class_names[index] if task.class_names else str(index)
