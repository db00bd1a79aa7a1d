"""What random noise on a classifier's logits costs: a first guess of what plans will cost.

Plans disturb the outputs, and what that costs follows from the margins, which the original's own
outputs tell: where few samples are near a boundary, or as many wrong ones as right ones, outputs
can be disturbed much before accuracy is lost. So independent normal noise is added to the logits,
as much as loses a given drop, and its divergence from the original is that of the guess.
"""

from __future__ import annotations

import numpy as np

from profiling_agent.compression.divergence import mean_divergence

NUM_DRAWS = 16
NUM_TOP = 16
"""Logits of a sample that noise is tried on: the largest. Smaller ones hardly ever win."""
LEAST_LOST = 20
"""Samples: of less the original's few samples near a boundary say too little."""
NUM_HALVINGS = 20
LARGEST = 64.0
"""Of the noise, over the spread of the logits."""
SEED = 0


def noise_divergence(outputs: np.ndarray, truth: np.ndarray, drop: float) -> float | None:
    """Nats at which noise on logits (samples, classes) loses ``drop`` points of accuracy against
    ``truth`` (samples,), column numbers; ``None`` where noise never loses so much.

    Where that is less than twenty samples, in proportion of what loses twenty.
    """
    logits = np.asarray(outputs, dtype=np.float64)
    level = max(drop, 100.0 * LEAST_LOST / len(logits))
    spread = float(logits.std())
    if drop <= 0.0 or spread == 0.0:
        return None
    rng = np.random.default_rng(SEED)
    columns = np.argsort(-logits, axis=1)[:, :NUM_TOP]
    top = np.take_along_axis(logits, columns, axis=1)
    rows = np.arange(len(logits))
    is_true = columns == truth[:, None]
    draws = [rng.standard_normal(top.shape, dtype=np.float32) for _ in range(NUM_DRAWS)]
    right = 100.0 * float(is_true[:, 0].mean())

    def lost(scale: float) -> float:
        hits = [is_true[rows, (top + scale * draw).argmax(axis=1)].mean() for draw in draws]
        return right - 100.0 * float(np.mean(hits))

    low, high = 0.0, LARGEST * spread
    if lost(high) < level:
        return None
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if lost(middle) < level else (low, middle)
    noise = high * rng.standard_normal(logits.shape)
    return mean_divergence(logits, logits + noise, has_classes=True) * drop / level
