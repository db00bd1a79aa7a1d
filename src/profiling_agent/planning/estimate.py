"""What a choice of widths and float layers is expected to save and to cost.

Savings are fractions of the whole model's time, from measured widths; costs are measured
divergences. Both add up over groups and layers only roughly, which is why a planner corrects them
by what the trials measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from profiling_agent.planning.drops import fitted_slope
from profiling_agent.planning.history import (
    Pair,
    controls,
    holds,
    is_clearly_over,
    measured_pair,
    pair_of,
    relative_latency,
)
from profiling_agent.records.common import Budget
from profiling_agent.records.patterns import assign, matches, units_kept
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import GroupCost, LayerQuantization, Profile
from profiling_agent.records.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Option:
    """One width of one group: share of the time saved (0 to 1) and predicted divergence."""

    ratio: float
    saved: float
    kl: float


def group_options(profile: Profile, group: GroupCost, pair: Pair | None = None) -> list[Option]:
    """The measured options of a group, mildest first; those that save nothing are left out.

    Divergence may not fall, and saving may not shrink, as the ratio grows: noise is levelled.
    """
    options: list[Option] = []
    kl = saved = 0.0
    for point in sorted(group.sensitivity, key=lambda p: p.ratio):
        kl = max(kl, point.kl)
        saved = max(saved, saved_share(profile, group, point.ratio, pair))
        if saved > 1e-4 and units_kept(group.width, point.ratio) < group.width:
            options.append(Option(ratio=point.ratio, saved=saved, kl=kl))
    return options


def saved_share(
    profile: Profile, group: GroupCost, ratio: float, pair: Pair | None = None
) -> float:
    """Share of the whole model's time saved by pruning this group by ``ratio``, interpolated.

    From what the pair's own runtime and scheme measured of the group's shape, else from the widths
    in eager mode; where there are neither, the group's share of the multiply-accumulates stands in.
    """
    kept = units_kept(group.width, ratio)
    deployed = _deployed_points(profile, group, pair)
    if deployed:
        return max(0.0, _interpolate({group.width: 0.0} | deployed, kept))
    if group.widths and profile.total is not None:
        points = {group.width: 0.0} | {p.width: p.saved_ms for p in group.widths}
        return max(0.0, _interpolate(points, kept)) / profile.total.median_ms
    if profile.total_macs == 0:
        return 0.0
    return (group.width - kept) * group.macs_per_unit / profile.total_macs


def _deployed_points(profile: Profile, group: GroupCost, pair: Pair | None) -> dict[int, float]:
    if pair is None:
        return {}
    return {
        point.width: point.saved
        for table in profile.deployed_widths
        if (table.runtime, table.scheme) == (pair.runtime, pair.scheme)
        and table.shape_class == group.shape_class
        for point in table.points
    }


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

    Each layer's part follows what its own runtime measured of it (``profile.deployed``), else its
    gain in eager mode, else its share of the multiply-accumulates; before there are controls, the
    gain in eager mode itself is used. Negative where int8 makes a layer slower. Empty for a scheme
    in which layers can't be chosen, or when just one of the two controls is missing.
    """
    layers = layers_of(profile, pair.scheme)
    if not layers:
        return []
    gains = _deployed_gains(profile, pair, layers) or _eager_gains(profile, layers)
    total = sum(gains.values())
    difference = _measured_gain(history, pair)
    if not controls(history) and profile.total is not None:
        difference = total / profile.total.median_ms
    if difference is None:
        return []
    return [
        LayerGain(
            name=layer.name,
            saved=difference * gains[layer.name] / total if total > 0 else 0.0,
            kl=max(layer.kl, 0.0),
        )
        for layer in layers
    ]


def float_cost(plan: Plan, gains: Sequence[LayerGain]) -> float:
    """What the layers that the plan keeps float cost, over the baseline's time."""
    names = [gain.name for gain in gains]
    kept = {n for pattern in plan.quantization.keep_float for n in matches(pattern, names)}
    return sum(gain.saved for gain in gains if gain.name in kept)


def layers_of(profile: Profile, scheme: str) -> list[LayerQuantization]:
    """The layers that a scheme quantizes one by one, as measured for its kind of int8."""
    kind = next((k for k in ("int8-dynamic", "int8-static") if scheme.startswith(k)), None)
    return [layer for layer in profile.layers if layer.scheme == kind]


def float_counterpart(pair: Pair) -> Pair:
    """The scheme in which layers kept float compute."""
    scheme = "bf16" if pair.scheme.endswith("bf16") else "fp32"
    return Pair(runtime=pair.runtime, scheme=scheme)


def controls_to_profile(history: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    """Int8 controls whose layers can be chosen, each after its float one, the fastest pair first.

    One float control may stand in several pairs.
    """
    measured = controls(history)
    pairs: list[tuple[Trial, Trial]] = []
    for pair, trial in sorted(measured.items(), key=lambda item: relative_latency(item[1]) or 9e9):
        whole = measured.get(float_counterpart(pair))
        kinds = ("int8-dynamic", "int8-static")
        if whole is not None and pair.scheme.startswith(kinds) and relative_latency(trial):
            pairs.append((whole, trial))
    return pairs


def worth_trying(profile: Profile, history: Sequence[Trial], budget: Budget) -> list[Pair]:
    """Pairs whose control was measured; those that clearly lost too much only if int8.

    A float scheme over the budget can't be saved by pruning; an int8 one can keep layers float.
    """
    measured = controls(history)
    if not history:  # a first guess, from what the profile measured in eager mode
        schemes = profile.schemes("torch")
        return [Pair(runtime="torch", scheme=scheme) for scheme in schemes]
    pairs: list[Pair] = []
    for pair, trial in measured.items():
        hopeless = is_clearly_over(trial, budget) and not pair.scheme.startswith("int8")
        if not hopeless and relative_latency(trial) is not None:
            pairs.append(pair)
    return pairs


LIKELY = 2
"""Controls whose runtime and scheme are worth width tables of their own."""


def likely_to_serve(history: Sequence[Trial], budget: Budget) -> list[Trial]:
    """The fastest controls that a plan could start from: feasible ones, and int8 ones in any case.

    An int8 scheme over the budget can keep layers float; a float one can't be saved by pruning.
    """
    slope = fitted_slope(history, budget)
    usable = [
        trial
        for pair, trial in controls(history).items()
        if relative_latency(trial) is not None
        and (holds(trial, slope, budget) or pair.scheme.startswith("int8"))
    ]
    return sorted(usable, key=lambda trial: relative_latency(trial) or 0.0)[:LIKELY]


def likely_pair(history: Sequence[Trial], budget: Budget) -> Pair | None:
    """The likeliest of them."""
    likely = likely_to_serve(history, budget)
    return pair_of(likely[0]) if likely else None


SLOWER = 0.1
"""Int8 makes a layer slower when it takes this share more than float; below, it is noise."""


def _deployed_gains(
    profile: Profile, pair: Pair, layers: Sequence[LayerQuantization]
) -> dict[str, float]:
    """Milliseconds that int8 saves each layer in the runtime itself; empty without both profiles.

    A layer that the runtime's graph no longer shows gains nothing that can be told.
    """
    times = {(d.runtime, d.scheme): d.module_ms() for d in profile.deployed}
    whole = times.get((pair.runtime, float_counterpart(pair).scheme))
    small = times.get((pair.runtime, pair.scheme))
    if whole is None or small is None:
        return {}
    gains: dict[str, float] = {}
    for layer in layers:
        before, after = whole.get(layer.name), small.get(layer.name)
        gain = before - after if before is not None and after is not None else 0.0
        is_slower = before is not None and gain < -SLOWER * before
        gains[layer.name] = gain if is_slower else max(0.0, gain)
    return gains if sum(gains.values()) > 0 else {}


def _eager_gains(profile: Profile, layers: Sequence[LayerQuantization]) -> dict[str, float]:
    if all(layer.float_ms is not None and layer.int8_ms is not None for layer in layers):
        return {
            layer.name: max(0.0, (layer.float_ms or 0.0) - (layer.int8_ms or 0.0))
            for layer in layers
        }
    macs = {module.name: float(module.macs) for module in profile.modules}
    return {layer.name: macs.get(layer.name, 0.0) for layer in layers}


def _measured_gain(history: Sequence[Trial], pair: Pair) -> float | None:
    measured = controls(history)
    whole, small = measured.get(float_counterpart(pair)), measured.get(pair)
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
        total += kl_at(groups[group_id], line.ratio)
    layers = layers_of(profile, plan.quantization.scheme)
    names = [layer.name for layer in layers]
    kept = {n for pattern in plan.quantization.keep_float for n in matches(pattern, names)}
    total += sum(max(layer.kl, 0.0) for layer in layers if layer.name not in kept)
    return total


def kl_at(group: GroupCost, ratio: float) -> float:
    """Divergence of one group by how many units a ratio removes, between those measured; squared
    beyond them. A ratio too small to remove any costs nothing."""
    points = sorted(
        ({_removed(group, p.ratio): p.kl for p in group.sensitivity} | {0: 0.0}).items()
    )
    removed = _removed(group, ratio)
    for (low, low_kl), (high, high_kl) in pairwise(points):
        if removed <= high:
            return low_kl + (high_kl - low_kl) * (removed - low) / (high - low)
    return points[-1][1] * (removed / points[-1][0]) ** 2 if points[-1][0] else 0.0


def _removed(group: GroupCost, ratio: float) -> int:
    """So many units."""
    return group.width - units_kept(group.width, ratio)


def predict_saved_share(profile: Profile, plan: Plan) -> float:
    """The share of time that the plan's pruning saves, at most 0.95.

    What its groups save one by one, less what shapes save twice: a layer that loses a quarter of
    its inputs to one and a quarter of its outputs to another has nine sixteenths left, not a half.
    """
    groups = {group.id: group for group in profile.groups}
    pair = Pair(runtime=plan.runtime, scheme=plan.quantization.scheme)
    lines = assign(plan, tuple(groups))
    shares = (saved_share(profile, groups[i], line.ratio, pair) for i, line in lines.items())
    removed = {i: _removed(groups[i], line.ratio) / groups[i].width for i, line in lines.items()}
    return min(0.95, sum(shares) * _together(profile, removed))


def _together(profile: Profile, removed: Mapping[str, float]) -> float:
    """Multiply-accumulates saved by all groups, over the sum of what each shape saves alone.

    ``removed`` is the share of its units that each loses. Counted on the layers that they cut.
    Groups of one shape were timed together, so what they share is in their times already.
    """
    left: dict[str, dict[str, float]] = {}  # of a layer, by the shape of what cuts it
    for group in profile.groups:
        for name in group.members if group.id in removed else ():
            shapes = left.setdefault(name, {})
            shapes[group.shape_class] = shapes.get(group.shape_class, 1.0) * (1 - removed[group.id])
    macs = {module.name: module.self_macs for module in profile.modules}
    alone = sum(macs.get(n, 0) * sum(1 - s for s in shapes.values()) for n, shapes in left.items())
    together = sum(macs.get(n, 0) * (1 - math.prod(shapes.values())) for n, shapes in left.items())
    return together / alone if alone > 0 else 1.0


UNTIMED = 0.6
"""Of what eager mode saves by a narrower layer, what a runtime is taken to save, until a trial."""


def saving_scale(profile: Profile, history: Sequence[Trial], pair: Pair) -> float:
    """Measured over predicted saving of this pair's pruned trials, between 0.2 and 1.5.

    This is how the trials correct the latency estimate. What layers kept float cost is not held
    against the pruning. Trials of the runtime's schemes that quantize alike count together as one
    more, where their widths were timed as this pair's were. Without a trial it is 1, but
    ``UNTIMED`` where other pairs' widths were timed and this one's were not: eager mode gains more
    by pruning than a runtime does, and what is known too well by guess would be tried before what
    is known.
    """
    known = controls(history)
    if pair not in known or relative_latency(known[pair]) is None:
        return 1.0
    timed = {measured_pair(table) for table in profile.deployed_widths}
    savings = _savings(profile, history, pair)
    alike = [
        saving
        for other in known
        if other != pair
        and (other.runtime, _kind(other)) == (pair.runtime, _kind(pair))
        and (other in timed) == (pair in timed)
        for saving in _savings(profile, history, other)
    ]
    if alike:
        savings.append((fmean(each[0] for each in alike), fmean(each[1] for each in alike)))
    predicted = sum(each[0] for each in savings)
    measured = sum(each[1] for each in savings)
    if predicted == 0.0:
        return UNTIMED if timed and pair not in timed else 1.0
    return min(1.5, max(0.2, measured / predicted))


def _kind(pair: Pair) -> str:
    """How a scheme quantizes, whatever its float layers compute in."""
    return pair.scheme.removesuffix("-bf16")


def _savings(profile: Profile, history: Sequence[Trial], pair: Pair) -> list[tuple[float, float]]:
    """Of each pruned trial of the pair: the predicted share of its control's time, squared, and
    that times the measured one. The sum of the second over that of the first is the scale that fits
    them best."""
    control = controls(history).get(pair)
    base = relative_latency(control) if control else None
    if base is None:
        return []
    gains = layer_gains(profile, history, pair)
    savings: list[tuple[float, float]] = []
    for trial in history:
        time = relative_latency(trial)
        if trial.plan.pruning and pair_of(trial) == pair and time is not None:
            share = predict_saved_share(profile, trial.plan)
            saved = 1.0 + (float_cost(trial.plan, gains) - time) / base
            savings.append((share * share, share * saved))
    return savings
