"""Answers from a file: a recorded transcript, or lines that a person wrote.

A recorded run is repeated without a model, a key or a network; each line is one answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from profiling_agent.errors import BudgetError
from profiling_agent.llm.conversation import Conversation, Reply
from profiling_agent.llm.faults import FinalFault
from profiling_agent.llm.transcript import is_answered
from profiling_agent.records.base import describe_faults
from profiling_agent.records.llm import Exchange

_EXAMPLE = '{"answer": "..."}'


class Replay:
    """Gives the answers of ``path`` in order, whatever is asked; then ``ProviderFault``.

    >>> Replay(Path("transcript.jsonl")).request(conversation, timeout_s=1.0).text
    '{"plans": []}'
    """

    def __init__(self, path: Path) -> None:
        """Read all answers; ``BudgetError`` names the file and the line that can't be used."""
        self._path = path
        exchanges, is_by_hand = _read(path)
        self._replies = [_as_reply(each) for each in exchanges]
        self._given = 0
        self._name = f"replay:{path}{' (written by a person)' if is_by_hand else ''}"

    @property
    def name(self) -> str:
        return self._name

    @property
    def offers_tools(self) -> bool:
        return any(reply.calls for reply in self._replies)

    def skip(self, count: int) -> None:
        """Pass over so many answers: an earlier process of the run has had them."""
        self._given = min(count, len(self._replies))

    @property
    def path(self) -> Path:
        return self._path

    def request(self, conversation: Conversation, timeout_s: float) -> Reply:
        """The next answer; a final ``ProviderFault`` when all were given."""
        if self._given == len(self._replies):
            raise FinalFault(f"The {self._given} answers of {str(self._path)!r} are used up.")
        self._given += 1
        return self._replies[self._given - 1]


def _read(path: Path) -> tuple[list[Exchange], bool]:
    """The answered exchanges, and whether a person wrote any of them."""
    try:
        # not splitlines(), which also splits at characters that JSON leaves as they are
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BudgetError(
            f"Can't read {str(path)!r}: {error}. Pass --llm replay:FILE with the llm transcript "
            f"of a run, or with lines like {_EXAMPLE}."
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    by_hand = [_written_answer(line) for _, line in numbered]
    exchanges = [
        _written(answer) if answer is not None else _recorded(path, number, line)
        for (number, line), answer in zip(numbered, by_hand, strict=True)
    ]
    answered = [each for each in exchanges if is_answered(each)]
    if not answered:
        raise BudgetError(f"{str(path)!r} has no answer; a line like {_EXAMPLE} is one.")
    return answered, any(answer is not None for answer in by_hand)


def _written_answer(line: str) -> str | None:
    try:
        value: Any = json.loads(line)
    except ValueError:
        return None
    fields = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    if set(fields) != {"answer"}:
        return None
    answer = fields["answer"]
    return answer if isinstance(answer, str) else json.dumps(answer)


def _written(answer: str) -> Exchange:
    return Exchange(
        number=0, agent="", model="", prompt_hash="", request_hash="", sent=(), answer=answer
    )


def _recorded(path: Path, number: int, line: str) -> Exchange:
    try:
        return Exchange.model_validate_json(line)
    except ValidationError as error:
        raise BudgetError(
            f"Line {number} of {str(path)!r} is no recorded answer: {describe_faults(error)}. "
            f"A line by hand is {_EXAMPLE}."
        ) from None


def _as_reply(exchange: Exchange) -> Reply:
    """The text and the calls; replaying costs nothing, so it has no tokens and no cost."""
    return Reply(
        text=exchange.answer or "", calls=exchange.tools, no_cost="recorded answers are not paid"
    )
