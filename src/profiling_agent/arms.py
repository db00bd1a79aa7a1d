"""The arms of a comparison: each walks from trial to trial as if nobody else were there.

An arm is a planner, a seed and, if it asks one, a language model. Every step is journalled, so that
a comparison that was stopped proposes, asks and measures nothing twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiling_agent.errors import (
    BudgetError,
    MissingDependency,
)
from profiling_agent.planning.effects import effect
from profiling_agent.planning.planner import ADVISED, Advised, Planner, Proposal, find_planner
from profiling_agent.proposing import is_reserved, objection
from profiling_agent.records.ablation import AblationSettings, Arm
from profiling_agent.records.llm import Guard, LlmSettings, LlmUsage
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial
from profiling_agent.workbench import Workbench

PLANNERS = ("random", "uniform", "greedy", "tpe", "solver")
FINAL_SHARE = 0.25
"""Of the comparison's time, at most, that is kept for the test split and the last races."""
LLM_SHARE = 0.5
"""Of the comparison's time, for waiting for language models, all arms together."""
OUT_OF_TIME = "the time budget ended"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """An attempt: the proposal and where its measurement is, or why there is none."""

    proposal: Proposal | None = None
    author: str = ""
    measured_as: str | None = None
    reason: str = ""


@dataclass(kw_only=True)
class WalkedArm:
    """An arm on its way: its record so far, and for each attempt what was proposed."""

    arm: Arm
    planner: Planner | None = None
    tried: list[Slot] = field(default_factory=list["Slot"])
    ended: str = ""
    is_handed_over: bool = False
    """To the planner behind it, for good."""

    @property
    def reserve(self) -> Planner | None:
        return self.planner.reserve if isinstance(self.planner, Advised) else None


class ArmWalker:
    """Opens arms and takes them a step on; what a plan does is measured once for all of them."""

    def __init__(self, bench: Workbench, settings: AblationSettings) -> None:
        self.bench, self.settings, self.state = bench, settings, bench.state
        self.budget = settings.search.budget
        self._unreachable: dict[LlmSettings, str] = {}
        self._measured: dict[Hashable, str] = {}
        self._open_models()

    def _open_models(self) -> None:
        """Say at once which language models can't be asked; their arms stay empty."""
        for llm in self.settings.models:
            try:
                find_planner("llm", llm)
            except (BudgetError, MissingDependency) as error:
                self._unreachable[llm] = str(error)
                self.bench.progress.message(f"{llm.model} is not compared: {error}")

    def arms(self) -> Iterator[list[Arm]]:
        """Seed by seed."""
        first = self.settings.search.seed
        for seed in range(first, first + self.settings.num_seeds):
            arms: list[Arm] = []
            for planner in self.settings.planners:
                models = self.settings.models if planner in ADVISED else ()
                arms += [Arm(planner=planner, seed=seed, llm=llm) for llm in models or (None,)]
            yield arms

    def opened(self, arm: Arm, profile: Profile | None) -> WalkedArm:
        """The arm at its beginning or where an earlier process left it; ended where it can't be
        walked, with the reason."""
        walked = WalkedArm(arm=arm)
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
        num_asking = sum(arm.llm is not None for arms in self.arms() for arm in arms)
        seconds = min(llm.limits.max_seconds, LLM_SHARE * self.settings.time_s / num_asking)
        limits = llm.limits.model_copy(update={"max_seconds": seconds})
        return llm.model_copy(update={"limits": limits})

    def _transcript(self, arm: Arm) -> Path | None:
        if arm.llm is None:
            return None
        folder = self.bench.store.transcripts
        folder.mkdir(exist_ok=True)
        return folder / f"{arm.planner}-{arm.llm.digest()}-{arm.seed}.jsonl"

    def goes_on(self, walked: WalkedArm) -> bool:
        return not walked.ended and len(walked.tried) < self.budget.max_trials

    def step(self, walked: WalkedArm, profile: Profile) -> None:
        """One proposal, with the attempts that it and the answers before it are; journalled."""
        if self.bench.left < self._kept() + 1.3 * self.bench.usual_trial_s():
            walked.ended = OUT_OF_TIME
            return
        self.bench.progress.stage("arm", f"{name_of(walked.arm)}, trial {len(walked.tried) + 1}")
        llm = walked.arm.llm
        if llm is not None and llm in self._unreachable and not walked.tried:
            walked.ended, walked.planner = self._unreachable[llm], None
            return
        num_slots, num_guards = len(walked.tried), len(walked.arm.guards)
        self._propose(walked, profile)
        if llm is not None and (lost := _unreached(walked)):  # it may be reached another time
            self._unreachable[llm] = walked.ended = lost
            walked.planner = None
            return
        self._journal(walked, num_slots, num_guards)

    def _propose(self, walked: WalkedArm, profile: Profile) -> None:
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
        if walked.ended or not self.goes_on(walked) or _unreached(walked):
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
            walked.tried.append(Slot(reason=against))
            walked.ended = "a plan that can't be used, and the planner would say the same again"
            return
        name = self._carried_out(proposal, proposal.author or planner.name, profile)
        slot = Slot(proposal=proposal, author=proposal.author or planner.name, measured_as=name)
        walked.tried.append(slot)

    def _keep_guards(self, walked: WalkedArm) -> None:
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
                walked.tried.append(Slot(reason=guard.reason))
            elif stands_alone and guard.action == "unanswered":
                walked.ended = f"no answer: {guard.reason}"
            guards.append(guard.model_copy(update={"trial_id": f"t{number}"}))
        update = {"guards": tuple(guards), "usage": planner.usage}
        walked.arm = walked.arm.model_copy(update=update)

    def _carried_out(self, proposal: Proposal, author: str, profile: Profile) -> str:
        """The trial that measured what the plan does, taken now if there is none."""
        does = effect(proposal.plan, profile)
        if not self._measured:
            for trial in self.state.trials:
                if not trial.is_control:
                    self._measured.setdefault(effect(trial.plan, profile), trial.trial_id)
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

    def _history(self, walked: WalkedArm) -> tuple[Trial, ...]:
        """The controls and the arm's own trials, as if nobody else had been there."""
        return (*self.controls(), *(t for _, t in self.trials(walked) if t is not None))

    def controls(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.state.trials if trial.is_control)

    def trials(self, walked: WalkedArm) -> Iterator[tuple[Slot, Trial | None]]:
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
            yield slot, self.trial(slot.measured_as).model_copy(update=update)

    def trial(self, trial_id: str) -> Trial:
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

    def _journal(self, walked: WalkedArm, num_slots: int, num_guards: int) -> None:
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

    def _resume(self, walked: WalkedArm) -> None:
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
        if isinstance(walked.planner, Advised):
            walked.planner.recall(self._history(walked), walked.arm.guards)


def name_of(arm: Arm) -> str:
    """The arm in words: planner, language model, wording, seed."""
    asks = f", {arm.llm.model}, {arm.llm.prompt} prompt" if arm.llm is not None else ""
    return f"{arm.planner}{asks}, seed {arm.seed}"


def _unreached(walked: WalkedArm) -> str:
    """Why nothing was ever answered to the arm, or an empty text: such an arm shows the solver."""
    usage = walked.arm.usage
    if usage is None or usage.answered or not usage.requests:
        return ""
    lost = (guard.reason for guard in walked.arm.guards if guard.action == "unanswered")
    return next(lost, "")


def _key(arm: Arm) -> str:
    return f"{name_of(arm)}, {arm.llm.digest()}" if arm.llm is not None else name_of(arm)


def _slot_as_data(slot: Slot) -> dict[str, Any]:
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


def _slot_of_data(data: dict[str, Any]) -> Slot:
    kept = data["proposal"]
    plan = kept and Plan.model_validate(kept["plan"])
    return Slot(
        proposal=Proposal(**kept | {"plan": plan}) if kept else None,
        author=data["author"],
        measured_as=data["measured_as"],
        reason=data["reason"],
    )
