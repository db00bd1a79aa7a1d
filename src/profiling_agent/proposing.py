"""Whose turn it is to propose, and what becomes of a proposal before it is a trial."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from profiling_agent.earlier_plans import SHARE, EarlierPlan
from profiling_agent.planning.check import check_plan
from profiling_agent.planning.decide import MAX_CANDIDATES
from profiling_agent.planning.drops import expected_drop, fitted_slope
from profiling_agent.planning.history import Pair, controls, feasible, search_drop
from profiling_agent.planning.planner import Advised, Planner, Proposal
from profiling_agent.planning.solver import estimate
from profiling_agent.records.llm import Guard
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import Rejection, RunSettings, Trial
from profiling_agent.report.live import Progress
from profiling_agent.run_state import RunState

RESERVED = 2
"""The last trials of a run that are the solver's, when a language model proposes; half of them
where there are fewer than four."""


def is_reserved(number: int, left: int) -> bool:
    """Whether trial ``number``, with so many left and itself among them, is the solver's."""
    return left <= min(RESERVED, (number - 1 + left) // 2)


def objection(
    plan: Plan, profile: Profile, history: Sequence[Trial], settings: RunSettings
) -> str | None:
    """Why a plan can't be tried, in words; ``None`` when it can."""
    reason = check_plan(plan, profile, {trial.plan.plan_id for trial in history})
    if reason is None and plan.runtime not in settings.runtimes:
        reason = f"The runtime {plan.runtime!r} is excluded by --runtime."
    return reason


@dataclass(kw_only=True)
class Proposals:
    """The search's proposals, one after the other; every step of a guard is journalled.

    ``trials_left`` says how many trials there is time for, ``None`` when that isn't known yet.
    """

    planner: Planner
    store: RunStore
    state: RunState
    settings: RunSettings
    progress: Progress
    warn: Callable[[str], None]
    trials_left: Callable[[], int | None]
    seconds_to_ask: Callable[[], float]
    earlier: Sequence[EarlierPlan] = ()
    """Plans of earlier runs, which are tried first."""

    def __post_init__(self) -> None:
        if isinstance(self.planner, Advised):
            self.planner.recall(self.state.trials, self.state.guards)
        self._journalled = Counter(self.state.guards)
        self._since = next(
            (_number(guard) - 1 for guard in self.state.guards if guard.action == "handover"), None
        )

    @property
    def since(self) -> int | None:
        """How many trials there were when the planner behind took over; ``None``: it has not."""
        return self._since

    def walk(self, profile: Profile) -> Iterator[tuple[int, Proposal, str]]:
        """Trial number, proposal and its author, until the planner has nothing left to propose."""
        while True:
            number = self._num_ours() + 1
            if number > self.settings.budget.max_trials:
                return
            earlier = self._earlier_plan(number, profile)
            if earlier is not None:
                yield number, earlier, earlier.author or ""
                continue
            planner = self._whose_turn(number)
            if isinstance(planner, Advised):
                planner.allow(self.seconds_to_ask())
            proposal = planner.propose(
                profile, tuple(self.state.trials), self.settings.budget, self.settings.seed
            )
            why = self._keep_guards(f"t{number}" if proposal else None)
            if proposal is None:
                if not self.hand_over(why or f"{planner.name} has nothing left to propose"):
                    return
                continue
            author = proposal.author or planner.name
            reason = self._reject(proposal.plan, profile, author)
            if reason is not None:  # a pure planner would only say the same again
                self.warn(f"The planner {planner.name!r} proposed a bad plan: {reason}")
                if not self.hand_over(f"{planner.name} proposed a bad plan: {reason}"):
                    return
                continue
            yield number, proposal, author

    def hand_over(self, why: str) -> bool:
        """For the rest of the run to the planner behind; whether there is one that has not taken
        over yet. A continued run knows of it by its guard."""
        if self._reserve is None or self._since is not None:
            return False
        self._since = self._num_ours()
        self._guard(
            Guard(
                action="handover",
                author="loop",
                trial_id=f"t{self._since + 1}",
                reason=f"{why}; {self._reserve.name} goes on",
            )
        )
        return True

    def _earlier_plan(self, number: int, profile: Profile) -> Proposal | None:
        """The next plan of an earlier run, with today's estimates: at the beginning, and as long as
        they are few among all trials and can be carried out."""
        if not self.earlier or any(not t.is_earlier for t in self._ours()):
            return None
        left, most = self.trials_left(), self.settings.budget.max_trials
        if left is not None:
            most = min(most, number - 1 + left)
        is_failing = any(trial.status == "failed" for trial in self._ours())
        if is_failing or number > min(MAX_CANDIDATES, most // SHARE):
            return None
        trials, measured = self.state.trials, controls(self.state.trials)
        for each in self.earlier:
            pair = Pair(runtime=each.plan.runtime, scheme=each.plan.quantization.scheme)
            if pair in measured and not objection(each.plan, profile, trials, self.settings):
                if number == 1:
                    self.progress.message("the plans that an earlier run ended with come first")
                return replace(estimate(each.plan, profile, trials), author=each.marked)
        return None

    def _ours(self) -> list[Trial]:
        return [trial for trial in self.state.trials if not trial.is_control]

    def _num_ours(self) -> int:
        return len(self._ours())

    @property
    def _reserve(self) -> Planner | None:
        return self.planner.reserve if isinstance(self.planner, Advised) else None

    def _whose_turn(self, number: int) -> Planner:
        """The planner, or who stands behind it: at the end of the run, or of its ideas."""
        if self._reserve is None:
            return self.planner
        in_time, left = self.trials_left(), self.settings.budget.max_trials - number + 1
        if in_time is not None:
            left = min(left, in_time)
        reserved = is_reserved(number, left)
        return self._reserve if reserved or self.since is not None else self.planner

    def _keep_guards(self, trial_id: str | None) -> str:
        """Journal what the guards did for a proposal, and what the asking has cost so far; why the
        planner itself hands over, if it does, which ``hand_over`` journals."""
        if not isinstance(self.planner, Advised):
            return ""
        why = ""
        for guard in self.planner.take_guards():
            if guard.action == "handover":
                why = guard.reason
                continue
            self._guard(guard.model_copy(update={"trial_id": trial_id}))
        usage = self.planner.usage
        if usage.requests and usage != self.state.llm:
            self.state.llm = usage
            self.store.journal.append("llm", usage)
        return why

    def _guard(self, guard: Guard) -> None:
        """Journal it, unless an earlier process did: a continued run may get an answer again."""
        if self._journalled[guard]:
            self._journalled[guard] -= 1
            return
        self.state.guards.append(guard)
        self.store.journal.append("guard", guard)
        self.progress.message(f"{guard.action}: {guard.reason}")

    def look_back(self, trial: Trial) -> None:
        """Say from where the search goes on after a model's plan that lost too much."""
        if self._reserve is None or trial.author == "solver" or trial.is_earlier:
            return
        best = feasible(self.state.trials, self.settings.budget)
        if trial.status == "failed" or trial.trial_id in {good.trial_id for good in best}:
            return
        lost = self._said_of_loss(trial) or trial.reason
        back = f"{best[0].trial_id} ({best[0].label})" if best else "the original"
        reason = f"{lost}; the search goes back to {back}"
        self._guard(Guard(action="rollback", author="loop", trial_id=trial.trial_id, reason=reason))

    def _said_of_loss(self, trial: Trial) -> str | None:
        budget = self.settings.budget
        drop = search_drop(trial)
        likely = expected_drop(trial, fitted_slope(self.state.trials, budget))
        if drop is None or likely is None:
            return None
        said = f"it lost {drop:.2f} {budget.unit}".rstrip()
        # what was measured may be within the budget, and what is likely over it
        return said if f"{drop:.2f}" == f"{likely:.2f}" else f"{said}, {likely:.2f} is likely"

    def _reject(self, plan: Plan, profile: Profile, author: str) -> str | None:
        reason = objection(plan, profile, self.state.trials, self.settings)
        if reason is not None and not any(r.plan == plan for r in self.state.rejections):
            rejection = Rejection(plan=plan, author=author, reason=reason)
            self.state.rejections.append(rejection)
            self.store.journal.append("rejection", rejection)
        return reason


def _number(guard: Guard) -> int:
    """Of the trial that a guard speaks of, from 1."""
    assert guard.trial_id is not None
    return int(guard.trial_id.removeprefix("t"))
