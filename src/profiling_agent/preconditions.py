"""What is refused before time is spent on a run: budgets, runtimes and data that make no sense."""

from __future__ import annotations

import math

from profiling_agent.acquisition.workload import Workload
from profiling_agent.deployment.runtimes import RUNTIMES
from profiling_agent.errors import BudgetError, DataError
from profiling_agent.planning.check import check_budget
from profiling_agent.records.common import DEFAULT_DROP
from profiling_agent.records.trial import RunSettings

MAX_OUTPUT_BYTES = 2e9
"""Of one split's outputs, which are held in memory."""


def default_drop(asked: float | None, unit: str) -> float:
    """What may be lost when nobody says: half a point; ``BudgetError`` for any other unit."""
    if asked is not None:
        return asked
    if unit != "points":
        raise BudgetError(
            "A metric of your own needs --max-drop: what may be lost of it, in its own unit."
        )
    return DEFAULT_DROP


def check_settings(settings: RunSettings) -> None:
    """``BudgetError`` for a budget or a runtime that makes no sense."""
    check_budget(settings.budget)
    unknown = [name for name in settings.runtimes if name not in RUNTIMES]
    if unknown:
        raise BudgetError(f"There is no runtime {unknown[0]!r}; choose from {', '.join(RUNTIMES)}.")
    if not settings.runtimes:
        raise BudgetError(f"No runtime was named; choose from {', '.join(RUNTIMES)}.")
    if settings.planner == "paper" and "torch" not in settings.runtimes:
        raise BudgetError("The paper's way runs in torch, which --runtime excludes.")


def check_task(workload: Workload, settings: RunSettings) -> None:
    """``DataError`` when the data can't decide about the budget, before time is spent."""
    splits = {split.name: split for split in workload.record.splits}
    if "search" not in splits or "test" not in splits:
        raise DataError(
            "Optimizing needs data: pass --data with labels, or without labels and "
            "--metric agreement."
        )
    num_test, budget = splits["test"].num_samples, settings.budget
    if workload.record.task.unit == "points" and 100.0 / num_test > budget.max_drop:
        raise DataError(
            f"One of the {num_test:,} test samples weighs {100.0 / num_test:.2g} points, more than "
            f"the budget of {budget.max_drop:g}. Give more test data, or allow a larger --max-drop."
        )
    task, most = workload.record.task, max(split.num_samples for split in splits.values())
    num_bytes = 4 * most * math.prod(task.output_shape)
    if num_bytes > MAX_OUTPUT_BYTES:
        raise DataError(
            f"The outputs of {most:,} samples, {task.output_shape} each, would take "
            f"{num_bytes / 1e9:.0f} GB. Reduce them in the model's factory (to classes, say, or to "
            "what the metric needs), or give fewer samples."
        )
