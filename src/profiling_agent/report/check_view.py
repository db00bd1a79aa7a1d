"""What ``check`` saw: a page in a terminal, and the samples as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiling_agent.records.check import CheckedSample, CheckRecord, Defaults, Finding, Level
from profiling_agent.report.wording import (
    DASH,
    as_count,
    as_share,
    describe_answers,
    describe_preprocessing,
    describe_reading,
    in_ms,
    in_percent,
    in_points,
    in_seconds,
    printable,
    significant,
)

_STYLES: Final[dict[Level, str]] = {"problem": "red", "hint": "yellow"}
_RIGHT: Final = (46, 160, 67)
_WRONG: Final = (207, 34, 46)
_UNKNOWN: Final = (140, 140, 140)
_COLUMNS: Final = 4
_TILE: Final = 176
_BORDER: Final = 6
_GAP: Final = 10
_LINE: Final = 17


def render_check(record: CheckRecord, *, folder: Path | None = None) -> RenderableType:
    """Facts, samples, alternatives tried, findings, and what could not be judged.

    ``folder`` is where the picture was written.
    """
    title = Text(f"{printable(record.workload.name)}: {_title(record)}", style="bold")
    parts: list[RenderableType] = [title, Text(), _facts(record, folder), Text()]
    parts += [_samples(record), Text()]
    if record.trials:
        parts += [_trials(record), Text()]
    parts += [_finding(finding) for finding in record.findings]
    if not record.findings:
        parts.append(Text("Nothing looks wrong.", style="green"))
    parts += [
        Text(f"not judged: {printable(n.what)}: {printable(n.reason, 400)}", style="dim")
        for n in record.not_judged
    ]
    return Group(*parts)


def _title(record: CheckRecord) -> str:
    count = len(record.problems)
    hints = len(record.findings) - count
    words = f"{count} problem{'' if count == 1 else 's'}"
    if hints:
        words += f", {hints} hint{'' if hints == 1 else 's'}"
    return words


def _facts(record: CheckRecord, folder: Path | None) -> Table:
    workload = record.workload
    inputs = ", ".join(f"{s.name} {s.dtype} {s.shape}" for s in workload.inputs)
    rows = [
        ("model", f"{as_count(workload.num_parameters)} parameters; takes {printable(inputs)}"),
        ("preprocessing", describe_preprocessing(workload.preprocessing)),
        ("predictions", describe_answers(workload.task)),
        (printable(workload.task.metric), _metric(record)),
        ("latency", _latency(record)),
        ("reading", _reading(record)),
        ("provable drop", _provable(record)),
        ("optimize will use", _defaults(record)),
    ]
    if record.picture is not None:
        path = folder / record.picture if folder is not None else Path(record.picture)
        rows.append(("picture", printable(str(path), 1000)))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, words in rows:
        table.add_row(Text(name), Text(words))
    for note in workload.notes:
        table.add_row(Text("note"), Text(printable(note, 400), style="dim"))
    return table


def _metric(record: CheckRecord) -> str:
    value = record.value
    if value is None:
        return DASH
    is_points = record.workload.task.unit == "points"
    low, mid, high = (
        in_percent(each) if is_points else significant(each)
        for each in (value.low, value.estimate, value.high)
    )
    words = f"{mid} [{low}, {high}] of {value.num_samples:,} samples of {record.split}"
    if record.chance is not None:
        words += f"; always the commonest class: {in_percent(record.chance)}"
    return words


def _latency(record: CheckRecord) -> str:
    latency, deployment = record.latency, record.deployment
    if latency is None:
        return DASH
    return (
        f"{in_ms(latency.median_ms)} (median of {latency.num_calls} calls, eager fp32, "
        f"batch size {deployment.batch_size}, threads {deployment.threads}); "
        f"{significant(latency.samples_per_s)} samples a second"
    )


def _reading(record: CheckRecord) -> str:
    reading = record.workload.reading
    if reading is None:
        return "arrays, nothing to decode"
    words = describe_reading(reading)
    rate = record.latency.samples_per_s if record.latency else None
    if rate is not None:
        words += f", {significant(reading.samples_per_s / rate)} times the model's rate"
        if reading.samples_per_s < 2 * rate:
            words += ": the data are the bottleneck"
    return words


def _provable(record: CheckRecord) -> str:
    if record.provable_drop is None:
        return DASH
    return (
        f"down to about {in_points(record.provable_drop)} points with the {_about(record)} test "
        "samples of the whole data, if 2 % of the predictions change"
    )


def _about(record: CheckRecord) -> str:
    read = {split.name: split.num_samples for split in record.workload.splits}
    return ("" if read.get("test") == record.num_test else "about ") + f"{record.num_test:,}"


def _defaults(record: CheckRecord) -> str:
    defaults = record.defaults
    splits = ", ".join(f"{name} {count:,}" for name, count in defaults.splits.items())
    lines = [
        _drop_in_words(defaults)
        + f", {in_seconds(defaults.time_budget_s)}, {defaults.max_trials} trials, "
        f"batch size {defaults.deployment.batch_size}, threads {defaults.deployment.threads}",
        f"runtimes {', '.join(printable(each) for each in defaults.runtimes)}",
        *(f"missing {printable(each, 400)}" for each in defaults.missing_runtimes),
        f"samples: {splits}",
    ]
    return "\n".join(lines)


def _samples(record: CheckRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"{record.split}", justify="right")
    for title in ("true", "predicted", "confidence", ""):
        table.add_column(title, overflow="fold")
    for sample in record.samples:
        table.add_row(
            str(sample.row),
            Text(printable(sample.true or DASH, 40)),
            Text(printable(sample.predicted or DASH, 40)),
            as_share(sample.confidence),
            _mark(sample),
        )
    return table


def _mark(sample: CheckedSample) -> Text:
    if sample.is_right is None:
        return Text("")
    return Text("right", style="green") if sample.is_right else Text("wrong", style="red")


def _trials(record: CheckRecord) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("preprocessing tried", overflow="fold")
    table.add_column("right", justify="right")
    table.add_column("samples", justify="right")
    for trial in record.trials:
        style = "bold" if trial.is_stated else ""
        cells = (in_percent(trial.value), f"{trial.num_samples:,}")
        table.add_row(Text(printable(trial.name)), *cells, style=style)
    return table


def _finding(finding: Finding) -> Text:
    text = Text()
    text.append(f"{finding.level} ({finding.kind}): ", style=f"bold {_STYLES[finding.level]}")
    text.append(printable(finding.text, 1000))
    text.append(f"\n  next step: {printable(finding.next_step, 1000)}", style="dim")
    return text


def draw_samples(samples: Sequence[CheckedSample], images: Sequence[np.ndarray]) -> bytes:
    """A contact sheet as PNG: each image bordered green when right, red when wrong, grey otherwise.

    ``images`` are bytes (h, w) or (h, w, 3), one for each sample, of any size; what the model says
    and what the sample is stand below each.
    """
    rows = -(-len(samples) // _COLUMNS)
    cell = _TILE + 2 * _BORDER
    height = cell + 2 * _LINE + 4
    sheet = Image.new(
        "RGB", (_GAP + _COLUMNS * (cell + _GAP), _GAP + rows * (height + _GAP)), (255, 255, 255)
    )
    for position, (sample, image) in enumerate(zip(samples, images, strict=True)):
        row, column = divmod(position, _COLUMNS)
        corner = (_GAP + column * (cell + _GAP), _GAP + row * (height + _GAP))
        _draw_tile(sheet, corner, sample, image)
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()


def _draw_tile(
    sheet: Image.Image, corner: tuple[int, int], sample: CheckedSample, image: np.ndarray
) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    colour = _UNKNOWN if sample.is_right is None else _RIGHT if sample.is_right else _WRONG
    cell = _TILE + 2 * _BORDER
    draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=colour)
    tile = _fitted(image)
    x, y = (_BORDER + (_TILE - side) // 2 for side in tile.size)
    sheet.paste(tile, (left + x, top + y))
    sure = "" if sample.confidence is None else f" {sample.confidence:.0%}"
    lines = [f"says {sample.predicted or DASH}{sure}"]
    if sample.true is not None:
        lines.append(f"is {sample.true}")
    for number, line in enumerate(lines):
        place = (left + 2, top + cell + 2 + number * _LINE)
        _write(draw, place, line, colour if number == 0 else (40, 40, 40), cell - 4)


def _fitted(image: np.ndarray) -> Image.Image:
    """The image in a tile, small ones enlarged without smoothing, so that pixels show."""
    drawn = Image.fromarray(image)
    ratio = _TILE / max(drawn.size)
    size = (max(1, round(drawn.width * ratio)), max(1, round(drawn.height * ratio)))
    how = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.LANCZOS
    return drawn.resize(size, how).convert("RGB")


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """One line, shortened to ``width`` pixels; the font that Pillow brings knows Latin-1 alone."""
    font = ImageFont.load_default(size=13)
    words = printable(text).encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(words, font=font) > width:
        while words and draw.textlength(f"{words}...", font=font) > width:
            words = words[:-1]
        words = f"{words}..."
    draw.text(place, words, fill=colour, font=font)


def _drop_in_words(defaults: Defaults) -> str:
    if defaults.max_drop is None:
        return "max drop as --max-drop says (it has no default for your metric)"
    return f"max drop {defaults.max_drop:g} {printable(defaults.unit)}"
