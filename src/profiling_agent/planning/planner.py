"""What every planner is: a pure function from records to the next plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from profiling_agent.errors import BudgetError
from profiling_agent.records.common import Budget
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan with what the planner expects of it; ``None`` where it has no estimate.

    ``relative_latency`` is over the baseline's; ``kl`` is the predicted divergence of the outputs.
    """

    plan: Plan
    relative_latency: float | None = None
    kl: float | None = None


class Planner(Protocol):
    """Same profile, history, budget and seed: same proposal. ``None``: nothing left to propose."""

    @property
    def name(self) -> str: ...

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None: ...


def find_planner(name: str) -> Planner:
    """The planner of that name; ``BudgetError`` lists those there are.

    ``MissingDependency`` for one that stands on a package which is not installed.
    """
    from profiling_agent.planning.controls import Greedy, Random, Uniform
    from profiling_agent.planning.solver import Solver
    from profiling_agent.planning.tpe import Tpe

    planners: dict[str, Callable[[], Planner]] = {
        "solver": Solver,
        "uniform": Uniform,
        "random": Random,
        "greedy": Greedy,
        "tpe": Tpe,
    }
    if name not in planners:
        raise BudgetError(f"There is no planner {name!r}. Choose one of {', '.join(planners)}.")
    return planners[name]()
