"""A run in a terminal: one table, one verdict; readable at 100 columns and without colour."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from profiling_agent.records.common import Interval
from profiling_agent.records.trial import RunRecord, Verdict, VerdictKind
from profiling_agent.records.workload import Task
from profiling_agent.report.summary import (
    HeadlineRow,
    advice_in_words,
    bottleneck_in_words,
    common_split,
    evidence_in_words,
    facts_of_data,
    gain_in_words,
    headline,
    loss_in_words,
)
from profiling_agent.report.wording import (
    DASH,
    as_range,
    as_ratio,
    as_share,
    drop_name,
    drop_range,
    in_drop,
    in_megabytes,
    in_metric,
    in_ms,
    in_seconds,
    lower_is_better,
    metric_name,
    printable,
)

_STYLES: Final[dict[VerdictKind, str]] = {
    "ACCEPT": "green",
    "NO_GAIN": "yellow",
    "INFEASIBLE": "red",
}


def render_run(record: RunRecord, *, folder: Path | None = None) -> RenderableType:
    """The headline table with its footnotes, what is known of the data, then the verdict.

    ``folder`` is the run's own, to show where the artefact lies; without it the path is relative
    to the run.
    """
    rows, task = headline(record), record.workload.task
    facts = [f"{name}: {words}" for name, words in facts_of_data(record.workload)]
    parts: list[RenderableType] = [_title(record), Text(), _table(record, rows)]
    lines = ["", _caption(rows, task), *_footnotes(rows), "", *facts]
    parts.append(Text("\n".join(lines), style="dim"))
    parts.append(_verdict_panel(record, folder))
    parts += [Text(printable(line, 400)) for line in advice_in_words(record)]
    if bottleneck := bottleneck_in_words(record):
        parts.append(Text(bottleneck, style="yellow"))
    parts += [Text(f"warning: {printable(w, 400)}", style="yellow") for w in record.warnings]
    return Group(*parts)


def _title(record: RunRecord) -> Text:
    deployment = record.settings.deployment
    return Text(
        f"{printable(record.workload.name)}: batch size {deployment.batch_size}, "
        f"threads {deployment.threads}, {deployment.device}"
    )


def _table(record: RunRecord, rows: tuple[HeadlineRow, ...]) -> Table:
    split, task = common_split(rows), record.workload.task
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    metric, drop = metric_name(task, 16), drop_name(task, 12)
    for title in ("latency", "speed-up", metric, drop, "size", "memory"):
        table.add_column(Text(title), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row, split, task.unit), style="bold" if row.is_handed_over else "")
    return table


def _caption(rows: tuple[HeadlineRow, ...], task: Task) -> str:
    split = common_split(rows)
    levels = {level for row in rows if (level := _confidence(row.speedup)) is not None}
    brackets = f"{100 * levels.pop():.0f} % intervals" if len(levels) == 1 else "Intervals"
    words = f"{brackets} in brackets; size and memory also as a share of the original's."
    words += f" Metric: {printable(task.metric, 40)}"
    if split:
        words += f" on {split}"
    if better := lower_is_better(task):
        words += f"; {better}, and a positive drop is a loss"
    return f"{words}."


def _confidence(interval: Interval | None) -> float | None:
    return interval.confidence if interval is not None else None


def _cells(row: HeadlineRow, split: str | None, unit: str) -> tuple[Text, ...]:
    accuracy = row.accuracy
    drop = accuracy.drop if accuracy else None
    reference = row.role == "original"
    of_split = f"on {accuracy.split}" if accuracy and split is None else ""
    return (
        _name(row),
        _cell(in_ms(row.timing.median_ms if row.timing else None)),
        _cell("reference" if reference else _estimate(row.speedup), as_range(row.speedup)),
        _cell(in_metric(accuracy.value if accuracy else None, unit), of_split),
        _cell(
            "reference" if reference else in_drop(drop.estimate if drop else None, unit),
            "" if reference else drop_range(drop, unit),
        ),
        _cell(in_megabytes(row.size_bytes), _of_original(row.size_ratio)),
        _cell(in_megabytes(row.memory_bytes), _of_original(row.memory_ratio)),
    )


def _name(row: HeadlineRow) -> Text:
    marks: list[str] = []
    if row.is_best_control:
        marks.append("best control")
    if row.is_handed_over:
        marks.append("handed over")
    text = Text(row.name)
    text.append(f"\n{row.how}", style="not bold dim")
    if marks:
        text.append(f"\n* {', '.join(marks)}")
    return text


def _cell(value: str, below: str = "") -> Text:
    text = Text(value)
    if below:
        text.append(f"\n{below}", style="not bold dim")
    return text


def _estimate(interval: Interval | None) -> str:
    return as_ratio(interval.estimate) if interval is not None else DASH


def _of_original(ratio: float | None) -> str:
    return as_share(ratio) if ratio is not None else ""


def _footnotes(rows: tuple[HeadlineRow, ...]) -> list[str]:
    return [f"{DASH} {row.name}: {note}" for row in rows for note in row.footnotes]


def _verdict_panel(record: RunRecord, folder: Path | None) -> Panel:
    verdict = record.verdict
    if verdict is None:
        return Panel(
            Text("The run has not ended, so there is no verdict yet; start it again to go on."),
            title="no verdict",
            title_align="left",
        )
    text = Table.grid(padding=(0, 1))
    text.add_column(style="dim", no_wrap=True)
    text.add_column(overflow="fold")
    for label, words in _verdict_lines(record, verdict, folder):
        text.add_row(label, Text(words))
    style = _STYLES[verdict.kind]
    return Panel(
        text,
        title=Text(verdict.kind, style=f"bold {style}"),
        title_align="left",
        border_style=style,
        subtitle=f"{_trials(len(record.trials))}, {in_seconds(record.seconds)}",
        subtitle_align="right",
    )


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def _verdict_lines(
    record: RunRecord, verdict: Verdict, folder: Path | None
) -> list[tuple[str, str]]:
    lines = [
        ("gain", gain_in_words(verdict)),
        ("loss", loss_in_words(verdict, record.workload.task)),
        ("evidence", evidence_in_words(verdict)),
        ("reason", printable(verdict.reason, 1000)),
        ("next step", printable(verdict.next_step, 1000)),
        ("artefact", _artefact_path(record, folder)),
    ]
    return [(label, words) for label, words in lines if words]


def _artefact_path(record: RunRecord, folder: Path | None) -> str:
    if record.artefact is None:
        return ""
    path = folder / record.artefact if folder is not None else Path(record.artefact)
    return printable(str(path), 1000)
