"""A file of JSON lines, appended and never rewritten, that a killed process leaves readable.

At most its last line is torn: reading skips it, and the next line replaces it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from profiling_agent.errors import PlanError, StorageError

T = TypeVar("T")


class LineFile(Generic[T]):
    """Lines that ``parse`` turns into values; it raises ``ValueError`` for what is none.

    ``name`` and ``item`` are for messages: the journal, an event.
    """

    def __init__(self, path: Path, parse: Callable[[str], T], *, name: str, item: str) -> None:
        self.path = path
        self._parse, self._name, self._item = parse, name, item

    def append(self, line: str) -> None:
        """Write one line and flush it to the disk; ``StorageError`` when that fails."""
        try:
            self._end_torn_line()
            # a lone surrogate (from an undecodable file name) becomes its own JSON escape
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"Can't write the {self._name} {str(self.path)!r}: {error}. Free space or pass "
                "--out."
            ) from None

    def read(self) -> Iterator[T]:
        """The values of all whole lines in order; empty without a file.

        A torn last line is skipped; ``PlanError`` names any other.
        """
        if not self.path.exists():
            return
        try:
            # not splitlines(), which also splits at characters that JSON leaves as they are
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise StorageError(
                f"Can't read the {self._name} {str(self.path)!r}: {error}."
            ) from None
        lines = text.removesuffix("\n").split("\n")
        for number, line in enumerate(lines, start=1):
            try:
                value = self._parse(line)
            except ValueError:
                if number == len(lines) or not line.strip():
                    continue
                raise PlanError(
                    f"Line {number} of {str(self.path)!r} is not {self._item}; the {self._name} "
                    "was edited or the disk is damaged. Start a new run with another --out."
                ) from None
            yield value

    def _end_torn_line(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() == b"\n":
                return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        with self.path.open("r+b") as file:
            if self._is_whole(content[whole:]):  # only its end is missing; it was read as whole
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            else:
                file.truncate(whole)

    def _is_whole(self, line: bytes) -> bool:
        try:
            self._parse(line.decode("utf-8", errors="replace"))
        except ValueError:
            return False
        return True
