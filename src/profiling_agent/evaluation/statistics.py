"""What paired outcomes allow to be said about a difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from profiling_agent.records.common import Interval


@dataclass(frozen=True, kw_only=True)
class Drop:
    """What was lost, with its two-sided interval and the one-sided bound at ``level``.

    The bound is None where the samples can't tell one: resamples that are all alike say nothing of
    what is rare.
    ``deviation`` is that of one sample's contribution, from which the intervals are made.
    """

    interval: Interval
    upper_bound: float | None
    deviation: float
    level: float

    def samples_to_prove(self, budget: float) -> int | None:
        """How many samples would bring the bound under ``budget`` if the rates stay as seen.

        ``None`` when no number would: the estimate itself is not below the budget.
        """
        gap = budget - self.interval.estimate
        if gap <= 0 or self.upper_bound is None:
            return None
        return max(1, math.ceil((NormalDist().inv_cdf(self.level) * self.deviation / gap) ** 2))


def paired_drop(
    before: np.ndarray,
    after: np.ndarray,
    *,
    span: float,
    level: float = 0.95,
    confidence: float = 0.95,
) -> Drop:
    """Mean of ``before - after`` (samples,) of the same samples in the same order.

    The interval is that of a mean with two samples added that differ by ``span`` in either
    direction, ``span`` being how far scores can lie apart. For scores of 0 and 1 it is exactly the
    adjusted Wald interval of Bonett and Price (2012) for paired proportions, which holds its level
    for few samples and for none that differ. With a span of 0 there is no bound: scores that never
    differed say nothing of how far they can. ``ValueError`` for arrays that don't pair.
    """
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(
            f"Paired outcomes must have one shape and a sample, got {before.shape} "
            f"and {after.shape}."
        )
    lost = before - after
    count = len(lost) + 2
    center = float(lost.sum()) / count
    square = (float((lost**2).sum()) + 2 * span**2) / count
    deviation = math.sqrt(max(0.0, square - center**2))
    spread = deviation / math.sqrt(count)
    estimate = float(f"{float(lost.mean()):.12g}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return Drop(
        interval=Interval(
            estimate=estimate,
            low=min(estimate, center - z * spread),
            high=max(estimate, center + z * spread),
            confidence=confidence,
            num_samples=len(lost),
        ),
        upper_bound=center + NormalDist().inv_cdf(level) * spread if span > 0 else None,
        deviation=deviation,
        level=level,
    )


def bootstrap_drop(
    estimate: float,
    statistic: Callable[[np.ndarray], float],
    num_samples: int,
    *,
    num_resamples: int,
    seed: int,
    level: float = 0.95,
    confidence: float = 0.95,
) -> Drop:
    """A statistic of the samples, its spread by the bootstrap (Efron 1979), its interval normal.

    ``statistic`` gets the rows (samples,) of a resample and gives nan where it is undefined; such
    resamples are left out. ``ValueError`` when that is more than half of them. Equal rows and seed
    give equal results.
    """
    rng = np.random.default_rng(seed)
    values = np.array(
        [statistic(rng.integers(0, num_samples, num_samples)) for _ in range(num_resamples)]
    )
    values = values[np.isfinite(values)]
    if 2 * len(values) < num_resamples:
        raise ValueError(f"undefined in {num_resamples - len(values)} of {num_resamples} resamples")
    spread = float(values.std(ddof=1))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    bound = estimate + NormalDist().inv_cdf(level) * spread
    return Drop(
        interval=Interval(
            estimate=estimate,
            low=estimate - z * spread,
            high=estimate + z * spread,
            confidence=confidence,
            num_samples=num_samples,
        ),
        upper_bound=bound if spread > 0 else None,
        deviation=spread * math.sqrt(num_samples),
        level=level,
    )


def mean_interval(scores: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The mean of scores (samples,) with its normal interval."""
    estimate = float(scores.mean())
    spread = float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.inf
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return Interval(
        estimate=estimate,
        low=estimate - z * spread,
        high=estimate + z * spread,
        confidence=confidence,
        num_samples=len(scores),
    )


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
