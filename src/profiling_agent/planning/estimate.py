"""What a choice of widths and float layers is expected to save and to cost.

Savings are fractions of the whole model's time, from measured widths; costs are measured
divergences. Both add up over groups and layers only roughly, which is why a planner corrects them
by what the trials measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from profiling_agent.planning.history import Pair, controls, pair_of, relative_latency
from profiling_agent.records.patterns import assign, matches, units_kept
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import GroupCost, Profile
from profiling_agent.records.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Option:
    """One width of one group: share of the time saved (0 to 1) and predicted divergence."""

    ratio: float
    saved: float
    kl: float


def group_options(profile: Profile, group: GroupCost) -> list[Option]:
    """The measured options of a group, mildest first; those that save nothing are left out.

    Divergence may not fall, and saving may not shrink, as the ratio grows: noise is levelled.
    """
    options: list[Option] = []
    kl = saved = 0.0
    for point in sorted(group.sensitivity, key=lambda p: p.ratio):
        kl = max(kl, point.kl)
        saved = max(saved, saved_share(profile, group, point.ratio))
        if saved > 1e-4 and units_kept(group.width, point.ratio) < group.width:
            options.append(Option(ratio=point.ratio, saved=saved, kl=kl))
    return options


def saved_share(profile: Profile, group: GroupCost, ratio: float) -> float:
    """Share of the whole model's time saved by pruning this group by ``ratio``, interpolated.

    From the measured widths of the group's shape; where there are none, the group's share of the
    multiply-accumulates stands in.
    """
    kept = units_kept(group.width, ratio)
    if group.widths and profile.total is not None:
        points = {group.width: 0.0} | {p.width: p.saved_ms for p in group.widths}
        return max(0.0, _interpolate(points, kept)) / profile.total.median_ms
    if profile.total_macs == 0:
        return 0.0
    return (group.width - kept) * group.macs_per_unit / profile.total_macs


def _interpolate(points: Mapping[int, float], width: int) -> float:
    """Piecewise linear over measured widths; below the smallest, as far as its slope goes."""
    known = sorted(points)
    above = min((w for w in known if w >= width), default=known[-1])
    below = max((w for w in known if w <= width), default=None)
    if below is None:
        low, high = known[0], known[1]
        slope = (points[low] - points[high]) / (high - low)
        return points[low] + slope * (low - width)
    if above == below:
        return points[above]
    share = (above - width) / (above - below)
    return points[above] + share * (points[below] - points[above])


@dataclass(frozen=True, kw_only=True)
class LayerGain:
    """What int8 of one layer saves, as a share of the baseline's time, and what it costs."""

    name: str
    saved: float
    kl: float


def layer_gains(profile: Profile, history: Sequence[Trial], pair: Pair) -> list[LayerGain]:
    """The gain of int8, measured between the runtime's controls, shared out over the layers.

    Each layer's part follows its own measured gain in eager mode; before there are controls, that
    gain itself is used. Empty for a float scheme, or when just one of the two controls is missing.
    """
    if not pair.scheme.startswith("int8"):
        return []
    gains = {
        layer.name: max(0.0, (layer.float_ms or 0.0) - (layer.int8_ms or 0.0))
        for layer in profile.layers
    }
    total = sum(gains.values())
    difference = _measured_gain(history, pair)
    if not controls(history) and profile.total is not None:
        difference = total / profile.total.median_ms
    if difference is None:
        return []
    return [
        LayerGain(
            name=layer.name,
            saved=difference * gains[layer.name] / total if total else 0.0,
            kl=max(layer.kl, 0.0),
        )
        for layer in profile.layers
    ]


def _measured_gain(history: Sequence[Trial], pair: Pair) -> float | None:
    measured = controls(history)
    whole, small = measured.get(Pair(runtime=pair.runtime, scheme="fp32")), measured.get(pair)
    float_time = relative_latency(whole) if whole else None
    int8_time = relative_latency(small) if small else None
    return None if float_time is None or int8_time is None else float_time - int8_time


def base_latency(profile: Profile, history: Sequence[Trial], pair: Pair) -> float:
    """Latency over the baseline's of a scheme without pruning: its control's.

    Before there are controls, the original's less what int8 saved its layers in eager mode.
    """
    control = controls(history).get(pair)
    measured = relative_latency(control) if control else None
    if measured is not None:
        return measured
    return max(0.02, 1.0 - sum(gain.saved for gain in layer_gains(profile, history, pair)))


def predict_kl(profile: Profile, plan: Plan) -> float:
    """Sum of the measured divergences of what the plan does."""
    total = 0.0
    groups = {group.id: group for group in profile.groups}
    for group_id, line in assign(plan, tuple(groups)).items():
        total += _kl_at(groups[group_id], line.ratio)
    if plan.quantization.scheme.startswith("int8"):
        names = [layer.name for layer in profile.layers]
        kept = {n for pattern in plan.quantization.keep_float for n in matches(pattern, names)}
        total += sum(max(layer.kl, 0.0) for layer in profile.layers if layer.name not in kept)
    return total


def _kl_at(group: GroupCost, ratio: float) -> float:
    points = [(0.0, 0.0), *sorted((p.ratio, p.kl) for p in group.sensitivity)]
    for (low, low_kl), (high, high_kl) in pairwise(points):
        if ratio <= high:
            return low_kl + (high_kl - low_kl) * (ratio - low) / (high - low)
    return points[-1][1] * (ratio / points[-1][0]) ** 2 if points[-1][0] else 0.0


def predict_saved_share(profile: Profile, plan: Plan) -> float:
    """Sum of the shares of time that the plan's pruning saves, at most 0.95."""
    groups = {group.id: group for group in profile.groups}
    shares = (
        saved_share(profile, groups[group_id], line.ratio)
        for group_id, line in assign(plan, tuple(groups)).items()
    )
    return min(0.95, sum(shares))


def saving_scale(profile: Profile, history: Sequence[Trial], pair: Pair) -> float:
    """Measured over predicted saving of this pair's pruned trials, between 0.2 and 1.5; 1 if none.

    This is how the trials correct the latency estimate.
    """
    control = controls(history).get(pair)
    base = relative_latency(control) if control else None
    if base is None:
        return 1.0
    predicted = measured = 0.0
    for trial in history:
        time = relative_latency(trial)
        if trial.plan.pruning and pair_of(trial) == pair and time is not None:
            share = predict_saved_share(profile, trial.plan)
            predicted += share * share
            measured += share * (1.0 - time / base)
    if predicted == 0.0:
        return 1.0
    return min(1.5, max(0.2, measured / predicted))
