"""What every planner is: a pure function from records to the next plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from profiling_agent.errors import BudgetError
from profiling_agent.records.common import Budget
from profiling_agent.records.llm import Guard, LlmSettings, LlmUsage
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

AdvisedName = Literal["llm", "hybrid", "paper"]
ADVISED: tuple[AdvisedName, ...] = ("llm", "hybrid", "paper")
"""Planners that ask a language model."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A plan with what the planner expects of it; ``None`` where it has no estimate.

    ``relative_latency`` is over the baseline's; ``kl`` is the predicted divergence of the outputs.
    ``author`` is who wrote it, where that isn't the planner itself; ``changed`` says what guards
    made of it, and why.
    """

    plan: Plan
    relative_latency: float | None = None
    kl: float | None = None
    author: str | None = None
    changed: str = ""


class Planner(Protocol):
    """Same profile, history, budget and seed: same proposal. ``None``: nothing left to propose."""

    @property
    def name(self) -> str: ...

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None: ...


@runtime_checkable
class Advised(Planner, Protocol):
    """A planner that asks a language model, and is guarded."""

    @property
    def reserve(self) -> Planner | None:
        """Who proposes the last trials of a run, and all when this planner has nothing left."""
        ...

    @property
    def usage(self) -> LlmUsage: ...

    def allow(self, seconds: float) -> None:
        """What the next proposal may take at most, waiting for answers."""
        ...

    def recall(self, trials: Sequence[Trial], guards: Sequence[Guard]) -> None:
        """What an earlier process of the run carried out and its guards did; before a proposal."""
        ...

    def take_guards(self) -> tuple[Guard, ...]:
        """What the guards did since the last call."""
        ...


def planner_name(name: str, llm: LlmSettings | None) -> str:
    """What ``auto`` stands for: ``hybrid`` with a language model, else ``solver``."""
    if name != "auto":
        return name
    return "solver" if llm is None else "hybrid"


def find_planner(
    name: str,
    llm: LlmSettings | None = None,
    transcript: Path | None = None,
    *,
    is_bare: bool = False,
) -> Planner:
    """The planner of that name; ``BudgetError`` lists those there are.

    ``MissingDependency`` for one that stands on a package which is not installed. ``llm`` is whom
    an advised planner asks, ``transcript`` the file that keeps what was said, and a bare one has
    nobody behind it.
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
    for each in ADVISED:
        planners[each] = partial(_advised, each, llm, transcript, is_bare=is_bare)
    if name not in planners:
        raise BudgetError(f"There is no planner {name!r}. Choose one of {', '.join(planners)}.")
    if llm is not None and name not in ADVISED:
        raise BudgetError(
            f"The planner {name!r} asks no language model; leave --llm out, or choose one of "
            f"{', '.join(ADVISED)}."
        )
    return planners[name]()


def _advised(
    name: AdvisedName, llm: LlmSettings | None, transcript: Path | None, *, is_bare: bool
) -> Planner:
    from profiling_agent.llm.client import Client
    from profiling_agent.llm.provider import open_provider
    from profiling_agent.llm.replay import Replay
    from profiling_agent.llm.transcript import Transcript
    from profiling_agent.planning.advised import AdvisedPlanner

    if llm is None:
        raise BudgetError(
            f"The planner {name!r} asks a language model; name one with --llm, such as "
            "--llm openai:gpt-4o or --llm ollama:llama3.2."
        )
    provider = open_provider(llm)
    own = provider.path if isinstance(provider, Replay) else None
    if own is not None and transcript is not None and own.resolve() == transcript.resolve():
        raise BudgetError(
            f"{str(own)!r} belongs to the run itself; copy it elsewhere to replay it."
        )
    kept = Transcript(transcript) if transcript is not None else None
    if isinstance(provider, Replay) and kept is not None:
        provider.resume(kept.earlier)
    return AdvisedPlanner(name, Client(provider, llm.limits, kept), llm, is_bare=is_bare)
