"""What a trial is expected to lose: what its samples say, and what its divergence says.

A drop counts the few samples whose answer changed, and on some thousands of them it is known to
half a budget. The divergence is told by every sample, and over the plans of one model drops are
proportional to it (``docs/log.md`` has the measurement). So a line through nothing is fitted to the
trials, and the expected drop is the mean of the trial's own and the line's, each weighted by how
well it is known: a normal-normal shrinkage. The slope starts from a prior that the trials replace.

Where every changed answer is a loss, as of agreement with the original, nothing cancels: the drop
is known as it is. It mostly grows with the root of the divergence, which is a square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from profiling_agent.records.common import Budget
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.trial import Trial

KL_PER_POINT = 0.02
"""First guess of the divergence (nats) that costs one point of accuracy; trials correct it."""
CHANGED = 25.0
"""First guess of the percentage of answers that change, over the root of the divergence (nats); 20
and 22 were measured of the demos' models."""
MAX_POINTS = 5.0
"""Of a budget in another unit, for the first guess; an error near zero would make it boundless."""
MISFIT = 0.3
"""How far, as a share of the line's drop, plans lie about the line besides the samples' noise."""
BLUR = 0.1
"""Of the budget: what the line's drop is unsure by where the divergence is nothing."""
LEAST = 1e-5
"""Of that blur: no point is known better than to this, so that nothing is divided by zero."""
DOUBT = 1.0
"""Twice the logarithm of a likelihood ratio that is taken for chance, or rounding."""
SHARED = 0.15
"""Of the slope: what is left unknown however many trials there are, since all share the samples."""


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Drop over divergence to a ``power``, in the metric's unit per nat, and the standard deviation
    of that. No drop on the line is known better than to ``blur``; where every changed answer
    ``is_loss``, drops are known without it."""

    value: float
    deviation: float
    power: float = 1.0
    is_loss: bool = False
    blur: float = 0.0

    def drop_at(self, apart: float) -> float:
        """What is lost at so many nats."""
        return self.value * max(0.0, apart) ** self.power

    def divergence_at(self, drop: float) -> float:
        """Nats at which so much is lost."""
        return (drop / self.value) ** (1.0 / self.power)


def points(budget: Budget, history: Sequence[Trial]) -> float:
    """The budget in points; of a metric in another unit, in percent of what a control reaches."""
    if budget.unit == "points":
        return budget.max_drop
    for trial in history:
        accuracy = trial.on_search
        if trial.is_control and trial.status == "done" and accuracy and accuracy.value != 0.0:
            return min(MAX_POINTS, 100.0 * budget.max_drop / abs(accuracy.value))
    return 1.0


def divergence(trial: Trial) -> float | None:
    """Of the trial's outputs from the original's on the search samples, if that was recorded."""
    accuracy = trial.on_search
    return None if accuracy is None else accuracy.divergence


def fitted_slope(history: Sequence[Trial], budget: Budget) -> Slope | None:
    """Bayesian linear regression through nothing; ``None`` without a divergence to go by.

    Where every changed answer is a loss, on the root of the divergence, which expects more of small
    ones, unless the line fits the trials clearly better.
    """
    in_points = points(budget, history)
    if in_points <= 0.0 or budget.max_drop <= 0.0:
        return None
    known = [
        (max(0.0, apart), accuracy.drop.estimate, _deviation(accuracy))
        for trial in history
        if trial.status == "done"
        and (accuracy := trial.on_search) is not None
        and accuracy.drop is not None
        and (apart := accuracy.divergence) is not None
    ]
    if not known:
        return None
    unit, blur = budget.max_drop / in_points, BLUR * budget.max_drop
    line = Slope(value=unit / KL_PER_POINT, deviation=unit / KL_PER_POINT, blur=blur)
    if not any(_every_change_is_loss(trial, budget) for trial in history):
        return _fit(known, line)
    root = Slope(value=unit * CHANGED, deviation=unit * CHANGED, power=0.5, blur=blur)
    careful, other = (_fit(known, replace(prior, is_loss=True)) for prior in (root, line))
    ahead = _unlikelihood(known, careful) - _unlikelihood(known, other)
    return other if ahead > DOUBT else careful


_Point = tuple[float, float, float]
"""Divergence, drop, and the standard error of that."""


def _fit(known: Sequence[_Point], prior: Slope) -> Slope:
    slope, least = prior, (LEAST * prior.blur) ** 2
    for _ in range(2):  # the misfit of a point follows from the slope
        precision, weighted = prior.deviation**-2, prior.value * prior.deviation**-2
        for apart, drop, error in known:
            along = apart**prior.power
            weight = 1.0 / (error**2 + (MISFIT * slope.value * along) ** 2 + least)
            precision += weight * along**2
            weighted += weight * along * drop
        value = max(weighted / precision, 0.1 * prior.value)
        deviation = (1.0 / precision + (SHARED * value) ** 2) ** 0.5
        slope = replace(slope, value=value, deviation=deviation)
    return slope


def _unlikelihood(known: Sequence[_Point], slope: Slope) -> float:
    """Minus twice the logarithm of the likelihood of the drops, but for a constant."""
    total = 0.0
    for apart, drop, error in known:
        line = slope.drop_at(apart)
        variance = error**2 + (MISFIT * line) ** 2 + (LEAST * slope.blur) ** 2
        total += (drop - line) ** 2 / variance + math.log(variance)
    return total


def expected_drop(trial: Trial, slope: Slope | None) -> float | None:
    """In the metric's unit; the drop as it was measured where there is no divergence to go by,
    ``None`` where that is missing too."""
    accuracy = trial.on_search
    if accuracy is None or accuracy.drop is None:
        return None
    own, apart = accuracy.drop.estimate, accuracy.divergence
    if slope is None or apart is None or slope.is_loss:
        return own
    line = slope.drop_at(apart)
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
    accuracy = trial.on_search
    if budget.unit != "points" or accuracy is None or accuracy.drop is None:
        return False
    return abs(accuracy.value + accuracy.drop.estimate - 100.0) < 1e-9


def _deviation(accuracy: Accuracy) -> float:
    """The standard error of the measured drop."""
    drop = accuracy.drop
    assert drop is not None
    return (drop.high - drop.low) / 2 / NormalDist().inv_cdf(0.5 + drop.confidence / 2)
