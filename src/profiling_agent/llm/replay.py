"""Answers from a file: a recorded transcript, or lines that a person wrote.

A recorded run is repeated without a model, a key or a network; each line is one answer. A question
that got none gets none again, so that the answers after it meet their own questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from profiling_agent.errors import BudgetError
from profiling_agent.llm.conversation import Conversation, ProviderFault, Reply
from profiling_agent.llm.faults import FinalFault
from profiling_agent.llm.transcript import INTERRUPTED, is_answered
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
        self._steps, is_by_hand = _read(path)
        self._given = 0
        self._failed: dict[str, int] = {}
        self._name = f"replay:{path}{' (written by a person)' if is_by_hand else ''}"

    @property
    def name(self) -> str:
        return self._name

    @property
    def offers_tools(self) -> bool:
        return any(step.tools for step in self._steps)

    def resume(self, earlier: Iterable[Exchange]) -> None:
        """Pass over what an earlier process of the run was given; a question that failed there
        fails again where it is asked again."""
        for exchange in earlier:
            if self._given == len(self._steps):
                return
            step = self._steps[self._given]
            if is_answered(exchange):
                self._given += 1
            elif exchange.request_hash not in self._failed and exchange.error == step.error:
                self._failed[exchange.request_hash] = self._given
                self._given += 1

    @property
    def path(self) -> Path:
        return self._path

    def request(self, conversation: Conversation, timeout_s: float) -> Reply:
        """The next answer; ``ProviderFault`` where there was none, a final one at the end."""
        place = self._failed.get(conversation.request_hash)
        if place is None:
            place = self._given
            self._given = min(self._given + 1, len(self._steps))
        if place == len(self._steps):
            count = sum(is_answered(step) for step in self._steps)
            raise FinalFault(f"The {count} answers of {str(self._path)!r} are used up.")
        step = self._steps[place]
        if is_answered(step):
            return _as_reply(step)
        if place == len(self._steps) - 1:  # nobody was asked after it
            raise FinalFault(step.error)
        raise ProviderFault(step.error, is_passing=False)


def _read(path: Path) -> tuple[list[Exchange], bool]:
    """What came of each question, and whether a person wrote any of the answers."""
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
    if not any(map(is_answered, exchanges)):
        raise BudgetError(f"{str(path)!r} has no answer; a line like {_EXAMPLE} is one.")
    return _that_stand(exchanges), any(answer is not None for answer in by_hand)


def _that_stand(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """Without failures that nothing came of: the process ended, and the next one asked again."""
    last = {each.request_hash: place for place, each in enumerate(exchanges)}
    return [
        each
        for place, each in enumerate(exchanges)
        if is_answered(each)
        or (last[each.request_hash] == place and not each.error.startswith(INTERRUPTED))
    ]


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
