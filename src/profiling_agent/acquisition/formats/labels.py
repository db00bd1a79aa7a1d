"""The label column of a table as class numbers of the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiling_agent.acquisition.formats.classes import ClassList, index_of, match_classes
from profiling_agent.acquisition.formats.columns import Column, Rows
from profiling_agent.errors import DataError

HIDDEN = (-1, "-1")
"""What data sets write where the label is kept secret."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels by part, None for a part without any; one is an int, a float (a target), or None.

    ``deferred`` names the column of labels that are no numbers or names, such as lists of boxes;
    they are read with their row.
    """

    values: Mapping[str, Sequence[Any] | None]
    class_names: tuple[str, ...]
    deferred: str | None = None
    notes: tuple[str, ...] = ()


def read_labels(
    parts: Mapping[str, tuple[Rows, Column | None]],
    known: ClassList,
    hidden: Collection[Any] = HIDDEN,
) -> Labels:
    """Numbers for the labels of all parts, by one rule; ``DataError`` when there is none.

    Values in ``hidden`` stand for no label.
    """
    columns = [column for _, column in parts.values() if column is not None]
    if not columns:
        return Labels(values=dict.fromkeys(parts), class_names=known.names)
    if any(column.kind not in ("integer", "float", "text") for column in columns):
        name = columns[0].name
        return Labels(values=dict.fromkeys(parts), class_names=known.names, deferred=name)
    raw = {part: _raw(rows, column) for part, (rows, column) in parts.items()}
    raw = {part: _shown(found, hidden) for part, found in raw.items()}
    mapping, class_names, notes = _mapping(columns[0], raw.values(), known)
    values = {part: _mapped(found, mapping) for part, found in raw.items()}
    return Labels(values=values, class_names=class_names, notes=notes)


def _raw(rows: Rows, column: Column | None) -> list[Any] | None:
    if column is None:
        return None
    return [_plain(value, column) for value in rows.column(column.name)]


def _mapping(
    column: Column, parts: Iterable[Sequence[Any] | None], known: ClassList
) -> tuple[dict[Any, int], tuple[str, ...], tuple[str, ...]]:
    """From the column's values to class numbers (empty: as they are), class names, and notes."""
    if column.class_names:
        return _from_stated(column.class_names, known)
    words = {v for part in parts if part is not None for v in part if isinstance(v, str)}
    if not words:
        return {}, known.names, ()
    index, how = index_of(sorted(words), known)
    if known.names:
        return index, known.names, (how,)
    by_number = {number: word for word, number in index.items()}
    names = tuple(by_number.get(number, str(number)) for number in range(max(by_number) + 1))
    return index, names, (how,)


def _from_stated(
    names: tuple[str, ...], known: ClassList
) -> tuple[dict[Any, int], tuple[str, ...], tuple[str, ...]]:
    """The file's own classes, put in the model's order where both name them."""
    matched = match_classes(names, known)
    if matched is not None:
        index, how = matched
        mapping = {number: index[name] for number, name in enumerate(names)}
        is_moved = any(number != index for number, index in mapping.items())
        words = f"{how}; the data number them differently from the model" if is_moved else how
        return mapping, known.names or names, (words,)
    if known.count is not None and known.count != len(names):
        raise DataError(
            f"The label has {len(names):,} classes ({', '.join(names[:3])}, ...) but the model has "
            f"{known.count:,}, and their names don't match; pass --classes FILE with the model's "
            "classes, one a line, by the names the data use."
        )
    return {}, names, ()


def _mapped(values: Sequence[Any] | None, mapping: dict[Any, int]) -> list[Any] | None:
    if values is None:
        return None
    found = [None if value is None else mapping.get(value, value) for value in values]
    return found if any(value is not None for value in found) else None


def _shown(values: Sequence[Any] | None, hidden: Collection[Any]) -> list[Any] | None:
    return None if values is None else [None if value in hidden else value for value in values]


def _plain(value: Any, column: Column) -> Any:
    """A number, or a name where the column holds text; None where there is no label."""
    if column.kind == "text":
        return value.strip() or None if isinstance(value, str) else None
    number = None if value is None else float(value)
    if number is None or math.isnan(number):
        return None
    return int(number) if number.is_integer() else number
