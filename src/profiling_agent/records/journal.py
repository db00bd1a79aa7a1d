"""The journal of a run: one JSON object a line, appended and never rewritten.

Resuming is reading: every measured value is in here before the next step begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from profiling_agent.records.lines import LineFile


class Journal:
    """Append-only events of kind and payload, stamped with ``clock`` (seconds of the run).

    >>> journal = Journal(path); journal.append("trial", {"trial_id": "t1"}); list(journal.events())
    [('trial', {'trial_id': 't1'})]
    """

    def __init__(self, path: Path, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.path = path
        self.clock = clock
        self._file = LineFile(path, _event, name="journal", item="an event")

    def append(self, kind: str, payload: Any) -> None:
        """Write one event and flush it to the disk; ``StorageError`` when that fails."""
        data = payload.model_dump(mode="json") if hasattr(payload, "model_dump") else payload
        event = {"kind": kind, "at": round(self.clock(), 3), "data": data}
        self._file.append(json.dumps(event, ensure_ascii=False))

    def events(self) -> Iterator[tuple[str, Any]]:
        """Kind and payload of all whole events in order.

        A torn last line is skipped; ``PlanError`` names any other.
        """
        for event in self._file.read():
            yield event["kind"], event["data"]

    def spent(self) -> float:
        """Seconds of the run at the last event, over all its starts."""
        return max((float(event.get("at", 0.0)) for event in self._file.read()), default=0.0)


def _event(line: str) -> dict[str, Any]:
    event = json.loads(line)
    if not isinstance(event, dict) or "kind" not in event or "data" not in event:
        raise ValueError("no event")
    return event  # pyright: ignore[reportUnknownVariableType]
