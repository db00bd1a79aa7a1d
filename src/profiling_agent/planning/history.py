"""Reading the trials so far: which were feasible, how fast, and how far predictions were off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from profiling_agent.planning.drops import Slope, expected_drop, fitted_slope
from profiling_agent.records.common import Budget
from profiling_agent.records.evaluation import Evaluation
from profiling_agent.records.profile import DeployedProfile, DeployedWidths
from profiling_agent.records.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A runtime and one of its schemes."""

    runtime: str
    scheme: str


def search_drop(trial: Trial) -> float | None:
    """Points lost on the search split, or ``None`` when it was not measured there."""
    accuracy = trial.on_search
    return accuracy.drop.estimate if accuracy and accuracy.drop else None


def relative_latency(trial: Trial) -> float | None:
    """Latency over the baseline's, from one interleaved measurement; by way of the reference where
    that was in it."""
    return _relative(trial.evaluation) if trial.evaluation else None


def _relative(evaluation: Evaluation) -> float | None:
    if evaluation.relative is not None:
        return evaluation.relative
    return 1.0 / evaluation.speedup.ratio.estimate if evaluation.speedup else None


def objective_value(evaluation: Evaluation, budget: Budget) -> float | None:
    """What is to be made small; ``None`` when it was not measured.

    ``throughput`` is that of one process at the deployment's batch size, so it ranks artefacts as
    the latency of a batch does.
    """
    match budget.objective:
        case "latency" | "throughput":
            return _relative(evaluation)
        case "size":
            return None if evaluation.size_bytes is None else float(evaluation.size_bytes)
        case "memory":
            return None if evaluation.memory_bytes is None else float(evaluation.memory_bytes)


def trial_value(trial: Trial, budget: Budget) -> float | None:
    return objective_value(trial.evaluation, budget) if trial.evaluation else None


def holds(trial: Trial, slope: Slope | None, budget: Budget, share: float = 1.0) -> bool:
    """Whether its expected drop (``drops.py``) is within that share of the budget, and its measured
    one not clearly over the budget."""
    expected = expected_drop(trial, slope)
    if expected is None or is_clearly_over(trial, budget):
        return False
    return expected <= share * budget.max_drop * (1 + 1e-9)


def is_clearly_over(trial: Trial, budget: Budget) -> bool:
    """Over the budget on search, even by the lower end of the drop's interval; or not measured."""
    accuracy = trial.on_search
    if trial.status != "done" or accuracy is None or accuracy.drop is None:
        return True
    return accuracy.drop.low > budget.max_drop


def feasible(
    trials: Sequence[Trial],
    budget: Budget,
    known: Sequence[Trial] | None = None,
    *,
    earlier: float = 1.0,
) -> list[Trial]:
    """Done trials that hold and whose objective was measured, best first; ties keep their order.
    Plans of earlier runs may be expected to lose ``earlier`` of the budget.

    They are judged by all that is ``known`` of the model, which are the same trials by default.
    """
    slope = fitted_slope(trials if known is None else known, budget)
    good = [
        trial
        for trial in trials
        if holds(trial, slope, budget, earlier if trial.is_earlier else 1.0)
        and trial_value(trial, budget) is not None
    ]
    return sorted(good, key=lambda trial: trial_value(trial, budget) or 0.0)


def pareto(trials: Sequence[Trial], budget: Budget) -> list[Trial]:
    """Done trials that no other beats in both objective and drop, best objective first."""
    points = [
        (value, drop, trial)
        for trial in trials
        if trial.status == "done"
        and (value := trial_value(trial, budget)) is not None
        and (drop := search_drop(trial)) is not None
    ]
    points.sort(key=lambda point: (point[0], point[1]))
    front: list[Trial] = []
    lowest = float("inf")
    for _value, drop, trial in points:
        if drop < lowest:
            front.append(trial)
            lowest = drop
    return front


def controls(trials: Sequence[Trial]) -> dict[Pair, Trial]:
    """The measured control of each runtime and scheme."""
    return {
        Pair(runtime=t.plan.runtime, scheme=t.plan.quantization.scheme): t
        for t in trials
        if t.is_control and t.status == "done"
    }


def pair_of(trial: Trial) -> Pair:
    return Pair(runtime=trial.plan.runtime, scheme=trial.plan.quantization.scheme)


def measured_pair(measured: DeployedProfile | DeployedWidths) -> Pair:
    """In which the operators or widths were timed."""
    return Pair(runtime=measured.runtime, scheme=measured.scheme)
