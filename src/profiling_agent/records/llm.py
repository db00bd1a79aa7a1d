"""What a run asks of a language model, and what came of it."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from profiling_agent.records.base import Record

GuardAction = Literal["rejected", "unanswered", "rewritten", "fallback", "handover", "rollback"]


class LlmLimits(Record):
    """What a run may spend on a language model, all requests together.

    A limit that is reached ends the asking and not the run: the solver goes on.
    """

    max_requests: int = Field(default=60, ge=1, le=100_000)
    max_tokens: int = Field(default=400_000, ge=1, description="input and output together")
    max_answer_tokens: int = Field(
        default=8000, ge=50, le=1_000_000, description="of one answer, thoughts included"
    )
    max_cost_usd: float | None = Field(
        default=None, gt=0, description="None: no limit; counted for models with a known price"
    )
    max_seconds: float = Field(default=300.0, gt=0, description="of waiting for answers")
    request_timeout_s: float = Field(default=60.0, gt=0)
    max_retries: int = Field(
        default=4, ge=0, le=20, description="of one request, after 429, 5xx and cut connections"
    )


class LlmSettings(Record):
    """Which model is asked. Keys are not part of it: they come from the environment alone."""

    model: str = Field(
        min_length=1, max_length=300, description="openai:gpt-4o, ollama:llama3.2, replay:FILE, ..."
    )
    base_url: str | None = Field(default=None, max_length=2000)
    limits: LlmLimits = LlmLimits()
    rounds: int | None = Field(
        default=None, ge=1, description="plans asked for; None: as many as there is time for"
    )
    use_tools: bool = True
    prompt: str = Field(default="default", description="wording of the instructions")

    @field_validator("base_url")
    @classmethod
    def _without_secrets(cls, url: str | None) -> str | None:
        """It is written into the run's record."""
        parts = urlsplit(url or "")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise PydanticCustomError(
                "secret", "the endpoint's URL holds a password or key; give it in the environment"
            )
        return url


class ToolUse(Record):
    """A tool that the model called, with the arguments as it wrote them."""

    call_id: str
    name: str
    arguments: str


class Exchange(Record):
    """One request to a model and its answer, as the transcript keeps it.

    ``sent`` holds the turns that were not in the exchange before; ``request_hash`` is over all of
    them, with instructions and schema.
    """

    number: int
    agent: str
    model: str
    prompt_hash: str = Field(description="of the instructions' text")
    request_hash: str
    sent: tuple[str, ...]
    answer: str | None = Field(description="text of the answer; None when there was none")
    tools: tuple[ToolUse, ...] = ()
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    no_cost: str = Field(default="", description="why the cost is not known")
    seconds: float = 0.0
    attempts: int = 1
    error: str = ""


class Guard(Record):
    """Something a guard did: a rejected answer, a question that got none, a rewritten plan, a
    fallback, a hand-over to the planner behind for the rest of the run, a rollback."""

    action: GuardAction
    author: str
    trial_id: str | None = Field(
        default=None,
        description="the trial it led to, that was rolled back, or from which on it holds",
    )
    reason: str


class LlmUsage(Record):
    """All requests of a run together; ``model`` is whoever answered, by its own name."""

    model: str = ""
    requests: int = 0
    answered: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None
    no_cost: str = ""
    seconds: float = 0.0
