"""A cheap look before the whole search split: has the accuracy plainly collapsed?"""

from __future__ import annotations

import numpy as np

from profiling_agent.evaluation.statistics import paired_drop

SCREEN_SAMPLES = 256
SCREEN_CONFIDENCE = 0.998


def collapsed(original_right: np.ndarray, artefact_right: np.ndarray, budget: float) -> str | None:
    """Why it is hopeless: even the lower bound of the drop is above twice the budget and a point.

    The bound's confidence is 99.9 %, one-sided, so that a good plan is almost never lost here.
    """
    drop = paired_drop(original_right, artefact_right, confidence=SCREEN_CONFIDENCE)
    if drop.low > 2 * budget + 1.0:
        return (
            f"accuracy collapsed: {drop.estimate:.1f} points lost on the first "
            f"{drop.num_samples} samples (budget {budget:g})"
        )
    return None
