"""How far a plan from outside may go: not to a divergence that trials have shown to be too much."""

from __future__ import annotations

from collections.abc import Sequence

from profiling_agent.planning.allowance import SEARCH_ENDED, allowance_bracket, next_allowance
from profiling_agent.planning.estimate import predict_kl
from profiling_agent.planning.history import Pair, pair_of
from profiling_agent.records.common import Budget
from profiling_agent.records.patterns import assign, units_kept
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

NEAR_COLLAPSE = 1 / 4
"""Of the divergence of a plan that collapsed: from there on others are not trusted."""
STEPS = 20
"""Of the bisection of the factor."""


def within_trust(
    plan: Plan, profile: Profile, history: Sequence[Trial], budget: Budget
) -> tuple[Plan | None, str]:
    """The plan, with smaller ratios if need be, and what was done to it, else an empty text.

    The bound is the least divergence of the plan's runtime and scheme that was over the budget; a
    quarter of it where that plan collapsed, since a little less would collapse too. What is to be
    tried next is within it, and so is what held.

    ``None`` for a pruning plan that can't be brought below it; one without any pruning stays as it
    is: only a trial can tell of the layers that it keeps float.
    """
    pair = Pair(runtime=plan.runtime, scheme=plan.quantization.scheme)
    low, high = allowance_bracket(profile, history, budget, pair)
    predicted = predict_kl(profile, plan)
    if high is None:
        return plan, ""
    wanted, _ = next_allowance(profile, history, budget, pair)
    collapsed = {
        predict_kl(profile, trial.plan)
        for trial in history
        if trial.status == "screened" and pair_of(trial) == pair
    }
    target = wanted if wanted is not None and wanted < high else high / SEARCH_ENDED
    bound = NEAR_COLLAPSE * high if high in collapsed else high
    if predicted * SEARCH_ENDED < bound or predicted <= max(target, low or 0.0):
        return plan, ""
    smaller = shrunk_to(plan, profile, target)
    if smaller is None:
        if not plan.pruning:
            return plan, ""
        return None, (
            f"a predicted divergence of {predicted:.3g} nats where {high:.3g} was too much, and "
            "smaller ratios would not mend it"
        )
    return smaller, (
        f"a predicted divergence of {predicted:.3g} nats where {high:.3g} was too much: all ratios "
        f"made smaller, to {predict_kl(profile, smaller):.3g}"
    )


def shrunk_to(plan: Plan, profile: Profile, target: float) -> Plan | None:
    """The plan with all ratios multiplied by the largest factor whose divergence fits.

    ``None`` when even none of its pruning is too much, or what is left would remove no unit.
    """
    low, high = 0.0, 1.0
    if predict_kl(profile, _scaled(plan, 0.0)) > target:
        return None
    for _ in range(STEPS):
        middle = (low + high) / 2
        if predict_kl(profile, _scaled(plan, middle)) <= target:
            low = middle
        else:
            high = middle
    smaller = _scaled(plan, low)
    return smaller if _removes(smaller, profile) else None


def _removes(plan: Plan, profile: Profile) -> bool:
    widths = {group.id: group.width for group in profile.groups}
    lines = assign(plan, tuple(widths))
    return any(units_kept(widths[i], line.ratio) < widths[i] for i, line in lines.items())


def _scaled(plan: Plan, factor: float) -> Plan:
    """Ratios rounded down to thousandths; lines that end at nothing still spare their groups."""
    lines = [
        line.model_copy(update={"ratio": int(1000 * factor * line.ratio) / 1000})
        for line in plan.pruning
    ]
    some = any(line.ratio > 0 for line in lines)
    return plan.model_copy(update={"pruning": tuple(lines) if some else ()})
