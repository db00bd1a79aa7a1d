"""What a trial is expected to lose: what its samples say, and what its divergence says.

A drop counts the few samples whose answer changed, and on some thousands of them it is known to
half a budget. The divergence is told by every sample, and over the plans of one model drops are
proportional to it (``docs/log.md`` has the measurement). So a line through nothing is fitted to the
trials, and the expected drop is the mean of the trial's own and the line's, each weighted by how
well it is known: a normal-normal shrinkage. The slope starts from a prior that the trials replace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from profiling_agent.records.common import Budget
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.trial import Trial

KL_PER_POINT = 0.02
"""First guess of the divergence (nats) that costs one point of accuracy; trials correct it."""
MAX_POINTS = 5.0
"""Of a budget in another unit, for the first guess; an error near zero would make it boundless."""
MISFIT = 0.3
"""How far, as a share of the line's drop, plans lie about the line besides the samples' noise."""
SHARED = 0.15
"""Of the slope: what is left unknown however many trials there are, since all share the samples."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Drop over divergence, in the metric's unit per nat, and the standard deviation of that."""

    value: float
    deviation: float


def points(budget: Budget, history: Sequence[Trial]) -> float:
    """The budget in points; of a metric in another unit, in percent of what a control reaches."""
    if budget.unit == "points":
        return budget.max_drop
    for trial in history:
        accuracy = _on_search(trial)
        if trial.is_control and trial.status == "done" and accuracy and accuracy.value != 0.0:
            return min(MAX_POINTS, 100.0 * budget.max_drop / abs(accuracy.value))
    return 1.0


def divergence(trial: Trial) -> float | None:
    """Of the trial's outputs from the original's on the search samples, if that was recorded."""
    accuracy = _on_search(trial)
    return None if accuracy is None else accuracy.divergence


def fitted_slope(history: Sequence[Trial], budget: Budget) -> Slope | None:
    """Bayesian linear regression through nothing; ``None`` without a divergence to go by."""
    in_points = points(budget, history)
    if in_points <= 0.0:
        return None
    prior = budget.max_drop / in_points / KL_PER_POINT
    known = [
        (apart, accuracy.drop.estimate, _deviation(accuracy))
        for trial in history
        if trial.status == "done"
        and (accuracy := _on_search(trial)) is not None
        and accuracy.drop is not None
        and (apart := accuracy.divergence) is not None
    ]
    if not known:
        return None
    slope = Slope(value=prior, deviation=prior)
    for _ in range(2):  # the misfit of a point follows from the slope
        precision, weighted = prior**-2, prior**-1
        for apart, drop, deviation in known:
            weight = 1.0 / (deviation**2 + (MISFIT * slope.value * apart) ** 2 + 1e-12)
            precision += weight * apart**2
            weighted += weight * apart * drop
        value = max(weighted / precision, 0.1 * prior)
        slope = Slope(value=value, deviation=(1.0 / precision + (SHARED * value) ** 2) ** 0.5)
    return slope


def expected_drop(trial: Trial, slope: Slope | None) -> float | None:
    """In the metric's unit; the drop as it was measured where there is no divergence to go by,
    ``None`` where that is missing too."""
    accuracy = _on_search(trial)
    if accuracy is None or accuracy.drop is None:
        return None
    own, apart = accuracy.drop.estimate, accuracy.divergence
    if slope is None or apart is None:
        return own
    line = slope.value * apart
    unsure = (MISFIT * line) ** 2 + (slope.deviation * apart) ** 2
    noise = _deviation(accuracy) ** 2
    if noise == 0.0:
        return own
    return (own * unsure + line * noise) / (unsure + noise)


def expected_drops(history: Sequence[Trial], budget: Budget) -> Mapping[str, float]:
    """By trial id, of the trials that were judged."""
    slope = fitted_slope(history, budget)
    found = {trial.trial_id: expected_drop(trial, slope) for trial in history}
    return {name: drop for name, drop in found.items() if drop is not None}


def _on_search(trial: Trial) -> Accuracy | None:
    return trial.evaluation.on("search") if trial.evaluation else None


def _deviation(accuracy: Accuracy) -> float:
    """The standard error of the measured drop."""
    drop = accuracy.drop
    assert drop is not None
    return (drop.high - drop.low) / 2 / NormalDist().inv_cdf(0.5 + drop.confidence / 2)
