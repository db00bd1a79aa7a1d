"""One artefact in a terminal: what was built, and what was measured on it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiling_agent.records.evaluation import Accuracy, BuiltArtefact, Evaluation
from profiling_agent.records.workload import Task
from profiling_agent.report.wording import (
    DASH,
    POINTS,
    as_count,
    as_ratio,
    in_drop,
    in_megabytes,
    in_metric,
    in_ms,
    lower_is_better,
    metric_name,
    printable,
    with_unit,
)

_ACCURACY = Task(num_classes=None)


def render_built(built: BuiltArtefact, folder: str) -> RenderableType:
    """What lies in an artefact folder, counted on it, group by group."""
    achieved = built.achieved
    rows = [
        ("artefact", f"{printable(folder)} ({printable(built.runtime)} {printable(built.scheme)})"),
        ("model files", in_megabytes(built.size_bytes)),
        (
            "parameters",
            f"{as_count(achieved.num_parameters)} of {as_count(achieved.original_parameters)}",
        ),
        ("MACs", f"{_count(achieved.macs)} of {_count(achieved.original_macs)}"),
        ("int8 layers", str(achieved.num_int8_layers)),
    ]
    rows += [
        (printable(group), f"{after} of {before} units")
        for group, (before, after) in achieved.widths.items()
    ]
    return _pairs(rows)


def render_evaluation(evaluation: Evaluation, task: Task = _ACCURACY) -> RenderableType:
    """The metric with its drop, latency with the speed-up over the original, size and memory.

    ``task`` names the metric, its unit and its direction; only these are looked at.
    """
    rows = [
        (f"{metric_name(task)} ({accuracy.split})", _value_and_drop(accuracy, task))
        for accuracy in evaluation.accuracy
    ]
    timing, speedup = evaluation.timing, evaluation.speedup
    if timing is not None:
        rows.append(("latency", f"{in_ms(timing.median_ms)}, p90 {in_ms(timing.p90_ms)}"))
    if speedup is not None:
        ratio = speedup.ratio
        words = f"{as_ratio(ratio.estimate)} ({as_ratio(ratio.low)} to {as_ratio(ratio.high)})"
        rows.append(("over the original", words))
    rows.append(("model files", _size(evaluation.size_bytes)))
    rows.append(("memory", _size(evaluation.memory_bytes)))
    missing = [f"{printable(m.what)}: {printable(m.reason)}" for m in evaluation.not_measured]
    return Group(_pairs(rows), *(Text(f"not measured: {line}", style="dim") for line in missing))


def _value_and_drop(accuracy: Accuracy, task: Task) -> str:
    drop, unit = accuracy.drop, task.unit
    joint = "of" if unit == POINTS else "on"
    parts = [f"{in_metric(accuracy.value, unit)} {joint} {accuracy.num_samples:,} samples"]
    if drop is not None:
        low, high = in_drop(drop.low, unit), in_drop(drop.high, unit)
        parts.append(f"drop {with_unit(in_drop(drop.estimate, unit), unit)} ({low} to {high})")
    parts += [words] if (words := lower_is_better(task)) else []
    return ", ".join(parts)


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _count(value: int | None) -> str:
    return DASH if value is None else as_count(value)


def _size(value: int | None) -> str:
    return DASH if value is None else in_megabytes(value)
