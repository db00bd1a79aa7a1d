"""The whole story: acquire, measure the controls, profile, propose, try, decide, hand over.

Every step is journalled, measured values included, before the next begins, so that a killed run
continues from its journal and measures nothing twice. The search split is what the loop looks at;
the test split is opened once, after the candidates are journalled.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload
from profiling_agent.deployment.artefact import baseline_size
from profiling_agent.errors import (
    ModelError,
    TrialError,
)
from profiling_agent.evaluation.judge import Judge, find_judge
from profiling_agent.evaluation.measure import TRIAL, race
from profiling_agent.evaluation.predictor import LivePredictor, Predictor, ProbeProcess
from profiling_agent.evaluation.statistics import provable_drop
from profiling_agent.finish import (
    Finish,
    answers_of_original,
    final_seconds,
    forward_of_original,
)
from profiling_agent.machine.clock import load_average, now
from profiling_agent.machine.processor import describe_machine
from profiling_agent.off_the_shelf import control_plans
from profiling_agent.planning.decide import best_control
from profiling_agent.planning.estimate import controls_to_profile, likely_to_serve
from profiling_agent.planning.fits import check_fits
from profiling_agent.planning.history import (
    feasible,
    pareto,
    relative_latency,
    search_drop,
)
from profiling_agent.planning.planner import Planner, find_planner
from profiling_agent.preconditions import check_settings, check_task
from profiling_agent.profiling.deployed import profile_artefact, profile_pairs
from profiling_agent.profiling.width_cache import WidthCache, default_folder
from profiling_agent.proposing import Proposals
from profiling_agent.records.common import NotMeasured
from profiling_agent.records.evaluation import Evaluation
from profiling_agent.records.llm import LlmSettings
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import DeployedProfile, Profile
from profiling_agent.records.store import RunStore, read_array, write_array, write_text
from profiling_agent.records.trial import (
    RunRecord,
    RunSettings,
    Trial,
)
from profiling_agent.report.live import Progress, SilentProgress, quiet
from profiling_agent.run_state import (
    RunState,
    draw_record,
    refuse_others,
    resume,
    save_record,
)
from profiling_agent.trial import (
    Baseline,
    Builder,
    LocalBuilder,
    TrialRunner,
    WorkerBuilder,
    first_labels,
    timed_while_busy,
)
from profiling_agent.widths import measure_deployed_widths

PROFILE_SHARE = 0.2
MIN_PROFILE_S, PROFILE_FORWARDS = 5.0, 80
"""What a profile takes at least: seconds, and forwards of the original on a sample."""
CONTROLS_SHARE, MIN_CONTROLS = 0.5, 2
"""Of the time before the final stage, for controls; they stop there, but not before the second."""
SEARCH_SHARE, MIN_SEARCH, TYPICAL_GAIN = 0.006, 1000, 2.5
"""A trial's accuracy takes about this share of the time budget, if it runs so many times faster
than the original: the first so many search samples are looked at, but never fewer than 1,000."""
DEPLOYED_SHARE = 0.05
"""Of the time budget, for the operator times of the controls."""
WIDTHS_SHARE, MIN_WIDTHS_S, TRIALS_FIRST = 0.15, 10.0, 6
"""Of the time budget, for widths in the runtimes; there are none with less than so many seconds,
or when so many trials would not have time after them."""
PATIENCE = 5
"""Trials without a better feasible plan after which the search stops."""
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
    planner = planner or find_planner(settings.planner, _within_time(settings), store.transcript)
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
            run = _Run(
                store=store,
                settings=settings,
                workload=workload,
                judge=find_judge(workload.record.task, metric),
                state=state,
                planner=planner,
                progress=progress,
                is_live=request.is_live,
                stack=stack,
            )
            run.walk()
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


class _Run:
    """One walk through the stages; each looks at the state first and does what is missing."""

    def __init__(
        self,
        *,
        store: RunStore,
        settings: RunSettings,
        workload: Workload,
        judge: Judge,
        state: RunState,
        planner: Planner,
        progress: Progress,
        is_live: bool,
        stack: contextlib.ExitStack,
    ) -> None:
        self.store, self.settings, self.workload, self.state = store, settings, workload, state
        self.planner, self.progress, self.is_live, self.stack = planner, progress, is_live, stack
        self.budget, self.deployment = settings.budget, settings.deployment
        self.judge = judge
        self.machine = describe_machine()
        self._timed_again: set[str] = set()
        self.memory_limit = int(0.85 * self.machine.memory_bytes)

    @property
    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.budget.time_s - self.store.journal.clock()

    def walk(self) -> None:
        num_test = self.workload.record.split("test").num_samples
        if self.workload.record.task.unit == "points":
            self.progress.message(
                f"{num_test:,} test samples can prove drops down to about "
                f"{provable_drop(num_test):.2f} points (if 2 % of the predictions change)"
            )
        if self.is_live:
            self._warn("The model is a live object: its trials run in this process, unguarded.")
        baseline = self._baseline()
        builder = self._builder()
        runner = TrialRunner(
            builder=builder,
            workload=self.workload,
            baseline=baseline,
            judge=self.judge,
            deployment=self.deployment,
            max_drop=self.budget.max_drop,
            data=self.store.data,
            memory_limit=self.memory_limit,
        )
        self._controls(runner)
        self._time_again(runner)
        profile = self._profile(builder, runner)
        if profile is not None:
            self._search(runner, profile)
        builder.close()
        Finish(
            store=self.store,
            settings=self.settings,
            workload=self.workload,
            state=self.state,
            runner=runner,
            progress=self.progress,
            warn=self._warn,
        ).walk()

    # ---- the beginning

    def _warn(self, text: str) -> None:
        if text not in self.state.warnings:
            self.state.warnings.append(text)
            self.store.journal.append("warning", text)
            self.progress.message(f"warning: {text}")

    def _builder(self) -> Builder:
        builder: Builder = (
            LocalBuilder(self.workload)
            if self.is_live
            else WorkerBuilder(self.store.data, self.memory_limit)
        )
        self.stack.callback(builder.close)
        return builder

    def _baseline(self) -> Baseline:
        """Open the untouched model, measure it once, refuse a broken one."""
        self.progress.stage("baseline", "the untouched model in eager PyTorch")
        predictor = self._open_baseline()
        path = self.store.data / "baseline_search.npy"
        predicted = read_array(path)
        if self.state.baseline is None or predicted is None:
            call_s = self._seconds_a_call(predictor)
            num_samples = self._search_samples(call_s)
            predicted = answers_of_original(
                predictor, self.judge, self.store.data, "search", num_samples
            )
            labels = first_labels(self.workload.splits["search"].labels, len(predicted))
            self.judge.refuse_broken(predicted, labels)
            doubt = self.judge.doubt(predicted)
            if doubt is not None:
                self._warn(doubt)
            write_array(path, predicted)
            self._measure_baseline(predictor, predicted, call_s)
        predictor.pause()
        opened = [predictor]

        def again() -> Predictor:
            if not opened[-1].alive:
                opened.append(self._open_baseline())
            return opened[-1]

        measured = self.state.baseline.timing if self.state.baseline else None
        return Baseline(open=again, search=predicted, ms=measured.median_ms if measured else None)

    def _open_baseline(self) -> Predictor:
        try:
            predictor: Predictor = (
                LivePredictor(self.workload, self.deployment)
                if self.is_live
                else ProbeProcess.eager(self.store.data, self.deployment, self.memory_limit)
            )
        except TrialError as error:
            raise ModelError(f"The untouched model can't be opened: {error}") from None
        self.stack.callback(predictor.close)
        return predictor

    def _seconds_a_call(self, predictor: Predictor) -> float:
        """A first look at the original's latency; ``ModelError`` when its forward fails."""
        with forward_of_original("calibration"):
            predictor.prepare(self.store.data / "calibration")
            predictor.time_block(0.0, 1, 1)
            return median(predictor.time_block(0.1, 2, 1)) / 1e3

    def _search_samples(self, call_s: float) -> int:
        """How many samples of the search split the time allows to look at in every trial."""
        there = self.workload.record.split("search").num_samples
        size = self.deployment.batch_size
        num_calls = SEARCH_SHARE * self.budget.time_s * TYPICAL_GAIN / call_s
        num_samples = max(MIN_SEARCH, int(num_calls) * size)
        num_samples = -(-num_samples // size) * size
        if num_samples >= there:
            return there
        self._warn(
            f"The search looks at {num_samples:,} of the {there:,} search samples, so that trials "
            "fit into the time budget. The test split is used whole."
        )
        return num_samples

    def _measure_baseline(self, predictor: Predictor, predicted: np.ndarray, call_s: float) -> None:
        protocol = TRIAL.suited_to(call_s)
        try:
            with quiet(self.progress):
                timing = race({"baseline": predictor}, self.store.data / "calibration", protocol)
            memory = predictor.memory_bytes()
        except TrialError as error:
            raise ModelError(f"The untouched model can't be timed: {error}") from None
        measured = timing.timing("baseline")
        labels = first_labels(self.workload.splits["search"].labels, len(predicted))
        missing = ()
        if memory is None:
            missing = (NotMeasured(what="memory", reason="not a process of its own"),)
        evaluation = Evaluation(
            artefact="baseline",
            runtime="torch",
            scheme="eager fp32",
            deployment=self.deployment,
            accuracy=(self.judge.score("search", predicted, labels, None),),
            timing=measured,
            speedup=None,
            throughput_per_s=1e3 * self.deployment.batch_size / measured.median_ms,
            size_bytes=baseline_size(self.workload.model),
            weight_bytes=self.workload.record.weight_bytes,
            memory_bytes=memory,
            not_measured=missing,
        )
        self.state.baseline = evaluation
        self.store.journal.append("baseline", evaluation)
        load = load_average()
        if load is not None and load > 1.5 * self.machine.num_cores:
            self._warn(f"The machine is busy (load {load:.1f}); intervals will be wide.")

    # ---- the controls, the profile, the search

    def _controls(self, runner: TrialRunner) -> None:
        """Every runtime's off-the-shelf artefacts: what the user gets without us."""
        done = {trial.plan.plan_id for trial in self.state.trials}
        ends = self.left - CONTROLS_SHARE * (self.left - self._reserve())
        plans, left_out = control_plans(self.machine, self.settings)
        for sentence in left_out:
            self._warn(sentence)
        for plan in plans:
            if plan.plan_id in done:
                continue
            num_done, likely = len(self.state.trials), self._usual_trial_s()
            stop = ends if num_done >= MIN_CONTROLS else 0.0
            if num_done and self.left - likely < max(stop, self._reserve(num_artefacts=1)):
                self._warn(
                    f"The control {plan.runtime} {plan.quantization.scheme} was not measured: the "
                    "time budget is too short."
                )
                continue
            trial_id = f"c{len(self.state.trials) + 1}"
            self._try(runner, trial_id, plan, "control", is_control=True)

    def _call_s(self) -> float:
        baseline = self.state.baseline
        assert baseline is not None and baseline.timing is not None
        return baseline.timing.median_ms / 1e3

    def _usual_trial_s(self) -> float:
        """The median of the trials so far; 0 before the first."""
        seconds = sorted(trial.seconds for trial in self.state.trials)
        return seconds[len(seconds) // 2] if seconds else 0.0

    def _reserve(self, num_artefacts: int = 3) -> float:
        """Seconds kept for the final stage of so many artefacts: a control and two candidates."""
        num_test = self.workload.record.split("test").num_samples
        control = best_control(self.state.trials, self.budget)
        relative = (relative_latency(control) if control else None) or 0.6
        call_s = self._call_s()
        num_calls = -(-num_test // self.deployment.batch_size)
        return final_seconds(
            num_calls, call_s, relative * call_s, self.budget.time_s, num_artefacts
        )

    def _profile(self, builder: Builder, runner: TrialRunner) -> Profile | None:
        """The profile, or ``None`` with a warning: then the controls are all there is to choose."""
        if self.store.profile.exists() and self.state.profile_path is not None:
            profile = Profile.read(self.store.profile)
            check_fits(profile, self.machine, self.deployment)
            return profile
        left = self.left - self._reserve()
        if left < MIN_PROFILE_S + PROFILE_FORWARDS * self._call_s():
            self._warn(
                "Nothing was searched: the controls took the time budget. Allow a larger "
                "--time-budget."
            )
            return None
        deployed = self._deployed()
        self.progress.stage("profiling", "costs, groups, sensitivity")
        seconds = max(5.0, min(PROFILE_SHARE * self.budget.time_s, left))
        try:
            with quiet(self.progress):
                profile = builder.profile(self.deployment, seconds)
        except TrialError as error:
            self._warn(
                f"Nothing was searched, since the model can't be profiled: {error} Try "
                "'profiling-agent profile' on it alone."
            )
            return None
        finally:
            builder.pause()
        profile = self._with_widths(runner, profile.model_copy(update={"deployed": deployed}))
        write_text(self.store.profile, profile.to_json())
        self.state.profile_path = self.store.profile.name
        self.store.journal.append("profile", {"path": self.store.profile.name})
        return profile

    def _deployed(self) -> tuple[DeployedProfile, ...]:
        """Operator times of the int8 controls and their float counterparts, the fastest first."""
        ends = self.store.journal.clock() + DEPLOYED_SHARE * self.budget.time_s

        def profile(trial: Trial) -> DeployedProfile | None:
            self.progress.stage("profiling", f"the operators of {trial.label}")
            try:
                return profile_artefact(
                    self.store.trial(trial.trial_id),
                    self.store.data / "calibration",
                    self.deployment,
                    memory_limit=self.memory_limit,
                )
            except TrialError as error:
                self._warn(f"The operators of {trial.label} could not be timed: {error}")
                return None

        return profile_pairs(
            controls_to_profile(self.state.trials),
            profile,
            has_time=lambda: self.store.journal.clock() <= ends,
        )

    def _with_widths(self, runner: TrialRunner, profile: Profile) -> Profile:
        """The profile with widths timed in the runtimes that are likely to serve."""
        left = self.left - self._reserve() - TRIALS_FIRST * self._usual_trial_s()
        seconds = min(WIDTHS_SHARE * self.budget.time_s, left)
        if not profile.groups or seconds < MIN_WIDTHS_S:
            return profile
        self.progress.stage("profiling", "widths in the runtimes that are likely to serve")
        with quiet(self.progress):
            tables, missing = measure_deployed_widths(
                runner,
                profile,
                likely_to_serve(self.state.trials, self.budget),
                self.store.trial("width"),
                self.store.data / "calibration",
                control_folder=self.store.trial,
                seconds=seconds,
                call_s=self._call_s(),
                cache=WidthCache(
                    folder=default_folder(), machine=profile.machine, deployment=self.deployment
                ),
            )
        return profile.model_copy(
            update={
                "deployed_widths": tables,
                "not_measured": (*profile.not_measured, *missing),
            }
        )

    def _search(self, runner: TrialRunner, profile: Profile) -> None:
        """Propose, check, try, until time, trials, ideas or progress run out."""
        if self.state.candidates is not None:
            return
        proposals = Proposals(
            planner=self.planner,
            store=self.store,
            state=self.state,
            settings=self.settings,
            progress=self.progress,
            warn=self._warn,
            trials_left=self._trials_left,
            seconds_to_ask=self._seconds_to_ask,
        )
        for number, proposal, author in proposals.walk(profile):
            if self.left < self._reserve() + 1.3 * self._usual_trial_s():
                self.progress.message("the rest of the time is kept for the final measurement")
                break
            time = proposal.relative_latency
            timing = self.state.baseline.timing if self.state.baseline else None
            self._try(
                runner,
                f"t{number}",
                proposal.plan,
                author,
                predicted_ms=timing.median_ms * time if timing and time else None,
                predicted_kl=proposal.kl,
            )
            self._time_again(runner)
            proposals.look_back(self.state.trials[-1])
            if self._stalled(proposals.since or 0) and not proposals.hand_over():
                self.progress.message(f"no better plan in {PATIENCE} trials")
                break

    def _trials_left(self) -> int | None:
        """How many usual trials there is time for; ``None`` before the first."""
        usual = self._usual_trial_s()
        return int((self.left - self._reserve()) / usual) if usual > 0 else None

    def _seconds_to_ask(self) -> float:
        """What a language model may take, so that two usual trials and the end still fit."""
        return max(0.0, self.left - self._reserve() - 2 * self._usual_trial_s())

    def _stalled(self, since: int) -> bool:
        """Whether patience has run out, counted from the trial after so many."""
        ours = [trial for trial in self.state.trials if not trial.is_control][since:]
        if len(ours) <= PATIENCE:
            return False
        best = feasible(self.state.trials, self.budget)
        return bool(best) and best[0].trial_id not in {t.trial_id for t in ours[-PATIENCE:]}

    def _try(
        self, runner: TrialRunner, trial_id: str, plan: Plan, author: str, **known: Any
    ) -> None:
        self.progress.trial_started(trial_id, f"{plan.runtime} {plan.quantization.scheme}")
        folder = self.store.trial(trial_id)
        with quiet(self.progress):
            trial = runner.run(
                trial_id,
                plan,
                author,
                folder,
                protocol=TRIAL.suited_to(self._call_s()),
                deadline=now() + max(0.0, self.left - self._reserve()),
                **known,
            )
        self._keep(trial)
        relative = relative_latency(trial)
        self.progress.trial_finished(
            trial, search_drop(trial), 1.0 / relative if relative else None
        )
        self._drop_dominated()

    def _keep(self, trial: Trial) -> None:
        self.state.keep(trial)
        self.store.journal.append("trial", trial)

    def _time_again(self, runner: TrialRunner) -> None:
        """Race those once more that ran while the machine was busy, as later races have shown.

        A wrong time would stand as the bar, or send the search after it.
        """
        if self.state.candidates is not None:
            return
        for trial in timed_while_busy(self.state.trials):
            if trial.trial_id in self._timed_again or self.left < self._reserve():
                continue
            self._timed_again.add(trial.trial_id)
            self.progress.message(f"{trial.trial_id} is timed again: the machine was busy")
            with quiet(self.progress):
                again = runner.time_again(
                    trial,
                    self.store.trial(trial.trial_id),
                    TRIAL.suited_to(self._call_s()),
                    now() + max(0.0, self.left - self._reserve()),
                )
            self._keep(again)

    def _drop_dominated(self) -> None:
        """Free the disk of artefacts that can't be handed over any more."""
        wanted = {trial.trial_id for trial in pareto(self.state.trials, self.budget)}
        wanted |= {trial.trial_id for trial in feasible(self.state.trials, self.budget)}
        wanted |= {trial.trial_id for trial in self.state.trials if trial.is_control}
        for trial in self.state.trials:
            if trial.trial_id not in wanted:
                shutil.rmtree(self.store.trial(trial.trial_id), ignore_errors=True)
