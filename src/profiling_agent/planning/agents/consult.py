"""A question to a language model until its answer is a plan; reasons go back, up to a limit.

The paper's analysis agent asks before the first trial, the iterative one after it; both are the
same question with other instructions, since all that was learned stands in the digest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from profiling_agent.errors import BudgetError, PlanError
from profiling_agent.llm.conversation import Conversation, Reply, Turn
from profiling_agent.planning.agents.answer import (
    ANYTHING,
    Limits,
    Parsed,
    answer_schema,
    read_answer,
    tried_plans,
)
from profiling_agent.planning.agents.digest import digest
from profiling_agent.planning.agents.tools import Tools
from profiling_agent.planning.effects import nothing_new
from profiling_agent.records.common import Budget
from profiling_agent.records.llm import ToolUse
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

MAX_ANSWERS = 4
"""Answers to one question, the first included, before it is given up."""
MAX_TOOL_USES = 8
"""Tools called for one question; after that the model is told to answer."""
MAX_CALLS = 4
"""Tools called at once."""
MAX_ECHO = 4000
"""Characters of a rejected answer that are sent back as its own words."""
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
PROMPTS = Path(__file__).parent / "prompts"

Ask = Callable[[Conversation], Reply]


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that is asked; the same fields make the same conversation."""

    profile: Profile
    history: Sequence[Trial]
    budget: Budget
    seed: int
    wording: str = "default"
    limits: Limits = ANYTHING
    use_tools: bool = True
    with_solver_tool: bool = True
    max_answers: int = MAX_ANSWERS

    @property
    def agent(self) -> str:
        return "iteration" if any(not trial.is_control for trial in self.history) else "analysis"

    def tools(self) -> Tools:
        return Tools(
            profile=self.profile,
            history=self.history,
            budget=self.budget,
            seed=self.seed,
            limits=self.limits,
            with_solver=self.with_solver_tool,
        )

    def conversation(self) -> Conversation:
        return Conversation(
            agent=self.agent,
            instructions=instructions(self.agent, self.wording),
            turns=(Turn(role="user", text=digest(self.profile, self.history, self.budget)),),
            schema=answer_schema(self.profile, self.limits),
            tools=self.tools().offers() if self.use_tools else (),
        )


def consult(ask: Ask, question: Question, rejected: list[str]) -> Parsed:
    """Ask until an answer passes or ``max_answers`` did not, which the last one's reason then says.

    A model that gives the answer again that was just refused is not asked a third time: small ones
    do so for ever. The reason for each answer that did not pass goes into ``rejected``. Raises what
    ``ask`` raises.
    """
    conversation, tools = question.conversation(), question.tools()
    tried = tried_plans(question.history)
    uses = 0
    refused: Reply | None = None
    while True:
        reply = ask(conversation)
        if reply.calls and uses < MAX_TOOL_USES:
            uses += len(reply.calls)
            conversation = conversation.extended(*_called(reply, tools))
            continue
        parsed = read_answer(
            reply.text,
            question.profile,
            seed=question.seed,
            tried=tried,
            limits=question.limits,
        )
        if parsed.plan is not None:
            reason = _nothing_new(parsed.plan, question)
            parsed = Parsed(reason=reason) if reason else parsed
        if not parsed.reason:
            return parsed
        rejected.append(parsed.reason)
        if len(rejected) >= question.max_answers or _repeats(reply, refused):
            return parsed
        refused = reply
        conversation = conversation.extended(
            *_unanswered(reply),
            Turn(role="user", text=f"{parsed.reason} Answer again, with the whole object."),
        )


def _nothing_new(plan: Plan, question: Question) -> str | None:
    try:
        return nothing_new(plan, question.profile, question.history)
    except PlanError as error:  # a pattern that was just in time before
        return str(error)


def _repeats(reply: Reply, before: Reply | None) -> bool:
    if before is None or reply.text != before.text:
        return False
    one, other = ([(c.name, c.arguments) for c in each.calls] for each in (reply, before))
    return one == other


def _called(reply: Reply, tools: Tools) -> list[Turn]:
    turns = [Turn(role="assistant", text=reply.text[:MAX_ECHO], calls=_brief(reply.calls))]
    for number, call in enumerate(reply.calls):
        text = "Too many calls at once." if number >= MAX_CALLS else tools.use(
            call.name, call.arguments
        )  # fmt: skip
        turns.append(Turn(role="tool", text=text, call_id=call.call_id, name=_sendable(call)))
    return turns


def _brief(calls: Sequence[ToolUse]) -> tuple[ToolUse, ...]:
    """The calls as they are sent back; endless arguments and impossible names are not."""
    return tuple(
        call.model_copy(
            update={
                "name": _sendable(call),
                "arguments": call.arguments if len(call.arguments) <= MAX_ECHO else "{}",
            }
        )
        for call in calls
    )


def _sendable(call: ToolUse) -> str:
    """A name that services take back: they refuse requests with any other."""
    return call.name if _TOOL_NAME.fullmatch(call.name) else "unknown"


def _unanswered(reply: Reply) -> list[Turn]:
    """The rejected answer as the assistant's turn, its calls told that there are no more tools."""
    turns = [Turn(role="assistant", text=reply.text[:MAX_ECHO] or "…", calls=_brief(reply.calls))]
    for call in reply.calls:
        text = "No more tools; answer now."
        turns.append(Turn(role="tool", text=text, call_id=call.call_id, name=_sendable(call)))
    return turns


@cache
def instructions(agent: str, wording: str) -> str:
    """The text of a prompt file; ``BudgetError`` names the wordings there are."""
    path = PROMPTS / f"{agent}.{wording}.md"
    if not path.is_file():
        known = sorted(p.name.split(".")[1] for p in PROMPTS.glob(f"{agent}.*.md"))
        raise BudgetError(f"There is no prompt {wording!r}; choose one of {', '.join(known)}.")
    return path.read_text(encoding="utf-8").strip()
