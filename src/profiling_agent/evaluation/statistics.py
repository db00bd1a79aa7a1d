"""What paired outcomes allow to be said about a difference of accuracies."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from profiling_agent.records.common import Interval


def paired_drop(
    original_right: np.ndarray, artefact_right: np.ndarray, *, confidence: float = 0.95
) -> Interval:
    """Accuracy lost, in points, with its two-sided interval; positive is a loss.

    Both arrays are boolean (samples,), for the same samples in the same order. The interval is
    the adjusted Wald interval for paired proportions (Bonett and Price 2012), which holds its
    level for few samples and for none that differ.
    """
    center, spread = _adjusted(original_right, artefact_right)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    estimate = 100.0 * (original_right.mean() - artefact_right.mean())
    return Interval(
        estimate=round(float(estimate), 10),
        low=min(float(estimate), 100.0 * (center - z * spread)),
        high=max(float(estimate), 100.0 * (center + z * spread)),
        confidence=confidence,
        num_samples=len(original_right),
    )


def upper_bound(
    original_right: np.ndarray, artefact_right: np.ndarray, *, level: float = 0.95
) -> float:
    """One-sided bound, in points, that the true drop stays under with probability ``level``."""
    center, spread = _adjusted(original_right, artefact_right)
    return 100.0 * (center + NormalDist().inv_cdf(level) * spread)


def samples_to_prove(
    original_right: np.ndarray, artefact_right: np.ndarray, budget: float, *, level: float = 0.95
) -> int | None:
    """How many samples would bring the bound under ``budget`` points if the rates stay as seen.

    ``None`` when no number would: the estimate itself is not below the budget.
    """
    lost, won = _discordant(original_right, artefact_right)
    count = len(original_right)
    rate_lost, rate_won = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    gap = budget / 100.0 - (lost - won) / count
    if gap <= 0:
        return None
    variance = rate_lost + rate_won - (rate_lost - rate_won) ** 2
    return math.ceil(NormalDist().inv_cdf(level) ** 2 * variance / gap**2)


def provable_drop(num_samples: int, *, discordance: float = 0.02, level: float = 0.95) -> float:
    """Points that this many samples can tell from zero, if ``discordance`` of them change.

    Two percent is what eight-bit quantization typically turns over.
    """
    spread = math.sqrt((discordance + 2 / (num_samples + 2)) / (num_samples + 2))
    return 100.0 * NormalDist().inv_cdf(level) * spread


def accuracy_interval(right: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Percent right with its Wilson (1927) interval."""
    count, rate = len(right), float(right.mean())
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    center = (rate + z * z / (2 * count)) / (1 + z * z / count)
    spread = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / 4 / count**2)
    return Interval(
        estimate=100.0 * rate,
        low=100.0 * max(0.0, center - spread),
        high=100.0 * min(1.0, center + spread),
        confidence=confidence,
        num_samples=count,
    )


def _discordant(original_right: np.ndarray, artefact_right: np.ndarray) -> tuple[int, int]:
    if original_right.shape != artefact_right.shape or len(original_right) == 0:
        raise ValueError(
            f"Paired outcomes must have one shape and a sample, got {original_right.shape} "
            f"and {artefact_right.shape}."
        )
    lost = int(np.sum(original_right & ~artefact_right))
    won = int(np.sum(~original_right & artefact_right))
    return lost, won


def _adjusted(original_right: np.ndarray, artefact_right: np.ndarray) -> tuple[float, float]:
    lost, won = _discordant(original_right, artefact_right)
    count = len(original_right) + 2
    rate_lost, rate_won = (lost + 1) / count, (won + 1) / count
    center = rate_lost - rate_won
    return center, math.sqrt((rate_lost + rate_won - center**2) / count)
