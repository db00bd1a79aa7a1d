"""A comparison of planners in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiling_agent.records.ablation import AblationRecord
from profiling_agent.report.ablation_summary import findings, rows_of, titles_of
from profiling_agent.report.wording import printable


def render_ablation(record: AblationRecord) -> RenderableType:
    """One line for each planner, seeds together, and how to read it."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for title in titles_of(record):
        table.add_column(Text(title), justify="right", overflow="fold")
    notes: list[str] = []
    for row in rows_of(record):
        name = "\n".join(part for part in (printable(row.name), row.under) if part)
        cells = ("\n".join(part for part in each if part) for each in row.cells)
        table.add_row(Text(name), *(Text(each) for each in cells))
        if row.note:
            notes.append(f"{row.name}{f' ({row.under})' if row.under else ''}: {row.note}")
    lines = [*notes, *findings(record)]
    return Group(
        Text(f"{printable(record.workload.name)}: planners compared"),
        Text(),
        table,
        Text(),
        *(Text(printable(line, 600), style="dim") for line in lines),
        *(Text(f"warning: {printable(w, 400)}", style="yellow") for w in record.warnings),
    )
