"""A plan against the profile, before anything is touched: words, or nothing when all is well."""

from __future__ import annotations

from collections.abc import Collection

from profiling_agent.errors import BudgetError, PlanError
from profiling_agent.records.common import Budget
from profiling_agent.records.patterns import assign, matches, units_kept
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile

MAX_RATIO = 0.95
MAX_DROP = 50.0


def check_budget(budget: Budget) -> None:
    """``BudgetError`` for a drop that makes no sense."""
    drop = budget.max_drop
    if drop < 0:
        raise BudgetError(f"--max-drop is {drop!r}; give what may be lost, such as 0.5.")
    if budget.unit == "points" and drop > MAX_DROP:
        raise BudgetError(
            f"--max-drop {drop:g} would allow a useless model; it is in points of accuracy (0.5 "
            "is half a percent of the samples)."
        )


def check_plan(plan: Plan, profile: Profile, tried: Collection[str] = ()) -> str | None:
    """The first reason why the plan can't be carried out, in words that can be acted on.

    ``tried`` holds the ids of plans carried out before. Checks in the order of the plan's fields.
    """
    for check in (_runtime, _pruning, _quantization):
        reason = check(plan, profile)
        if reason is not None:
            return reason
    if plan.plan_id in tried:
        return "This plan was tried before; change a ratio, the scheme or the runtime."
    return None


def demand_plan(plan: Plan, profile: Profile) -> None:
    """``PlanError`` with the reason when a person's plan can't be carried out."""
    reason = check_plan(plan, profile)
    if reason is not None:
        raise PlanError(reason)


def _runtime(plan: Plan, profile: Profile) -> str | None:
    known = {entry.runtime: entry for entry in profile.runtimes}
    entry = known.get(plan.runtime)
    if entry is not None and entry.schemes:
        return None
    usable = [name for name, e in known.items() if e.schemes]
    why = f" ({entry.reason})" if entry is not None and entry.reason else ""
    choice = f"choose one of {', '.join(usable)}" if usable else "none that is known can be"
    return f"The runtime {plan.runtime!r} can't be used here{why}; {choice}."


def _quantization(plan: Plan, profile: Profile) -> str | None:
    scheme, schemes = plan.quantization.scheme, profile.schemes(plan.runtime)
    if scheme not in schemes:
        choice = f"choose one of {', '.join(schemes)}"
        for refused in profile.refused(plan.runtime):
            if refused.what == scheme:
                return (
                    f"The runtime {plan.runtime!r} does not offer {scheme!r} here: "
                    f"{refused.reason}; {choice}."
                )
        return f"The runtime {plan.runtime!r} has no scheme {scheme!r}; {choice}."
    names = [module.name for module in profile.modules if _is_product(module.type)]
    for pattern in plan.quantization.keep_float:
        try:
            if not matches(pattern, names):
                return _matches_nothing("keep_float", pattern, "linear layer or convolution", names)
        except PlanError as error:
            return str(error)
    return None


def _is_product(kind: str) -> bool:
    return kind.endswith("Linear") or kind in ("Conv1d", "Conv2d", "Conv3d")


def _pruning(plan: Plan, profile: Profile) -> str | None:
    ids = [group.id for group in profile.groups]
    for line in plan.pruning:
        try:
            selected = matches(line.match, ids)
        except PlanError as error:
            return str(error)
        if not selected:
            frozen = {entry.id: entry.reason for entry in profile.frozen}
            for group_id in matches(line.match, list(frozen)):
                return f"The group {group_id!r} can't be pruned: {frozen[group_id]}."
            return _matches_nothing("pruning", line.match, "prunable group", ids)
        if line.ratio > MAX_RATIO:
            return (
                f"The ratio {line.ratio} of {line.match!r} is above {MAX_RATIO}; "
                "a layer that small is better removed by hand."
            )
    if plan.pruning and not any(
        units_kept(profile.group(group_id).width, line.ratio) < profile.group(group_id).width
        for group_id, line in assign(plan, ids).items()
    ):
        return "The pruning lines remove nothing: every ratio rounds down to zero units."
    return None


def _matches_nothing(field: str, pattern: str, what: str, names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3]) or "none at all"
    return (
        f"The {field} pattern {pattern!r} matches no {what}. It must match a whole name, "
        f"such as {shown}."
    )
