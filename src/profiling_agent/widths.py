"""Milliseconds against width, in the runtime and scheme that will serve.

Eager PyTorch says little of what a fused int8 graph gains by a narrower layer, and a layer alone
misses what happens between layers. So the whole model is built with all groups of one shape
narrowed at once, as any plan is built, and raced against the control of the same runtime and
scheme. What is saved is shared out among the groups. Weights and accuracy don't matter here:
nothing is repaired, and a few calibration samples do.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from profiling_agent.errors import MissingDependency, PlanError, TrialError
from profiling_agent.evaluation.measure import TRIAL, Protocol
from profiling_agent.evaluation.predictor import Predictor
from profiling_agent.evaluation.watch import Slowed
from profiling_agent.machine.clock import now
from profiling_agent.planning.history import Pair, measured_pair, pair_of
from profiling_agent.profiling.group_costs import levels
from profiling_agent.profiling.width_cache import WidthCache
from profiling_agent.records.common import NotMeasured
from profiling_agent.records.patterns import exactly, units_kept
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.profile import DeployedWidths, GroupCost, Profile, SharePoint
from profiling_agent.records.trial import Trial
from profiling_agent.trial import TrialRunner, median_ms

RATIOS = (0.5, 0.25)
"""Measured of each shape, the larger cut first: it tells most about a single point."""
MIN_BUILD_S = 10.0
"""That a build may take at least, so that the deadline alone makes none fail."""


def measure_deployed_widths(
    runner: TrialRunner,
    profile: Profile,
    controls: Sequence[Trial],
    folder: Path,
    *,
    control_folder: Callable[[str], Path],
    seconds: float,
    call_s: float,
    cache: WidthCache | None = None,
) -> tuple[tuple[DeployedWidths, ...], tuple[NotMeasured, ...]]:
    """Tables of the controls' runtimes and schemes, the first control first, in about ``seconds``.

    ``folder`` is for the artefacts that are built and thrown away. What the time did not reach, or
    can't be built, is listed with the reason. Tables that the profile has from an earlier run, or
    the ``cache``, take no time; those that are timed in full, and not while the machine was busy,
    go into it.
    """
    deadline, longest = now() + seconds, 0.0
    tables: list[DeployedWidths] = []
    missing: list[NotMeasured] = []
    for control in controls:
        pair = pair_of(control)
        whole_ms = median_ms(control)
        points: dict[str, list[SharePoint]] = {}
        unfinished: set[str] = set()
        steps = list(_steps(profile))
        known = _known(profile, cache, pair, [shape for shape, _, _ in steps], whole_ms)
        tables += known.values()
        for shape, ratio, groups in steps:
            if shape in known:
                continue
            what = f"widths of {shape} in {pair.runtime} {pair.scheme}"
            start = now()
            if start + longest > deadline:
                missing.append(NotMeasured(what=what, reason="the profiling time ran out"))
                unfinished.add(shape)
                continue
            try:
                point, slowed = _measure(
                    runner,
                    pair,
                    ratio,
                    groups,
                    folder,
                    control.trial_id,
                    control_folder(control.trial_id),
                    TRIAL.suited_to(call_s),
                    deadline=deadline,
                )
                points.setdefault(shape, []).append(point)
                if slowed.is_doubtful:
                    unfinished.add(shape)  # it will do, but not for other runs
            except (TrialError, PlanError, MissingDependency) as error:
                missing.append(NotMeasured(what=what, reason=str(error)))
                unfinished.add(shape)
            longest = max(longest, now() - start)
        for shape, found in points.items():
            table = DeployedWidths(
                runtime=pair.runtime,
                scheme=pair.scheme,
                shape_class=shape,
                points=tuple(sorted(found, key=lambda point: point.width)),
                is_provisional=shape in unfinished,
            )
            tables.append(table)
            if cache is not None and not table.is_provisional:
                cache.keep(table, whole_ms)
    return tuple(_fullest([*profile.deployed_widths, *tables])), tuple(missing)


def _fullest(tables: Sequence[DeployedWidths]) -> list[DeployedWidths]:
    """Of the tables of one runtime, scheme and shape the last, but for one with more points."""
    best: dict[tuple[Pair, str], DeployedWidths] = {}
    for table in tables:
        key = (measured_pair(table), table.shape_class)
        if key not in best or len(table.points) >= len(best[key].points):
            best[key] = table
    return list(best.values())


def _known(
    profile: Profile,
    cache: WidthCache | None,
    pair: Pair,
    shapes: Sequence[str],
    whole_ms: float | None,
) -> dict[str, DeployedWidths]:
    """Tables of earlier runs, by shape: of this very model, else of another with the same."""
    known = {
        table.shape_class: table
        for table in profile.deployed_widths
        if measured_pair(table) == pair and not table.is_provisional
    }
    if cache is not None:
        others = [shape for shape in shapes if shape not in known]
        found = {s: cache.find(pair.runtime, pair.scheme, s, whole_ms) for s in others}
        known |= {shape: table for shape, table in found.items() if table is not None}
    return known


def _steps(profile: Profile) -> Iterator[tuple[str, float, list[GroupCost]]]:
    """Shapes at one ratio after the other, the most costly shape first."""
    shapes: dict[str, list[GroupCost]] = {}
    for group in profile.groups:
        shapes.setdefault(group.shape_class, []).append(group)
    ranked = sorted(shapes, key=lambda s: -sum(g.macs_per_unit * g.width for g in shapes[s]))
    for wanted in RATIOS:
        for shape in ranked:
            offered = levels(shapes[shape][0])
            if offered:
                ratio = min(offered, key=lambda level: abs(level - wanted))
                if wanted == RATIOS[0] or len(offered) > 1:
                    yield shape, ratio, shapes[shape]


def _measure(
    runner: TrialRunner,
    pair: Pair,
    ratio: float,
    groups: Sequence[GroupCost],
    folder: Path,
    control_id: str,
    control: Path,
    protocol: Protocol,
    *,
    deadline: float,
) -> tuple[SharePoint, Slowed]:
    """Share of the control's time that one of these groups saves at this ratio, and whether that
    may be doubted."""
    plan = Plan(
        runtime=pair.runtime,  # pyright: ignore[reportArgumentType]
        pruning=tuple(
            PruningLine(match=exactly(group.id), ratio=ratio, importance="magnitude")
            for group in groups
        ),
        quantization=Quantization(scheme=pair.scheme),
        repair="none",
        why="timed and thrown away",
    )
    try:
        timeout_s = max(MIN_BUILD_S, deadline - now())
        runner.builder.build(plan, folder, runner.deployment, timeout_s)
        runner.builder.pause()
        with contextlib.ExitStack() as stack:
            racers: Mapping[str, Predictor] = {
                name: stack.enter_context(contextlib.closing(runner.open(place, pair.runtime)))
                for name, place in ((control_id, control), ("narrow", folder))
            }
            racers = {**runner.beside(control_id), **racers}
            times, slowed = runner.race(racers, protocol, has_time=lambda: now() < deadline)
        saved = times.speedup("narrow", control_id)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    estimate, low, high = (
        (1.0 - 1.0 / value) / len(groups) for value in (saved.estimate, saved.low, saved.high)
    )
    width = units_kept(groups[0].width, ratio)
    return SharePoint(width=width, saved=estimate, low=low, high=high), slowed
