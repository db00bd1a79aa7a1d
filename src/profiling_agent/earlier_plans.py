"""Plans that earlier runs on this machine ended with: a warm start.

A later run on the same model, data, machine and deployment, for the same budget, objective and
runtimes, tries them first: what was found once is not lost, whatever chance did to the later
search. Handed on are the plans that a search nominated, in its order; it had not seen the test
split then, and what that said of them afterwards is not handed on. All splits have to be the same,
or a plan that was chosen on some samples could be judged on them. Every run measures them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from profiling_agent.acquisition.workload import Workload
from profiling_agent.planning.decide import MAX_CANDIDATES
from profiling_agent.profiling.profile_cache import identity
from profiling_agent.profiling.user_cache import file_of, keep, read_kept
from profiling_agent.records.base import Record
from profiling_agent.records.common import Machine
from profiling_agent.records.plan import Plan
from profiling_agent.records.trial import EARLIER, Candidate, RunSettings, Trial

MOST_KEPT = 256
"""Files in the folder; the oldest go."""
MOST_PLANS = 2 * MAX_CANDIDATES
"""In a file."""
SHARE = 3
"""One of so many trials, at most, tries an earlier run's plan."""


class EarlierPlan(Record):
    """A plan and who wrote it."""

    plan: Plan
    author: str

    @property
    def marked(self) -> str:
        """The author, as trials have it."""
        return self.author.removesuffix(EARLIER) + EARLIER


class EarlierPlans(Record):
    """As they are stored, in the order in which they are tried."""

    plans: tuple[EarlierPlan, ...]


@dataclass(frozen=True, kw_only=True)
class PlanCache:
    """The plans of one workload, machine and settings; ``folder`` None finds and keeps nothing."""

    folder: Path | None
    workload: Workload
    machine: Machine
    settings: RunSettings

    def find(self) -> tuple[EarlierPlan, ...]:
        found = read_kept(self._path, EarlierPlans)
        return found.plans if found else ()

    def keep(self, trials: Sequence[Trial], candidates: Sequence[Candidate]) -> None:
        """Those that a run nominated, after earlier ones that it did not come to."""
        tried = {trial.plan.plan_id for trial in trials}
        by_id = {trial.trial_id: trial for trial in trials}
        nominated = [by_id[candidate.trial_id] for candidate in candidates]
        ours = [EarlierPlan(plan=trial.plan, author=trial.author) for trial in nominated]
        left = [each for each in self.find() if each.plan.plan_id not in tried]
        left = left[: MOST_PLANS - len(ours)]
        keep(self._path, EarlierPlans(plans=(*left, *ours)), MOST_KEPT)

    @cached_property
    def _path(self) -> Path | None:
        if self.folder is None:
            return None
        settings, splits = self.settings, self.workload.record.splits
        same = identity(self.workload, self.machine, settings.deployment)
        if same is None:
            return None
        budget = settings.budget
        wanted = (budget.max_drop, budget.unit, budget.objective, budget.evidence)
        judged_on = [(split.name, split.sha256, split.num_samples) for split in splits]
        return file_of(self.folder, (same, judged_on, wanted, sorted(settings.runtimes)))
