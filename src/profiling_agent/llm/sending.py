"""Sends conversations to a model of ``pydantic_ai`` and takes its answers and its errors apart.

No agent of that library is used: the client asks again, counts and records. Each request has an
event loop and a thread of its own, so that it works inside a notebook, leaves no open connection
and ends at its deadline, however slowly the server answers.

A refusal or a filtered answer is an answer: its text is what the model said, its tokens were spent.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from profiling_agent.llm.conversation import Conversation, ProviderFault, Reply
from profiling_agent.llm.faults import (
    FinalFault,
    body_text,
    is_too_long,
    quoted,
    status_fault,
)
from profiling_agent.records.llm import ToolUse

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelRequestPart, ModelResponse
    from pydantic_ai.models import Model, ModelRequestParameters
    from pydantic_ai.settings import ModelSettings

_GRACE_S = 2.0  # for closing connections after the deadline
_ABOUT_SCHEMA = re.compile(r"response_format|schema|grammar|structured", re.IGNORECASE)
_ABOUT_TOOLS = re.compile(r"\btools?\b|tool_|function", re.IGNORECASE)
_SCHEMA_IN_WORDS = """

Answer with one JSON object that follows this JSON schema, and with nothing before or after it:
{schema}"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is. ``advice`` is what to check when it can't be asked.

    ``build`` makes it anew for each request, since a connection belongs to one event loop.
    ``sends_schema`` None: if the model's profile has it.
    """

    name: str
    advice: str
    build: Callable[[], Model]
    has_price: bool
    sends_schema: bool | None


class ModelProvider:
    """A model behind pydantic_ai. What it refuses once, JSON schemas or tools, is left out then."""

    def __init__(self, source: Source, *, use_tools: bool, max_tokens: int) -> None:
        profile = source.build().profile
        self._max_tokens = max_tokens
        self._source = source
        self._sends_schema = source.sends_schema or (
            source.sends_schema is None and bool(profile.get("supports_json_schema_output"))
        )
        self._offers_tools = use_tools and bool(profile.get("supports_tools", True))

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def offers_tools(self) -> bool:
        return self._offers_tools

    def request(self, conversation: Conversation, timeout_s: float) -> Reply:
        """One answer within so many seconds; ``ProviderFault`` when there is none."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                response = self._in_time(conversation, left, timeout_s)
            except _Refused as refused:
                if not self._left_out(refused.said, conversation):
                    raise refused.fault from None
            else:
                return self._as_reply(response)

    async def _send(self, conversation: Conversation) -> ModelResponse:
        from pydantic_ai.direct import model_request

        try:
            async with self._source.build() as model:
                return await model_request(
                    model,
                    _messages(conversation, self._instructions(conversation)),
                    model_settings=_model_settings(model, self._max_tokens),
                    model_request_parameters=self._parameters(conversation),
                )
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever the libraries raise is a fault of this request
            raise _as_fault(self._source, error) from error

    def _in_time(
        self, conversation: Conversation, left_s: float, timeout_s: float
    ) -> ModelResponse:
        """The response, had in a loop and a thread of its own, or a fault at the deadline."""
        outcome: list[ModelResponse | BaseException] = []

        async def limited() -> None:
            try:
                async with asyncio.timeout(left_s):
                    outcome.append(await self._send(conversation))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(
            target=lambda: asyncio.run(limited()), name="language model", daemon=True
        )
        thread.start()
        thread.join(left_s + _GRACE_S)
        if not outcome or isinstance(outcome[0], (TimeoutError, asyncio.CancelledError)):
            raise ProviderFault(
                f"{self._source.name} gave no answer within {timeout_s:.3g} s.", is_passing=True
            )
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _instructions(self, conversation: Conversation) -> str:
        if self._sends_schema or not conversation.schema:
            return conversation.instructions
        return conversation.instructions + _SCHEMA_IN_WORDS.format(
            schema=json.dumps(conversation.schema)
        )

    def _parameters(self, conversation: Conversation) -> ModelRequestParameters:
        from pydantic_ai.models import ModelRequestParameters
        from pydantic_ai.output import OutputObjectDefinition
        from pydantic_ai.tools import ToolDefinition

        tools = [
            ToolDefinition(
                name=tool.name,
                description=tool.description,
                parameters_json_schema=tool.parameters,
            )
            for tool in (conversation.tools if self._offers_tools else ())
        ]
        if not (self._sends_schema and conversation.schema):
            return ModelRequestParameters(function_tools=tools)
        return ModelRequestParameters(
            function_tools=tools,
            output_mode="native",
            output_object=OutputObjectDefinition(json_schema=conversation.schema, name="answer"),
        )

    def _left_out(self, said: str, conversation: Conversation) -> bool:
        """Leave out what a 400 is about, for good; whether there was anything."""
        if is_too_long(said):
            return False
        if self._sends_schema and conversation.schema and _ABOUT_SCHEMA.search(said):
            self._sends_schema = False
            return True
        if self._offers_tools and conversation.tools and _ABOUT_TOOLS.search(said):
            self._offers_tools = False
            return True
        return False

    def _as_reply(self, response: ModelResponse) -> Reply:
        from pydantic_ai.messages import TextPart, ToolCallPart

        text = "".join(part.content for part in response.parts if isinstance(part, TextPart))
        calls = tuple(
            ToolUse(
                call_id=part.tool_call_id, name=part.tool_name, arguments=part.args_as_json_str()
            )
            for part in response.parts
            if isinstance(part, ToolCallPart)
        )
        usage = response.usage
        is_told = bool(usage.input_tokens or usage.output_tokens)
        cost, no_cost = self._cost(response, is_told)
        return Reply(
            text=text or str((response.provider_details or {}).get("refusal") or ""),
            calls=calls,
            input_tokens=usage.input_tokens if is_told else None,
            output_tokens=usage.output_tokens if is_told else None,
            cost_usd=cost,
            no_cost=no_cost,
        )

    def _cost(self, response: ModelResponse, is_told: bool) -> tuple[float | None, str]:
        if not self._source.has_price:
            return None, "an endpoint of one's own has no price list"
        if not is_told:
            return None, f"{self._source.name} does not tell the tokens"
        try:
            return float(response.cost().total_price), ""
        except (LookupError, ValueError, AssertionError):
            return None, f"genai-prices has no price of {response.model_name}"


class _Refused(Exception):
    """A 400 or 422 that may be about what can be left out."""

    def __init__(self, fault: ProviderFault, said: str) -> None:
        super().__init__(str(fault))
        self.fault, self.said = fault, said


def _messages(conversation: Conversation, instructions: str) -> list[ModelMessage]:
    """The turns as pydantic_ai has them; turns that follow each other from one side are one."""
    from pydantic_ai import messages

    result: list[ModelMessage] = []
    waiting: list[ModelRequestPart] = []
    for turn in conversation.turns:
        if turn.role == "user":
            waiting.append(messages.UserPromptPart(turn.text))
        elif turn.role == "tool":
            waiting.append(messages.ToolReturnPart(turn.name, turn.text, turn.call_id))
        else:
            if waiting:
                result.append(messages.ModelRequest(waiting, instructions=instructions))
                waiting = []
            text = [messages.TextPart(turn.text)] if turn.text else []
            calls = [
                messages.ToolCallPart(call.name, call.arguments, call.call_id)
                for call in turn.calls
            ]
            result.append(messages.ModelResponse([*text, *calls]))
    result.append(messages.ModelRequest(waiting, instructions=instructions))
    return result


def _as_fault(source: Source, error: Exception) -> ProviderFault | _Refused:
    from pydantic_ai.exceptions import ModelHTTPError, UnexpectedModelBehavior, UserError

    name, said = source.name, quoted(_first_words(error))
    if isinstance(error, ModelHTTPError):
        body = body_text(error.body)
        wait_s = cast("float | None", getattr(error, "retry_after", None))
        fault = status_fault(name, error.status_code, body, source.advice, wait_s)
        return _Refused(fault, body) if error.status_code in (400, 422) else fault
    if isinstance(error, UserError):
        return ProviderFault(f"{name} can't be asked this{said}.", is_passing=False)
    if isinstance(error, UnexpectedModelBehavior) and "expected JSON data" in str(error):
        return FinalFault(f"{name} answers with a web page or other text; {source.advice}.")
    # a body without choices is an IndexError there, one that is no JSON the cause of another error
    broken = (UnexpectedModelBehavior, ValueError, LookupError, TypeError, AttributeError)
    root = _root(error)  # a certificate's error is both, and about the connection
    is_no_json = isinstance(root, ValueError) and not isinstance(root, OSError)
    if is_no_json or (isinstance(error, broken) and not isinstance(error, OSError)):
        return ProviderFault(f"{name} gave a broken answer{said}.", is_passing=True)
    if _is_cut(error):
        return ProviderFault(
            f"The connection to {name} failed{said}; {source.advice}.", is_passing=True
        )
    words = f"{type(error).__name__}{said}"
    return ProviderFault(f"{name} can't be asked: {words}.", is_passing=False)


def _model_settings(model: Model, max_tokens: int) -> ModelSettings:
    """The library's own retries off, for the models that can: we count and wait ourselves."""
    if "max_retries" in getattr(model, "unsupported_settings", ()):
        return {"max_tokens": max_tokens}
    return {"max_retries": 0, "max_tokens": max_tokens}


def _first_words(error: BaseException) -> str:
    """The error's text, and that of its first cause where that says more."""
    words = [text for text in (str(error), str(_root(error))) if text]
    if len(words) == 2 and words[1] in words[0]:
        words.pop()
    return ": ".join(words) or type(error).__name__


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_cut(error: Exception) -> bool:
    """Whether it is about the connection; the HTTP clients have no common class for that."""
    from pydantic_ai.exceptions import ModelAPIError

    modules = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    return isinstance(error, (ModelAPIError, OSError)) or bool(
        modules & {"httpx", "httpx2", "httpcore", "httpcore2"}
    )
