"""Which columns of a table are the model's input and which is the label.

Data sets name their columns by habit. The habits are written down here, the choice is said in the
notes, and a table that follows none is refused with its columns named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from profiling_agent.acquisition.data import LABEL_KEYS
from profiling_agent.acquisition.formats.folder import IMAGE_SUFFIXES
from profiling_agent.errors import DataError

Form = Literal["image", "path", "text", "arrays"]
Kind = Literal["text", "integer", "float", "list", "binary", "image", "other"]

MORE_LABEL_NAMES = ("fine_label", "class", "category", "class_id", "label_id", "sentiment")
TEXT_NAMES = ("text", "sentence", "content", "review", "comment", "document", "tweet", "question")
PAIRS = (
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "passage"),
    ("question", "context"),
)
PATH_NAMES = (
    "image", "img", "image_path", "img_path", "path", "file", "file_name", "filename", "file_path",
    "filepath",
)  # fmt: skip
IDENTIFIERS = ("id", "idx", "index", "guid", "uid", "__index_level_0__", "unnamed: 0", "")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column as its file declares it; ``class_names`` when the file names the label's classes.

    ``list`` are numbers in lists of any depth, ``image`` a struct of bytes and path.
    """

    name: str
    kind: Kind
    class_names: tuple[str, ...] = ()


class Rows(Protocol):
    """A table that is read row by row; safe for threads."""

    columns: tuple[Column, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def get(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        """Values of one row: str, int, float, bytes, None, arrays for lists, dicts for images."""
        ...

    def column(self, name: str) -> list[Any]:
        """All values of one column."""
        ...

    def example(self, name: str) -> Any:
        """One of the first values of a column that is there, else None; reads little."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``form`` says what the input columns hold: an image, a path to one, texts, or arrays."""

    form: Form
    inputs: tuple[str, ...]
    label: Column | None
    notes: tuple[str, ...]


def choose_columns(rows: Rows, table: str, num_classes: int | None) -> Choice:
    """Input and label columns; ``num_classes`` decides between two columns of classes.

    Raises ``DataError`` that names the columns when no habit fits; ``table`` is what it calls it.
    """
    label = _label(rows.columns, num_classes)
    others = [each for each in rows.columns if each is not label]
    candidates: tuple[tuple[Form, list[str]], ...] = (
        ("arrays", _token_lists(others)),
        ("image", _image(others)),
        ("path", _path(others, rows)),
        ("text", _texts(others)),
        ("arrays", [each.name for each in others if each.kind == "list"]),
    )
    for form, inputs in candidates:
        if inputs:
            notes = _notes(others, inputs, label)
            return Choice(form=form, inputs=tuple(inputs), label=label, notes=notes)
    names = ", ".join(f"{each.name!r} ({each.kind})" for each in rows.columns)
    raise DataError(
        f"None of the columns of {table!r} is known to be the model's input ({names}); name one "
        "'text', 'image' or 'image_path', or give a factory as 'path/file.py:function'."
    )


def _label(columns: Sequence[Column], num_classes: int | None) -> Column | None:
    by_name = {each.name.lower(): each for each in reversed(columns)}
    for name in LABEL_KEYS:
        if name in by_name:
            return by_name[name]
    found = [by_name[name] for name in MORE_LABEL_NAMES if name in by_name]
    found += [each for each in columns if each.class_names and each not in found]
    fitting = [each for each in found if num_classes and len(each.class_names) == num_classes]
    return next(iter([*fitting, *found]), None)


def _token_lists(columns: Sequence[Column]) -> list[str]:
    lists = [each.name for each in columns if each.kind == "list"]
    return lists if "input_ids" in lists else []


def _image(columns: Sequence[Column]) -> list[str]:
    found = [each.name for each in columns if each.kind == "image"]
    found = found or [each.name for each in columns if each.kind == "binary"]
    known = [name for name in found if name.lower() in PATH_NAMES]
    return (known or found)[:1]


def _path(columns: Sequence[Column], rows: Rows) -> list[str]:
    for column in columns:
        if column.kind == "text" and column.name.lower() in PATH_NAMES:
            example = rows.example(column.name)
            if isinstance(example, str) and example.lower().endswith(IMAGE_SUFFIXES):
                return [column.name]
    return []


def _texts(columns: Sequence[Column]) -> list[str]:
    texts = {each.name.lower(): each.name for each in columns if each.kind == "text"}
    for first, second in PAIRS:
        if first in texts and second in texts:
            return [texts[first], texts[second]]
    for name in TEXT_NAMES:
        if name in texts:
            return [texts[name]]
    left = [name for key, name in texts.items() if key not in IDENTIFIERS]
    return left if len(left) == 1 else []


def _notes(
    others: Sequence[Column], inputs: Sequence[str], label: Column | None
) -> tuple[str, ...]:
    read = " and ".join(repr(name) for name in inputs)
    notes = [f"input column {read}, " + (f"label {label.name!r}" if label else "no label column")]
    left = [each.name for each in others if each.name not in inputs]
    left = [name for name in left if name.lower() not in IDENTIFIERS]
    if left:
        notes.append(f"columns left out: {', '.join(left)}")
    return tuple(notes)
