"""What an agent may look up while it thinks: a group, an estimate, the solver's plan, the archive.

The answers are made of the same records and by the same estimator as the solver's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic_core import from_json

from profiling_agent.errors import PlanError
from profiling_agent.llm.conversation import ToolOffer
from profiling_agent.planning.agents.answer import Limits, answer_schema, read_answer
from profiling_agent.planning.agents.folding import printable, shown
from profiling_agent.planning.allowance import next_allowance
from profiling_agent.planning.estimate import likely_pair, saved_share
from profiling_agent.planning.history import Pair, pareto, relative_latency, search_drop
from profiling_agent.planning.solver import estimate, solve
from profiling_agent.records.common import Budget
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

MAX_SHOWN = 4000
"""Characters of a tool's answer."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The tools over one state of the search; ``use`` never raises."""

    profile: Profile
    history: Sequence[Trial]
    budget: Budget
    seed: int
    limits: Limits
    with_solver: bool = True

    def offers(self) -> tuple[ToolOffer, ...]:
        plan = answer_schema(self.profile, self.limits)
        offers = [
            ToolOffer(
                name="look_at_group",
                description="Everything measured of one group, by its exact name.",
                parameters=_object(name={"type": "string"}),
            ),
            ToolOffer(
                name="estimate",
                description="Predicted time over eager and harm of a plan, without a trial.",
                parameters={**plan, "description": "a plan as in the answer"},
            ),
            ToolOffer(
                name="archive",
                description="The trials that no other beats in both objective and loss.",
                parameters=_object(),
            ),
        ]
        if self.with_solver:
            offers.append(
                ToolOffer(
                    name="solver_plan",
                    description=(
                        "The solver's fastest plan for a runtime and scheme whose predicted harm "
                        "is at most so many thousandths of a nat."
                    ),
                    parameters=_object(
                        runtime={"type": "string"},
                        scheme={"type": "string"},
                        harm={"type": "number"},
                    ),
                )
            )
        return tuple(offers)

    def use(self, name: str, arguments: str) -> str:
        """The tool's answer, or in words why there is none."""
        tools: dict[str, Callable[[dict[str, Any], str], str]] = {
            "look_at_group": lambda given, _: self._group(given),
            "estimate": lambda _, text: self._estimate(text),
            "archive": lambda _given, _text: self._archive(),
        }
        if self.with_solver:
            tools["solver_plan"] = lambda given, _: self._solver(given)
        if name not in tools:
            return f"There is no tool {shown(name)!r}; there are {', '.join(tools)}."
        try:
            given = from_json(arguments or "{}", allow_inf_nan=False)
        except (ValueError, TypeError, RecursionError):  # TypeError: half of a surrogate pair
            return "The arguments are not JSON."
        if not isinstance(given, dict):
            return "The arguments must be an object."
        try:
            return tools[name](cast(dict[str, Any], given), arguments)[:MAX_SHOWN]
        except PlanError as error:  # a pattern that was just in time before
            return str(error)[:MAX_SHOWN]

    def _group(self, given: dict[str, Any]) -> str:
        name = str(given.get("name", ""))
        group = next((g for g in self.profile.groups if g.id == name), None)
        if group is None:
            frozen = {entry.id: entry.reason for entry in self.profile.frozen}
            if name in frozen:
                return f"It can't be pruned: {shown(frozen[name])}."
            return f"There is no group {shown(name)!r}."
        pair = likely_pair(self.history, self.budget)
        rows = [
            f"ratio {p.ratio:g}: harm {1000 * p.kl:.3g} ± {1000 * p.kl_error:.2g}, answers changed "
            f"{p.disagreement:.1%}, saves "
            f"{saved_share(self.profile, group, p.ratio, pair):.2%} of the time"
            for p in group.sensitivity
        ]
        layers = ", ".join(shown(member) for member in group.members[:8])
        return "\n".join([f"{group.width} units in {len(group.members)} layers: {layers}", *rows])

    def _estimate(self, text: str) -> str:
        parsed = read_answer(text, self.profile, seed=self.seed, limits=self.limits)
        if parsed.plan is None:
            return parsed.reason or "Nothing to estimate."
        found = estimate(parsed.plan, self.profile, self.history)
        pair = Pair(runtime=found.plan.runtime, scheme=found.plan.quantization.scheme)
        allowance, _ = next_allowance(self.profile, self.history, self.budget, pair)
        is_told = allowance is not None and self.with_solver  # it is the solver's next step
        fits = f"; worth trying next: about {1000 * (allowance or 0.0):.3g}" if is_told else ""
        return (
            f"time over eager {found.relative_latency or 0.0:.3f}, harm "
            f"{1000 * (found.kl or 0.0):.3g} thousandths of a nat{fits}"
        )

    def _solver(self, given: dict[str, Any]) -> str:
        pair = Pair(runtime=str(given.get("runtime")), scheme=str(given.get("scheme")))
        harm = given.get("harm")
        if pair.scheme not in self.profile.schemes(pair.runtime):
            return f"There is no {shown(pair.runtime)} {shown(pair.scheme)} here."
        if isinstance(harm, bool) or not isinstance(harm, int | float) or not 0 <= harm <= 1e6:
            return "Give harm as a number of thousandths of a nat."
        found = solve(pair, self.profile, self.history, self.budget, self.seed, harm / 1000)
        if found is None:
            return "No plan fits."
        lines = "; ".join(f"{printable(line.match)} {line.ratio:g}" for line in found.plan.pruning)
        kept = ", ".join(printable(name) for name in found.plan.quantization.keep_float)
        return (
            f"time over eager {found.relative_latency or 0.0:.3f}, harm "
            f"{1000 * (found.kl or 0.0):.3g}; prune {lines or 'nothing'}; keep float "
            f"{kept or 'nothing'}"
        )

    def _archive(self) -> str:
        rows = [
            f"{trial.trial_id} {trial.label}: time over eager "
            f"{relative_latency(trial) or 0.0:.3f}, lost {search_drop(trial) or 0.0:.2f}"
            for trial in pareto(self.history, self.budget)
        ]
        return "\n".join(rows) or "No trial was measured yet."


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
