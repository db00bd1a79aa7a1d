"""A profile in a terminal: where the time goes, what can be pruned, what is not known."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiling_agent.records.profile import (
    DeployedProfile,
    GroupCost,
    ModuleCost,
    Profile,
    Spread,
)
from profiling_agent.report.summary import facts_of_data
from profiling_agent.report.wording import (
    DASH,
    as_count,
    as_share,
    in_megabytes,
    in_ms,
    printable,
    significant,
)


def render_profile(profile: Profile, top: int = 15) -> RenderableType:
    """Whole and sum of parts, the ``top`` slowest modules, all groups, and the gaps."""
    parts: list[RenderableType] = [_summary(profile), _modules(profile, top)]
    if profile.groups:
        parts.append(_groups(profile))
    if profile.deployed:
        parts.append(_deployed(profile))
    gaps = gaps_of(profile)
    if gaps:
        parts.append(Text("Not known\n" + "\n".join(f"  {gap}" for gap in gaps)))
    return Group(*parts)


def slowest_modules(profile: Profile, top: int) -> tuple[ModuleCost, ...]:
    """By self time; modules that were not timed come last, by the work they do themselves."""

    def rank(module: ModuleCost) -> tuple[float, int]:
        return (module.self_time.median_ms if module.self_time else -1.0, module.self_macs)

    return tuple(sorted(profile.modules, key=rank, reverse=True)[:top])


def gaps_of(profile: Profile) -> tuple[str, ...]:
    """Unsupported operators, frozen groups, absent runtimes and whatever else is missing."""
    lines = [
        f"operator {printable(name)}: its cost is not counted"
        for name in profile.unsupported_operators
    ]
    lines += [
        f"{printable(f.id)} can't be pruned: {printable(f.reason, 400)}" for f in profile.frozen
    ]
    lines += [
        f"runtime {printable(runtime.runtime)}: {printable(runtime.reason, 400)}"
        for runtime in profile.runtimes
        if not runtime.schemes
    ]
    lines += [f"{printable(g.what)}: {printable(g.reason, 400)}" for g in profile.not_measured]
    return tuple(lines)


def whole_and_parts(profile: Profile) -> str:
    """The whole forward beside the sum of all self times; a gap between them is overhead."""
    if profile.total is None:
        return f"whole forward {DASH}, sum of parts {in_ms(profile.sum_of_parts_ms)}"
    words = f"whole forward {in_ms(profile.total.median_ms)}"
    words += f" [{significant(profile.total.low_ms)}, {significant(profile.total.high_ms)}]"
    if profile.sum_of_parts_ms is None:
        return f"{words}, sum of parts {DASH}"
    words += f", sum of parts {in_ms(profile.sum_of_parts_ms)}"
    if profile.total.median_ms > 0:
        words += f" ({as_share(profile.sum_of_parts_ms / profile.total.median_ms)} of the whole)"
    return words


def taken_when(profile: Profile) -> str:
    """Whether it is this run's; empty where it is."""
    when = profile.reused_from
    return "" if when is None else f"by an earlier run on this machine, {printable(when, 40)}"


def divergence_name(profile: Profile) -> tuple[str, str]:
    """How sensitivity is called for what this model returns, and what it measures."""
    if profile.workload.task.num_classes is not None:
        return "KL", "divergence of the outputs from the original's"
    meaning = "half the squared difference of the outputs, over the variance of the original's,"
    return "divergence", meaning


def schemes_in_words(profile: Profile) -> str:
    """``torch 2.13.0: fp32, int8-dynamic; ...`` for the runtimes that offer something here."""
    return "; ".join(
        f"{printable(r.runtime)} {printable(r.version or '')}".strip()
        + f": {', '.join(printable(s, 40) for s in r.schemes)}"
        for r in profile.runtimes
        if r.schemes
    )


def _summary(profile: Profile) -> Text:
    deployment = profile.deployment
    lines = [
        f"{printable(profile.workload.name)} on {printable(profile.machine.processor)}: "
        f"batch size {deployment.batch_size}, threads {deployment.threads}, {deployment.device}",
        whole_and_parts(profile),
        f"{as_count(profile.num_parameters)} parameters, {as_count(profile.total_macs)} MACs, "
        f"peak activations {in_megabytes(profile.peak_activation_bytes)}",
    ]
    lines += [f"taken {words}"] if (words := taken_when(profile)) else []
    schemes = schemes_in_words(profile)
    lines += [f"runtimes: {schemes}"] if schemes else []
    lines += [f"{name}: {words}" for name, words in facts_of_data(profile.workload)]
    return Text("\n".join(lines))


def _modules(profile: Profile, top: int) -> Table:
    shown = slowest_modules(profile, top)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text(f"Slowest {len(shown)} of {len(profile.modules)} modules, by self time"),
        title_justify="left",
    )
    table.add_column("module", overflow="fold")
    table.add_column("type", overflow="fold")
    for title in ("self", "total", "share", "MACs", "params", "peak act."):
        table.add_column(title, justify="right", no_wrap=True)
    for module in shown:
        table.add_row(
            Text(module_name(module)),
            Text(printable(module.type)),
            _time(module.self_time),
            _time(module.total),
            as_share(module.share),
            as_count(module.self_macs),
            as_count(module.num_parameters),
            in_megabytes(module.peak_activation_bytes),
        )
    return table


def module_name(module: ModuleCost) -> str:
    return printable(module.name) if module.name else "(whole model)"


def _groups(profile: Profile) -> Table:
    groups, (name, _) = profile.groups, divergence_name(profile)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text(f"{len(groups)} groups that can be pruned; {name} after repair by ratio pruned"),
        title_justify="left",
    )
    table.add_column("group", overflow="fold")
    for title in ("width", "self", "MACs/unit", "params/unit", f"{name} by ratio"):
        table.add_column(title, justify="right", overflow="fold")
    for group in groups:
        table.add_row(
            Text(printable(group.id)),
            str(group.width),
            in_ms(group.self_ms),
            as_count(group.macs_per_unit),
            as_count(group.parameters_per_unit),
            _sensitivity(group),
        )
    return table


DEPLOYED_TITLES = ("artefact", "call", "operators", "int8", "unknown", "slowest modules")


def deployed_row(deployed: DeployedProfile, top: int = 3) -> tuple[str, ...]:
    """A cell for each of ``DEPLOYED_TITLES``; times are the runtime's own, after its fusions.

    ``operators`` is their sum, ``int8`` the part of it in int8 operators, ``unknown`` that of
    operators whose module the runtime's graph does not tell.
    """
    slowest = sorted(deployed.module_ms().items(), key=lambda item: -item[1])[:top]
    int8 = sum(operator.ms for operator in deployed.operators if operator.precision == "i8")
    return (
        f"{printable(deployed.runtime)} {printable(deployed.scheme)}",
        in_ms(deployed.total_ms),
        in_ms(sum(operator.ms for operator in deployed.operators)),
        in_ms(int8),
        in_ms(deployed.unmapped_ms),
        ", ".join(f"{printable(name) or '(whole model)'} {in_ms(ms)}" for name, ms in slowest),
    )


def _deployed(profile: Profile) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=Text("Where artefacts spend their time, by their own runtimes"),
        title_justify="left",
    )
    for title in DEPLOYED_TITLES:
        is_number = title not in (DEPLOYED_TITLES[0], DEPLOYED_TITLES[-1])
        table.add_column(
            title, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number
        )
    for deployed in profile.deployed:
        table.add_row(*(Text(value) for value in deployed_row(deployed)))
    return table


def _sensitivity(group: GroupCost, most: int = 3) -> str:
    points = sorted(group.sensitivity, key=lambda point: point.ratio)
    if not points:
        return DASH
    step = max(1, -(-len(points) // most))
    return "  ".join(f"{p.ratio:.2f}: {significant(p.kl, 2)}" for p in points[::step])


def _time(spread: Spread | None) -> str:
    return in_ms(spread.median_ms if spread else None)
