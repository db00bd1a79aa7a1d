"""What ``optimize`` would do with a workload when it is given no flags, for check to tell."""

from __future__ import annotations

from typing import Final

from profiling_agent.acquisition.splits import thinned
from profiling_agent.deployment.runtimes import INSTALL_LINES, RUNTIMES
from profiling_agent.records.check import Defaults
from profiling_agent.records.common import DEFAULT_DROP, Budget, Deployment
from profiling_agent.records.workload import SplitName, WorkloadRecord

MAX_SAMPLES_OF_A_RUN: Final = 20_000


def whole_splits(record: WorkloadRecord) -> dict[SplitName, int]:
    """Samples that ``optimize`` will have in each split, damaged ones aside."""
    return thinned(record.available, MAX_SAMPLES_OF_A_RUN)


def describe_defaults(record: WorkloadRecord, deployment: Deployment) -> Defaults:
    """What ``optimize`` would use without flags; the deployment is the one asked for."""
    budget = Budget(max_drop=DEFAULT_DROP, unit=record.task.unit)
    has_default = record.task.unit == "points"
    versions = {name: runtime.version() for name, runtime in RUNTIMES.items()}
    return Defaults(
        max_drop=budget.max_drop if has_default else None,
        unit=budget.unit,
        time_budget_s=budget.time_s,
        max_trials=budget.max_trials,
        deployment=deployment,
        runtimes=tuple(f"{name} {version}" for name, version in versions.items() if version),
        missing_runtimes=tuple(
            f"{name}: {INSTALL_LINES[name]}" for name, version in versions.items() if not version
        ),
        splits=whole_splits(record),
    )
