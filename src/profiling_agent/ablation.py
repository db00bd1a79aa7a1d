"""Planners compared: one workbench, one space of plans, as many trials for each, over seeds.

Original, controls and profile are measured once. Every arm (a planner, a seed, and the language
model that it asks) starts from them and has its own history. A plan that does what one before it
did is measured once, whoever proposed it, so that arms differ by what they propose and not by
noise. The language model's arm stands alone: an answer that does not pass costs it a trial.

At the end the best artefact of each arm is judged on the test split and raced against that of the
reference, the solver. A stopped comparison goes on from its journal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.arms import OUT_OF_TIME, PLANNERS, ArmWalker, WalkedArm
from profiling_agent.deployment.opened import check_artefact
from profiling_agent.errors import (
    ArtefactError,
    BudgetError,
    ModelError,
    TrialError,
)
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.evaluation.predictor import Predictor
from profiling_agent.finish import answers_of_original, final_protocol
from profiling_agent.machine.clock import now
from profiling_agent.planning.agents.consult import instructions
from profiling_agent.planning.drops import fitted_slope
from profiling_agent.planning.history import feasible, holds
from profiling_agent.planning.hypervolume import gain, hypervolume, reference_drop
from profiling_agent.planning.planner import ADVISED
from profiling_agent.preconditions import check_settings, check_task
from profiling_agent.records.ablation import AblationRecord, AblationSettings, Arm, Attempt
from profiling_agent.records.common import Budget, Deployment, Interval
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.llm import LlmSettings
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore, read_array, write_array, write_text
from profiling_agent.records.trial import RunSettings, Trial
from profiling_agent.report.ablation_html import render_ablation_html
from profiling_agent.report.live import Progress, SilentProgress, quiet
from profiling_agent.run_profile import take_profile
from profiling_agent.run_state import package_version, refuse_others, resume
from profiling_agent.workbench import Workbench

REFERENCE = "solver"
PREPARED_AS = 0.25
"""Of the comparison's time: controls and profile are those of a run with so much."""

_Judged = tuple[Accuracy | None, Interval | None, str]


def ablation_settings(
    budget: Budget,
    *,
    deployment: Deployment,
    runtimes: Sequence[str],
    planners: Sequence[str] | None = None,
    models: Sequence[LlmSettings | None] = (),
    num_seeds: int = 2,
    seed: int = 0,
    time_s: float = 3600.0,
) -> AblationSettings:
    """What is compared: ``planners`` None are all that can be asked; ``time_s`` is of the whole,
    and that of ``budget`` is not looked at."""
    if planners is None:
        planners = PLANNERS + (ADVISED if models else ())
        if "torch" not in runtimes:
            planners = tuple(name for name in planners if name != "paper")
    search = RunSettings(
        budget=budget.model_copy(update={"time_s": PREPARED_AS * time_s}),
        deployment=deployment,
        planner="ablation",
        runtimes=tuple(runtimes),
        seed=seed,
    )
    return AblationSettings(
        search=search,
        planners=tuple(planners),
        models=tuple(dict.fromkeys(model for model in models if model is not None)),
        num_seeds=num_seeds,
        time_s=time_s,
    )


def check_ablation(settings: AblationSettings) -> None:
    """``BudgetError`` for a budget, runtime, planner or wording that there is not."""
    check_settings(settings.search)
    for name in settings.planners:
        if name not in (*PLANNERS, *ADVISED):
            raise BudgetError(
                f"There is no planner {name!r} to compare. Choose from "
                f"{', '.join((*PLANNERS, *ADVISED))}."
            )
    if "paper" in settings.planners and "torch" not in settings.search.runtimes:
        raise BudgetError(
            "The paper's way runs in torch, which --runtime excludes; name --planners without it."
        )
    for llm in settings.models:
        instructions("analysis", llm.prompt)


def compare_planners(
    request: Request,
    settings: AblationSettings,
    *,
    out: Path,
    progress: Progress | None = None,
) -> AblationRecord:
    """Walk all arms and leave ``ablation.json`` and ``ablation.html`` in ``out``.

    Continues a comparison that was stopped there. Raises the errors of ``errors.py``; a planner or
    a language model that can't be had leaves its arms empty, with the reason.
    """
    progress = progress or SilentProgress()
    check_ablation(settings)
    metric = load_metric(request.metric)
    store = RunStore(out)
    store.create()
    start, spent = now(), store.journal.spent()
    store.journal.clock = lambda: spent + now() - start
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.locked())
        refuse_others(store, settings.search, request.source())
        progress.stage("acquiring", "model and data")
        workload = acquire(request, folder=store.data, seed=settings.search.seed)
        check_task(workload, settings.search)
        bench = Workbench(
            store=store,
            settings=settings.search,
            workload=workload,
            judge=find_judge(workload.record.task, metric),
            state=resume(store, settings.search, workload.record),
            progress=progress,
            is_live=request.is_live,
            stack=stack,
        )
        comparison = Comparison(bench, settings)
        bench.set_up()
        profile = take_profile(bench)
        bench.time_s = settings.time_s
        record = comparison.walk(profile)
    write_text(store.ablation_record, record.to_json())
    write_text(store.ablation_report, render_ablation_html(record))
    return record


class Comparison:
    """All arms over one workbench, whose trials it shares with earlier comparisons on it."""

    def __init__(self, bench: Workbench, settings: AblationSettings) -> None:
        self.bench, self.settings, self.state = bench, settings, bench.state
        self.budget = settings.search.budget
        self.walker = ArmWalker(bench, settings)

    def walk(self, profile: Profile | None) -> AblationRecord:
        """All arms, a trial of each in turn and seed by seed; without a profile they are empty.

        The workbench is set up, and its ``time_s`` says when to end.
        """
        walked: list[WalkedArm] = []
        for arms in self.walker.arms():
            seed = [self.walker.opened(arm, profile) for arm in arms]
            walked += seed
            while profile is not None and (going := [w for w in seed if self.walker.goes_on(w)]):
                for each in going:
                    self.walker.step(each, profile)
        self.bench.time_again(at_last=True)
        self.bench.runner.builder.close()
        return self._record(self._compared(self._finished(walked)))

    # ---- what came of it

    def _finished(self, walked: list[WalkedArm]) -> list[Arm]:
        used: set[str] = set()
        return [self._as_record(each, used) for each in walked]

    def _as_record(self, walked: WalkedArm, used: set[str]) -> Arm:
        """The arm with its attempts; ``used`` are the measurements of the arms before it."""
        if walked.planner is None or (not walked.tried and walked.ended == OUT_OF_TIME):
            return walked.arm.model_copy(update={"ended": walked.ended})
        baseline, controls = self.state.baseline, self.walker.controls()
        slope = fitted_slope(self.state.trials, self.budget)
        assert baseline is not None
        attempts: list[Attempt] = []
        gains = [self._best_gain(controls)]
        seen, names = list(controls), {trial.trial_id: trial.trial_id for trial in controls}
        for number, (slot, trial) in enumerate(self.walker.trials(walked), 1):
            if trial is not None and slot.measured_as is not None:
                seen.append(trial)
                names[trial.trial_id] = slot.measured_as
            attempts.append(
                Attempt(
                    number=number,
                    trial=trial,
                    measured_as=slot.measured_as,
                    is_cached=slot.measured_as in used,
                    reason=slot.reason,
                    holds=trial is not None and holds(trial, slope, self.budget),
                )
            )
            gains.append(self._best_gain(seen))
        used |= {attempt.measured_as for attempt in attempts if attempt.measured_as is not None}
        best = feasible(seen, self.budget, known=self.state.trials)
        return walked.arm.model_copy(
            update={
                "attempts": tuple(attempts),
                "gains": tuple(gains),
                "hypervolume": hypervolume(seen, baseline, self.budget),
                "best_id": names[best[0].trial_id] if best else None,
                "ended": walked.ended,
            }
        )

    def _best_gain(self, trials: Sequence[Trial]) -> float | None:
        """Arms and their attempts are judged alike, by all that was measured."""
        known, baseline = self.state.trials, self.state.baseline
        best = feasible(trials, self.budget, known=known)
        return gain(best[0], baseline, self.budget) if best and baseline else None

    def _compared(self, arms: list[Arm]) -> list[Arm]:
        """The arms with their best one's accuracy on the test split and its race against the
        best of the reference's seeds; each artefact is judged once."""
        references = [arm for arm in arms if arm.planner == self._reference() and arm.best_id]
        best = max(references, key=lambda arm: arm.gains[-1] or 0.0, default=None)
        reference = best.best_id if best else None
        finals: dict[str, _Judged] = {}
        compared: list[Arm] = []
        for arm in arms:
            name = arm.best_id
            if name is not None:
                if name not in finals:
                    self.bench.progress.stage("test split", self.walker.trial(name).label)
                    finals[name] = self.judged(name, reference)
                test, over, why = finals[name]
                update = {
                    "test": test,
                    "over_reference": over,
                    "same_as_reference": name == reference,
                    "not_compared": why,
                }
                arm = arm.model_copy(update=update)
            compared.append(arm)
        return compared

    def _reference(self) -> str:
        return REFERENCE if REFERENCE in self.settings.planners else self.settings.planners[0]

    def judged(self, name: str, reference: str | None) -> _Judged:
        """A measured trial's accuracy on the test split, the reference's latency over its own from
        one race, and why one of them is missing, else an empty text. Journalled."""
        for kind, data in self.bench.store.journal.events():
            if kind == "judged" and (data["name"], data["reference"]) == (name, reference):
                over = data["over"] and Interval.model_validate(data["over"])
                return Accuracy.model_validate(data["test"]), over, ""
        if self.bench.left < 0:
            return None, None, OUT_OF_TIME
        test: Accuracy | None = None
        over: Interval | None = None
        try:
            with quiet(self.bench.progress):
                test = self._on_test(name)
                if reference not in (None, name):
                    over = self._raced(name, reference)
        except (TrialError, ArtefactError, BudgetError, ModelError) as error:
            return test, over, str(error)
        event = {"name": name, "reference": reference, "test": test.model_dump(mode="json")}
        event["over"] = over and over.model_dump(mode="json")
        self.bench.store.journal.append("judged", event)
        return test, over, ""

    def _on_test(self, name: str) -> Accuracy:
        bench = self.bench
        labels = bench.workload.splits["test"].labels
        path = bench.store.data / "baseline_test.npy"
        original = read_array(path)
        if original is None:
            predictor = bench.runner.baseline.open()
            original = answers_of_original(predictor, bench.judge, bench.store.data, "test")
            predictor.pause()
            write_array(path, original)
        with contextlib.closing(self._open(name)) as predictor:
            ours = bench.judge.answers(predictor.logits(bench.store.data / "test"))
        return bench.judge.score("test", ours, labels, original)

    def _raced(self, name: str, reference: str) -> Interval:
        protocol = final_protocol(self.budget.time_s, self.bench.call_s())
        with contextlib.ExitStack() as stack:
            racers = {
                each: stack.enter_context(contextlib.closing(self._open(each)))
                for each in (reference, name)
            }
            runner = self.bench.runner
            times, slowed = runner.race(
                {**runner.beside(reference, name), **racers},
                protocol,
                has_time=lambda: self.bench.left > 0,
            )
        if slowed.is_doubtful:
            self.bench.warn(f"In the race of {name} and {reference} {slowed}.")
        return times.speedup(name, reference)

    def _open(self, name: str) -> Predictor:
        folder = self.bench.store.trial(name)
        return self.bench.runner.open(folder, check_artefact(folder).runtime)

    def _record(self, arms: list[Arm]) -> AblationRecord:
        state = self.state
        assert state.baseline is not None and state.machine is not None
        controls = self.walker.controls()
        measured = {attempt.measured_as for arm in arms for attempt in arm.attempts} - {None}
        return AblationRecord(
            package_version=package_version(),
            machine=state.machine,
            settings=self.settings,
            workload=self.bench.workload.record,
            baseline=state.baseline,
            controls=controls,
            controls_hypervolume=hypervolume(controls, state.baseline, self.budget),
            reference_drop=reference_drop(self.budget),
            reference=self._reference(),
            arms=tuple(arms),
            num_measured=len(measured),
            seconds=self.bench.store.journal.clock(),
            warnings=tuple(state.warnings),
        )
