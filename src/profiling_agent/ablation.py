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
from typing import Any

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
from profiling_agent.records.llm import Guard, LlmSettings, LlmUsage
from profiling_agent.records.plan import Plan
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
LLM_SHARE = 0.5
"""Of the comparison's time, for waiting for language models, all arms together."""
OUT_OF_TIME = "the time budget ended"

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
        profile = bench.set_up()
        bench.time_s = settings.time_s
        record = comparison.walk(profile)
    write_text(store.ablation_record, record.to_json())
    write_text(store.ablation_report, render_ablation_html(record))
    return record


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """An attempt: the proposal and where its measurement is, or why there is none."""

    proposal: Proposal | None = None
    author: str = ""
    measured_as: str | None = None
    reason: str = ""


@dataclass(kw_only=True)
class _Walked:
    """An arm on its way: its record so far, and for each attempt what was proposed."""

    arm: Arm
    planner: Planner | None = None
    tried: list[_Slot] = field(default_factory=list["_Slot"])
    ended: str = ""
    is_handed_over: bool = False
    """To the planner behind it, for good."""

    @property
    def reserve(self) -> Planner | None:
        return self.planner.reserve if isinstance(self.planner, Advised) else None


class Comparison:
    """All arms over one workbench, whose trials it shares with earlier comparisons on it."""

    def __init__(self, bench: Workbench, settings: AblationSettings) -> None:
        self.bench, self.settings, self.state = bench, settings, bench.state
        self.budget = settings.search.budget
        self._unreachable: dict[LlmSettings, str] = {}
        self._measured: dict[Hashable, str] = {}
        self._open_models()

    def walk(self, profile: Profile | None) -> AblationRecord:
        """All arms, a trial of each in turn and seed by seed; without a profile they are empty.

        The workbench is set up, and its ``time_s`` says when to end.
        """
        for trial in self.state.trials:
            if profile is not None and not trial.is_control:
                self._measured.setdefault(effect(trial.plan, profile), trial.trial_id)
        walked: list[_Walked] = []
        for arms in self._arms():
            seed = [self._opened(arm, profile) for arm in arms]
            walked += seed
            while profile is not None and (going := [w for w in seed if self._goes_on(w)]):
                for each in going:
                    self._step(each, profile)
        self.bench.runner.builder.close()
        return self._record(self._compared(self._finished(walked)))

    def _open_models(self) -> None:
        """Say at once which language models can't be asked; their arms stay empty."""
        for llm in self.settings.models:
            try:
                find_planner("llm", llm)
            except (BudgetError, MissingDependency) as error:
                self._unreachable[llm] = str(error)
                self.bench.progress.message(f"{llm.model} is not compared: {error}")

    def _arms(self) -> Iterator[list[Arm]]:
        """Seed by seed."""
        first = self.settings.search.seed
        for seed in range(first, first + self.settings.num_seeds):
            arms: list[Arm] = []
            for planner in self.settings.planners:
                models = self.settings.models if planner in ADVISED else ()
                arms += [Arm(planner=planner, seed=seed, llm=llm) for llm in models or (None,)]
            yield arms

    # ---- one arm

    def _opened(self, arm: Arm, profile: Profile | None) -> _Walked:
        """The arm at its beginning or where an earlier process left it; ended where it can't be
        walked, with the reason."""
        walked = _Walked(arm=arm)
        if profile is None:
            walked.ended = "there is no profile to plan from; see the warnings"
        elif arm.planner in ADVISED and arm.llm is None:
            walked.ended = "no language model was named"
        elif arm.llm is not None and arm.llm in self._unreachable:
            walked.ended = self._unreachable[arm.llm]
        else:
            try:
                walked.planner = find_planner(
                    arm.planner,
                    self._within_share(arm.llm),
                    self._transcript(arm),
                    is_bare=arm.planner == "llm",
                )
            except MissingDependency as error:
                walked.ended = str(error)
            else:
                self._resume(walked)
        return walked

    def _within_share(self, llm: LlmSettings | None) -> LlmSettings | None:
        """Waiting no longer than an arm's share of the time."""
        if llm is None:
            return None
        num_asking = sum(arm.llm is not None for arms in self._arms() for arm in arms)
        seconds = min(llm.limits.max_seconds, LLM_SHARE * self.settings.time_s / num_asking)
        limits = llm.limits.model_copy(update={"max_seconds": seconds})
        return llm.model_copy(update={"limits": limits})

    def _transcript(self, arm: Arm) -> Path | None:
        if arm.llm is None:
            return None
        folder = self.bench.store.transcripts
        folder.mkdir(exist_ok=True)
        return folder / f"{arm.planner}-{arm.llm.digest()}-{arm.seed}.jsonl"

    def _goes_on(self, walked: _Walked) -> bool:
        return not walked.ended and len(walked.tried) < self.budget.max_trials

    def _step(self, walked: _Walked, profile: Profile) -> None:
        """One proposal, with the attempts that it and the answers before it are; journalled."""
        if self.bench.left < self._kept() + 1.3 * self.bench.usual_trial_s():
            walked.ended = OUT_OF_TIME
            return
        self.bench.progress.stage("arm", f"{name_of(walked.arm)}, trial {len(walked.tried) + 1}")
        num_slots, num_guards = len(walked.tried), len(walked.arm.guards)
        self._propose(walked, profile)
        self._journal(walked, num_slots, num_guards)
        if walked.arm.llm is not None and (lost := _unreached(walked)):
            self._unreachable[walked.arm.llm] = walked.ended = lost
            walked.tried.clear()

    def _propose(self, walked: _Walked, profile: Profile) -> None:
        planner, reserve, number = walked.planner, walked.reserve, len(walked.tried) + 1
        assert planner is not None
        left = self.budget.max_trials - number + 1
        if reserve is not None and (walked.is_handed_over or is_reserved(number, left)):
            planner = reserve
        if isinstance(planner, Advised):
            planner.allow(max(0.0, self.bench.left - self._kept()))
        history = self._history(walked)
        proposal = planner.propose(profile, history, self.budget, walked.arm.seed)
        self._keep_guards(walked)
        if walked.ended or not self._goes_on(walked) or _unreached(walked):
            return
        against = None
        if proposal is not None:
            against = objection(proposal.plan, profile, history, self.settings.search)
        if (proposal is None or against) and reserve is not None and planner is not reserve:
            walked.is_handed_over = True
            planner, against = reserve, None
            proposal = reserve.propose(profile, history, self.budget, walked.arm.seed)
        if proposal is None:
            if walked.arm.planner == "paper" and len(walked.tried) >= number:
                walked.ended = "an answer that does not pass ends the paper's way"
            elif len(walked.tried) < number:  # else an answer was rejected, and the next may pass
                walked.ended = "the planner has nothing left to propose"
            return
        if against:
            walked.tried.append(_Slot(reason=against))
            walked.ended = "a plan that can't be used, and the planner would say the same again"
            return
        name = self._carried_out(proposal, proposal.author or planner.name, profile)
        slot = _Slot(proposal=proposal, author=proposal.author or planner.name, measured_as=name)
        walked.tried.append(slot)

    def _keep_guards(self, walked: _Walked) -> None:
        """Guards go into the arm; a bare planner's rejected answers are its attempts, and one that
        gets no answer is at its end."""
        planner = walked.planner
        if not isinstance(planner, Advised):
            return
        stands_alone, guards = planner.reserve is None, list(walked.arm.guards)
        for guard in planner.take_guards():
            number = len(walked.tried) + 1
            if stands_alone and guard.action == "rejected":
                if number > self.budget.max_trials:
                    continue
                walked.tried.append(_Slot(reason=guard.reason))
            elif stands_alone and guard.action == "unanswered":
                walked.ended = f"no answer: {guard.reason}"
            guards.append(guard.model_copy(update={"trial_id": f"t{number}"}))
        update = {"guards": tuple(guards), "usage": planner.usage}
        walked.arm = walked.arm.model_copy(update=update)

    def _carried_out(self, proposal: Proposal, author: str, profile: Profile) -> str:
        """The trial that measured what the plan does, taken now if there is none."""
        does = effect(proposal.plan, profile)
        if does not in self._measured:
            name = f"a{sum(not trial.is_control for trial in self.state.trials) + 1}"
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
        return self._measured[does]

    def _history(self, walked: _Walked) -> tuple[Trial, ...]:
        """The controls and the arm's own trials, as if nobody else had been there."""
        return (*self._controls(), *(t for _, t in self._trials(walked) if t is not None))

    def _controls(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.state.trials if trial.is_control)

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

    def _kept(self) -> float:
        """Seconds kept for the end."""
        each = self.bench.reserve(num_artefacts=1)
        num_arms = len(self.settings.planners) * self.settings.num_seeds
        wanted = min(FINAL_SHARE * self.settings.time_s, each * num_arms)
        return max(wanted, self.bench.reserve())

    # ---- the journal

    def _journal(self, walked: _Walked, num_slots: int, num_guards: int) -> None:
        """What a step has added to an arm."""
        arm = walked.arm
        event = {
            "arm": _key(arm),
            "slots": [_slot_as_data(slot) for slot in walked.tried[num_slots:]],
            "guards": [guard.model_dump(mode="json") for guard in arm.guards[num_guards:]],
            "usage": arm.usage and arm.usage.model_dump(mode="json"),
            "ended": walked.ended,
            "is_handed_over": walked.is_handed_over,
        }
        self.bench.store.journal.append("arm", event)

    def _resume(self, walked: _Walked) -> None:
        """The attempts that an earlier process made: none is proposed or asked for again."""
        for kind, data in self.bench.store.journal.events():
            if kind != "arm" or data["arm"] != _key(walked.arm):
                continue
            walked.tried += [_slot_of_data(slot) for slot in data["slots"]]
            guards = tuple(Guard.model_validate(guard) for guard in data["guards"])
            usage = data["usage"] and LlmUsage.model_validate(data["usage"])
            update = {"guards": (*walked.arm.guards, *guards), "usage": usage}
            walked.arm = walked.arm.model_copy(update=update)
            walked.ended, walked.is_handed_over = data["ended"], data["is_handed_over"]

    # ---- what came of it

    def _finished(self, walked: list[_Walked]) -> list[Arm]:
        used: set[str] = set()
        return [self._as_record(each, used) for each in walked]

    def _as_record(self, walked: _Walked, used: set[str]) -> Arm:
        """The arm with its attempts; ``used`` are the measurements of the arms before it."""
        if walked.planner is None or (walked.arm.llm in self._unreachable and not walked.tried):
            return walked.arm.model_copy(update={"ended": walked.ended})
        baseline, controls = self.state.baseline, self._controls()
        assert baseline is not None
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
                    is_cached=slot.measured_as in used,
                    reason=slot.reason,
                )
            )
            gains.append(self._best_gain(seen))
        used |= {attempt.measured_as for attempt in attempts if attempt.measured_as is not None}
        best = feasible(seen, self.budget)
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
        baseline, best = self.state.baseline, feasible(trials, self.budget)
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
                    self.bench.progress.stage("test split", self._trial(name).label)
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
        except (TrialError, ArtefactError, BudgetError) as error:
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
            times = race(racers, self.bench.store.data / "calibration", protocol)
        return times.speedup(name, reference)

    def _open(self, name: str) -> Predictor:
        folder = self.bench.store.trial(name)
        return self.bench.runner.open(folder, check_artefact(folder).runtime)

    def _record(self, arms: list[Arm]) -> AblationRecord:
        state = self.state
        assert state.baseline is not None and state.machine is not None
        controls = self._controls()
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


def name_of(arm: Arm) -> str:
    """The arm in words: planner, language model, wording, seed."""
    asks = f", {arm.llm.model}, {arm.llm.prompt} prompt" if arm.llm is not None else ""
    return f"{arm.planner}{asks}, seed {arm.seed}"


def _unreached(walked: _Walked) -> str:
    """Why nothing was ever answered to the arm, or an empty text: such an arm shows the solver."""
    usage = walked.arm.usage
    if usage is None or usage.answered:
        return ""
    lost = (guard.reason for guard in walked.arm.guards if guard.action == "unanswered")
    return next(lost, "")


def _key(arm: Arm) -> str:
    return f"{name_of(arm)}, {arm.llm.digest()}" if arm.llm is not None else name_of(arm)


def _slot_as_data(slot: _Slot) -> dict[str, Any]:
    proposal = slot.proposal
    return {
        "author": slot.author,
        "measured_as": slot.measured_as,
        "reason": slot.reason,
        "proposal": proposal
        and {
            "plan": proposal.plan.model_dump(mode="json"),
            "relative_latency": proposal.relative_latency,
            "kl": proposal.kl,
            "author": proposal.author,
            "changed": proposal.changed,
        },
    }


def _slot_of_data(data: dict[str, Any]) -> _Slot:
    kept = data["proposal"]
    plan = kept and Plan.model_validate(kept["plan"])
    return _Slot(
        proposal=Proposal(**kept | {"plan": plan}) if kept else None,
        author=data["author"],
        measured_as=data["measured_as"],
        reason=data["reason"],
    )
