"""A model on the workbench: the original measured, the controls tried.

What every search starts from, and where its plans are carried out. Each step is journalled before
the next begins, and what the journal holds already is not measured again.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from profiling_agent.acquisition.workload import Workload
from profiling_agent.anchors import anchored, with_latency
from profiling_agent.beside import Beside
from profiling_agent.building import Builder, LocalBuilder, WorkerBuilder
from profiling_agent.deployment.artefact import baseline_size
from profiling_agent.errors import ModelError, TrialError
from profiling_agent.evaluation.judge import Judge
from profiling_agent.evaluation.measure import TRIAL, race
from profiling_agent.evaluation.predictor import LivePredictor, Predictor, ProbeProcess
from profiling_agent.finish import final_seconds, forward_of_original
from profiling_agent.machine.clock import load_average, now
from profiling_agent.machine.processor import describe_machine
from profiling_agent.off_the_shelf import control_plans
from profiling_agent.planning.history import (
    controls,
    is_clearly_over,
    pareto,
    relative_latency,
    search_drop,
)
from profiling_agent.profiling.profile_cache import ControlLatency
from profiling_agent.records.common import NotMeasured
from profiling_agent.records.evaluation import Evaluation
from profiling_agent.records.plan import Plan
from profiling_agent.records.store import RunStore, read_array, write_array
from profiling_agent.records.trial import RunSettings, Trial
from profiling_agent.report.live import Progress, quiet
from profiling_agent.run_state import RunState
from profiling_agent.trial import Baseline, TrialRunner, first_labels, timed_while_busy

CONTROLS_SHARE, MIN_CONTROLS = 0.5, 2
"""Of the time before the final stage, for controls; they stop there, but not before the second."""
SEARCH_SHARE, MIN_SEARCH, TYPICAL_GAIN = 0.012, 1000, 2.5
"""A trial's accuracy takes about this share of the time budget, if it runs so many times faster
than the original: the first so many search samples are looked at, but never fewer than 1,000."""
STEP = 2**0.5
"""From one number of samples to the next: runs of the same budget are to look at the same ones,
though the first look at the original's latency varies."""
MAX_OUTPUT_BYTES = 2**26
"""Of the original's outputs on the search samples: trials are compared with them if they are few
enough to be held beside a trial's own."""
LOOKS, LOOK_S = 3, 0.1
"""At the latency of the original, and seconds of each: in one the machine may have been busy, or
the model's first forwards slow. One is enough for a model that takes longer than that."""
MOST_AGAIN = 2
"""Times that a trial is raced once more because the machine was busy."""
FAR_BEHIND = 2.0
"""A control that takes so many times as long as the fastest one is not raced once more before the
search is over: no plan starts from it, and a busy machine alone doesn't slow one so much more. What
float layers cost is told by the race of the fastest controls, if it was among them."""


class Workbench:
    """One workload of one run or ablation; ``stack`` closes the processes that are opened."""

    runner: TrialRunner
    """Set by ``set_up``."""

    def __init__(
        self,
        *,
        store: RunStore,
        settings: RunSettings,
        workload: Workload,
        judge: Judge,
        state: RunState,
        progress: Progress,
        is_live: bool,
        stack: contextlib.ExitStack,
    ) -> None:
        self.store, self.settings, self.workload, self.state = store, settings, workload, state
        self.progress, self.is_live, self.stack = progress, is_live, stack
        self.budget, self.deployment = settings.budget, settings.deployment
        self.judge = judge
        self.machine = describe_machine()
        self.time_s = settings.budget.time_s
        """When the search is to end, on the journal's clock."""
        self._times_again: Counter[str] = Counter()
        self._fastest_of: dict[frozenset[str], str | None] = {}
        self.memory_limit = int(0.85 * self.machine.memory_bytes)

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.time_s - self.store.journal.clock()

    def set_up(self) -> None:
        """Measure the original and the controls.

        ``ModelError`` for an original that can't be measured or is broken.
        """
        if self.is_live:
            self.warn("The model is a live object: its trials run in this process, unguarded.")
        baseline = self._baseline()
        builder = self._builder()
        self.runner = TrialRunner(
            builder=builder,
            workload=self.workload,
            baseline=baseline,
            judge=self.judge,
            deployment=self.deployment,
            max_drop=self.budget.max_drop,
            data=self.store.data,
            memory_limit=self.memory_limit,
        )
        self.stack.callback(self.runner.close)
        self._controls()
        self.runner.watch(self.state.trials, self.store.trial)
        self._controls_beside()
        self.time_again()

    def warn(self, text: str) -> None:
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
        outputs_path = self.store.data / "baseline_search_outputs.npy"
        predicted, outputs = read_array(path), read_array(outputs_path)
        if outputs is not None and (predicted is None or len(outputs) != len(predicted)):
            outputs = None
        if self.state.baseline is None or predicted is None:
            call_s = self._seconds_a_call(predictor)
            num_samples = self._search_samples(call_s)
            with forward_of_original("search"):
                outputs = predictor.logits(self.store.data / "search", 0, num_samples)
                predicted = self.judge.answers(outputs)
            labels = first_labels(self.workload.splits["search"].labels, len(predicted))
            self.judge.refuse_broken(predicted, labels)
            doubt = self.judge.doubt(predicted)
            if doubt is not None:
                self.warn(doubt)
            if outputs.nbytes <= MAX_OUTPUT_BYTES:
                write_array(outputs_path, outputs)
            else:
                outputs_path.unlink(missing_ok=True)
                outputs = None
            write_array(path, predicted)
            self._measure_baseline(predictor, predicted, call_s)
        predictor.pause()
        opened = [predictor]

        def again() -> Predictor:
            if not opened[-1].alive:
                opened.append(self._open_baseline())
            return opened[-1]

        measured = self.state.baseline.timing if self.state.baseline else None
        return Baseline(
            open=again,
            search=predicted,
            outputs=outputs,
            ms=measured.median_ms if measured else None,
        )

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
            looks = [median(predictor.time_block(LOOK_S, 2, 1))]
            while len(looks) < LOOKS and looks[0] < 1e3 * LOOK_S:
                looks.append(median(predictor.time_block(LOOK_S, 2, 1)))
            return min(looks) / 1e3

    def _search_samples(self, call_s: float) -> int:
        """How many samples of the search split the time allows to look at in every trial."""
        there = self.workload.record.split("search").num_samples
        size = self.deployment.batch_size
        affordable = SEARCH_SHARE * self.budget.time_s * TYPICAL_GAIN / call_s * size
        if STEP * affordable >= there:
            return there
        steps = round(math.log(max(1.0, affordable / MIN_SEARCH), STEP))
        num_samples = -(-int(MIN_SEARCH * STEP**steps) // size) * size
        if num_samples >= there:
            return there
        self.warn(
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
            self.warn(f"The machine is busy (load {load:.1f}); intervals will be wide.")

    def _controls(self) -> None:
        """Every runtime's off-the-shelf artefacts: what the user gets without us.

        One that there was no time for stays so when the run is continued: what was searched and
        nominated since was compared with the others.
        """
        done = {trial.plan.plan_id for trial in self.state.trials}
        ends = self.left - CONTROLS_SHARE * (self.left - self.reserve())
        plans, left_out = control_plans(self.machine, self.settings)
        for sentence in left_out:
            self.warn(sentence)
        for plan in plans:
            no_time = (
                f"The control {plan.runtime} {plan.quantization.scheme} was not measured: the "
                "time budget is too short."
            )
            if plan.plan_id in done or no_time in self.state.warnings:
                continue
            num_done, likely = len(self.state.trials), self.usual_trial_s()
            stop = ends if num_done >= MIN_CONTROLS else 0.0
            if num_done and self.left - likely < max(stop, self.reserve(num_artefacts=1)):
                self.warn(no_time)
                continue
            trial_id = f"c{len(self.state.trials) + 1}"
            self.try_plan(trial_id, plan, "control", is_control=True)

    def _controls_beside(self) -> None:
        """Time the fastest controls in one race: plans start from them."""
        state = self.state
        if state.controls_timed or state.profile_path or state.candidates is not None:
            return
        timed = [t for t in state.trials if t.is_control and relative_latency(t) is not None]
        fastest = sorted(timed, key=lambda trial: relative_latency(trial) or 0.0)
        fastest = fastest[: self.beside.most]
        if not self._has_time_beside(fastest):
            return
        again = self.beside.race(fastest, f"the {len(fastest)} fastest controls")
        for trial in again:
            self._keep(trial)
        if again:
            state.controls_timed = True
            self.store.journal.append("controls-timed", [trial.trial_id for trial in again])

    def anchor(self, known: Sequence[ControlLatency]) -> None:
        """Start from the places of the controls in the race of an earlier run."""
        again = anchored(self.state.trials, known)
        for trial in again:
            self._keep(trial)
        if again:
            self.runner.watch(self.state.trials, self.store.trial)

    def plans_beside(self) -> str | None:
        """The id of the fastest plan in a race of the fastest, as before candidates are named, once
        for the same; None where there is no time, or it failed.

        The trials keep the times of their own races, or they could not be compared with the rest.
        """
        trials = self.state.trials
        leaders = self.beside.leaders(trials, self.workload.record.split("test").num_samples)
        names = frozenset(trial.trial_id for trial in leaders)
        if names not in self._fastest_of and self._has_time_beside(leaders):
            again = self.beside.race_plans(leaders, trials)
            plans = [trial for trial in again if trial.trial_id in names]
            fastest = min(plans, key=lambda trial: relative_latency(trial) or 0.0, default=None)
            self._fastest_of[names] = fastest.trial_id if fastest else None
        return self._fastest_of.get(names)

    def _has_time_beside(self, racers: Sequence[Trial]) -> bool:
        seconds = self.beside.seconds(len(racers))
        return len(racers) >= 2 and self.left > self.reserve() + seconds

    @property
    def beside(self) -> Beside:
        return Beside(
            runner=self.runner,
            store=self.store,
            budget=self.budget,
            call_s=self.call_s(),
            progress=self.progress,
            warn=self.warn,
        )

    def call_s(self) -> float:
        """Seconds a call of the original."""
        baseline = self.state.baseline
        assert baseline is not None and baseline.timing is not None
        return baseline.timing.median_ms / 1e3

    def usual_trial_s(self) -> float:
        """The median of the trials so far; 0 before the first."""
        seconds = sorted(trial.seconds for trial in self.state.trials)
        return seconds[len(seconds) // 2] if seconds else 0.0

    def reserve(self, num_artefacts: int = 3) -> float:
        """Seconds kept for the final stage of so many artefacts: a control and two candidates."""
        num_test = self.workload.record.split("test").num_samples
        return final_seconds(
            self.state.trials,
            self.budget,
            -(-num_test // self.deployment.batch_size),
            self.call_s(),
            num_artefacts,
            self.beside.most_seconds if num_artefacts > 1 else 0.0,
        )

    def try_plan(self, trial_id: str, plan: Plan, author: str, **known: Any) -> Trial:
        """Carry a plan out and journal the trial; ``known`` are further arguments of the runner."""
        self.progress.trial_started(trial_id, f"{plan.runtime} {plan.quantization.scheme}")
        folder = self.store.trial(trial_id)
        with quiet(self.progress):
            trial = self.runner.run(
                trial_id,
                plan,
                author,
                folder,
                protocol=TRIAL.suited_to(self.call_s()),
                deadline=now() + max(0.0, self.left - self.reserve()),
                **known,
            )
        self._keep(trial)
        relative = relative_latency(trial)
        self.progress.trial_finished(
            trial, search_drop(trial), 1.0 / relative if relative else None
        )
        self._drop_dominated()
        return trial

    def _keep(self, trial: Trial) -> None:
        self.state.keep(trial)
        self.store.journal.append("trial", trial)

    def time_again(self, *, at_last: bool = False) -> None:
        """Race those once more that ran while the machine was busy, as later races have shown:
        when it is no longer, or ``at_last``.

        A wrong time would stand as the bar, or send the search after it.
        """
        if self.state.candidates is not None or (self.runner.is_busy and not at_last):
            return
        far_behind = () if at_last else self._far_behind()
        for trial in timed_while_busy(self.state.trials):
            if trial.trial_id in far_behind:
                continue
            if self._times_again[trial.trial_id] >= MOST_AGAIN or self.left < self.reserve():
                continue
            self._times_again[trial.trial_id] += 1
            self.progress.message(f"{trial.trial_id} is timed again: the machine was busy")
            with quiet(self.progress):
                again = self.runner.time_again(
                    trial,
                    self.store.trial(trial.trial_id),
                    TRIAL.suited_to(self.call_s()),
                    now() + max(0.0, self.left - self.reserve()),
                )
            if trial.evaluation is not None and trial.evaluation.is_relative_kept:
                again = with_latency(again, trial.evaluation.relative)
            self._keep(again)

    def _far_behind(self) -> set[str]:
        """The ids of controls far slower than the fastest one."""
        trials = controls(self.state.trials).values()
        took = {t.trial_id: s for t in trials if (s := relative_latency(t)) is not None}
        return {name for name, s in took.items() if s > FAR_BEHIND * min(took.values())}

    def _drop_dominated(self) -> None:
        """Free the disk of artefacts that can't be handed over any more."""
        wanted = {trial.trial_id for trial in pareto(self.state.trials, self.budget)}
        wanted |= {t.trial_id for t in self.state.trials if not is_clearly_over(t, self.budget)}
        wanted |= {trial.trial_id for trial in self.state.trials if trial.is_control}
        for trial in self.state.trials:
            if trial.trial_id not in wanted:
                shutil.rmtree(self.store.trial(trial.trial_id), ignore_errors=True)
