"""How numbers and names are written for people; terminal and page say the same thing the same way.

A value that was not measured is a dash, never a zero. Names come from the user's code and data, so
whatever could steer a terminal or reorder a line is shown as its escape instead.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from profiling_agent.records.common import Interval
from profiling_agent.records.plan import Plan
from profiling_agent.records.workload import ImageTransform, Preprocessing, Reading, Task

DASH: Final = "–"
LONGEST_NAME: Final = 200
POINTS: Final = "points"
"""The unit of a drop whose metric is in percent."""


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


def in_metric(value: float | None, unit: str) -> str:
    """A metric's value: ``91.93 %`` where drops are in points, else ``0.8731`` in its own unit."""
    if value is None or unit == POINTS:
        return in_percent(value)
    return significant(value, 4)


def in_drop(drop: float | None, unit: str) -> str:
    """What was lost; positive is a loss: ``0.12`` points, or ``0.0123`` of any other unit."""
    return in_points(drop) if drop is None or unit == POINTS else significant(drop)


def drop_range(drop: Interval | None, unit: str) -> str:
    """The bounds of a drop alone: ``[-0.08, 0.32]``; empty for a missing interval."""
    if drop is None:
        return ""
    return f"[{in_drop(drop.low, unit)}, {in_drop(drop.high, unit)}]"


def with_unit(value: str, unit: str) -> str:
    """``0.12 points``; a metric without a unit leaves the number alone."""
    return f"{value} {printable(unit, 40)}".rstrip()


def in_budget(max_drop: float, unit: str) -> str:
    """As the user gave it, never rounded: ``0.5 points``, ``0.01``."""
    return with_unit(f"{max_drop:g}", unit)


def metric_name(task: Task, limit: int = 40) -> str:
    """``accuracy``, ``map50``, or with its own unit ``error, px``."""
    name = printable(task.metric, limit) or "metric"
    own_unit = "" if task.unit == POINTS else printable(task.unit, limit)
    return f"{name}, {own_unit}" if own_unit else name


def drop_name(task: Task, limit: int = 40) -> str:
    """``drop, points``, or ``drop`` for a metric without a unit."""
    unit = printable(task.unit, limit)
    return f"drop, {unit}" if unit else "drop"


def lower_is_better(task: Task) -> str:
    """The words, where they hold; empty otherwise."""
    return "" if task.higher_is_better else "lower is better"


def of_metric(task: Task) -> str:
    """What a drop is a drop of: ``accuracy``, or ``error, lower is better``."""
    name = printable(task.metric, 40) or "metric"
    return ", ".join(filter(None, (name, lower_is_better(task))))


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


def describe_metric(task: Task) -> str:
    """``accuracy: percent of samples right``; for a function of the user's, which way is better."""
    name = metric_name(task)
    if task.unit != POINTS:
        better = lower_is_better(task) or "higher is better"
        return f"{name}: a function of the user's; {better}"
    if task.metric == "agreement":
        return f"{name}: percent of samples answered as the original answers; no labels are used"
    return f"{name}: percent of samples right"


def describe_answers(task: Task) -> str:
    """Which classes a prediction may be: any, or those present in the data."""
    if task.num_classes is None or task.unit != POINTS:
        return f"the model's outputs as they are, scored by {printable(task.metric, 40)}"
    if task.answers:
        return f"one of the {len(task.answers):,} classes present, of {task.num_classes:,}"
    return f"any of the {task.num_classes:,} classes"


def describe_preprocessing(stated: Preprocessing) -> str:
    """From files to the model's input, each step with where it comes from."""
    steps = [_describe_image(stated.image)] if stated.image is not None else []
    return "; ".join([*steps, _describe_arithmetic(stated)])


def describe_reading(reading: Reading) -> str:
    """``812 samples/s with 4 workers; 3 unreadable samples left out``."""
    workers = f"{reading.num_workers} worker{'' if reading.num_workers == 1 else 's'}"
    words = f"{significant(reading.samples_per_s)} samples/s with {workers}"
    lost = reading.num_unreadable
    if not lost:
        return words
    return f"{words}; {lost:,} unreadable sample{'' if lost == 1 else 's'} left out"


def _describe_image(image: ImageTransform) -> str:
    parts: list[str] = [image.mode]
    if isinstance(image.resize, tuple):
        parts.append(f"resize {_size(image.resize)} {image.interpolation}")
    elif image.resize is not None:
        parts.append(f"resize shorter side {image.resize} {image.interpolation}")
    else:
        parts.append("no resize")
    parts.append(f"crop {_size(image.crop)}" if image.crop is not None else "no crop")
    return f"images: {', '.join(parts)} (from: {printable(image.source)})"


def _describe_arithmetic(stated: Preprocessing) -> str:
    if stated.layout == "none":
        return "no arithmetic: inputs are passed on as they are"
    is_byte = abs(stated.scale * 255 - 1) < 1e-6
    parts = [f"layout {stated.layout}", f"scale {'1/255' if is_byte else f'{stated.scale:g}'}"]
    for name, values in (("mean", stated.mean), ("std", stated.std)):
        if values:
            parts.append(f"{name} ({_some(values)})")
    return f"{', '.join(parts)} (from: {printable(stated.source)})"


def _some(values: tuple[float, ...], most: int = 4) -> str:
    """All values of usual images, the first of data with many channels."""
    words = ", ".join(f"{value:g}" for value in values[:most])
    return f"{words} and {len(values) - most} more" if len(values) > most else words


def _size(height_and_width: tuple[int, int]) -> str:
    return "x".join(str(side) for side in height_and_width)


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
