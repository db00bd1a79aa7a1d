"""The journal of a run: one JSON object a line, appended and never rewritten.

A killed run leaves at most one broken last line; reading skips it. Resuming is reading: every
measured value is in here before the next step begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from profiling_agent.errors import PlanError, StorageError


class Journal:
    """Append-only events of kind and payload, stamped with ``clock`` (seconds of the run).

    >>> journal = Journal(path); journal.append("trial", {"trial_id": "t1"}); list(journal.events())
    [('trial', {'trial_id': 't1'})]
    """

    def __init__(self, path: Path, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.path = path
        self.clock = clock

    def append(self, kind: str, payload: Any) -> None:
        """Write one event and flush it to the disk; ``StorageError`` when that fails."""
        data = payload.model_dump(mode="json") if hasattr(payload, "model_dump") else payload
        event = {"kind": kind, "at": round(self.clock(), 3), "data": data}
        line = json.dumps(event, ensure_ascii=False)
        try:
            self._end_broken_line()
            # a lone surrogate (from an undecodable file name) becomes its own JSON escape
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"Can't write the journal {str(self.path)!r}: {error}. Free space or pass --out."
            ) from None

    def events(self) -> Iterator[tuple[str, Any]]:
        """Kind and payload of all whole events in order.

        A broken last line is skipped; ``PlanError`` names any other.
        """
        for event in self._read():
            yield event["kind"], event["data"]

    def spent(self) -> float:
        """Seconds of the run at the last event, over all its starts."""
        return max((float(event.get("at", 0.0)) for event in self._read()), default=0.0)

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        # not splitlines(), which also splits at characters that JSON leaves as they are
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = text.removesuffix("\n").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
                _ = event["kind"], event["data"]
                yield event
            except (ValueError, KeyError, TypeError):
                if number == len(lines) or not line.strip():
                    continue
                raise PlanError(
                    f"Line {number} of {str(self.path)!r} is not an event; the journal was edited "
                    "or the disk is damaged. Start a new run with another --out."
                ) from None

    def _end_broken_line(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            whole = content.rfind(b"\n") + 1
            with self.path.open("r+b") as file:
                if _is_event(content[whole:]):  # only its end is missing; it was read as whole
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                else:
                    file.truncate(whole)


def _is_event(line: bytes) -> bool:
    try:
        event = json.loads(line)
        return "kind" in event and "data" in event
    except (ValueError, TypeError):
        return False
