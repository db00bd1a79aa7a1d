"""What was sent to a language model and what it said: one JSON object a line, appended.

A killed run leaves at most one torn last line; reading skips it, and the next line replaces it.
Secrets are replaced before anything is written.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from profiling_agent.errors import PlanError, StorageError
from profiling_agent.records.llm import Exchange

SECRET = "[secret]"
MAX_ANSWER_CHARACTERS = 200_000
_SECRET_NAMES = ("_API_KEY", "_TOKEN", "_SECRET")
_SECRET_LENGTH = 8  # shorter values of such variables are words like "none"
_LOOKS_SECRET = (
    (re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"), SECRET),
    (re.compile(r"\b(Bearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{SECRET}"),
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), rf"\1{SECRET}@"),  # a password in a URL
)
_T = TypeVar("_T")


def redact(text: str) -> str:
    """The text with ``[secret]`` for the environment's keys and for what looks like one."""
    # the longest first: one key may begin with another
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, SECRET)
    for pattern, replacement in _LOOKS_SECRET:
        text = pattern.sub(replacement, text)
    return text


def is_answered(exchange: Exchange) -> bool:
    """Whether the exchange has a whole answer, in text or in calls of tools."""
    return not exchange.error and (exchange.answer is not None or bool(exchange.tools))


class Transcript:
    """Append-only exchanges; those of earlier processes of the run are ``earlier``.

    >>> transcript = Transcript(path); transcript.append(exchange); transcript.next_number
    2
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; ``PlanError`` names a bad line, ``StorageError`` a bad file."""
        self.path = path
        self.earlier = tuple(_read(path))
        self.next_number = max((each.number for each in self.earlier), default=0) + 1
        self._waiting: dict[str, deque[Exchange]] = {}
        for exchange in filter(is_answered, self.earlier):
            self._waiting.setdefault(exchange.request_hash, deque()).append(exchange)

    def append(self, exchange: Exchange) -> None:
        """Write one exchange without its secrets, to the disk; ``StorageError`` if that fails."""
        line = Exchange.model_validate(_redacted(exchange.model_dump())).to_json(indent=None)
        try:
            _end_torn_line(self.path)
            with self.path.open("ab") as file:
                file.write(line.encode("utf-8") + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"Can't write the transcript {str(self.path)!r}: {error}. Free space or pass --out."
            ) from None
        self.next_number = exchange.number + 1

    def answered(self, request_hash: str) -> Exchange | None:
        """The answer that an earlier process got to this request; each is given once, in order."""
        waiting = self._waiting.get(request_hash)
        return waiting.popleft() if waiting else None


def _secrets() -> Iterable[str]:
    return {
        value
        for name, value in os.environ.items()
        if name.upper().endswith(_SECRET_NAMES) and len(value) >= _SECRET_LENGTH
    }


def _redacted(value: _T) -> _T:
    """The value with every string in it redacted; characters that UTF-8 hasn't become ``?``."""
    if isinstance(value, str):
        return redact(value).encode("utf-8", "replace").decode()  # pyright: ignore[reportReturnType]
    if isinstance(value, dict):
        return {key: _redacted(each) for key, each in value.items()}  # pyright: ignore
    if isinstance(value, (list, tuple)):
        return tuple(_redacted(each) for each in value)  # pyright: ignore
    return value


def _read(path: Path) -> Iterable[Exchange]:
    if not path.exists():
        return
    try:
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise StorageError(f"Can't read the transcript {str(path)!r}: {error}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            yield Exchange.model_validate_json(line)
        except ValidationError:
            if number == len(lines) or not line.strip():
                continue
            raise PlanError(
                f"Line {number} of {str(path)!r} is not an exchange; the transcript was edited or "
                "the disk is damaged. Start a new run with another --out."
            ) from None


def _end_torn_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    with path.open("r+b") as file:
        if _is_exchange(content[whole:]):  # only its end is missing; it was read as whole
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(whole)


def _is_exchange(line: bytes) -> bool:
    try:
        Exchange.model_validate_json(line)
    except ValidationError:
        return False
    return True
