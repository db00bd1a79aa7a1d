"""What a plan's patterns select. Patterns come from outside: full match, and with a timeout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import regex

from profiling_agent.errors import PlanError
from profiling_agent.records.plan import MAX_PATTERN_LENGTH, Plan, PruningLine

TIMEOUT_S = 0.2


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that the pattern matches in full.

    Raises ``PlanError`` for a pattern that is not a regular expression, is longer than 200
    characters or takes too long.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PlanError(
            f"A pattern has {len(pattern)} characters; at most {MAX_PATTERN_LENGTH} are allowed. "
            "Split it into several lines."
        )
    try:
        compiled = regex.compile(pattern)
        return [name for name in names if compiled.fullmatch(name, timeout=TIMEOUT_S)]
    except TimeoutError:
        raise PlanError(
            f"The pattern {pattern!r} takes too long to match. Write it without nested repeats."
        ) from None
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise PlanError(
            f"The pattern {pattern!r} is not a regular expression: {error}. "
            "Escape the dots of a layer's name as \\. and close every bracket."
        ) from None


def assign(plan: Plan, group_ids: Sequence[str]) -> dict[str, PruningLine]:
    """The pruning line of each selected group: the first that matches wins."""
    chosen: dict[str, PruningLine] = {}
    for line in plan.pruning:
        for group_id in matches(line.match, group_ids):
            chosen.setdefault(group_id, line)
    return chosen


def units_kept(width: int, ratio: float) -> int:
    """How many of ``width`` units stay: the removed number is rounded down, one always stays."""
    return max(1, width - math.floor(ratio * width + 1e-6))
