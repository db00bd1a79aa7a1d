"""Planners that ask a language model: ``llm``, ``hybrid``, and ``paper``, the paper's own way.

``llm`` carries out what the model proposes. ``hybrid`` lets the solver mend and complete the
model's plan and takes the better of that and its own, by estimate. Behind both stands the solver:
it steps in when no answer passes, when the model can't be reached, and for the last trials of a
run. ``paper`` has nobody behind it: dynamic int8 of linear layers in eager PyTorch, magnitude
pruning without repair, and a malformed answer ends the search, as in 2509.05584.

Same profile, history, budget and seed: same questions. The answers are the model's own; those that
a run's transcript holds are taken from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from profiling_agent.errors import LlmUnavailable
from profiling_agent.llm.client import Client
from profiling_agent.planning.agents.answer import ANYTHING, Limits, Parsed
from profiling_agent.planning.agents.consult import (
    MAX_ANSWERS,
    Question,
    consult,
    instructions,
)
from profiling_agent.planning.allowance import needs_rescue, next_allowance
from profiling_agent.planning.effects import nothing_new
from profiling_agent.planning.estimate import predict_kl, worth_trying
from profiling_agent.planning.history import Pair
from profiling_agent.planning.planner import AdvisedName, Planner, Proposal
from profiling_agent.planning.solver import Solver, estimate, promise, repair_for, solve
from profiling_agent.planning.trust import shrunk_to, within_trust
from profiling_agent.records.common import Budget
from profiling_agent.records.llm import Guard, GuardAction, LlmSettings, LlmUsage
from profiling_agent.records.patterns import assign
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

PAPER = Limits(pairs=(("torch", "int8-dynamic"),), importance="magnitude", repair="none")
MODEL, TOGETHER = "llm", "llm+solver"
"""Authors of plans; the solver's own are ``solver``."""
AUTHORS = (MODEL, TOGETHER, "paper")
"""Of plans that a model's answer led to."""
IN_VAIN = "the solver's plan instead, since no answer of the model's passed"
NO_ANSWER = "the solver's plan instead, since the model gave no answer"
NOT_ASKED = "the solver's plan instead, since there is nothing to choose from"
ALTERED = "the solver's plan instead, since the guards left none of the model's"
NO_WORSE = "the solver's own plan is no worse by estimate"
"""Why a plan is the solver's; a continued run counts its questions by these."""
SECOND_CHANCE = 2
"""Answers to a question after one in vain."""
MAX_CHANGED = 600
"""Characters of what is told to the model of its guards."""
PATIENCE = 2
"""Questions in a row without an answer that passes, after which a model isn't asked again."""


class AdvisedPlanner:
    """A guarded planner over one client; see the module's text.

    A bare one, for comparisons, stands alone: no solver behind it or among its tools, no trust
    region, and each answer that does not pass is one of the budget's ``max_trials``.
    """

    def __init__(
        self, name: AdvisedName, client: Client, settings: LlmSettings, *, is_bare: bool = False
    ) -> None:
        """``BudgetError`` for a wording of the prompt that there is not."""
        instructions("analysis", settings.prompt)
        self.name: str = name
        self._stands_alone = is_bare or name == "paper"
        self._is_bare = is_bare
        self._client, self._settings = client, settings
        self._solver = Solver()
        self._guards: list[Guard] = []
        self._changed: list[str] = []
        self._gone = False
        self._num_asked = self._num_rejected = self._num_in_vain = 0

    @property
    def reserve(self) -> Planner | None:
        return None if self._stands_alone else self._solver

    @property
    def usage(self) -> LlmUsage:
        return self._client.usage

    def allow(self, seconds: float) -> None:
        self._client.allow(seconds)

    def take_guards(self) -> tuple[Guard, ...]:
        taken = tuple(self._guards)
        self._guards.clear()
        return taken

    def recall(self, trials: Sequence[Trial], guards: Sequence[Guard]) -> None:
        """Count the questions of an earlier process, one for each trial that it carried out."""
        reasons = {each.trial_id: each.reason for each in guards if each.action == "fallback"}
        self._num_asked = self._num_in_vain = 0
        self._num_rejected = sum(guard.action == "rejected" for guard in guards)
        for trial in trials:
            reason = reasons.get(trial.trial_id, "")
            has_passed = trial.author in AUTHORS or reason in (ALTERED, NO_WORSE)
            self._num_asked += has_passed or reason in (IN_VAIN, NO_ANSWER)
            if has_passed:
                self._num_in_vain = 0
            elif reason == IN_VAIN:
                self._num_in_vain += 1

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        """``None``: the model says that it is done or can't be asked any more, its rounds are used
        up, or the paper's way ended."""
        self._changed.clear()
        proposal = self._propose(profile, history, budget, seed)
        if proposal is None:
            return None
        return replace(proposal, changed="; ".join(self._changed)[:MAX_CHANGED])

    def _propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        asked = sum(trial.author in AUTHORS for trial in history)
        rounds = self._settings.rounds
        if self._gone or (rounds is not None and max(asked, self._num_asked) >= rounds):
            return None
        if self._num_in_vain >= PATIENCE and not self._stands_alone:
            self._gone = True
            self._note(
                "handover", f"the model is not asked again: {PATIENCE} questions in a row in vain"
            )
            return None
        pairs = _open_to(self.name, profile, history, budget)
        if not pairs:
            self._note("unanswered", "nothing to choose from: no runtime and scheme was measured")
            return self._fallback(profile, history, budget, seed, NOT_ASKED)
        parsed = self._consult(profile, history, budget, seed, pairs)
        if parsed is None or parsed.reason:
            reason = NO_ANSWER if parsed is None else IN_VAIN
            return self._fallback(profile, history, budget, seed, reason)
        plan = parsed.plan
        if plan is None:
            self._gone = self._stands_alone  # it is done, and nobody goes on in its place
            return None
        if self.name == "paper":
            return replace(estimate(plan, profile, history), author="paper")
        if self._is_bare:
            return replace(estimate(plan, profile, history), author=MODEL)
        if self.name == "hybrid":
            return self._hybrid(plan, profile, history, budget, seed)
        plan = self._trusted(plan, profile, history, budget)
        if plan is None:
            return self._fallback(profile, history, budget, seed, ALTERED)
        return replace(estimate(plan, profile, history), author=MODEL)

    def _consult(
        self,
        profile: Profile,
        history: Sequence[Trial],
        budget: Budget,
        seed: int,
        pairs: tuple[tuple[str, str], ...],
    ) -> Parsed | None:
        """The model's plan; ``None`` when it gives no answer, with the reason among the guards."""
        self._num_asked += 1
        rejected: list[str] = []
        unanswered = ""
        question = Question(
            profile=profile,
            history=history,
            budget=budget,
            seed=seed,
            wording=self._settings.prompt,
            limits=replace(PAPER if self.name == "paper" else ANYTHING, pairs=pairs),
            use_tools=self._settings.use_tools and self._client.provider.offers_tools,
            with_solver_tool=not self._stands_alone,
            max_answers=self._max_answers(history, budget),
        )
        try:
            parsed = consult(self._client.ask, question, rejected)
        except LlmUnavailable as error:
            self._gone = error.is_final
            unanswered, parsed = str(error), None
        for reason in rejected:
            self._note("rejected", reason)
        if unanswered:
            self._note("unanswered", unanswered)
        self._num_rejected += len(rejected)
        if parsed is not None:  # a fault of the line says nothing about the model
            self._num_in_vain = self._num_in_vain + 1 if parsed.reason else 0
        for change in parsed.changed if parsed else ():
            self._note("rewritten", change)
        return parsed

    def _max_answers(self, history: Sequence[Trial], budget: Budget) -> int:
        """To one question; for a bare planner what is left of its trials."""
        if not self._is_bare:
            most = SECOND_CHANCE if self._num_in_vain else MAX_ANSWERS
            return 1 if self.name == "paper" else most
        ours = sum(not trial.is_control for trial in history)
        return max(1, budget.max_trials - ours - self._num_rejected)

    def _trusted(
        self, plan: Plan, profile: Profile, history: Sequence[Trial], budget: Budget
    ) -> Plan | None:
        """The plan within the trust region; ``None`` when that was tried before, or can't be."""
        trusted, change = within_trust(plan, profile, history, budget)
        if change:
            self._note("rejected" if trusted is None else "rewritten", change)
        if trusted is None:
            return None
        same = nothing_new(trusted, profile, history)
        if same is not None:
            self._note("rejected", f"as the guards have changed it: {same}")
            return None
        return trusted

    def _fallback(
        self,
        profile: Profile,
        history: Sequence[Trial],
        budget: Budget,
        seed: int,
        reason: str,
    ) -> Proposal | None:
        if self._stands_alone:
            return None
        proposal = self._solver.propose(profile, history, budget, seed)
        if proposal is None:
            return None
        self._note("fallback", reason)
        return replace(proposal, author="solver")

    def _hybrid(
        self, plan: Plan, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        """The better estimate of the solver's own plan and the model's, mended and completed."""
        completed = _completed(plan, profile, history, budget)
        if completed != plan:
            kl, before = predict_kl(profile, completed), predict_kl(profile, plan)
            self._note(
                "rewritten",
                f"the solver took its predicted divergence from {before:.3g} to {kl:.3g} nats: "
                f"{len(plan.pruning)} pruning lines before, {len(completed.pruning)} after",
            )
        trusted = self._trusted(completed, profile, history, budget)
        if trusted is None:
            return self._fallback(profile, history, budget, seed, ALTERED)
        theirs = estimate(trusted, profile, history)
        own = self._solver.propose(profile, history, budget, seed)
        if own is not None:
            ours, value = (
                promise(each, _pair(each.plan), profile, history, budget) for each in (own, theirs)
            )
            if ours <= value:
                self._note("fallback", NO_WORSE)
                return replace(own, author="solver")
        return replace(theirs, author=MODEL if trusted == plan else TOGETHER)

    def _note(self, action: GuardAction, reason: str) -> None:
        author = "paper" if self.name == "paper" else MODEL
        self._guards.append(Guard(action=action, author=author, reason=reason))
        self._changed.append(f"{action}: {reason}")


def _open_to(
    name: str, profile: Profile, history: Sequence[Trial], budget: Budget
) -> tuple[tuple[str, str], ...]:
    """Runtimes and schemes that a plan may have: those worth trying, of the paper its one."""
    if name == "paper":
        offered = {(each.runtime, scheme) for each in profile.runtimes for scheme in each.schemes}
        return tuple(pair for pair in PAPER.pairs or () if pair in offered)
    return tuple((each.runtime, each.scheme) for each in worth_trying(profile, history, budget))


def _pair(plan: Plan) -> Pair:
    return Pair(runtime=plan.runtime, scheme=plan.quantization.scheme)


def _completed(plan: Plan, profile: Profile, history: Sequence[Trial], budget: Budget) -> Plan:
    """The plan at the divergence to try next: smaller ratios where it is over that, and below it
    the rest spent by the solver on the groups that the plan leaves alone."""
    pair = _pair(plan)
    allowance, _ = next_allowance(profile, history, budget, pair)
    if allowance is None or needs_rescue(pair, history, budget):
        return plan
    if predict_kl(profile, plan) > allowance:
        return shrunk_to(plan, profile, allowance) or plan
    ids = tuple(group.id for group in profile.groups)
    taken = assign(plan, ids)
    cut = [group_id for group_id, line in taken.items() if line.ratio > 0]
    bare = plan.model_copy(update={"quantization": plan.quantization.model_copy(
        update={"scheme": "fp32", "keep_float": ()})})  # fmt: skip
    left = allowance - predict_kl(profile, bare)
    found = solve(pair, profile, history, budget, plan.seed, left, leave=taken)
    if found is None:
        return plan
    kept = dict.fromkeys((*plan.quantization.keep_float, *found.plan.quantization.keep_float))
    completed = plan.model_copy(
        update={
            "pruning": (*plan.pruning, *found.plan.pruning),
            "quantization": plan.quantization.model_copy(update={"keep_float": tuple(kept)}),
            "repair": repair_for((*cut, *assign(found.plan, ids))),
        }
    )
    within = predict_kl(profile, completed) <= allowance * (1 + 1e-9)
    return completed if within else plan
