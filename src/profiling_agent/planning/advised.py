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
from profiling_agent.planning.agents.answer import ANYTHING, Limits
from profiling_agent.planning.agents.consult import (
    MAX_ANSWERS,
    Consulted,
    Question,
    consult,
    instructions,
)
from profiling_agent.planning.allowance import next_allowance
from profiling_agent.planning.estimate import predict_kl
from profiling_agent.planning.history import Pair
from profiling_agent.planning.planner import AdvisedName, Planner, Proposal
from profiling_agent.planning.solver import Solver, estimate, promise, solve
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


class AdvisedPlanner:
    """A guarded planner over one client; see the module's text."""

    def __init__(self, name: AdvisedName, client: Client, settings: LlmSettings) -> None:
        """``BudgetError`` for a wording of the prompt that there is not."""
        instructions("analysis", settings.prompt)
        self.name: str = name
        self._client, self._settings = client, settings
        self._solver = Solver()
        self._guards: list[Guard] = []
        self._gone = ""

    @property
    def reserve(self) -> Planner | None:
        return None if self.name == "paper" else self._solver

    @property
    def usage(self) -> LlmUsage:
        return self._client.usage

    def take_guards(self) -> tuple[Guard, ...]:
        taken = tuple(self._guards)
        self._guards.clear()
        return taken

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        """``None``: the model says that it is done, its rounds are used up, or the paper's way
        ended."""
        asked = sum(trial.author in (MODEL, TOGETHER, "paper") for trial in history)
        if self._settings.rounds is not None and asked >= self._settings.rounds:
            return None
        consulted = self._consult(profile, history, budget, seed)
        if consulted is None or (consulted.parsed.plan is None and not consulted.parsed.done):
            return self._fallback(profile, history, budget, seed)
        plan = consulted.parsed.plan
        if plan is None:
            return None
        if self.name == "paper":
            return self._described(estimate(plan, profile, history), "paper")
        if self.name == "hybrid":
            return self._hybrid(plan, profile, history, budget, seed)
        plan = self._trusted(plan, profile, history, budget)
        if plan is None:
            return self._fallback(profile, history, budget, seed)
        return self._described(estimate(plan, profile, history), MODEL)

    def _consult(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Consulted | None:
        """The model's plan; ``None`` when it can't be asked, with the reason among the guards."""
        if self._gone:
            return None
        question = Question(
            profile=profile,
            history=history,
            budget=budget,
            seed=seed,
            wording=self._settings.prompt,
            limits=PAPER if self.name == "paper" else ANYTHING,
            use_tools=self._settings.use_tools and self._client.provider.offers_tools,
            with_solver_tool=self.name != "paper",
            max_answers=1 if self.name == "paper" else MAX_ANSWERS,
        )
        try:
            consulted = consult(self._client.ask, question)
        except LlmUnavailable as error:
            self._gone = str(error) if error.is_final else ""
            self._note("rejected", MODEL, f"no answer: {error}")
            return None
        for reason in consulted.rejected:
            self._note("rejected", MODEL, reason)
        for change in consulted.parsed.changed:
            self._note("rewritten", MODEL, change)
        return consulted

    def _trusted(
        self, plan: Plan, profile: Profile, history: Sequence[Trial], budget: Budget
    ) -> Plan | None:
        """The plan within the trust region; ``None`` when that was tried before, or can't be."""
        trusted, change = within_trust(plan, profile, history, budget)
        if change:
            self._note("rejected" if trusted is None else "rewritten", MODEL, change)
        if trusted is None:
            return None
        if trusted.plan_id in {trial.plan.plan_id for trial in history}:
            self._note("rejected", MODEL, "with smaller ratios it is a plan that was tried before")
            return None
        return trusted

    def _fallback(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        if self.name == "paper":
            return None
        proposal = self._solver.propose(profile, history, budget, seed)
        if proposal is None:
            return None
        self._note("fallback", MODEL, f"the solver's plan instead{self._why_gone()}")
        return replace(proposal, author="solver")

    def _why_gone(self) -> str:
        return f" ({self._gone})" if self._gone else ""

    def _hybrid(
        self, plan: Plan, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        """The better estimate of the solver's own plan and the model's, mended and completed."""
        own = self._solver.propose(profile, history, budget, seed)
        trusted = self._trusted(
            _completed(plan, profile, history, budget), profile, history, budget
        )
        if trusted is None:
            return replace(own, author="solver") if own else None
        theirs = estimate(trusted, profile, history)
        if own is not None:
            values = [
                promise(each, _pair(each.plan), profile, history, budget) for each in (own, theirs)
            ]
            if values[0] < values[1]:
                self._note("rewritten", MODEL, "the solver's own plan is better by estimate")
                return replace(own, author="solver")
        return self._described(theirs, MODEL if trusted == plan else TOGETHER)

    def _described(self, proposal: Proposal, author: str) -> Proposal:
        return replace(proposal, author=author)

    def _note(self, action: GuardAction, author: str, reason: str) -> None:
        self._guards.append(Guard(action=action, author=author, reason=reason))


def _pair(plan: Plan) -> Pair:
    return Pair(runtime=plan.runtime, scheme=plan.quantization.scheme)


def _completed(plan: Plan, profile: Profile, history: Sequence[Trial], budget: Budget) -> Plan:
    """The plan at the divergence to try next: smaller ratios where it is over that, and below it
    the rest spent by the solver on the groups that the plan leaves alone."""
    pair = _pair(plan)
    allowance, _ = next_allowance(profile, history, budget, pair)
    if allowance is None:
        return plan
    if predict_kl(profile, plan) > allowance:
        return shrunk_to(plan, profile, allowance) or plan
    taken = assign(plan, tuple(group.id for group in profile.groups))
    others = tuple(group for group in profile.groups if group.id not in taken)
    bare = plan.model_copy(update={"quantization": plan.quantization.model_copy(
        update={"scheme": "fp32", "keep_float": ()})})  # fmt: skip
    rest = profile.model_copy(update={"groups": others})
    found = solve(pair, rest, history, budget, plan.seed, allowance - predict_kl(profile, bare))
    if found is None:
        return plan
    kept = dict.fromkeys((*plan.quantization.keep_float, *found.plan.quantization.keep_float))
    completed = plan.model_copy(
        update={
            "pruning": (*plan.pruning, *found.plan.pruning),
            "quantization": plan.quantization.model_copy(update={"keep_float": tuple(kept)}),
        }
    )
    within = predict_kl(profile, completed) <= allowance * (1 + 1e-9)
    return completed if within else plan
