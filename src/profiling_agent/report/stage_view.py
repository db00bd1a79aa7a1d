"""One artefact in a terminal: what was built, and what was measured on it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiling_agent.records.evaluation import BuiltArtefact, Evaluation
from profiling_agent.report.wording import (
    DASH,
    as_count,
    as_ratio,
    in_megabytes,
    in_ms,
    in_percent,
    in_points,
    printable,
)


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


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """Accuracy with its drop, latency with the speed-up over the original, size and memory."""
    rows: list[tuple[str, str]] = []
    for accuracy in evaluation.accuracy:
        drop = accuracy.drop
        lost = (
            f", drop {in_points(drop.estimate)} points"
            f" ({in_points(drop.low)} to {in_points(drop.high)})"
            if drop
            else ""
        )
        words = f"{in_percent(accuracy.value)} of {accuracy.num_samples:,} samples{lost}"
        rows.append((f"accuracy ({accuracy.split})", words))
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


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _count(value: int | None) -> str:
    return DASH if value is None else as_count(value)


def _size(value: int | None) -> str:
    return DASH if value is None else in_megabytes(value)
