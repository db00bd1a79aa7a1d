"""Plans that earlier runs on this machine ended with.

A later run on the same model, calibration samples, machine and deployment, for the same budget and
objective, tries them first: what was found once is not lost, whatever chance did to the later
search. Handed on are the plans that a search nominated, in its order; it had not seen the test
split then, and what that said of them afterwards is not handed on. Every run measures them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from profiling_agent.acquisition.workload import Workload
from profiling_agent.planning.decide import MAX_CANDIDATES
from profiling_agent.profiling.profile_cache import identity
from profiling_agent.profiling.user_cache import file_of, keep, read_kept
from profiling_agent.records.base import Record
from profiling_agent.records.common import Budget, Deployment, Machine
from profiling_agent.records.plan import Plan
from profiling_agent.records.trial import Candidate, Trial

MOST_KEPT = 256
"""Files in the folder; the oldest go."""
SHARE = 3
"""One of so many trials, at most, tries an earlier run's plan."""
MARK = ", in an earlier run"
"""Behind the name of a plan's author."""


class EarlierPlan(Record):
    """A plan and who wrote it."""

    plan: Plan
    author: str

    @property
    def marked(self) -> str:
        """The author, as trials have it."""
        return self.author.removesuffix(MARK) + MARK


class EarlierPlans(Record):
    """As they are stored, the most promising first."""

    plans: tuple[EarlierPlan, ...]


def is_earlier(author: str) -> bool:
    """Whether the author of a trial wrote its plan in an earlier run."""
    return author.endswith(MARK)


@dataclass(frozen=True, kw_only=True)
class PlanCache:
    """The plans of one workload, machine, deployment and budget; ``folder`` None finds and keeps
    nothing."""

    folder: Path | None
    workload: Workload
    machine: Machine
    deployment: Deployment
    budget: Budget

    def find(self) -> tuple[EarlierPlan, ...]:
        """At most as many as a run nominates."""
        found = read_kept(self._path(), EarlierPlans)
        return found.plans[:MAX_CANDIDATES] if found else ()

    def keep(self, trials: Sequence[Trial], candidates: Sequence[Candidate]) -> None:
        """Those that a run nominated, and after them earlier ones that it did not come to."""
        path = self._path()
        if path is None:
            return
        tried = {trial.plan.plan_id for trial in trials}
        by_id = {trial.trial_id: trial for trial in trials}
        nominated = [by_id[candidate.trial_id] for candidate in candidates]
        plans = [EarlierPlan(plan=trial.plan, author=trial.author) for trial in nominated]
        plans += [each for each in self.find() if each.plan.plan_id not in tried]
        if plans:
            keep(path, EarlierPlans(plans=tuple(plans[:MAX_CANDIDATES])), MOST_KEPT)

    def _path(self) -> Path | None:
        if self.folder is None:
            return None
        same = identity(self.workload, self.machine, self.deployment)
        if same is None:
            return None
        budget = self.budget
        return file_of(self.folder, (same, budget.max_drop, budget.unit, budget.objective))
