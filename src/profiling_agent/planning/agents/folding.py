"""Repeated blocks folded into one row: names that differ in a number alone share a pattern."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import regex

from profiling_agent.records.plan import MAX_PATTERN_LENGTH

NUMBER = regex.compile(r"\d+")
_CHARACTER = regex.compile(r"\\?.", regex.DOTALL)
MAX_NAME = 120
"""Characters of a name that are shown; names come from outside."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Names that one pattern matches in full, and no other name.

    ``labels`` tell the names apart, in the same order: the numbers that vary, joined by dots.
    """

    pattern: str
    names: tuple[str, ...]
    labels: tuple[str, ...]


def fold(names: Sequence[str], alike: Callable[[str], Hashable]) -> list[Fold]:
    """All names, each in one fold with those that read the same but for numbers and are alike."""
    families: dict[Hashable, list[str]] = {}
    for name in names:
        families.setdefault((tuple(NUMBER.split(name)), alike(name)), []).append(name)
    return [each for family in families.values() for each in _folds(family, names)]


def _folds(family: list[str], names: Sequence[str]) -> list[Fold]:
    """One fold of the family, or several where no short pattern selects just these names."""
    numbers = [NUMBER.findall(name) for name in family]
    values = {place: {each[place] for each in numbers} for place in range(len(numbers[0]))}
    varying = [place for place, known in values.items() if len(known) > 1]
    if not varying:
        return [Fold(pattern=_escaped(name), names=(name,), labels=("",)) for name in family]
    for pattern in (
        _pattern(family[0], dict.fromkeys(varying, r"\d+")),
        _pattern(family[0], {place: _either(values[place]) for place in varying}),
    ):
        if len(pattern) <= MAX_PATTERN_LENGTH and _selected(pattern, names) == set(family):
            labels = tuple(".".join(each[place] for place in varying) for each in numbers)
            return [Fold(pattern=pattern, names=tuple(family), labels=labels)]
    place = min(varying, key=lambda place: len(values[place]))
    known = sorted(values[place], key=_by_value)
    parts = [[value] for value in known] if len(varying) > 1 else [
        known[: len(known) // 2], known[len(known) // 2 :]
    ]  # fmt: skip
    return [
        each
        for part in parts
        for each in _folds(
            [n for n, own in zip(family, numbers, strict=True) if own[place] in part], names
        )
    ]


def _pattern(name: str, numbers: dict[int, str]) -> str:
    """The name as a pattern, with the numbers at the given places replaced."""
    parts: list[str] = []
    end = 0
    for place, found in enumerate(NUMBER.finditer(name)):
        parts.append(_escaped(name[end : found.start()]))
        parts.append(numbers.get(place, found.group()))
        end = found.end()
    return "".join(parts) + _escaped(name[end:])


def _escaped(text: str) -> str:
    return printable(regex.escape(text, special_only=True))


def printable(pattern: str) -> str:
    """The same pattern on one line: characters that can't be printed are given by their numbers."""
    return _CHARACTER.sub(lambda found: _numbered(found.group()), pattern)


def _numbered(character: str) -> str:
    """One character of a pattern, which may have a backslash before it."""
    last = character[-1]
    return character if last.isprintable() else f"\\U{ord(last):08x}"


def _either(numbers: set[str]) -> str:
    return f"({'|'.join(sorted(numbers, key=_by_value))})"


def _by_value(number: str) -> tuple[int, str]:
    """The order of whole numbers, without ``int``, which refuses thousands of digits."""
    return len(number.lstrip("0")), number.lstrip("0") + number


def _selected(pattern: str, names: Sequence[str]) -> set[str]:
    compiled = regex.compile(pattern)
    return {name for name in names if compiled.fullmatch(name)}


def shown(text: str, limit: int = MAX_NAME) -> str:
    """Text from outside on one line: without control characters, and not endless."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
