"""What a plan's patterns select. Patterns come from outside: full match, and with a timeout."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache

import regex

from profiling_agent.errors import PlanError
from profiling_agent.records.plan import MAX_PATTERN_LENGTH, Plan, PruningLine

TIMEOUT_S = 0.2
"""Of one pattern, for all names together."""
MAX_REPEAT = 200
"""Of all counts of a pattern multiplied: ``regex`` writes a counted repeat out when it compiles,
and three nested thousands take gigabytes before there is anything to time."""
_ESCAPE = regex.compile(r"\\.", regex.DOTALL)
_COUNT = regex.compile(r"\{([^,}]*)")
_COSTLY = regex.compile(r"\(\?(?:R|[+-]?[0-9]|&|P>|[A-Za-z0-9-]*x)")
"""Recursion, which fills the memory while it is timed, and the flag ``x``, which hides counts."""


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that the pattern matches in full.

    Raises ``PlanError`` for a pattern that is not a regular expression, is longer than 200
    characters, repeats more than 200 times by count, recurs or takes too long.
    """
    return list(_matches(pattern, tuple(names)))


def exactly(name: str) -> str:
    """The pattern of one name; of one too long for a pattern its ends, with anything between.

    >>> exactly("mlp:blocks.0.fc1")
    'mlp:blocks\\.0\\.fc1'
    """
    whole = regex.escape(name, special_only=True)
    if len(whole) <= MAX_PATTERN_LENGTH:
        return whole
    size = (MAX_PATTERN_LENGTH - 2) // 4  # an escaped character takes two places
    head, tail = (regex.escape(part, special_only=True) for part in (name[:size], name[-size:]))
    return f"{head}.*{tail}"


@lru_cache(maxsize=4096)
def _matches(pattern: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Remembered, since a plan is looked at many times and a pattern may just be in time."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise PlanError(
            f"A pattern has {len(pattern)} characters; at most {MAX_PATTERN_LENGTH} are allowed. "
            "Split it into several lines."
        )
    bare = _ESCAPE.sub("", pattern)
    if _COSTLY.search(bare) or _repeats(bare) > MAX_REPEAT:
        raise PlanError(
            f"The pattern {pattern!r} takes too long to match. Write it without recursion, the "
            f"flag x and counts that multiply to more than {MAX_REPEAT}."
        )
    try:
        return _selected(pattern, names)
    except TimeoutError:
        raise PlanError(
            f"The pattern {pattern!r} takes too long to match. Write it without nested repeats."
        ) from None
    except (regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise PlanError(
            f"The pattern {pattern!r} is not a regular expression: {error}. "
            "Escape the dots of a layer's name as \\. and close every bracket."
        ) from None


def _selected(pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    """``TimeoutError`` when all names together take too long."""
    compiled = regex.compile(pattern, cache_pattern=False)
    ends = time.monotonic() + TIMEOUT_S
    selected: list[str] = []
    for name in names:
        left = ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if compiled.fullmatch(name, timeout=left):
            selected.append(name)
    return tuple(selected)


def _repeats(pattern: str) -> int:
    """The least counts of all repeats multiplied, as if each were inside the next."""
    product = 1
    for found in _COUNT.findall(pattern):
        digits = "".join(c for c in found if c in "0123456789")
        product *= max(1, int(digits or 0))
    return product


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
