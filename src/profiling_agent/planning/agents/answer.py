"""What a language model may answer, and how its text becomes a plan or a reason.

Nothing in an answer is trusted: the text is parsed strictly, every field has a length, and all
patterns together must match within a second before anything else looks at them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from profiling_agent.errors import PlanError
from profiling_agent.planning.check import MAX_RATIO, check_plan
from profiling_agent.planning.solver import repair_for
from profiling_agent.records.base import describe_faults
from profiling_agent.records.patterns import TIMEOUT_S, assign, matches
from profiling_agent.records.plan import (
    MAX_PATTERN_LENGTH,
    Importance,
    Plan,
    PruningLine,
    Quantization,
    Repair,
)
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

MAX_ANSWER = 100_000
"""Characters of an answer that are read at all."""
MAX_LINES = 100
MAX_SHOWN = 300
MAX_REASON = 1500
"""Characters of a reason; a longer one loses its middle."""
PATTERNS_S = 1.0
"""Seconds that all patterns of an answer may take together."""
PATTERN_SHARE = 0.5
"""Of the timeout of a pattern: it is matched again on other names, maybe when less is free."""
_FENCE = regex.compile(r"```(?:json)?[ \t]*\n(.*?)```", regex.DOTALL | regex.IGNORECASE)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AnswerLine(_Strict):
    match: str = Field(
        min_length=1,
        max_length=MAX_PATTERN_LENGTH,
        description="a pattern of the GROUPS table; matches whole names",
    )
    ratio: float = Field(ge=0.0, le=MAX_RATIO, description="share of the units to remove")
    why: str = Field(default="", max_length=2000)


class Answer(_Strict):
    """One proposal, or the word that there is none left worth a trial."""

    why: str = Field(default="", max_length=4000, description="the reasoning, in a few sentences")
    done: bool = Field(default=False, description="true: no further plan is worth a trial")
    runtime: str = Field(default="", max_length=40)
    scheme: str = Field(default="", max_length=40)
    prune: list[AnswerLine] = Field(default=[], max_length=MAX_LINES)
    keep_float: list[str] = Field(
        default=[], max_length=MAX_LINES, description="layers that int8 must leave alone"
    )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is not the model's to choose.

    ``pairs`` None: any runtime and scheme that the profile offers; ``repair`` None: the one that
    the solver takes for such groups.
    """

    pairs: tuple[tuple[str, str], ...] | None = None
    importance: Importance = "obs"
    repair: Repair | None = None


ANYTHING = Limits()


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A plan, or ``done``, or the reason why there is neither. ``changed``: what was mended."""

    plan: Plan | None = None
    done: bool = False
    reason: str = ""
    why: str = ""
    changed: tuple[str, ...] = ()


def answer_schema(profile: Profile, limits: Limits = ANYTHING) -> dict[str, Any]:
    """The JSON schema of an answer, with the runtimes and schemes of this profile as choices."""
    schema = Answer.model_json_schema()
    pairs = _pairs(profile, limits)
    for model in (schema, *schema["$defs"].values()):
        for each in model["properties"].values():
            del each["title"]  # the name again
    properties = schema["properties"]
    properties["runtime"]["enum"] = list(dict.fromkeys(runtime for runtime, _ in pairs))
    properties["scheme"]["enum"] = list(dict.fromkeys(scheme for _, scheme in pairs))
    for name in ("runtime", "scheme"):
        properties[name].pop("default", None)
    schema["required"] = ["why", "done", "runtime", "scheme", "prune", "keep_float"]
    return schema


def _pairs(profile: Profile, limits: Limits) -> list[tuple[str, str]]:
    offered = [(r.runtime, scheme) for r in profile.runtimes for scheme in r.schemes]
    if limits.pairs is None:
        return offered
    return [pair for pair in limits.pairs if pair in offered]


def read_answer(
    text: str,
    profile: Profile,
    *,
    seed: int,
    tried: Collection[str] = (),
    limits: Limits = ANYTHING,
) -> Parsed:
    """The plan in a model's text, checked against the profile; never raises."""
    if len(text) > MAX_ANSWER:
        return _refused(f"The answer has {len(text):,} characters; at most {MAX_ANSWER:,}.")
    value, changed = json_in(text)
    if value is None:
        return _refused(f"The answer is not JSON ({_excerpt(text)}). Answer with one object.")
    try:
        answer = Answer.model_validate(value)
    except ValidationError as error:
        return _refused(f"The answer does not fit the schema: {describe_faults(error)}.")
    except RecursionError:
        return _refused("The answer is nested too deeply.")
    if answer.done:
        return Parsed(done=True, why=_printable(answer.why), changed=changed)
    reason = _slow_patterns(answer, profile) or _outside(answer, profile, limits)
    if reason is not None:
        return _refused(reason)
    try:
        plan = _plan(answer, profile, seed, limits)
        reason = check_plan(plan, profile, tried)
    except ValidationError as error:
        return _refused(f"The answer does not make a plan: {describe_faults(error)}.")
    except PlanError as error:  # a pattern that was just in time before
        return _refused(str(error))
    if reason is not None:
        return _refused(reason)
    return Parsed(plan=plan, why=plan.why, changed=changed)


def _refused(reason: str) -> Parsed:
    """A reason on one line and not endless, whatever of the answer it quotes."""
    clean = _printable(reason)
    if len(clean) > MAX_REASON:
        clean = f"{clean[: MAX_REASON - 403]} … {clean[-400:]}"
    return Parsed(reason=clean)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()


def json_in(text: str) -> tuple[Any, tuple[str, ...]]:
    """The JSON value of the text; from a fence or between the outer braces when there is more."""
    value = _loaded(text.strip())
    if value is not None:
        return value, ()
    mended = ("took the JSON out of the words around it",)
    fenced = _FENCE.search(text) if text.count("```") >= 2 else None
    if fenced is not None and (value := _loaded(fenced.group(1))) is not None:
        return value, mended
    start, end = text.find("{"), text.rfind("}")
    if 0 <= start < end and (value := _loaded(text[start : end + 1])) is not None:
        return value, mended
    return None, ()


def _loaded(text: str) -> Any:
    try:
        value = from_json(text, allow_inf_nan=False)
    except (ValueError, TypeError, RecursionError):  # TypeError: half of a surrogate pair
        return None
    return value if isinstance(value, dict) else None  # pyright: ignore[reportUnknownVariableType]


def _excerpt(text: str) -> str:
    clean = _printable(text[:MAX_SHOWN])
    return f"it begins {clean[:60]!r}" if clean else "it is empty"


def _slow_patterns(answer: Answer, profile: Profile) -> str | None:
    """Why the patterns can't be used, when all of them together take too long or one is none."""
    ids = [group.id for group in profile.groups] + [entry.id for entry in profile.frozen]
    names = [module.name for module in profile.modules]
    ends = time.monotonic() + PATTERNS_S
    for pattern, among in [(line.match, ids) for line in answer.prune] + [
        (pattern, names) for pattern in answer.keep_float
    ]:
        if not pattern or len(pattern) > MAX_PATTERN_LENGTH:
            return f"A pattern has {len(pattern)} characters; give 1 to {MAX_PATTERN_LENGTH}."
        start = time.monotonic()
        try:
            matches(pattern, among)
        except PlanError as error:
            return str(error)
        slow = time.monotonic() - start > PATTERN_SHARE * TIMEOUT_S
        if slow or time.monotonic() > ends:
            return "The patterns take too long to match. Copy those of the GROUPS table."
    return None


def _outside(answer: Answer, profile: Profile, limits: Limits) -> str | None:
    pairs = _pairs(profile, limits)
    if (answer.runtime, answer.scheme) in pairs:
        return None
    among = [scheme for runtime, scheme in pairs if runtime == answer.runtime]
    if among:
        return (
            f"{answer.runtime} has no scheme {answer.scheme[:40]!r} here; choose one of "
            f"{', '.join(among)}."
        )
    offered = ", ".join(dict.fromkeys(runtime for runtime, _ in pairs))
    return f"There is no runtime {answer.runtime[:40]!r} here; choose one of {offered}."


def _plan(answer: Answer, profile: Profile, seed: int, limits: Limits) -> Plan:
    """Lines with the ratio 0 are kept beside others: they spare what a later line would cut."""
    lines = tuple(
        PruningLine(
            match=line.match,
            ratio=line.ratio,
            importance=limits.importance,
            why=_printable(line.why),
        )
        for line in answer.prune
    )
    if not any(line.ratio > 0.0 for line in lines):
        lines = ()
    plan = Plan(
        seed=seed,
        runtime=answer.runtime,  # pyright: ignore[reportArgumentType]
        pruning=lines,
        quantization=Quantization(scheme=answer.scheme, keep_float=tuple(answer.keep_float)),
        why=_printable(answer.why),
    )
    cut = [i for i, line in assign(plan, [g.id for g in profile.groups]).items() if line.ratio > 0]
    return plan.model_copy(update={"repair": limits.repair or repair_for(cut)})


def tried_plans(history: Sequence[Trial]) -> frozenset[str]:
    """Ids of the plans that were carried out."""
    return frozenset(trial.plan.plan_id for trial in history)
