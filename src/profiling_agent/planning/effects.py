"""What a plan does, whatever it is written like: two plans with one effect are one trial."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from profiling_agent.planning.estimate import layers_of
from profiling_agent.records.patterns import assign, matches, units_kept
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial


def effect(plan: Plan, profile: Profile) -> Hashable:
    """Runtime, scheme, units kept of each group that is cut and how, and layers kept float."""
    groups = {group.id: group for group in profile.groups}
    cut = {
        group_id: (units_kept(groups[group_id].width, line.ratio), line.importance)
        for group_id, line in assign(plan, tuple(groups)).items()
        if units_kept(groups[group_id].width, line.ratio) < groups[group_id].width
    }
    repair = plan.repair if cut else None
    return (
        plan.runtime,
        plan.quantization.scheme,
        tuple(sorted(cut.items())),
        repair,
        floats(plan, profile),
    )


def floats(plan: Plan, profile: Profile) -> frozenset[str]:
    """The layers that an int8 plan keeps float, of those that can be chosen."""
    names = [layer.name for layer in layers_of(profile, plan.quantization.scheme)]
    patterns = plan.quantization.keep_float
    return frozenset(name for pattern in patterns for name in matches(pattern, names))


def nothing_new(plan: Plan, profile: Profile, history: Sequence[Trial]) -> str | None:
    """Why a trial of the plan would teach nothing, in words; ``None`` when it would."""
    layers = layers_of(profile, plan.quantization.scheme)
    if layers and len(floats(plan, profile)) == len(layers):
        return (
            f"Every layer would stay float, so {plan.quantization.scheme!r} would quantize "
            "nothing; choose a float scheme for that."
        )
    wanted = effect(plan, profile)
    same = next((trial for trial in history if effect(trial.plan, profile) == wanted), None)
    if same is None:
        return None
    what = "what the runtime gives without a plan" if same.is_control else "a plan tried before"
    return f"This does the same as {same.trial_id}, {what}; change a ratio, a layer or the scheme."
