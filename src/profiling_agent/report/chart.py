"""What was lost against time, as one inline SVG: which trials were worth it, at a glance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Final

from profiling_agent.records.trial import RunRecord, Trial
from profiling_agent.records.workload import Task
from profiling_agent.report.summary import BASELINE, searched_accuracy
from profiling_agent.report.wording import (
    drop_name,
    in_budget,
    in_drop,
    in_ms,
    of_metric,
    printable,
    significant,
    with_unit,
)

WIDTH: Final = 720
HEIGHT: Final = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 16, 44


@dataclass(frozen=True, kw_only=True)
class Point:
    """One trial: milliseconds a call, and what was lost on the split the loop decides by."""

    trial_id: str
    label: str
    latency_ms: float
    drop: float
    is_control: bool
    is_pareto: bool
    is_chosen: bool


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """From measured units to pixels; drops above ``most_drop`` are drawn on the upper edge."""

    most_ms: float
    least_drop: float
    most_drop: float

    def x(self, milliseconds: float) -> float:
        return _LEFT + milliseconds / self.most_ms * (WIDTH - _LEFT - _RIGHT)

    def y(self, drop: float) -> float:
        inside = min(max(drop, self.least_drop), self.most_drop)
        share = (inside - self.least_drop) / (self.most_drop - self.least_drop)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def points_of(record: RunRecord) -> tuple[Point, ...]:
    """The trials with both a time and a drop; the others have nothing to draw."""
    chosen = record.verdict.trial_id if record.verdict else None
    points = (_point(record, trial, chosen) for trial in record.trials)
    return tuple(point for point in points if point is not None)


def scatter(record: RunRecord) -> str:
    """The SVG, or an empty string when no trial has both values."""
    points = points_of(record)
    if not points:
        return ""
    baseline_ms, task = _baseline_ms(record), record.workload.task
    max_drop = record.settings.budget.max_drop
    axes = _axes(points, baseline_ms, max_drop)
    parts = [
        *_frame(axes, record),
        *_references(axes, baseline_ms, max_drop, task.unit),
        _front(axes, points),
        *(_dot(axes, point, task.unit) for point in points),
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(_loss_label(task))}, against latency of {len(points)} trials">'
        f"{''.join(parts)}</svg>"
    )


def _loss_label(task: Task) -> str:
    """``drop, points (accuracy)``, ``drop, px (error, lower is better)``, ``drop (map50)``."""
    return f"{drop_name(task, 24)} ({of_metric(task)})"


def _point(record: RunRecord, trial: Trial, chosen: str | None) -> Point | None:
    evaluation = trial.evaluation
    accuracy = searched_accuracy(evaluation)
    if evaluation is None or evaluation.timing is None or accuracy is None or accuracy.drop is None:
        return None
    return Point(
        trial_id=trial.trial_id,
        label=printable(f"{trial.trial_id} {trial.author}, {trial.label}"),
        latency_ms=evaluation.timing.median_ms,
        drop=accuracy.drop.estimate,
        is_control=trial.is_control,
        is_pareto=trial.trial_id in record.pareto,
        is_chosen=trial.trial_id == chosen,
    )


def _baseline_ms(record: RunRecord) -> float | None:
    final = next((e.timing for e in record.final if e.artefact == BASELINE and e.timing), None)
    timing = final or record.baseline_timing or record.baseline.timing
    return timing.median_ms if timing else None


def _axes(points: tuple[Point, ...], baseline_ms: float | None, max_drop: float) -> _Axes:
    """Collapsed trials would flatten everything near the budget, so the drop axis is cut."""
    times = [p.latency_ms for p in points] + ([baseline_ms] if baseline_ms else [])
    kept = [p.drop for p in points if p.is_pareto or p.is_chosen]
    ceiling = max([4 * max_drop, 1e-3, *kept])
    highest = max([max_drop, *(min(p.drop, ceiling) for p in points)])
    lowest = min([0.0, *(p.drop for p in points)])
    margin = 0.08 * ((highest - lowest) or 1e-3)
    return _Axes(
        most_ms=max([1e-9, *times]) * 1.06,
        least_drop=lowest - margin,
        most_drop=highest + margin,
    )


def _frame(axes: _Axes, record: RunRecord) -> list[str]:
    left, right, floor = _LEFT, WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = [_line("axis", left, floor, right, floor), _line("axis", left, _TOP, left, floor)]
    for value in ticks(0.0, axes.most_ms):
        label = significant(value, 2) if value else "0"
        parts.append(_text(axes.x(value), floor + 16, label, "middle"))
    for value in ticks(axes.least_drop, axes.most_drop):
        y = axes.y(value)
        parts += [_line("axis", left - 4, y, left, y), _text(left - 8, y + 4, f"{value:g}", "end")]
    deployment = record.settings.deployment
    parts.append(
        _text(
            (left + right) / 2,
            HEIGHT - 8,
            f"latency, ms a call at batch size {deployment.batch_size}",
            "middle",
        )
    )
    middle = (floor + _TOP) / 2
    parts.append(
        f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(_loss_label(record.workload.task))}</text>"
    )
    return parts


def _references(axes: _Axes, baseline_ms: float | None, max_drop: float, unit: str) -> list[str]:
    right, floor = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    y = axes.y(max_drop)
    parts = [
        _line("reference", _LEFT, axes.y(0.0), right, axes.y(0.0)),
        _line("budget", _LEFT, y, right, y),
        _text(_LEFT + 6, y - 5, f"budget {in_budget(max_drop, unit)}", "start"),
    ]
    if baseline_ms is not None:
        x = axes.x(baseline_ms)
        parts += [_line("reference", x, _TOP, x, floor), _text(x - 5, _TOP + 10, "original", "end")]
    return parts


def _front(axes: _Axes, points: tuple[Point, ...]) -> str:
    front = sorted((p for p in points if p.is_pareto), key=lambda p: p.latency_ms)
    if len(front) < 2:
        return ""
    path = " ".join(f"{axes.x(p.latency_ms):.1f},{axes.y(p.drop):.1f}" for p in front)
    return f'<polyline class="front" points="{path}"/>'


def _dot(axes: _Axes, point: Point, unit: str) -> str:
    x, y = axes.x(point.latency_ms), axes.y(point.drop)
    outside = point.drop > axes.most_drop
    kind = "outside" if outside else "control" if point.is_control else "trial"
    drop = with_unit(in_drop(point.drop, unit), unit)
    title = escape(f"{point.label}: {in_ms(point.latency_ms)}, drop {drop}")
    shape = (
        f'<rect class="{kind}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
        if point.is_control
        else f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    )
    ring = f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="8.5"/>' if point.is_chosen else ""
    name = escape(printable(point.trial_id, 24))
    label = f'<text class="label" x="{x + 11:.1f}" y="{y + 4:.1f}">{name}</text>'
    named = label if point.is_pareto or point.is_chosen else ""
    return f"<g><title>{title}</title>{shape}{ring}{named}</g>"


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round values between the two, some ``about`` of them."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [float(f"{n * step:.10g}") for n in range(first, last + 1)]


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
