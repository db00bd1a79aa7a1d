"""What is sent to a language model and what comes back, in our own words.

Agents know these types and nothing of providers; a provider knows how to send them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from profiling_agent.records.llm import ToolUse


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. ``tool`` turns answer the call ``call_id`` of the assistant's turn before."""

    role: Literal["user", "assistant", "tool"]
    text: str = ""
    calls: tuple[ToolUse, ...] = ()
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class ToolOffer:
    """A tool that the model may call; ``parameters`` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """All that one request carries. ``schema`` is the JSON schema of the wanted answer."""

    agent: str
    instructions: str
    turns: tuple[Turn, ...]
    schema: dict[str, Any]
    tools: tuple[ToolOffer, ...] = field(default=())

    @property
    def prompt_hash(self) -> str:
        return _hash(self.instructions)

    @property
    def request_hash(self) -> str:
        """Of everything but the offered tools: these are left out once an endpoint refused them,
        which a continued run does not know."""
        turns = [[t.role, t.text, t.call_id, [[c.name, c.arguments] for c in t.calls]]
                 for t in self.turns]  # fmt: skip
        return _hash(json.dumps([self.instructions, turns, self.schema], sort_keys=True))

    def extended(self, *turns: Turn) -> Conversation:
        """The conversation with further turns."""
        return Conversation(
            agent=self.agent,
            instructions=self.instructions,
            turns=(*self.turns, *turns),
            schema=self.schema,
            tools=self.tools,
        )


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A model's answer: text, or tools that it wants called first. ``None``: not told."""

    text: str
    calls: tuple[ToolUse, ...] = ()
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    no_cost: str = ""


class ProviderFault(Exception):
    """A request without an answer. ``wait_s``: how long the provider asks to wait, if it does."""

    def __init__(self, sentence: str, *, is_passing: bool, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.is_passing, self.wait_s = is_passing, wait_s


class Provider(Protocol):
    """Whatever answers a conversation: a model behind an endpoint, or a recorded run."""

    @property
    def name(self) -> str: ...

    @property
    def offers_tools(self) -> bool: ...

    def request(self, conversation: Conversation, timeout_s: float) -> Reply:
        """One answer within so many seconds; raises ``ProviderFault``, and nothing else."""
        ...


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
