"""What was sent to a language model and what it said: one JSON object a line, appended.

Secrets are replaced before anything is written.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from profiling_agent.records.lines import LineFile
from profiling_agent.records.llm import Exchange

SECRET = "[secret]"
MAX_ANSWER_CHARACTERS = 200_000
INTERRUPTED = "interrupted: "
"""Begins the error of a request whose process ended before there was an answer."""
_SECRET_NAMES = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_BEDROCK")
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


def clean(text: str) -> str:
    """Without secrets, and with ``?`` for characters that UTF-8 hasn't: half of a pair, say."""
    return redact(text).encode("utf-8", "replace").decode()


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
        self._file = LineFile(
            path, Exchange.model_validate_json, name="transcript", item="an exchange"
        )
        self.earlier = tuple(self._file.read())
        self.next_number = max((each.number for each in self.earlier), default=0) + 1
        self._waiting: dict[str, deque[Exchange]] = {}
        for exchange in filter(is_answered, self.earlier):
            self._waiting.setdefault(exchange.request_hash, deque()).append(exchange)

    def append(self, exchange: Exchange) -> None:
        """Write one exchange without its secrets, to the disk; ``StorageError`` if that fails."""
        clean = Exchange.model_validate(_redacted(exchange.model_dump()))
        self._file.append(clean.to_json(indent=None))
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
    """The value with every string in it clean."""
    if isinstance(value, str):
        return clean(value)  # pyright: ignore[reportReturnType]
    if isinstance(value, dict):
        return {key: _redacted(each) for key, each in value.items()}  # pyright: ignore
    if isinstance(value, (list, tuple)):
        return tuple(_redacted(each) for each in value)  # pyright: ignore
    return value
