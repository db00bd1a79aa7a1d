"""Which number a class has, from its folder's or its label's name.

A folder of validation images often has some of a model's classes only. Ranks among the folders
would then be wrong in silence, and the accuracy with them: names are matched with what the model or
a classes file says, and where that can't be done the numbers are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiling_agent.errors import DataError

WORDNET_ID = re.compile(r"n\d{8}(?!\w)")
NUMBERED = re.compile(r"(\d+)[\s:,]+(\S.*)")
MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """A model's classes by index: what people call them, and ids such as WordNet's.

    ``names`` and ``ids`` may be empty, and ``num_classes`` None when nothing says how many. A name
    may hold synonyms after commas.

    >>> ClassList(names=("tench, Tinca tinca", "goldfish"), ids=(), num_classes=2)
    """

    names: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    num_classes: int | None = None

    @property
    def count(self) -> int | None:
        """How many classes there are, from whatever says so."""
        return self.num_classes or len(self.names) or len(self.ids) or None


def read_classes(path: Path) -> ClassList:
    """One class a line, by index: ``n01440764 tench, Tinca tinca``, an id alone, or a name.

    Lines that begin with their own number (``0 tench``) are put in its order. Raises ``DataError``
    for files that can't be read, are empty, have an empty line inside, or repeat an id.
    """
    lines = [line.strip() for line in _text(path).rstrip().splitlines()]
    if not lines:
        raise DataError(f"The classes file {str(path)!r} is empty; write one class a line.")
    if "" in lines:
        raise DataError(
            f"Line {lines.index('') + 1} of the classes file {str(path)!r} is empty; write one "
            "class a line, in the order of the model's outputs."
        )
    lines = _numbered(lines)
    if not all(WORDNET_ID.match(line) for line in lines):
        return ClassList(names=tuple(lines), num_classes=len(lines))
    parts = [(line[:9], line[9:].strip(" \t:,")) for line in lines]
    ids = tuple(wnid for wnid, _ in parts)
    if len(set(ids)) != len(ids):
        twice = next(wnid for wnid in ids if ids.count(wnid) > 1)
        raise DataError(f"The classes file {str(path)!r} has {twice!r} twice; ids must be unique.")
    names = tuple(name or wnid for wnid, name in parts)
    return ClassList(names=names, ids=ids, num_classes=len(lines))


def index_of(labels: Sequence[str], known: ClassList | None) -> tuple[dict[str, int], str]:
    """The class of each label, and in words how it was found.

    In this order: ids, names (any case, ``_`` for a space, any synonym), whole numbers as the
    index, the rank when there are as many labels as classes or nobody knows how many there are.
    Raises ``DataError`` when none applies, or a name stands for several classes.
    """
    known = known or ClassList()
    matched = match_classes(labels, known)
    if matched is not None:
        return matched
    count = known.count
    numbers = {label: int(label) for label in labels if label.isdecimal()}
    if len(numbers) == len(set(labels)):
        if count is None or max(numbers.values(), default=0) < count:
            return numbers, _number_words(numbers)
        if len(numbers) == count and len(set(numbers.values())) == count:
            ranked = sorted(numbers, key=lambda label: numbers[label])
            return _ranks(ranked), (
                f"classes are numbered from {ranked[0]} to {ranked[-1]}; they were counted from 0"
            )
    ordered = sorted(set(labels))
    if count is None or len(ordered) == count:
        return _ranks(ordered), f"classes are numbered by rank, {ordered[0]!r} is 0"
    raise DataError(_mismatch(ordered, count))


def match_classes(labels: Iterable[str], known: ClassList) -> tuple[dict[str, int], str] | None:
    """As ``index_of`` by ids or names alone; None when hardly any of the labels is known.

    Raises ``DataError`` when more than half are, and some are not.
    """
    wanted = sorted(set(labels))
    by_id = {wnid: index for index, wnid in enumerate(known.ids)}
    best: dict[str, int] = {label: by_id[label] for label in wanted if label in by_id}
    how = "classes are known by their ids"
    if len(best) < len(wanted) and known.names:
        named = _by_name(wanted, known.names)
        if len(named) > len(best):
            best, how = named, "classes are known by their names"
    if len(best) == len(wanted):
        return best, how
    if 2 * len(best) <= len(wanted):
        return None
    missing = [label for label in wanted if label not in best]
    raise DataError(
        f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} none of the model's classes, the "
        f"other {len(best)} are; remove or rename, or pass --classes FILE with the model's classes."
    )


def _by_name(labels: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Whole names come before first synonyms, and those before others."""
    tables: tuple[dict[str, list[int]], ...] = ({}, {}, {})
    for index, name in enumerate(names):
        synonyms = [_normal(part) for part in name.split(",")]
        for table, keys in zip(tables, ([_normal(name)], synonyms[:1], synonyms), strict=True):
            for key in keys:
                table.setdefault(key, []).append(index)
    found: dict[str, int] = {}
    for label in labels:
        key = _normal(label)
        indices = next((table[key] for table in tables if key in table), None)
        if indices is None:
            continue
        if len(set(indices)) > 1:
            raise DataError(
                f"The class name {label!r} stands for {len(indices)} classes of the model "
                f"({', '.join(map(str, indices))}); name classes by id, or by index."
            )
        found[label] = indices[0]
    return found


def _normal(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _number_words(numbers: dict[str, int]) -> str:
    words = "classes are named by numbers, taken as the index"
    by_number = sorted(numbers, key=lambda label: numbers[label])
    if sorted(numbers) != by_number:
        first = next(a for a, b in zip(sorted(numbers), by_number, strict=True) if a != b)
        words += (
            f"; a model trained on torchvision's ImageFolder counted them as words ({first!r} "
            f"before {by_number[sorted(numbers).index(first)]!r}), then pass --classes FILE"
        )
    elif numbers and min(numbers.values()) == 1:
        words += "; there is no 0, so they may be one too high"
    return words


def _ranks(labels: Sequence[str]) -> dict[str, int]:
    return {label: rank for rank, label in enumerate(labels)}


def _mismatch(labels: Sequence[str], count: int) -> str:
    have = f"{len(labels):,} {'class' if len(labels) == 1 else 'classes'} ({_some(labels)})"
    if len(labels) > count:
        return (
            f"The data have {have} but the model has {count:,}; pass data of the model's classes, "
            "or --classes FILE with one class a line."
        )
    return (
        f"The data have {have} but the model has {count:,}, and nothing says which is which; pass "
        "--classes FILE with the model's classes, one a line, by the names the data use."
    )


def _some(labels: Sequence[str]) -> str:
    words = ", ".join(repr(label) for label in labels[:MAX_NAMED])
    more = len(labels) - MAX_NAMED
    return words if more <= 0 else f"{words} and {more:,} more"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"The classes file {str(path)!r} doesn't exist; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The classes file {str(path)!r} can't be read ({error}); it must be text in UTF-8."
        ) from None


def _numbered(lines: list[str]) -> list[str]:
    """Without the numbers when every line begins with one of 0, 1, ..., each once."""
    found = [NUMBERED.fullmatch(line) for line in lines]
    pairs = [(int(match[1]), match[2]) for match in found if match is not None]
    if len(pairs) != len(lines) or sorted(n for n, _ in pairs) != list(range(len(lines))):
        return lines
    return [name for _, name in sorted(pairs)]
