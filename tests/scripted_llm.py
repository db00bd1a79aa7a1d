"""A language model that is a list of replies, and the answers that it gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from profiling_agent.llm.client import Client
from profiling_agent.llm.conversation import Conversation, ProviderFault, Reply
from profiling_agent.llm.transcript import Transcript
from profiling_agent.records.llm import LlmLimits, ToolUse

Step = str | Reply | Exception


class Scripted:
    """Gives one reply after the other, the last one forever; ``asked`` keeps what it was sent."""

    def __init__(self, steps: Iterable[Step], *, offers_tools: bool = True) -> None:
        self.name, self.offers_tools = "scripted", offers_tools
        self.asked: list[Conversation] = []
        self._steps: Iterator[Step] = iter(steps)
        self._last: Step = ""

    def __call__(self, conversation: Conversation) -> Reply:
        self.asked.append(conversation)
        self._last = next(self._steps, self._last)
        if isinstance(self._last, Exception):
            raise self._last
        return Reply(text=self._last) if isinstance(self._last, str) else self._last

    def request(self, conversation: Conversation, timeout_s: float) -> Reply:
        return self(conversation)


def client_of(provider: Scripted, folder: Path | None = None, **limits: Any) -> Client:
    values: dict[str, Any] = {"max_requests": 10_000, "max_tokens": 10**9, "max_seconds": 1e6}
    transcript = Transcript(folder / "llm.jsonl") if folder else None
    return Client(provider, LlmLimits(**values | limits), transcript, sleep=_no_sleep)


def _no_sleep(seconds: float) -> None:
    pass


def calls(*uses: tuple[str, str], text: str = "") -> Reply:
    """A reply that wants tools: names and arguments."""
    return Reply(
        text=text,
        calls=tuple(
            ToolUse(call_id=f"call{number}", name=name, arguments=arguments)
            for number, (name, arguments) in enumerate(uses)
        ),
    )


def lost(*, is_passing: bool = False) -> ProviderFault:
    return ProviderFault("Nobody is there.", is_passing=is_passing)


def answer(*prune: tuple[str, float], **fields: Any) -> dict[str, Any]:
    """A good answer for the profiles of the tests, but for what is said otherwise."""
    values: dict[str, Any] = {
        "why": "much time for little harm",
        "done": False,
        "runtime": "onnxruntime",
        "scheme": "int8-dynamic",
        "prune": [{"match": match, "ratio": ratio, "why": "so"} for match, ratio in prune],
        "keep_float": [],
    }
    return values | fields


def said(*prune: tuple[str, float], **fields: Any) -> str:
    return json.dumps(answer(*prune, **fields))
