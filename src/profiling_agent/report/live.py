"""What a running search shows: a live display on a terminal, plain lines elsewhere, or nothing.

Drawing costs processor time, and a redraw inside a timed block is measured as latency. Between
``pause`` and ``resume`` nothing is written: what is said meanwhile is kept and shown afterwards.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.spinner import Spinner
from rich.text import Text

from profiling_agent.records.trial import Trial
from profiling_agent.report.wording import as_ratio, in_drop, in_seconds, printable, with_unit

ProgressMode = Literal["auto", "live", "lines", "silent"]


class Progress(Protocol):
    """Told of every step of a run. ``pause`` and ``resume`` nest; ``close`` ends the display."""

    def stage(self, name: str, detail: str = "") -> None: ...
    def trial_started(self, trial_id: str, label: str) -> None: ...
    def trial_finished(self, trial: Trial, drop: float | None, speedup: float | None) -> None: ...
    def message(self, text: str) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


def open_progress(
    time_budget_s: float | None = None,
    *,
    mode: ProgressMode = "auto",
    stream: TextIO | None = None,
    unit: str = "points",
) -> Progress:
    """The display that suits ``stream`` (stderr): live on a terminal, else a line per event."""
    target = stream if stream is not None else sys.stderr
    if mode == "silent":
        return SilentProgress()
    console = Console(file=target)
    if mode == "live" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return RichProgress(console, time_budget_s, unit=unit)
    return LineProgress(target, time_budget_s, unit=unit)


@contextmanager
def quiet(progress: Progress) -> Generator[None]:
    """Nothing is drawn inside.

    >>> with quiet(progress):
    ...     time_blocks()
    """
    progress.pause()
    try:
        yield
    finally:
        progress.resume()


def describe_trial(
    trial: Trial, drop: float | None, speedup: float | None, unit: str = "points"
) -> str:
    """``t03 solver, onnxruntime int8-dynamic: 2.31x, drop 0.12 points (12.3 s)``."""
    head = f"{printable(trial.trial_id)} {printable(trial.author)}, {printable(trial.label)}"
    if trial.status != "done":
        outcome = f"{trial.status}, {printable(trial.reason, 300)}"
    else:
        facts = [as_ratio(speedup)] if speedup is not None else []
        facts += [f"drop {with_unit(in_drop(drop, unit), unit)}"] if drop is not None else []
        facts += [printable(trial.reason, 300)] if trial.reason else []
        outcome = ", ".join(facts) or "done"
    return f"{head}: {outcome} ({in_seconds(trial.seconds)})"


class SilentProgress:
    """Shows nothing."""

    def stage(self, name: str, detail: str = "") -> None:
        pass

    def trial_started(self, trial_id: str, label: str) -> None:
        pass

    def trial_finished(self, trial: Trial, drop: float | None, speedup: float | None) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def close(self) -> None:
        pass


class LineProgress:
    """One line per event with the seconds since the start; for logs, pipes and CI."""

    def __init__(
        self, stream: TextIO, time_budget_s: float | None = None, *, unit: str = "points"
    ) -> None:
        self._stream = stream
        self._unit = unit
        self._start = time.monotonic()
        self._lines = _HeldLines(self._write)
        if time_budget_s is not None:
            self.message(f"time budget {in_seconds(time_budget_s)}")

    def stage(self, name: str, detail: str = "") -> None:
        self._say(_stage_words(name, detail))

    def trial_started(self, trial_id: str, label: str) -> None:
        self._say(f"{printable(trial_id)} started, {printable(label)}")

    def trial_finished(self, trial: Trial, drop: float | None, speedup: float | None) -> None:
        self._say(describe_trial(trial, drop, speedup, self._unit))

    def message(self, text: str) -> None:
        self._say(printable(text, 1000))

    def pause(self) -> None:
        self._lines.hold()

    def resume(self) -> None:
        self._lines.release()

    def close(self) -> None:
        self._lines.release_all()

    def _say(self, text: str) -> None:
        self._lines.add(f"[{time.monotonic() - self._start:6.1f} s] {text}")

    def _write(self, line: str) -> None:
        # A reader that went away (`2>&1 | head`) must not end a run of many minutes.
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._lines.drop()


class RichProgress:
    """A spinner with the stage, the time spent and the budget; finished trials scroll above it."""

    def __init__(
        self, console: Console, time_budget_s: float | None = None, *, unit: str = "points"
    ) -> None:
        self._console = console
        self._budget_s = time_budget_s
        self._unit = unit
        self._start = time.monotonic()
        self._words = "starting"
        self._spinner = Spinner("dots")
        self._lines = _HeldLines(self._write)
        self._live = Live(
            get_renderable=self._draw,
            console=console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._closed = False
        self._live.start()

    def stage(self, name: str, detail: str = "") -> None:
        self._words = _stage_words(name, detail)

    def trial_started(self, trial_id: str, label: str) -> None:
        self._words = f"trial {printable(trial_id)}: {printable(label)}"

    def trial_finished(self, trial: Trial, drop: float | None, speedup: float | None) -> None:
        self._lines.add(describe_trial(trial, drop, speedup, self._unit))

    def message(self, text: str) -> None:
        self._lines.add(printable(text, 1000))

    def pause(self) -> None:
        """Stops the redrawing thread and leaves one still line that says so."""
        if self._lines.hold() and not self._closed:
            self._live.stop()
            self._console.print(self._status(" (timing; nothing is redrawn)"), end="\r")

    def resume(self) -> None:
        if self._lines.is_last_hold and not self._closed:
            self._erase_line()
            self._live.start()
        self._lines.release()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._lines.is_held:
                self._erase_line()
            self._live.stop()
            self._lines.release_all()

    def _write(self, line: str) -> None:
        self._console.print(Text(line))

    def _erase_line(self) -> None:
        self._console.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN))

    def _draw(self) -> Text:
        frame = self._spinner.render(self._console.get_time())
        mark = frame if isinstance(frame, Text) else Text()
        return Text.assemble(mark, " ", self._status())

    def _status(self, note: str = "") -> Text:
        spent = in_seconds(time.monotonic() - self._start)
        clock = f"{spent} of {in_seconds(self._budget_s)}" if self._budget_s else spent
        text = Text(f"{self._words}{note}  ")
        text.append(clock, style="dim")
        text.truncate(max(10, self._console.width - 4), overflow="ellipsis")
        return text


class _HeldLines:
    """Passes lines on at once, or keeps them while held."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._kept: list[str] = []
        self._holds = 0
        self._dropped = False

    @property
    def is_held(self) -> bool:
        return self._holds > 0

    @property
    def is_last_hold(self) -> bool:
        return self._holds == 1

    def add(self, line: str) -> None:
        if self._dropped:
            return
        if self._holds:
            self._kept.append(line)
        else:
            self._write(line)

    def hold(self) -> bool:
        """True for the first of nested holds."""
        self._holds += 1
        return self._holds == 1

    def release(self) -> None:
        self._holds = max(0, self._holds - 1)
        if not self._holds:
            self._flush()

    def release_all(self) -> None:
        self._holds = 0
        self._flush()

    def drop(self) -> None:
        """From now on nothing is passed on."""
        self._dropped = True
        self._kept.clear()

    def _flush(self) -> None:
        kept, self._kept = self._kept, []
        for line in kept:
            self.add(line)


def _stage_words(name: str, detail: str) -> str:
    return f"{printable(name)}: {printable(detail)}" if detail else printable(name)
