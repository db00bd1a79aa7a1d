"""Opens the provider of a model string: a service by name, an endpoint by URL, or a recording."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from profiling_agent.errors import BudgetError, MissingDependency, ProfilingAgentError
from profiling_agent.llm.conversation import Provider
from profiling_agent.llm.replay import Replay
from profiling_agent.llm.sending import ModelProvider, Source
from profiling_agent.llm.transcript import redact
from profiling_agent.records.llm import LlmSettings

if TYPE_CHECKING:
    from pydantic_ai.models import Model

INSTALL = "pip install 'profiling-agent[llm]'"
EXAMPLES = "--llm openai:gpt-4o or --llm ollama:llama3.2"
OLLAMA_URL = "http://localhost:11434/v1"
# Services whose JSON schemas work beside tools; the others get the schema in words.
NATIVE_SCHEMA = ("openai", "openai-chat", "openai-responses", "anthropic", "ollama")
_NO_KEY = "none"  # for servers that want no key; the client library wants one


def open_provider(settings: LlmSettings) -> Provider:
    """The provider of the settings, checked as far as that goes without asking it anything.

    Raises ``BudgetError`` for an unknown or malformed model, a missing key and a wrong base URL,
    and ``MissingDependency`` when the extra or the provider's own package is not installed.
    """
    if settings.model.startswith("replay:"):
        return Replay(Path(settings.model.removeprefix("replay:")))
    if settings.base_url is not None:
        source = _endpoint(settings.model, settings.base_url)
    else:
        source = _service(settings.model)
    return ModelProvider(
        source, use_tools=settings.use_tools, max_tokens=settings.limits.max_answer_tokens
    )


def _endpoint(model: str, base_url: str) -> Source:
    """A server of unknown kind that speaks OpenAI's chat completions."""
    _check_url(base_url)
    _require_extra()
    shown = redact(base_url)
    name = model.removeprefix("openai:").strip()
    if not name:
        raise BudgetError(f"{model!r} names no model of the server at {shown}; pass --llm NAME.")

    def build() -> Model:
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        key = os.environ.get("OPENAI_API_KEY") or _NO_KEY
        return OpenAIChatModel(name, provider=OpenAIProvider(base_url=base_url, api_key=key))

    return Source(
        name=f"{name} at {shown}",
        advice=f"check --llm-base-url {shown!r}, its name for the model {name!r} and, if it wants "
        "a key, OPENAI_API_KEY",
        build=build,
        has_price=False,
        sends_schema=True,
    )


def _service(model: str) -> Source:
    """A provider that pydantic_ai knows by name."""
    service, separator, name = model.partition(":")
    if not (separator and service.strip() and name.strip()):
        raise BudgetError(f"{model!r} names no provider and model; pass for example {EXAMPLES}.")
    _require_extra()
    advice = f"check the key in the environment and the model's name {name!r}"
    arguments: dict[str, str] = {}
    if service == "ollama":
        arguments["base_url"] = os.environ.get("OLLAMA_BASE_URL") or OLLAMA_URL
        advice = f"start Ollama, set OLLAMA_BASE_URL if it is not there, and 'ollama pull {name}'"
    return Source(
        name=model,
        advice=advice,
        build=lambda: _named_model(model, service, arguments),
        has_price=service != "ollama",
        sends_schema=None if service in NATIVE_SCHEMA else False,
    )


def _named_model(model: str, service: str, arguments: dict[str, str]) -> Model:
    from pydantic_ai.models import infer_model
    from pydantic_ai.providers import infer_provider, infer_provider_class

    try:
        if not arguments:
            return infer_model(model, provider_factory=infer_provider)
        kind: Any = infer_provider_class(service)
        return infer_model(model, provider_factory=lambda _: kind(**arguments))
    except Exception as error:  # cloud libraries have errors of their own for a missing account
        raise _opening_error(model, error) from error


def _opening_error(model: str, error: Exception) -> ProfilingAgentError:
    said = redact(" ".join(str(error).split()))
    if isinstance(error, ImportError):
        # the library's extra, and not the package that its message names: for Mistral that is wrong
        extra = re.search(r"pydantic-ai-slim\[[^\]]+\]", said)
        wanted = extra.group(0) if extra else f"pydantic-ai-slim[{model.partition(':')[0]}]"
        return MissingDependency(f"{model!r} needs its provider's package: pip install '{wanted}'")
    if said.startswith(("Unknown provider", "Unknown model")):
        return BudgetError(
            f"There is no provider for {model!r}. Pass for example {EXAMPLES}; for any other "
            "server that speaks OpenAI's chat completions, --llm-base-url."
        )
    variables = re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", said)
    if variables:
        listed = " or ".join(dict.fromkeys(variables))
        return BudgetError(f"{model!r} can't be asked yet: set the environment variable {listed}.")
    return BudgetError(
        f"{model!r} can't be opened: {said[:300]} Check its account and key in the environment."
    )


def _check_url(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or any(character.isspace() for character in base_url):
        raise BudgetError(
            f"--llm-base-url {redact(base_url)!r} is no http(s) URL; pass one like "
            "'http://localhost:8080/v1'."
        )


def _require_extra() -> None:
    """``MissingDependency`` unless pydantic_ai and the client of its openai extra are there."""
    for package in ("pydantic_ai", "openai"):
        try:
            found = importlib.util.find_spec(package) is not None
        except ValueError:  # blocked or half loaded
            found = False
        if not found:
            raise MissingDependency(
                f"Asking a language model needs the package {package!r}: {INSTALL}"
            )
