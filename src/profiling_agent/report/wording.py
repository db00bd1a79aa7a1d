"""How numbers and names are written for people; terminal and page say the same thing the same way.

A value that was not measured is a dash, never a zero. Names come from the user's code and data, so
whatever could steer a terminal or reorder a line is shown as its escape instead.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from profiling_agent.records.common import Interval
from profiling_agent.records.plan import Plan

DASH: Final = "–"
LONGEST_NAME: Final = 200


def printable(text: str, limit: int = LONGEST_NAME) -> str:
    """One line without control, format and surrogate characters, at most ``limit`` long.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    words = " ".join(text[: 4 * limit].split())
    shown = "".join(_visible(character) for character in words)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _visible(character: str) -> str:
    if not unicodedata.category(character).startswith("C"):
        return character
    return character.encode("unicode_escape").decode("ascii")


def in_ms(milliseconds: float | None) -> str:
    """Three significant digits: ``4.21 ms``, ``0.0312 ms``, ``128 ms``."""
    return DASH if milliseconds is None else f"{significant(milliseconds)} ms"


def as_ratio(ratio: float | None) -> str:
    """``2.31x``."""
    return DASH if ratio is None else f"{ratio:.2f}x"


def in_percent(percent: float | None) -> str:
    """A value that already is in percent: ``91.93 %``."""
    return DASH if percent is None else f"{percent:.2f} %"


def as_share(share: float | None) -> str:
    """A share from 0 to 1 as ``41.2 %``."""
    return DASH if share is None else f"{100 * share:.1f} %"


def in_points(points: float | None) -> str:
    """A difference of percentages; positive is a loss: ``0.12``."""
    return DASH if points is None else f"{_no_negative_zero(points, 2)}"


def in_megabytes(num_bytes: int | None) -> str:
    """Decimal megabytes, kilobytes below one: ``6.41 MB``."""
    if num_bytes is None:
        return DASH
    if abs(num_bytes) < 1_000_000:
        return f"{significant(num_bytes / 1e3)} kB"
    return f"{significant(num_bytes / 1e6)} MB"


def in_seconds(seconds: float) -> str:
    """``12.3 s``; from two minutes on ``2 min 05 s``."""
    if round(seconds, 1) < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def as_count(count: int | None) -> str:
    """``1.63 M``, ``812 k``, ``97``."""
    if count is None:
        return DASH
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{significant(count / size)} {letter}"
    return str(count)


def as_range(interval: Interval | None, digits: int = 2) -> str:
    """The bounds alone: ``[2.25, 2.38]``; empty for a missing interval."""
    if interval is None:
        return ""
    low = _no_negative_zero(interval.low, digits)
    high = _no_negative_zero(interval.high, digits)
    return f"[{low}, {high}]"


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits without an exponent for values people meet."""
    if value == 0:
        return "0"
    whole = f"{value:.0f}"
    if len(whole.lstrip("-")) >= digits:
        return whole
    text = f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.2g}" if "e" in text else text


def describe_plan(plan: Plan, most_lines: int = 4) -> str:
    """A plan in one line: ``prune mlp:.* 40.0 % (obs); torch int8-dynamic; repair none``."""
    parts = [
        f"prune {printable(line.match, 60)} {as_share(line.ratio)} ({line.importance})"
        for line in plan.pruning[:most_lines]
    ]
    if len(plan.pruning) > most_lines:
        parts.append(f"and {len(plan.pruning) - most_lines} more pruning lines")
    parts.append(_describe_quantization(plan))
    if plan.pruning:
        parts.append(f"repair {plan.repair}")
    return "; ".join(parts)


def _describe_quantization(plan: Plan, most_names: int = 3) -> str:
    scheme = f"{plan.runtime} {printable(plan.quantization.scheme, 40)}"
    kept = plan.quantization.keep_float
    if not kept:
        return scheme
    names = ", ".join(printable(name, 40) for name in kept[:most_names])
    more = f" and {len(kept) - most_names} more" if len(kept) > most_names else ""
    return f"{scheme}, float: {names}{more}"


def _no_negative_zero(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text
