"""What each planner had found after so many trials, as one inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final

from profiling_agent.records.ablation import AblationRecord
from profiling_agent.report.ablation_summary import arms_together, median_gains, name_of
from profiling_agent.report.chart import ticks

WIDTH: Final = 720
HEIGHT: Final = 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 16, 44
_DASHES: Final = ("", "7 3", "2 3", "9 3 2 3")
_NUM_COLOURS: Final = 6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A planner's best feasible gain over the original, median of its seeds; index 0 is before
    its first trial."""

    name: str
    gains: tuple[float | None, ...]


def curves_of(record: AblationRecord) -> tuple[Curve, ...]:
    """One of each planner and language model that ran."""
    curves: list[Curve] = []
    for arms in arms_together(record):
        gains = median_gains(record, arms)
        if any(gain is not None for gain in gains):
            name, under = name_of(arms[0])
            curves.append(Curve(name=f"{name}, {under}" if under else name, gains=gains))
    return tuple(curves)


def gains_chart(record: AblationRecord) -> str:
    """The SVG, or an empty string when no arm has found anything."""
    curves = curves_of(record)
    if not curves:
        return ""
    values = [gain for curve in curves for gain in curve.gains if gain is not None]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low or high)
    low, high = low - margin, high + margin
    most = record.settings.search.budget.max_trials
    right, floor = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def x(number: float) -> float:
        return _LEFT + number / max(most, 1) * (right - _LEFT)

    def y(gain: float) -> float:
        return floor - (gain - low) / (high - low) * (floor - _TOP)

    parts = [_line(_LEFT, floor, right, floor), _line(_LEFT, _TOP, _LEFT, floor)]
    for number in dict.fromkeys(int(value) for value in ticks(0.0, max(most, 1))):
        parts.append(_text(x(number), floor + 16, str(number), "middle"))
    for gain in ticks(low, high):
        parts += [
            _line(_LEFT - 4, y(gain), _LEFT, y(gain)),
            _text(_LEFT - 8, y(gain) + 4, f"{gain:g}", "end"),
        ]
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 8, "trials", "middle"))
    middle = (floor + _TOP) / 2
    objective = record.settings.search.budget.objective
    parts.append(
        f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(objective)}: times better than the original</text>"
    )
    places = _apart([y(curve.gains[-1] or low) for curve in curves])
    for number, (curve, place) in enumerate(zip(curves, places, strict=True)):
        points = [(x(i), y(gain)) for i, gain in enumerate(curve.gains) if gain is not None]
        parts.append(_steps(number, points))
        kind = f"label curve{number % _NUM_COLOURS}"
        parts.append(
            f'<text class="{kind}" x="{right + 8:.1f}" y="{place + 4:.1f}">'
            f"<title>{escape(curve.name)}</title>{escape(_short(curve.name))}</text>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="best found against trials, {len(curves)} planners">{"".join(parts)}</svg>'
    )


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _steps(number: int, points: Sequence[tuple[float, float]]) -> str:
    """A line that stays where it is until a trial makes it better."""
    path = [f"{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (_, before), (at, value) in pairwise(points):
        path += [f"{at:.1f},{before:.1f}", f"{at:.1f},{value:.1f}"]
    dash = _DASHES[number // _NUM_COLOURS % len(_DASHES)]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline class="curve curve{number % _NUM_COLOURS}"{style} points="{" ".join(path)}"/>'
    )


def _apart(places: list[float], least: float = 14.0) -> list[float]:
    """The places moved so that labels don't lie on one another."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved, last = list(places), float("-inf")
    for i in order:
        moved[i] = last = max(places[i], last + least)
    over = max(0.0, last - (HEIGHT - _BOTTOM)) if order else 0.0
    return [place - over for place in moved]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="axis" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
