"""What a trial is expected to lose: what its samples say, and what its divergence says.

A drop counts the few samples whose answer changed, and on some thousands of them it is known to
half a budget. The divergence is told by every sample, and over the plans of one model drops are
proportional to it (``docs/log.md`` has the measurement). So a line through nothing is fitted to the
trials, and the expected drop is the mean of the trial's own and the line's, each weighted by how
well it is known: a normal-normal shrinkage. The slope starts from a prior that the trials replace.

Where every changed answer is a loss, as of agreement with the original, nothing cancels: the drop
is known as it is, and grows with the root of the divergence, which is a square.
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
CHANGED = 25.0
"""First guess of the percentage of answers that change, over the root of the divergence (nats)."""
MAX_POINTS = 5.0
"""Of a budget in another unit, for the first guess; an error near zero would make it boundless."""
MISFIT = 0.3
"""How far, as a share of the line's drop, plans lie about the line besides the samples' noise."""
BLUR = 0.1
"""Of the budget: what the line's drop is unsure by where the divergence is nothing."""
SHARED = 0.15
"""Of the slope: what is left unknown however many trials there are, since all share the samples."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Drop over divergence, in the metric's unit per nat, and the standard deviation of that; over
    its root where every changed answer ``is_loss``. No drop on the line is known better than to
    ``blur``."""

    value: float
    deviation: float
    is_loss: bool = False
    blur: float = 0.0

    def divergence_at(self, drop: float) -> float:
        """Nats at which so much is lost on the line."""
        return (drop / self.value) ** (2.0 if self.is_loss else 1.0)


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
    if in_points <= 0.0 or budget.max_drop <= 0.0:
        return None
    is_loss = any(_every_change_is_loss(trial, budget) for trial in history)
    blur = BLUR * budget.max_drop
    power = 0.5 if is_loss else 1.0
    prior = budget.max_drop / in_points * (CHANGED if is_loss else 1.0 / KL_PER_POINT)
    known = [
        (max(0.0, apart) ** power, accuracy.drop.estimate, _deviation(accuracy))
        for trial in history
        if trial.status == "done"
        and (accuracy := _on_search(trial)) is not None
        and accuracy.drop is not None
        and (apart := accuracy.divergence) is not None
    ]
    if not known:
        return None
    slope = Slope(value=prior, deviation=prior, is_loss=is_loss, blur=blur)
    for _ in range(2):  # the misfit of a point follows from the slope
        precision, weighted = prior**-2, prior**-1
        for apart, drop, deviation in known:
            weight = 1.0 / (deviation**2 + (MISFIT * slope.value * apart) ** 2 + 1e-12)
            precision += weight * apart**2
            weighted += weight * apart * drop
        value = max(weighted / precision, 0.1 * prior)
        deviation = (1.0 / precision + (SHARED * value) ** 2) ** 0.5
        slope = Slope(value=value, deviation=deviation, is_loss=is_loss, blur=blur)
    return slope


def expected_drop(trial: Trial, slope: Slope | None) -> float | None:
    """In the metric's unit; the drop as it was measured where there is no divergence to go by,
    ``None`` where that is missing too."""
    accuracy = _on_search(trial)
    if accuracy is None or accuracy.drop is None:
        return None
    own, apart = accuracy.drop.estimate, accuracy.divergence
    if slope is None or apart is None or slope.is_loss:
        return own
    line = slope.value * apart
    unsure = (MISFIT * line) ** 2 + (slope.deviation * apart) ** 2 + slope.blur**2
    noise = _deviation(accuracy) ** 2
    if noise == 0.0:
        return own
    return (own * unsure + line * noise) / (unsure + noise)


def expected_drops(history: Sequence[Trial], budget: Budget) -> Mapping[str, float]:
    """By trial id, of the trials that were judged."""
    slope = fitted_slope(history, budget)
    found = {trial.trial_id: expected_drop(trial, slope) for trial in history}
    return {name: drop for name, drop in found.items() if drop is not None}


def _every_change_is_loss(trial: Trial, budget: Budget) -> bool:
    """Whether the original is right on all: on agreement with it by definition."""
    accuracy = _on_search(trial)
    if budget.unit != "points" or accuracy is None or accuracy.drop is None:
        return False
    return abs(accuracy.value + accuracy.drop.estimate - 100.0) < 1e-9


def _on_search(trial: Trial) -> Accuracy | None:
    return trial.evaluation.on("search") if trial.evaluation else None


def _deviation(accuracy: Accuracy) -> float:
    """The standard error of the measured drop."""
    drop = accuracy.drop
    assert drop is not None
    return (drop.high - drop.low) / 2 / NormalDist().inv_cdf(0.5 + drop.confidence / 2)
