"""What went wrong with a request, in a sentence that names what to do.

Passing, so that the client asks again: 408, 409, 429, 5xx, timeouts, cut connections, and answers
that are broken at the server's side (invalid JSON, no choices). Final, so that nobody asks again in
this run: a wrong key, an unknown model, no credit left, a base URL that answers with web pages.
All other faults are of this one request (400, 413, 422: too long, not understood).
"""

from __future__ import annotations

import json
from typing import Any

from profiling_agent.llm.conversation import ProviderFault
from profiling_agent.llm.transcript import clean

_PASSING = (408, 409, 425, 429)
_SAID = 300  # characters of the provider's own words that are quoted


class FinalFault(ProviderFault):
    """A fault that the next request would meet as well."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, is_passing=False)


def status_fault(
    name: str, status: int, said: str, advice: str, wait_s: float | None
) -> ProviderFault:
    """The fault of an HTTP status; ``said`` is the body, ``advice`` what a 401 or 404 may lack."""
    lowered = said.lower()
    start = f"{name} answers {status}{quoted(said)}"
    if status in (401, 403):
        return FinalFault(f"{start}. The key is wrong or may not use this model; {advice}.")
    if status == 404 or "model_not_found" in lowered:
        return FinalFault(f"{start}. There is no such model or address; {advice}.")
    if status == 402 or "insufficient_quota" in lowered:
        return FinalFault(f"{start}. The account has no credit; add some or pass another --llm.")
    if status in _PASSING or status >= 500:
        return ProviderFault(f"{start}.", is_passing=True, wait_s=wait_s)
    if is_too_long(said):
        return ProviderFault(
            f"{start}. The request is too long for this model; pass one with a longer context.",
            is_passing=False,
        )
    return ProviderFault(
        f"{start}. It does not take this request; check the model's name and the base URL, or pass "
        "another --llm.",
        is_passing=False,
    )


def is_too_long(said: str) -> bool:
    """Whether a provider's words are about the length of the request."""
    lowered = said.lower()
    return any(words in lowered for words in ("context_length", "context length", "context size"))


def body_text(body: object) -> str:
    """The words of an error's body: its message where it has one."""
    inner: Any = body
    if isinstance(inner, dict):
        inner = inner.get("error", inner)  # pyright: ignore
        if isinstance(inner, dict) and isinstance(inner.get("message"), str):  # pyright: ignore
            named = [inner[key] for key in ("code", "type") if isinstance(inner.get(key), str)]  # pyright: ignore
            return ": ".join([*named, inner["message"]])  # pyright: ignore
    if isinstance(inner, str):
        return inner
    return "" if inner is None else json.dumps(inner, default=str)


def quoted(said: str) -> str:
    """`` (...)`` with the provider's own words on one line, short and without secrets."""
    words = " ".join(clean(said).split())
    if not words:
        return ""
    return f" ({words[:_SAID]}...)" if len(words) > _SAID else f" ({words})"
