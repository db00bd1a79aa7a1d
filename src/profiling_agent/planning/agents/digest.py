"""The profile, the budget and the trials so far in few words, for a reader that pays by the token.

Every prunable group is in it. Repeated blocks share a row, whose pattern a plan can use as it
stands; what differs between them stands in the row by block number. When the text would be longer
than allowed, numbers are dropped before groups are: first the second ratio, then the single
divergences but for the extremes, then the modules and layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import regex

from profiling_agent.planning.agents.folding import NUMBER, Fold, fold, shown
from profiling_agent.planning.drops import Slope, expected_drop, fitted_slope
from profiling_agent.planning.estimate import (
    kl_at,
    layer_gains,
    likely_pair,
    likely_to_serve,
    saved_share,
)
from profiling_agent.planning.history import (
    Pair,
    controls,
    feasible,
    holds,
    pair_of,
    relative_latency,
    search_drop,
)
from profiling_agent.records.common import Budget
from profiling_agent.records.patterns import units_kept
from profiling_agent.records.profile import GroupCost, ModuleCost, Profile
from profiling_agent.records.trial import Trial

MAX_TOKENS = 3200
"""Of a digest; with the instructions and the schema of the answer it stays under 5,000."""
MAX_TOKENS_LARGE = 7000
LARGE_MODEL = 150
"""Groups above which the larger limit holds."""
MAX_TRIALS, MAX_MODULES, MAX_LAYERS = 8, 6, 10
MILLI = 1000.0
MAX_CHANGED = 240
"""Characters of what guards made of a plan."""
_TOKEN = regex.compile(r"\d|\p{L}{1,4}|[^\d\p{L}\s]|\s+")


def count_tokens(text: str) -> int:
    """About how many tokens a text takes, rather more than less: every digit counts as one."""
    return sum(1 for _ in _TOKEN.finditer(text))


@dataclass(frozen=True, kw_only=True)
class Detail:
    """How much is told: ratios of a group, single divergences, rows of modules and layers."""

    num_ratios: int
    each: bool
    num_modules: int
    num_layers: int
    num_trials: int


DETAILS = (
    Detail(num_ratios=2, each=True, num_modules=MAX_MODULES, num_layers=MAX_LAYERS, num_trials=8),
    Detail(num_ratios=1, each=True, num_modules=MAX_MODULES, num_layers=MAX_LAYERS, num_trials=8),
    Detail(num_ratios=1, each=False, num_modules=MAX_MODULES, num_layers=MAX_LAYERS, num_trials=6),
    Detail(num_ratios=1, each=False, num_modules=3, num_layers=4, num_trials=3),
    Detail(num_ratios=1, each=False, num_modules=0, num_layers=0, num_trials=1),
)


def digest(profile: Profile, history: Sequence[Trial], budget: Budget) -> str:
    """The text; see the module's own."""
    limit = MAX_TOKENS_LARGE if len(profile.groups) > LARGE_MODEL else MAX_TOKENS
    text = ""
    for detail in DETAILS:
        text = _written(profile, history, budget, detail)
        if count_tokens(text) <= limit:
            break
    return text


def _written(profile: Profile, history: Sequence[Trial], budget: Budget, detail: Detail) -> str:
    parts = [
        _situation(profile, budget),
        _controls(history, budget),
        _bottlenecks(profile, detail.num_modules),
        _groups(profile, history, budget, detail),
        _layers(profile, history, budget, detail.num_layers),
        _trials(history, budget, detail.num_trials),
    ]
    return "\n\n".join(part for part in parts if part)


def _situation(profile: Profile, budget: Budget) -> str:
    machine, deployment = profile.machine, profile.deployment
    eager = f", {profile.total.median_ms:.3g} ms in eager fp32" if profile.total else ""
    samples = "sample" if deployment.batch_size == 1 else "samples"
    return (
        f"MACHINE {shown(machine.processor)}, {machine.num_cores} cores, "
        f"{' '.join(machine.features) or 'no vector features'}\n"
        f"SERVES {deployment.batch_size} {samples} a call on {deployment.threads} threads\n"
        f"MODEL {profile.num_parameters / 1e6:.3g} M parameters, "
        f"{profile.total_macs / 1e9:.3g} GMACs{eager}\n"
        f"BUDGET lose at most {budget.max_drop:g} {budget.unit}; make {budget.objective} best"
    )


def _controls(history: Sequence[Trial], budget: Budget) -> str:
    """What runtimes give without any plan, the fastest first."""
    slope = fitted_slope(history, budget)
    lines: list[tuple[float, str]] = []
    for pair, trial in controls(history).items():
        time = relative_latency(trial)
        if time is None:
            continue
        lost = _lost(trial, slope, budget)
        lines.append((time, f"{pair.runtime} {pair.scheme} | {time:.3f} | {lost}"))
    if not lines:
        return ""
    head = "OFF THE SHELF, measured: runtime scheme | time over eager | lost"
    return "\n".join([head, *(line for _, line in sorted(lines))])


def _bottlenecks(profile: Profile, limit: int) -> str:
    """Where eager time goes, by kind of place, with what bounds it."""
    timed = [m for m in profile.modules if m.self_time is not None and m.self_time.median_ms > 0]
    total = sum(_ms(m) for m in timed)
    if not timed or not limit or total <= 0:
        return ""
    families: dict[tuple[str, str], list[ModuleCost]] = {}
    for module in timed:
        families.setdefault((NUMBER.sub("#", module.name), module.type), []).append(module)
    balance = _balance(timed)
    rows: list[tuple[float, str]] = []
    for (name, kind), modules in families.items():
        ms = sum(_ms(m) for m in modules)
        intensity = sum(m.self_macs for m in modules) / max(1, sum(_bytes(m) for m in modules))
        bound = "compute" if intensity >= balance else "memory"
        rows.append(
            (
                -ms,
                f"{shown(name) or 'the model itself'} ({shown(kind)}) x{len(modules)} "
                f"| {ms / total:.0%} | {intensity:.3g} | {bound}",
            )
        )
    head = "WHERE EAGER TIME GOES: place | share | MACs per byte | bound by"
    return "\n".join([head, *(line for _, line in sorted(rows)[:limit])])


def _ms(module: ModuleCost) -> float:
    return module.self_time.median_ms if module.self_time else 0.0


def _bytes(module: ModuleCost) -> int:
    return module.weight_bytes + module.output_bytes


def _balance(modules: Sequence[ModuleCost]) -> float:
    """MACs per byte at which the best measured rates of both would take the same time.

    An empirical roofline: the highest rates seen in this model stand for the machine's own.
    """
    rate = max(m.self_macs / _ms(m) for m in modules)
    bandwidth = max(_bytes(m) / _ms(m) for m in modules)
    return rate / bandwidth if bandwidth > 0 else 0.0


def _groups(profile: Profile, history: Sequence[Trial], budget: Budget, detail: Detail) -> str:
    if not profile.groups:
        return "GROUPS none of this model's layers can be pruned; only runtime and scheme count"
    known = {group.id: group for group in profile.groups}
    pair = likely_pair(history, budget)
    ratios = _ratios(profile, detail.num_ratios)
    folds = fold(
        list(known), lambda name: (known[name].kind, known[name].width, known[name].shape_class)
    )
    at = " and ".join(f"{ratio:g}" for ratio in ratios)
    timed = pair is not None and any(
        (table.runtime, table.scheme) == (pair.runtime, pair.scheme)
        for table in profile.deployed_widths
    )
    where = f"in {pair.runtime} {pair.scheme}" if pair is not None and timed else "in eager mode"
    head = (
        f"GROUPS: pattern | blocks | units of each | % of the time saved by each {where} at ratio "
        f"{at} | harm at ratio {at} by block number, in thousandths of a nat"
    )
    return "\n".join([head, *(_group_row(profile, f, known, pair, ratios, detail) for f in folds)])


def _ratios(profile: Profile, count: int) -> tuple[float, ...]:
    """Measured ratios to show: the one nearest a quarter, and the one nearest a half."""
    known = sorted({point.ratio for group in profile.groups for point in group.sensitivity})
    if not known:
        return ()
    wanted = (0.25, 0.5)[:count]
    return tuple(dict.fromkeys(min(known, key=lambda r: abs(r - w)) for w in wanted))


def _group_row(
    profile: Profile,
    row: Fold,
    known: dict[str, GroupCost],
    pair: Pair | None,
    ratios: Sequence[float],
    detail: Detail,
) -> str:
    groups = [known[name] for name in row.names]
    first = groups[0]
    saved = "/".join(
        "-"
        if units_kept(first.width, ratio) == first.width
        else f"{100 * saved_share(profile, first, ratio, pair):.2g}"
        for ratio in ratios
    )
    return (
        f"{row.pattern} | {len(groups)} | {first.width} | {saved or '?'} | "
        f"{_harm(groups, row.labels, ratios, each=detail.each)}"
    )


def _harm(
    groups: Sequence[GroupCost], labels: Sequence[str], ratios: Sequence[float], *, each: bool
) -> str:
    """The measured divergences of all groups of a row, or their extremes."""
    values = {
        label: [_millinats(group, ratio) for ratio in ratios]
        for label, group in zip(labels, groups, strict=True)
    }
    if len(groups) == 1 or each:
        named = {label: "/".join(each_) for label, each_ in values.items()}
        if len(set(named.values())) == 1:
            return next(iter(named.values()))
        return " ".join(f"{label}:{value}" for label, value in named.items())
    order = sorted(
        zip(labels, groups, strict=True),
        key=lambda item: kl_at(item[1], ratios[0]) if ratios and item[1].sensitivity else 0.0,
    )
    low, high = order[0][0], order[-1][0]
    worst = " ".join(f"{label}:{values[label][0]}" for label, _ in order[-4:]) if ratios else "?"
    return f"from {low}:{values[low][0]} to {worst}" if ratios and low != high else worst


def _millinats(group: GroupCost, ratio: float) -> str:
    """Interpolated between measured ratios; a dash where the ratio removes no unit."""
    if not group.sensitivity:
        return "?"
    if units_kept(group.width, ratio) == group.width:
        return "-"
    return _short(MILLI * max(0.0, kl_at(group, ratio)))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.2g}"


def _layers(profile: Profile, history: Sequence[Trial], budget: Budget, limit: int) -> str:
    """The layers that int8 harms most, for the scheme that is likeliest to serve."""
    for trial in likely_to_serve(history, budget):
        pair = pair_of(trial)
        gains = layer_gains(profile, history, pair)
        if not gains or not limit:
            continue
        worst = sorted(gains, key=lambda gain: -gain.kl)[:limit]
        total = sum(gain.kl for gain in gains)
        lines = [
            f"{shown(gain.name)} | {MILLI * gain.kl:.2g} | {100 * gain.saved:.2g}" for gain in worst
        ]
        head = (
            f"INT8 in {pair.runtime} {pair.scheme}: {len(gains)} layers, harm "
            f"{MILLI * total:.3g} together; the worst: layer | harm in thousandths of a nat | % of "
            "eager time that int8 saves there"
        )
        return "\n".join([head, *lines])
    return ""


def _trials(history: Sequence[Trial], budget: Budget, limit: int) -> str:
    ours = [trial for trial in history if not trial.is_control]
    if not ours:
        return "TRIALS none yet"
    best = [trial for trial in feasible(history, budget) if not trial.is_control]
    lines = ["TRIALS: id, author | plan | predicted, measured time over eager | lost | guards"]
    slope = fitted_slope(history, budget)
    lines += [_trial_row(trial, history, budget, slope) for trial in ours[-limit:]]
    if best:
        lines.append(f"The best of them within the budget is {best[0].trial_id}.")
    return "\n".join(lines)


def _lost(trial: Trial, slope: Slope | None, budget: Budget) -> str:
    """What was measured, what is likely where that is another figure, and whether it holds."""
    drop, likely = search_drop(trial), expected_drop(trial, slope)
    if drop is None or likely is None:
        return "?"
    figures = f"{drop:.2f}", f"{likely:.2f}"
    lost = figures[0] if figures[0] == figures[1] else f"{figures[0]} (likely {figures[1]})"
    return lost if holds(trial, slope, budget) else f"{lost} OVER BUDGET"


def _trial_row(trial: Trial, history: Sequence[Trial], budget: Budget, slope: Slope | None) -> str:
    plan = trial.plan
    lines = [f"{shown(line.match)} {line.ratio:g}" for line in plan.pruning[:6]]
    more = f" and {len(plan.pruning) - 6} more" if len(plan.pruning) > 6 else ""
    cut = f"prune {'; '.join(lines)}{more}" if lines else "prune nothing"
    kept = len(plan.quantization.keep_float)
    time, outcome = relative_latency(trial), _lost(trial, slope, budget)
    result = "?" if time is None else f"{time:.3f}"
    if trial.status != "done":
        outcome = f"{trial.status.upper()}: {shown(trial.reason)}"
    changed = f" | guards: {shown(trial.changed, MAX_CHANGED)}" if trial.changed else ""
    return (
        f"{trial.trial_id}, {trial.author} | {trial.label}, {cut}, {kept} layers float | "
        f"{_predicted(trial, history)}, {result} | {outcome}{changed}"
    )


def _predicted(trial: Trial, history: Sequence[Trial]) -> str:
    """Predicted milliseconds over the baseline's, which the controls' own timings tell."""
    for control in history:
        time, evaluation = relative_latency(control), control.evaluation
        if time and evaluation and evaluation.timing and trial.predicted_ms:
            return f"{trial.predicted_ms * time / evaluation.timing.median_ms:.3f}"
    return "?"
