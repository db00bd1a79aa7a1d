"""What random noise on a classifier's logits costs: a first guess of what plans will cost.

Plans disturb the outputs, and what that costs follows from the margins, which the original's own
outputs tell: where few samples are near a boundary, or as many wrong ones as right ones, outputs
can be disturbed much before accuracy is lost. So independent normal noise is added to the logits,
as much as loses a given drop, and its divergence from the original is that of the guess.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from profiling_agent.compression.divergence import CHUNK, mean_divergence

NUM_DRAWS = 16
NUM_TOP = 16
"""Logits of a sample that noise is tried on: the largest. Smaller ones hardly ever win."""
LEAST_LOST = 20
"""Samples: of less the original's few samples near a boundary say too little."""
NUM_HALVINGS = 20
SMALLEST, LARGEST = 1e-3, 64.0
"""Of the noise, over the spread of the logits; less only parts logits that are equal."""
SEED = 0


def noise_divergence(
    outputs: np.ndarray,
    truth: np.ndarray,
    drop: float,
    *,
    answers: Sequence[int] | None = None,
) -> float | None:
    """Nats at which noise on logits (samples, classes) loses ``drop`` points of accuracy against
    the classes of ``truth`` (samples,); ``None`` where noise never loses so much, or at once.

    Only the classes in ``answers`` can be predicted, which are all by default; the divergence is
    that of all logits. Where the drop is less than twenty samples, it is taken from the noise that
    loses twenty: in proportion, or where the original is right on all, so that every changed answer
    is a loss, as the square.
    """
    level = max(drop, 100.0 * LEAST_LOST / len(outputs))
    spread = float(outputs.std(dtype=np.float64))
    if drop <= 0.0 or spread == 0.0:
        return None
    top, is_true = _largest(outputs, truth, answers)
    rng = np.random.default_rng(SEED)
    draws = [rng.standard_normal(top.shape, dtype=np.float32) for _ in range(NUM_DRAWS)]
    rows = np.arange(len(outputs))
    is_right = is_true[:, 0]

    def lost(scale: float) -> float:
        hits = [is_true[rows, (top + scale * draw).argmax(axis=1)].mean() for draw in draws]
        return 100.0 * float(is_right.mean() - np.mean(hits))

    low, high = SMALLEST * spread, LARGEST * spread
    if lost(low) >= level or lost(high) < level:
        return None
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if lost(middle) < level else (low, middle)
    noise = rng.standard_normal(outputs.shape, dtype=np.float32)
    noise *= high
    noise += outputs
    apart = mean_divergence(outputs, noise, has_classes=True)
    return apart * (drop / level) ** (2 if is_right.all() else 1)


def _largest(
    outputs: np.ndarray, truth: np.ndarray, answers: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The largest logits of the answers (samples, some), and which of them is the true one's."""
    columns = np.arange(outputs.shape[1]) if answers is None else np.asarray(answers)
    tops: list[np.ndarray] = []
    trues: list[np.ndarray] = []
    size = max(1, CHUNK // len(columns))
    for start in range(0, len(outputs), size):
        some = outputs[start : start + size, columns]
        order = np.argsort(-some, axis=1, kind="stable")[:, :NUM_TOP]  # the first of equals leads
        tops.append(np.take_along_axis(some, order, axis=1))
        trues.append(columns[order] == truth[start : start + size, None])
    return np.concatenate(tops), np.concatenate(trues)
