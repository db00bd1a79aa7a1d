"""How much of objective and accuracy a set of trials dominates, as one number."""

from __future__ import annotations

from collections.abc import Sequence

from profiling_agent.planning.history import objective_value, pareto, search_drop, trial_value
from profiling_agent.records.common import Budget
from profiling_agent.records.evaluation import Evaluation
from profiling_agent.records.trial import Trial


def reference_drop(budget: Budget) -> float:
    """The drop at which an artefact counts for nothing: twice the budget."""
    return 2.0 * budget.max_drop or 1.0


def gain(trial: Trial, baseline: Evaluation, budget: Budget) -> float | None:
    """How many times better than the original in the objective; ``None`` when not measured."""
    value = trial_value(trial, budget)
    if not value:
        return None
    if budget.objective in ("latency", "throughput"):
        return 1.0 / value
    original = objective_value(baseline, budget)
    return original / value if original else None


def hypervolume(trials: Sequence[Trial], baseline: Evaluation, budget: Budget) -> float:
    """The dominated share of the unit square; higher is better.

    One axis is the objective over the original's, the other the drop on the search split over
    ``reference_drop``, a gain in accuracy counted as no loss. Trials outside of it add nothing.
    """
    points: list[tuple[float, float]] = []
    for trial in pareto(trials, budget):
        better, drop = gain(trial, baseline, budget), search_drop(trial)
        if better and drop is not None:
            points.append((1.0 / better, max(0.0, drop) / reference_drop(budget)))
    inside = sorted(point for point in points if point[0] < 1.0 and point[1] < 1.0)
    total, lowest = 0.0, 1.0
    for cost, loss in inside:
        if loss < lowest:
            total += (1.0 - cost) * (lowest - loss)
            lowest = loss
    return total
