"""Rows of text files: comma or tab separated values, and JSON a line.

Whether the first line is a header is told from its content: many tab separated data sets have none.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.acquisition.data import LABEL_KEYS, UnreadableSample
from profiling_agent.acquisition.formats.columns import (
    IDENTIFIERS,
    MORE_LABEL_NAMES,
    PAIRS,
    PATH_NAMES,
    TEXT_NAMES,
    Column,
    Kind,
)
from profiling_agent.errors import DataError

HEADER_NAMES = {
    *LABEL_KEYS,
    *MORE_LABEL_NAMES,
    *TEXT_NAMES,
    *PATH_NAMES,
    *IDENTIFIERS,
    *(name for pair in PAIRS for name in pair),
} - {""}
MAX_CLASSES_WITHOUT_HEADER = 1000


class TextRows:
    """Rows held in memory, by column; missing values are None."""

    def __init__(self, values: dict[str, list[Any]]) -> None:
        self._values = values
        self.columns = tuple(
            Column(name=name, kind=_kind(column)) for name, column in values.items()
        )
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self._values.values())))

    def get(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        return {name: _value(self._values[name][index], index, name) for name in names}

    def column(self, name: str) -> list[Any]:
        return self._values[name]

    def example(self, name: str) -> Any:
        return next((each for each in self._values[name] if each is not None), None)


def read_text(paths: Sequence[Path]) -> TextRows:
    """One table from files of one format; ``DataError`` names the line that doesn't fit."""
    read: Callable[[Path], dict[str, list[Any]]]
    read = _read_json if paths[0].suffix.lower() in (".jsonl", ".ndjson") else _read_separated
    tables = [read(path) for path in paths]
    for table, path in zip(tables, paths, strict=True):
        if list(table) != list(tables[0]):
            raise DataError(
                f"{str(path)!r} has other columns than {str(paths[0])!r} ({', '.join(table)} and "
                f"{', '.join(tables[0])}); pass files of one table."
            )
    return TextRows({name: [v for table in tables for v in table[name]] for name in tables[0]})


def _read_json(path: Path) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"Line {number} of {str(path)!r} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise DataError(f"Line {number} of {str(path)!r} is no JSON object.")
        rows.append(row)
    _refuse_empty(rows, path)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_separated(path: Path) -> dict[str, list[Any]]:
    is_tab = path.suffix.lower() == ".tsv"
    text = _text(path)
    # Tab separated text has its quotes as they are, unless lines only fit when they are unquoted.
    rows = _split(text, is_tab, quoted=not is_tab, path=path)
    if is_tab and len({len(row) for _, row in rows}) > 1:
        rows = _split(text, is_tab, quoted=True, path=path)
    _refuse_empty(rows, path)
    width = len(rows[0][1])
    for line, row in rows:
        if len(row) != width:
            raise DataError(
                f"Line {line} of {str(path)!r} has {len(row)} values and the first has {width}."
            )
    cells = [row for _, row in rows]
    names = cells.pop(0) if _has_header(cells, path) else _names(cells, path)
    _refuse_empty(cells, path)
    return {name: [row[place] or None for row in cells] for place, name in enumerate(names)}


def _split(text: str, is_tab: bool, quoted: bool, path: Path) -> list[tuple[int, list[str]]]:
    reader = csv.reader(
        io.StringIO(text, newline="") if quoted else text.replace("\r\n", "\n").split("\n"),
        delimiter="\t" if is_tab else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=quoted,
    )
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if row:
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise DataError(
            f"Line {reader.line_num} of {str(path)!r} can't be read ({error})."
        ) from None
    return rows


def _has_header(rows: Sequence[Sequence[str]], path: Path) -> bool:
    """Known names, or a word above a column of numbers; in .csv files any words that differ."""
    first, rest = rows[0], rows[1:101]
    if any(_is_number(cell) for cell in first) or len(set(first)) != len(first):
        return False
    if path.suffix.lower() == ".csv" or any(cell.strip().lower() in HEADER_NAMES for cell in first):
        return True
    columns = zip(*rest, strict=True)
    return any(all(_is_number(cell) for cell in column) for column in columns)


def _names(rows: Sequence[Sequence[str]], path: Path) -> list[str]:
    """Without a header: the one column of few different values is the label, the rest text."""
    width = len(rows[0])
    columns = list(zip(*rows, strict=True))
    numbers = [i for i, column in enumerate(columns) if all(_is_number(cell) for cell in column)]
    if width == 1:
        return ["text"]
    if not numbers and len(set(columns[-1])) <= min(MAX_CLASSES_WITHOUT_HEADER, len(rows) // 2):
        numbers = [width - 1]
    if len(numbers) != 1 or width > 3:
        raise DataError(
            f"{str(path)!r} has {width} columns and no header that is understood; begin with a "
            "line of names such as text and label."
        )
    texts = iter(["text"] if width == 2 else ["sentence1", "sentence2"])
    return ["label" if place in numbers else next(texts) for place in range(width)]


def _kind(values: Sequence[Any]) -> Kind:
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, list) for value in present):
        return "list" if all(_is_numeric(value) for value in present[:16]) else "other"
    if present and all(isinstance(value, int) for value in present):
        return "integer"
    if present and all(isinstance(value, int | float) for value in present):
        return "float"
    if not all(isinstance(value, str) for value in present):
        return "other"
    if present and all(_is_integer(value) for value in present):
        return "integer"
    return "float" if present and all(_is_number(value) for value in present) else "text"


def _value(value: Any, index: int, name: str) -> Any:
    """Lists of numbers become arrays; ``UnreadableSample`` when their lengths differ."""
    if not isinstance(value, list) or not _is_numeric(value):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise UnreadableSample(f"Row {index} has lists of different lengths in {name!r}.") from None


def _is_numeric(value: Any) -> bool:
    """A number, or lists of them at any depth; the first of each list is looked at."""
    while isinstance(value, list):
        if not value:
            return True
        value = value[0]
    return isinstance(value, int | float)


def _is_integer(cell: str) -> bool:
    return cell.strip().lstrip("+-").isdecimal()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refuse_empty(rows: Sequence[Any], path: Path) -> None:
    if not rows:
        raise DataError(f"{str(path)!r} has no rows; check what wrote it.")


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{str(path)!r} can't be read ({error}); it must be text in UTF-8."
        ) from None
