"""A cheap look before the whole search split: has the accuracy plainly collapsed?"""

from __future__ import annotations

import numpy as np

from profiling_agent.evaluation.judge import Judge

SCREEN_SAMPLES = 256
SCREEN_CONFIDENCE = 0.998
MARGIN = 0.01
"""Of the metric's value, above twice the budget: a point, where the metric is in percent."""


def collapsed(
    judge: Judge,
    ours: np.ndarray,
    labels: np.ndarray | None,
    original: np.ndarray,
    budget: float,
) -> str | None:
    """Why it is hopeless: even the lower bound of the drop is above twice the budget and a point.

    The bound's confidence is 99.9 %, one-sided, so that a good plan is almost never lost here.
    """
    drop = judge.drop(ours, labels, original, confidence=SCREEN_CONFIDENCE).interval
    scale = 100.0 if judge.task.unit == "points" else abs(judge.value(original, labels, original))
    if drop.low > 2 * budget + MARGIN * scale:
        return (
            f"{judge.task.metric} collapsed: {drop.estimate:.3g} {judge.task.unit or 'units'} lost "
            f"on the first {drop.num_samples} samples (budget {budget:g})"
        )
    return None
