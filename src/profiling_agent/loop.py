"""The whole story: acquire, measure the controls, profile, propose, try, decide, hand over.

Every step is journalled, measured values included, before the next begins, so that a killed run
continues from its journal and measures nothing twice. The search split is what the loop looks at;
the test split is opened once, after the candidates are journalled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.earlier_plans import EarlierPlan, PlanCache
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.evaluation.statistics import provable_drop
from profiling_agent.finish import Finish
from profiling_agent.machine.clock import now
from profiling_agent.planning.history import feasible
from profiling_agent.planning.planner import Planner, find_planner
from profiling_agent.preconditions import check_settings, check_task
from profiling_agent.profiling.user_cache import user_folder
from profiling_agent.proposing import Proposals
from profiling_agent.records.llm import LlmSettings
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import RunRecord, RunSettings, Trial
from profiling_agent.records.workload import WorkloadRecord
from profiling_agent.report.live import Progress, SilentProgress
from profiling_agent.run_profile import take_profile
from profiling_agent.run_state import (
    draw_record,
    is_finished,
    refuse_others,
    resume,
    save_record,
)
from profiling_agent.workbench import Workbench

PATIENCE = 12
"""Trials without a better feasible plan after which the search stops."""
STARTING_WARM = ("solver", "llm", "hybrid")
"""Planners that go on from the plans of earlier runs; the others are there to be compared with."""
LLM_SHARE = 0.25
"""Of the time budget, for waiting for a language model's answers."""


def optimize_workload(
    request: Request,
    settings: RunSettings,
    *,
    out: Path,
    planner: Planner | None = None,
    progress: Progress | None = None,
) -> RunRecord:
    """Search for the best artefact within the budget and hand it over in ``out/artefact``.

    Continues a run that was stopped in ``out``, if it had the same settings and data. Raises the
    errors of ``errors.py``; whatever a plan causes becomes a FAILED trial instead.
    """
    progress = progress or SilentProgress()
    check_settings(settings)
    metric = load_metric(request.metric)
    store = RunStore(out)
    if planner is None and not is_finished(store):
        planner = find_planner(settings.planner, _within_time(settings), store.transcript)
    store.create()
    start = now()
    spent = store.journal.spent()
    store.journal.clock = lambda: spent + now() - start
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.locked())
        refuse_others(store, settings, request.source())
        progress.stage("acquiring", "model and data")
        workload = acquire(request, folder=store.data, seed=settings.seed)
        check_task(workload, settings)
        state = resume(store, settings, workload.record)
        if state.verdict is None:
            assert planner is not None
            bench = Workbench(
                store=store,
                settings=settings,
                workload=workload,
                judge=find_judge(workload.record.task, metric),
                state=state,
                progress=progress,
                is_live=request.is_live,
                stack=stack,
            )
            _walk(bench, planner)
        else:
            progress.message(f"This run is finished; {str(out)!r} holds its result.")
    record = draw_record(store, state)
    save_record(store, record)
    return record


def _within_time(settings: RunSettings) -> LlmSettings | None:
    """Whom to ask, waiting no longer than the time budget can bear."""
    if settings.llm is None:
        return None
    limits = settings.llm.limits
    seconds = min(limits.max_seconds, LLM_SHARE * settings.budget.time_s)
    return settings.llm.model_copy(
        update={"limits": limits.model_copy(update={"max_seconds": seconds})}
    )


def _walk(bench: Workbench, planner: Planner) -> None:
    """Set up, search, finish; each looks at the state first and does what is missing."""
    _say_what_is_provable(bench.workload.record, bench.progress)
    bench.set_up()
    profile = take_profile(bench)
    cache = PlanCache(
        folder=user_folder("plans"),
        workload=bench.workload,
        machine=bench.machine,
        settings=bench.settings,
    )
    starts_warm = planner.name in STARTING_WARM
    if profile is not None:
        _Search(bench, planner).walk(profile, cache.find() if starts_warm else ())
    bench.time_again(at_last=True)
    bench.runner.builder.close()
    bench.runner.close()
    finish = Finish(
        store=bench.store,
        settings=bench.settings,
        workload=bench.workload,
        state=bench.state,
        beside=bench.beside,
    )
    candidates = finish.nominate()
    if starts_warm:
        cache.keep(bench.state.trials, candidates)
    finish.walk(candidates)


def _say_what_is_provable(workload: WorkloadRecord, progress: Progress) -> None:
    if workload.task.unit == "points":
        num_test = workload.split("test").num_samples
        progress.message(
            f"{num_test:,} test samples can prove drops down to about "
            f"{provable_drop(num_test):.2f} points (if 2 % of the predictions change)"
        )


class _Search:
    """Propose, check, try, until time, trials, ideas or progress run out."""

    def __init__(self, bench: Workbench, planner: Planner) -> None:
        self.bench, self.planner, self.state = bench, planner, bench.state

    def walk(self, profile: Profile, earlier: Sequence[EarlierPlan]) -> None:
        bench = self.bench
        if self.state.candidates is not None:
            return
        proposals = Proposals(
            planner=self.planner,
            store=bench.store,
            state=self.state,
            settings=bench.settings,
            progress=bench.progress,
            warn=bench.warn,
            trials_left=self._trials_left,
            seconds_to_ask=self._seconds_to_ask,
            earlier=earlier,
        )
        for number, proposal, author in proposals.walk(profile):
            if bench.left < bench.reserve() + 1.3 * bench.usual_trial_s():
                bench.progress.message("the rest of the time is kept for the final measurement")
                if not self._ours(0):
                    bench.warn(
                        "Nothing was searched: what was measured before took the time budget. "
                        "Allow a larger --time-budget."
                    )
                break
            time = proposal.relative_latency
            trial = bench.try_plan(
                f"t{number}",
                proposal.plan,
                author,
                predicted_ms=1e3 * bench.call_s() * time if time else None,
                predicted_kl=proposal.kl,
                changed=proposal.changed,
            )
            bench.time_again()
            proposals.look_back(trial)
            no_better = f"no better plan in {PATIENCE} trials"
            since = proposals.since or sum(t.is_earlier for t in self._ours(0))
            if not self._stalled(since):
                continue
            if bench.plans_beside() in self._lately(since):
                continue  # the best had been a lucky race
            if not proposals.hand_over(no_better):
                bench.progress.message(no_better)
                break

    def _trials_left(self) -> int | None:
        """How many usual trials there is time for; ``None`` before the first."""
        usual = self.bench.usual_trial_s()
        return int((self.bench.left - self.bench.reserve()) / usual) if usual > 0 else None

    def _seconds_to_ask(self) -> float:
        """What a language model may take, so that two usual trials and the end still fit."""
        bench = self.bench
        return max(0.0, bench.left - bench.reserve() - 2 * bench.usual_trial_s())

    def _stalled(self, since: int) -> bool:
        """Whether patience has run out, counted from the trial after so many."""
        if len(self._ours(since)) <= PATIENCE:
            return False
        best = feasible(self.state.trials, self.bench.budget)
        return not best or best[0].trial_id not in self._lately(since)

    def _lately(self, since: int) -> set[str]:
        return {trial.trial_id for trial in self._ours(since)[-PATIENCE:]}

    def _ours(self, since: int) -> list[Trial]:
        return [trial for trial in self.state.trials if not trial.is_control][since:]
