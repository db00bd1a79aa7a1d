"""Asks a language model within the limits of a run, again after passing faults, and writes it down.

Everything counts: requests of earlier processes of the run, requests that failed, and the seconds
that were waited between two of them. An answer that an earlier process got is not asked for again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from profiling_agent.errors import LlmUnavailable
from profiling_agent.llm.conversation import Conversation, Provider, ProviderFault, Reply, Turn
from profiling_agent.llm.faults import FinalFault
from profiling_agent.llm.transcript import (
    INTERRUPTED,
    MAX_ANSWER_CHARACTERS,
    Transcript,
    clean,
    is_answered,
)
from profiling_agent.records.llm import Exchange, LlmLimits, LlmUsage

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0


@dataclass(kw_only=True)
class _Attempts:
    """How one question went so far."""

    started: float
    count: int = 0


class Client:
    """One provider under the limits of one run; ``transcript`` None keeps nothing.

    >>> Client(open_provider(settings), settings.limits, Transcript(path)).ask(conversation).text
    '{"plans": []}'
    """

    def __init__(
        self,
        provider: Provider,
        limits: LlmLimits,
        transcript: Transcript | None,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.provider = provider
        self._limits, self._transcript = limits, transcript
        self._now, self._sleep = now, sleep
        self._exchanges: list[Exchange] = list(transcript.earlier) if transcript else []
        self._known_turns: dict[str, tuple[Turn, ...]] = {}
        self._ends: float | None = None

    def allow(self, seconds: float) -> None:
        """Wait no longer than so many seconds from now, whatever the limits still grant."""
        self._ends = self._now() + seconds

    @property
    def usage(self) -> LlmUsage:
        """What the run has spent, its earlier processes included."""
        return _total(self._exchanges).model_copy(update={"model": self.provider.name})

    def ask(self, conversation: Conversation) -> Reply:
        """The model's answer, or the recorded one of an earlier process.

        Raises ``LlmUnavailable`` when a limit is reached or the provider gives none, and
        ``StorageError`` when the transcript can't be written.
        """
        recorded = self._transcript and self._transcript.answered(conversation.request_hash)
        if recorded:
            self._known_turns[conversation.agent] = conversation.turns
            return _as_reply(recorded)
        self._refuse_beyond_limits(attempts=0, seconds=0.0)
        attempts = _Attempts(started=self._now())
        try:
            reply = _cleaned(self._until_answered(conversation, attempts))
        except LlmUnavailable as error:
            self._keep(conversation, None, attempts, error=str(error))
            raise
        except BaseException as error:  # an interrupted request was sent, and may be paid for
            self._keep(conversation, None, attempts, error=f"{INTERRUPTED}{type(error).__name__}")
            raise
        return self._checked(conversation, reply, attempts)

    def _until_answered(self, conversation: Conversation, attempts: _Attempts) -> Reply:
        while True:
            seconds = self._now() - attempts.started
            left = self._refuse_beyond_limits(attempts=attempts.count, seconds=seconds)
            attempts.count += 1
            try:
                return self.provider.request(
                    conversation, min(self._limits.request_timeout_s, left)
                )
            except ProviderFault as fault:
                self._wait_or_give_up(fault, attempts)

    def _wait_or_give_up(self, fault: ProviderFault, attempts: _Attempts) -> None:
        sentence = clean(str(fault))
        if not fault.is_passing:
            raise LlmUnavailable(sentence, is_final=isinstance(fault, FinalFault)) from None
        if attempts.count > self._limits.max_retries:
            asked = "once" if attempts.count == 1 else f"{attempts.count} times"
            raise LlmUnavailable(f"{sentence} It was asked {asked}.", is_final=False) from None
        wait_s = min(_FIRST_WAIT_S * 2 ** (attempts.count - 1), _LONGEST_WAIT_S)
        wait_s = max(wait_s, fault.wait_s or 0.0)
        left = self._seconds_left(self._now() - attempts.started)
        if wait_s >= left:
            raise LlmUnavailable(
                f"{sentence} Asking again means {wait_s:.1f} s of waiting, and {max(left, 0):.1f} "
                f"of the {self._limits.max_seconds:g} s for the language model are left.",
                is_final=wait_s >= self._granted(self._now() - attempts.started),
            ) from None
        self._sleep(wait_s)

    def _refuse_beyond_limits(self, *, attempts: int, seconds: float) -> float:
        """Seconds that are left; ``LlmUnavailable`` when any limit is reached."""
        limits, spent = self._limits, self.usage
        left = self._seconds_left(seconds)
        cost = _known_cost(self._exchanges)
        if spent.requests + attempts >= limits.max_requests:
            reached = f"{limits.max_requests:,} requests"
        elif self._tokens() >= limits.max_tokens:
            reached = f"{limits.max_tokens:,} tokens"
        elif limits.max_cost_usd is not None and spent.answered and spent.cost_usd is None:
            raise LlmUnavailable(
                f"What {self.provider.name} costs is not known ({spent.no_cost}), so a limit in "
                "dollars can't be kept. Limit tokens in its place.",
                is_final=True,
            )
        elif limits.max_cost_usd is not None and cost >= limits.max_cost_usd:
            reached = f"{limits.max_cost_usd:g} USD"
        elif self._granted(seconds) <= 0:
            reached = f"{limits.max_seconds:g} s of waiting"
        elif left <= 0:
            raise LlmUnavailable("The run has no time left to wait for it.", is_final=False)
        else:
            return left
        raise LlmUnavailable(
            f"The run's limit for the language model is reached: {reached}.", is_final=True
        )

    def _tokens(self) -> int:
        """Spent so far; an answer whose tokens aren't told counts as the longest there may be."""
        return sum(
            (each.input_tokens or 0) + (each.output_tokens or 0)
            if each.output_tokens is not None or each.answer is None
            else self._limits.max_answer_tokens
            for each in self._exchanges
        )

    def _seconds_left(self, seconds: float) -> float:
        left = self._granted(seconds)
        return left if self._ends is None else min(left, self._ends - self._now())

    def _granted(self, seconds: float) -> float:
        """What the limit for all questions leaves, whatever was allowed for this one."""
        return self._limits.max_seconds - self.usage.seconds - seconds

    def _checked(self, conversation: Conversation, reply: Reply, attempts: _Attempts) -> Reply:
        length = len(reply.text) + sum(len(call.arguments) for call in reply.calls)
        if length <= MAX_ANSWER_CHARACTERS:
            self._keep(conversation, reply, attempts)
            return reply
        error = (
            f"{self.provider.name} answers with {length:,} characters; more than "
            f"{MAX_ANSWER_CHARACTERS:,} are no plan. The transcript has the beginning of its text."
        )
        self._keep(conversation, reply, attempts, error=error)
        raise LlmUnavailable(error, is_final=False)

    def _keep(
        self,
        conversation: Conversation,
        reply: Reply | None,
        attempts: _Attempts,
        *,
        error: str = "",
    ) -> None:
        """Count and record what was sent; a question that no request was made for is neither."""
        if attempts.count == 0:
            return
        exchange = Exchange(
            number=self._transcript.next_number if self._transcript else len(self._exchanges) + 1,
            agent=conversation.agent,
            model=self.provider.name,
            prompt_hash=conversation.prompt_hash,
            request_hash=conversation.request_hash,
            sent=self._new_turns(conversation),
            answer=reply.text[:MAX_ANSWER_CHARACTERS] if reply else None,
            tools=reply.calls if reply and not error else (),
            input_tokens=reply.input_tokens if reply else None,
            output_tokens=reply.output_tokens if reply else None,
            cost_usd=reply.cost_usd if reply else None,
            no_cost=_no_cost(reply),
            seconds=max(0.0, self._now() - attempts.started),
            attempts=attempts.count,
            error=error,
        )
        self._exchanges.append(exchange)
        self._known_turns[conversation.agent] = conversation.turns
        if self._transcript:
            self._transcript.append(exchange)

    def _new_turns(self, conversation: Conversation) -> tuple[str, ...]:
        """The turns that the agent's exchange before neither sent nor got as its answer."""
        known = self._known_turns.get(conversation.agent, ())
        turns = conversation.turns
        shared = len(known) if turns[: len(known)] == known else 0
        new = turns[shared:]
        if shared and new and new[0].role == "assistant":
            new = new[1:]
        return tuple(_describe(turn) for turn in new)


def _describe(turn: Turn) -> str:
    if turn.role == "tool":
        return f"tool {turn.name} ({turn.call_id}): {turn.text}"
    calls = "".join(f"\n[calls {call.name}: {call.arguments}]" for call in turn.calls)
    return f"{turn.role}: {turn.text}{calls}"


def _cleaned(reply: Reply) -> Reply:
    """The reply as the transcript will hold it, so that a continued run goes on from the same."""
    return replace(
        reply,
        text=clean(reply.text),
        calls=tuple(
            call.model_copy(update={"name": clean(call.name), "arguments": clean(call.arguments)})
            for call in reply.calls
        ),
    )


def _no_cost(reply: Reply | None) -> str:
    if reply is None:
        return "the request has no answer"
    return (reply.no_cost or "the provider does not tell it") if reply.cost_usd is None else ""


def _as_reply(exchange: Exchange) -> Reply:
    return Reply(
        text=exchange.answer or "",
        calls=exchange.tools,
        input_tokens=exchange.input_tokens,
        output_tokens=exchange.output_tokens,
        cost_usd=exchange.cost_usd,
        no_cost=exchange.no_cost,
    )


def _known_cost(exchanges: Iterable[Exchange]) -> float:
    return sum(each.cost_usd for each in exchanges if each.cost_usd is not None)


def _total(exchanges: list[Exchange]) -> LlmUsage:
    """The sums; the cost is that of all answers, and None when it isn't known of one of them."""
    paid = [each for each in exchanges if is_answered(each) or each.answer is not None]
    unknown = sorted({each.no_cost for each in paid if each.cost_usd is None})
    failed = sum(each.attempts for each in exchanges) - len(paid)
    no_cost = "; ".join(unknown)
    if not paid and exchanges:
        no_cost = "no request was answered"
    elif failed and not unknown:
        no_cost = f"without {failed} requests that were not answered" if failed > 1 else (
            "without 1 request that was not answered"
        )  # fmt: skip
    return LlmUsage(
        requests=sum(each.attempts for each in exchanges),
        answered=len(paid),
        input_tokens=sum(each.input_tokens or 0 for each in exchanges),
        output_tokens=sum(each.output_tokens or 0 for each in exchanges),
        cost_usd=_known_cost(paid) if paid and not unknown else None,
        no_cost=no_cost,
        seconds=sum(each.seconds for each in exchanges),
    )
