"""What a trial is expected to lose: what its samples say, and what its divergence says.

A drop counts the few samples whose answer changed, and on some thousands of them it is known to
half a budget. The divergence is told by every sample, and over the plans of one model drops are
proportional to it (``docs/log.md`` has the measurement). So a line through nothing is fitted to the
trials, and the expected drop is the mean of the trial's own and the line's, each weighted by how
well it is known: a normal-normal shrinkage. The slope starts from what random noise on the logits
costs, and the trials correct it; but all are judged on the same samples, so half of their errors is
the same, and many trials tell little more of the slope than two.

Where every changed answer is a loss, as of agreement with the original, nothing cancels: the drop
is known as it is. It mostly grows with the root of the divergence, which is a square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from profiling_agent.records.common import Budget
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.trial import Trial

KL_PER_POINT = 0.02
"""First guess of the divergence (nats) that costs one point of accuracy, where noise tells none;
and how far the first plans may go in any case (``allowance.py``)."""
CHANGED = 25.0
"""The same for the percentage of answers that change, over the root of the divergence (nats); 20
and 22 were measured of the demos' models."""
SPREAD, WIDER = 0.7, 1.0
"""Of the logarithm of the slope about what noise costs, and about those. Plans of three models lost
0.5 to 4 times what noise of their divergence does."""
REACH, NUM_STEPS = 8.0, 321
"""Of the grid on which the slope is found: so many spreads each way."""
MAX_POINTS = 5.0
"""Of a budget in another unit, for the first guess; an error near zero would make it boundless."""
MISFIT = 0.15
"""How far, as a share of the line's drop, plans lie about the line besides the samples' noise: 0.07
to 0.11 was measured of the plans of six runs, on 10,000 samples and with smoothed answers."""
BLUR = 0.1
"""Of the budget: what the line's drop is unsure by where the divergence is nothing."""
LEAST = 1e-5
"""Of that blur: no point is known better than to this, so that nothing is divided by zero."""
DOUBT = 1.0
"""Twice the logarithm of a likelihood ratio that is taken for chance, or rounding."""
SHARED = 0.5
"""Of the variance of a trial's sampling error: what it has in common with other trials', which are
judged on the same samples. Correlations of 0.2 to 0.9 were measured."""


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
    """Bayesian regression through nothing; ``None`` without a divergence to go by.

    Where every changed answer is a loss, the drop may also follow the root of the divergence: of
    both laws the one that affords less, unless the other fits the trials clearly better.
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
    noise = _noise_divergence(history)
    spread = SPREAD if noise else WIDER
    guess = budget.max_drop / noise if noise else unit / KL_PER_POINT
    line = Slope(value=guess, deviation=spread * guess, blur=blur)
    if not any(_every_change_is_loss(trial, budget) for trial in history):
        return _fit(known, line)
    guess = budget.max_drop / math.sqrt(noise) if noise else unit * CHANGED
    root = Slope(value=guess, deviation=spread * guess, power=0.5, blur=blur)
    laws = [_fit(known, replace(prior, is_loss=True)) for prior in (root, line)]
    careful, other = sorted(laws, key=lambda law: law.divergence_at(budget.max_drop))
    ahead = _unlikelihood(known, careful) - _unlikelihood(known, other)
    return other if ahead > DOUBT else careful


def _noise_divergence(history: Sequence[Trial]) -> float | None:
    """What was recorded with the trials; the same for all."""
    known = (trial.on_search for trial in history)
    return next((a.noise_divergence for a in known if a and a.noise_divergence), None)


_Point = tuple[float, float, float]
"""Divergence, drop, and the standard error of that."""


def _fit(known: Sequence[_Point], guess: Slope) -> Slope:
    """The slope after the points, the mean and the standard deviation over a grid; before them its
    logarithm is normal and its mean the guess. What the points' errors share is not averaged out.
    """
    aparts, drops, errors = (np.array(column)[:, None] for column in zip(*known, strict=True))
    along, least = aparts**guess.power, (LEAST * guess.blur) ** 2
    steps = np.linspace(-REACH, REACH, NUM_STEPS)
    spread = guess.deviation / guess.value
    slopes = guess.value * np.exp(spread * steps - spread**2 / 2)
    misfits = (MISFIT * slopes * along) ** 2 + least  # (points, slopes)
    weights = along / (errors**2 + misfits)
    totals = (weights * along).sum(0)
    alone = (weights**2 * ((1 - SHARED) * errors**2 + misfits)).sum(0)
    shared = SHARED * (weights * errors).sum(0) ** 2
    likely = -(steps**2) / 2
    if totals.min() > 0.0:
        spreads = (alone + shared) / totals**2
        gaps = (weights * drops).sum(0) / totals - slopes
        likely -= gaps**2 / spreads / 2 + np.log(spreads) / 2
    chances = np.exp(likely - likely.max())
    chances /= chances.sum()
    value = float((chances * slopes).sum())
    deviation = float((chances * (slopes - value) ** 2).sum()) ** 0.5
    return replace(guess, value=value, deviation=deviation)


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
    ``None`` where that is missing too.

    That the trial has helped to fit the slope is not taken off, which gives its own drop a little
    more weight.
    """
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
