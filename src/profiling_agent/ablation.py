"""Planners compared: one workbench, one space of plans, as many trials for each, over seeds.

Original, controls and profile are measured once. Every arm (a planner, a seed, and the language
model that it asks) starts from them and has its own history. A plan that does what one before it
did is measured once, whoever proposed it, so that arms differ by what they propose and not by
noise. The language model's arm stands alone: an answer that does not pass costs it a trial.

At the end the best artefact of each arm is judged on the test split and raced against that of the
reference, the solver. A stopped comparison goes on from its folder: measured trials and answers are
there, and the arms are walked again over them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.deployment.opened import check_artefact
from profiling_agent.errors import (
    ArtefactError,
    BudgetError,
    MissingDependency,
    TrialError,
)
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.evaluation.measure import race
from profiling_agent.evaluation.predictor import Predictor
from profiling_agent.finish import answers_of_original, final_protocol
from profiling_agent.machine.clock import now
from profiling_agent.planning.agents.consult import instructions
from profiling_agent.planning.effects import effect
from profiling_agent.planning.history import feasible
from profiling_agent.planning.hypervolume import gain, hypervolume, reference_drop
from profiling_agent.planning.planner import Advised, Planner, Proposal, find_planner
from profiling_agent.preconditions import check_settings, check_task
from profiling_agent.proposing import is_reserved, objection
from profiling_agent.records.ablation import AblationRecord, AblationSettings, Arm, Attempt
from profiling_agent.records.common import Budget, Deployment, Interval
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.llm import LlmSettings
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore, read_array, write_array, write_text
from profiling_agent.records.trial import RunSettings, Trial
from profiling_agent.report.ablation_html import render_ablation_html
from profiling_agent.report.live import Progress, SilentProgress, quiet
from profiling_agent.run_state import package_version, refuse_others, resume
from profiling_agent.workbench import Workbench

REFERENCE = "solver"
PREPARED_AS = 0.25
"""Of the comparison's time: controls and profile are those of a run with so much."""
FINAL_SHARE = 0.25
"""Of the comparison's time, at most, that is kept for the test split and the last races."""
PLANNERS = ("random", "uniform", "greedy", "tpe", "solver")
ADVISED = ("llm", "hybrid", "paper")


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
        models=tuple(model for model in models if model is not None),
        num_seeds=num_seeds,
        time_s=time_s,
    )


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
    check_settings(settings.search)
    for name in settings.planners:
        if name not in (*PLANNERS, *ADVISED):
            raise BudgetError(
                f"There is no planner {name!r} to compare. Choose from "
                f"{', '.join((*PLANNERS, *ADVISED))}."
            )
    for llm in settings.models:
        instructions("analysis", llm.prompt)
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
        profile = bench.set_up()
        bench.time_s = settings.time_s
        record = comparison.walk(profile)
    write_text(store.ablation_record, record.to_json())
    write_text(store.ablation_report, render_ablation_html(record))
    return record


@dataclass(kw_only=True)
class _Walked:
    """An arm on its way: its record so far, and for each attempt the measured trial's name."""

    arm: Arm
    planner: Planner
    tried: list[_Slot] = field(default_factory=list["_Slot"])
    ended: str = ""


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """An attempt: the proposal and where its measurement is, or why there is none."""

    proposal: Proposal | None = None
    author: str = ""
    measured_as: str | None = None
    is_cached: bool = False
    reason: str = ""


class Comparison:
    """All arms over one workbench, whose trials it shares with earlier comparisons on it."""

    def __init__(self, bench: Workbench, settings: AblationSettings) -> None:
        self.bench, self.settings, self.state = bench, settings, bench.state
        self.budget = settings.search.budget
        self._unreachable: dict[LlmSettings, str] = {}
        self._used: set[str] = set()
        self._measured: dict[Hashable, str] = {}
        self._open_models()

    def walk(self, profile: Profile | None) -> AblationRecord:
        """All arms one after the other; without a profile they are empty. The workbench is set up,
        and its ``time_s`` says when to end."""
        for trial in self.state.trials:
            if profile is not None and not trial.is_control:
                self._measured.setdefault(effect(trial.plan, profile), trial.trial_id)
        why = "" if profile is not None else "there is no profile to plan from; see the warnings"
        walked = [self._walk_arm(arm, profile, why) for arm in self._arms()]
        self.bench.runner.builder.close()
        return self._record(self._compared([self._finished(each) for each in walked]))

    def _open_models(self) -> None:
        """Say at once which language models can't be asked; their arms stay empty."""
        for llm in self.settings.models:
            try:
                find_planner("llm", llm)
            except (BudgetError, MissingDependency) as error:
                self._unreachable[llm] = str(error)
                self.bench.warn(f"{llm.model} is not compared: {error}")

    def _arms(self) -> Iterator[Arm]:
        first = self.settings.search.seed
        for seed in range(first, first + self.settings.num_seeds):
            for planner in self.settings.planners:
                if planner not in ADVISED:
                    yield Arm(planner=planner, seed=seed)
                    continue
                for llm in self.settings.models or (None,):
                    yield Arm(planner=planner, seed=seed, llm=llm)

    # ---- one arm

    def _walk_arm(self, arm: Arm, profile: Profile | None, why: str) -> _Walked | Arm:
        """The arm with its attempts, or as it is with the reason why it has none."""
        if profile is None:
            return arm.model_copy(update={"ended": why})
        if arm.planner in ADVISED and arm.llm is None:
            return arm.model_copy(update={"ended": "no language model was named"})
        known = self._unreachable.get(arm.llm) if arm.llm is not None else None
        if known is not None:
            return arm.model_copy(update={"ended": known})
        try:
            planner = find_planner(
                arm.planner, arm.llm, self._transcript(arm), is_bare=arm.planner == "llm"
            )
        except MissingDependency as error:
            return arm.model_copy(update={"ended": str(error)})
        self.bench.progress.stage("arm", name_of(arm))
        walked = _Walked(arm=arm, planner=planner)
        while len(walked.tried) < self.budget.max_trials and not walked.ended:
            self._step(walked, profile)
            if isinstance(planner, Advised) and (lost := _unreached(walked)):
                return self._without(walked.arm, lost)
        return walked

    def _without(self, arm: Arm, reason: str) -> Arm:
        if arm.llm is not None:
            self._unreachable[arm.llm] = reason
        return arm.model_copy(update={"ended": reason})

    def _transcript(self, arm: Arm) -> Path | None:
        if arm.llm is None:
            return None
        folder = self.bench.store.transcripts
        folder.mkdir(exist_ok=True)
        return folder / f"{arm.planner}-{arm.llm.digest()}-{arm.seed}.jsonl"

    def _step(self, walked: _Walked, profile: Profile) -> None:
        """One proposal, and the attempts that it and the answers before it are."""
        number, history = len(walked.tried) + 1, self._history(walked)
        planner = walked.planner
        reserve = planner.reserve if isinstance(planner, Advised) else None
        if reserve is not None and is_reserved(number, self.budget.max_trials - number + 1):
            planner = reserve
        if isinstance(planner, Advised):
            planner.allow(max(0.0, self.bench.left - self._kept()))
        proposal = planner.propose(profile, history, self.budget, walked.arm.seed)
        self._keep_guards(walked)
        if len(walked.tried) >= self.budget.max_trials or _unreached(walked):
            return
        if proposal is None and reserve is not None and planner is not reserve:
            planner = reserve
            proposal = reserve.propose(profile, history, self.budget, walked.arm.seed)
        if proposal is None:
            if len(walked.tried) < number:  # no answer was rejected in this step
                walked.ended = "the planner has nothing left to propose"
            elif walked.arm.planner == "paper":
                walked.ended = "an answer that does not pass ends the paper's way"
            return
        author = proposal.author or planner.name
        against = objection(proposal.plan, profile, history, self.settings.search)
        if against is not None:
            walked.tried.append(_Slot(reason=against))
            walked.ended = "a plan that can't be used, and the planner would say the same again"
            return
        slot = self._carried_out(proposal, author, profile)
        if slot is None:
            walked.ended = "the time budget ended"
            return
        walked.tried.append(slot)

    def _keep_guards(self, walked: _Walked) -> None:
        """Guards go into the arm; a bare planner's rejected answers are its attempts."""
        planner = walked.planner
        if not isinstance(planner, Advised):
            return
        guards = planner.take_guards()
        for guard in guards:
            is_trial = guard.action == "rejected" and planner.reserve is None
            if is_trial and len(walked.tried) < self.budget.max_trials:
                walked.tried.append(_Slot(reason=guard.reason))
        numbered = [g.model_copy(update={"trial_id": f"t{len(walked.tried) + 1}"}) for g in guards]
        update = {"guards": (*walked.arm.guards, *numbered), "usage": planner.usage}
        walked.arm = walked.arm.model_copy(update=update)

    def _history(self, walked: _Walked) -> tuple[Trial, ...]:
        """The controls and the arm's own trials, as if nobody else had been there."""
        controls = [trial for trial in self.state.trials if trial.is_control]
        return (*controls, *(t for _, t in self._trials(walked) if t is not None))

    def _trials(self, walked: _Walked) -> Iterator[tuple[_Slot, Trial | None]]:
        for number, slot in enumerate(walked.tried, 1):
            if slot.measured_as is None or slot.proposal is None:
                yield slot, None
                continue
            update = {
                "trial_id": f"t{number}",
                "plan": slot.proposal.plan,
                "author": slot.author,
                "predicted_ms": self._predicted_ms(slot.proposal),
                "predicted_kl": slot.proposal.kl,
                "changed": slot.proposal.changed,
            }
            yield slot, self._trial(slot.measured_as).model_copy(update=update)

    def _trial(self, trial_id: str) -> Trial:
        return next(trial for trial in self.state.trials if trial.trial_id == trial_id)

    def _predicted_ms(self, proposal: Proposal) -> float | None:
        time = proposal.relative_latency
        return 1e3 * self.bench.call_s() * time if time else None

    def _carried_out(self, proposal: Proposal, author: str, profile: Profile) -> _Slot | None:
        """The measurement of the plan, taken now if nobody had it; ``None``: no time for that."""
        does = effect(proposal.plan, profile)
        name = self._measured.get(does)
        if name is None:
            if self.bench.left < self._kept() + 1.3 * self.bench.usual_trial_s():
                return None
            num_ours = sum(1 for trial in self.state.trials if not trial.is_control)
            name = f"a{num_ours + 1}"
            self.bench.try_plan(
                name,
                proposal.plan,
                author,
                predicted_ms=self._predicted_ms(proposal),
                predicted_kl=proposal.kl,
                changed=proposal.changed,
            )
            self.bench.time_again()
            self._measured[does] = name
        is_cached = name in self._used
        self._used.add(name)
        return _Slot(proposal=proposal, author=author, measured_as=name, is_cached=is_cached)

    def _kept(self) -> float:
        """Seconds kept for the end."""
        each = self.bench.reserve(num_artefacts=1)
        return min(FINAL_SHARE * self.settings.time_s, each * len(set(self.settings.planners)))

    # ---- what came of it

    def _finished(self, walked: _Walked | Arm) -> Arm:
        if isinstance(walked, Arm):
            return walked
        controls = [trial for trial in self.state.trials if trial.is_control]
        attempts: list[Attempt] = []
        gains = [self._best_gain(controls)]
        seen, names = list(controls), {trial.trial_id: trial.trial_id for trial in controls}
        for number, (slot, trial) in enumerate(self._trials(walked), 1):
            if trial is not None and slot.measured_as is not None:
                seen.append(trial)
                names[trial.trial_id] = slot.measured_as
            attempts.append(
                Attempt(
                    number=number,
                    trial=trial,
                    measured_as=slot.measured_as,
                    is_cached=slot.is_cached,
                    reason=slot.reason,
                )
            )
            gains.append(self._best_gain(seen))
        best = feasible(seen, self.budget)
        baseline = self.state.baseline
        assert baseline is not None
        return walked.arm.model_copy(
            update={
                "attempts": tuple(attempts),
                "gains": tuple(gains),
                "hypervolume": hypervolume(seen, baseline, self.budget),
                "best_id": names[best[0].trial_id] if best else None,
                "ended": walked.ended,
            }
        )

    def _best_gain(self, trials: list[Trial]) -> float | None:
        baseline, best = self.state.baseline, feasible(trials, self.budget)
        return gain(best[0], baseline, self.budget) if best and baseline else None

    def _compared(self, arms: list[Arm]) -> list[Arm]:
        """The arms with their best one's accuracy on the test split and its race against the
        reference's; each artefact is judged once."""
        reference = next(
            (arm.best_id for arm in arms if arm.planner == self._reference() and arm.best_id), None
        )
        finals: dict[str, tuple[Accuracy | None, Interval | None, str]] = {}
        for arm in arms:
            name = arm.best_id
            if name is not None and name not in finals:
                self.bench.progress.stage("test split", self._trial(name).label)
                finals[name] = self.judged(name, reference)
        compared: list[Arm] = []
        for arm in arms:
            if arm.best_id is not None:
                test, over, why = finals[arm.best_id]
                update = {
                    "test": test,
                    "over_reference": over,
                    "same_as_reference": arm.best_id == reference,
                    "not_compared": why,
                }
                arm = arm.model_copy(update=update)
            compared.append(arm)
        return compared

    def _reference(self) -> str:
        return REFERENCE if REFERENCE in self.settings.planners else self.settings.planners[0]

    def judged(
        self, name: str, reference: str | None
    ) -> tuple[Accuracy | None, Interval | None, str]:
        """A measured trial's accuracy on the test split, the reference's latency over its own from
        one race, and why one of them is missing, else an empty text."""
        if self.bench.left < 0:
            return None, None, "the time budget ended"
        try:
            with quiet(self.bench.progress):
                test = self._on_test(name)
                if reference in (None, name):
                    return test, None, ""
                return test, self._raced(name, reference), ""
        except (TrialError, ArtefactError, BudgetError) as error:
            return None, None, str(error)

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
            times = race(racers, self.bench.store.data / "calibration", protocol)
        return times.speedup(name, reference)

    def _open(self, name: str) -> Predictor:
        folder = self.bench.store.trial(name)
        return self.bench.runner.open(folder, check_artefact(folder).runtime)

    def _record(self, arms: list[Arm]) -> AblationRecord:
        state = self.state
        assert state.baseline is not None and state.machine is not None
        controls = tuple(trial for trial in state.trials if trial.is_control)
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
            num_measured=len(self._used),
            seconds=self.bench.store.journal.clock(),
            warnings=tuple(state.warnings),
        )


def name_of(arm: Arm) -> str:
    """The arm in words: planner, language model, wording, seed."""
    asks = f", {arm.llm.model}, {arm.llm.prompt} prompt" if arm.llm is not None else ""
    return f"{arm.planner}{asks}, seed {arm.seed}"


def _unreached(walked: _Walked) -> str:
    """Why nothing was ever answered to the arm, or an empty text: such an arm shows the solver."""
    usage = walked.arm.usage
    if usage is None or usage.output_tokens:
        return ""
    for guard in walked.arm.guards:
        if guard.action == "rejected" and guard.reason.startswith("no answer: "):
            return guard.reason.removeprefix("no answer: ")
    return ""
