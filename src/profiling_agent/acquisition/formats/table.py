"""Tables of samples: parquet, Hugging Face's saved data sets, csv, tsv, JSON lines.

Opening one reads names, types and the label column; everything else waits until a sample is asked
for.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiling_agent.acquisition.data import (
    PART_NAMES,
    UNNAMED,
    Bundle,
    Sample,
    Source,
    UnreadableSample,
)
from profiling_agent.acquisition.formats.arrow_rows import ArrowRows, ParquetRows
from profiling_agent.acquisition.formats.classes import ClassList
from profiling_agent.acquisition.formats.columns import Choice, Rows, choose_columns
from profiling_agent.acquisition.formats.folder import IMAGE_SUFFIXES
from profiling_agent.acquisition.formats.labels import HIDDEN, Labels, read_labels
from profiling_agent.acquisition.formats.text_rows import read_text
from profiling_agent.errors import DataError

BINARY_SUFFIXES = (".parquet", ".arrow")
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
SPLIT_NAMES = {**PART_NAMES, "training": "train", "dev": "search", "testing": "test"}
SAVED_FILES = ("dataset_dict.json", "state.json")
MAX_SEEN_FOLDERS = 64
MAX_SEEN_FILES = 1000


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One part's rows, and the folder that relative paths in them start from."""

    rows: Rows
    folder: Path


def is_table(path: Path) -> bool:
    """Whether a file or folder holds a table, by names alone.

    A folder of images with a ``.csv`` beside them is none.
    """
    if not path.is_dir():
        return path.suffix.lower() in (*BINARY_SUFFIXES, *TEXT_SUFFIXES)
    if any((path / name).is_file() for name in SAVED_FILES):
        return True
    names = _some_names(path)
    folders = [name for name in names if (path / name).is_dir()]
    below = [path / name for name in folders[:MAX_SEEN_FOLDERS]]
    seen = itertools.chain(names, *(_some_names(folder) for folder in below))
    if any(name.lower().endswith(BINARY_SUFFIXES) for name in seen):
        return True
    has_text = any(name.lower().endswith(TEXT_SUFFIXES) for name in names)
    return has_text and not folders and not any(n.lower().endswith(IMAGE_SUFFIXES) for n in names)


def open_table(path: Path, known: ClassList | None = None, *, has_classes: bool = True) -> Bundle:
    """Parts of a table: images as bytes or paths, texts and pairs of them, or named arrays.

    Label names become the numbers that ``known`` gives them; with ``has_classes`` a label of -1 is
    one that is kept secret, otherwise a number like others. Raises ``DataError`` for damaged
    files, columns and splits that can't be told; ``MissingDependency`` without pyarrow.
    """
    known = known or ClassList()
    notes: list[str] = []
    tables = {part: table for part, table in _tables(path, notes).items() if len(table.rows)}
    if not tables:
        raise DataError(f"The table {str(path)!r} has no rows; check what wrote it.")
    choices = {
        part: choose_columns(table.rows, str(path), known.count) for part, table in tables.items()
    }
    labels = read_labels(
        {part: (table.rows, choices[part].label) for part, table in tables.items()},
        known,
        HIDDEN if has_classes else (),
    )
    for choice in choices.values():
        notes += [note for note in choice.notes if note not in notes]
    for table in tables.values():
        notes += [note for note in table.rows.notes if note not in notes]
    parts = _labelled_only(labels, notes)
    return Bundle(
        parts={part: _source(tables[part], choices[part], labels, part) for part in parts},
        preprocessing={},
        class_names=labels.class_names,
        notes=(*notes, *labels.notes),
    )


def _labelled_only(labels: Labels, notes: list[str]) -> list[str]:
    """Without parts whose labels are hidden while others have some, as in public benchmarks."""
    bare = [part for part, values in labels.values.items() if values is None]
    if not bare or len(bare) == len(labels.values):
        return list(labels.values)
    notes.append(f"parts without labels left out: {', '.join(bare)}")
    return [part for part in labels.values if part not in bare]


def _source(table: _Table, choice: Choice, labels: Labels, part: str) -> Source:
    values = labels.values[part]
    deferred = labels.deferred if choice.label is not None else None
    names = choice.inputs if deferred is None else (*choice.inputs, deferred)

    def get(index: int) -> Sample:
        row = table.rows.get(index, names)
        label = values[index] if values is not None else None
        if deferred is not None:
            label = row[deferred]
        return Sample(inputs=_inputs(row, choice, table.folder, index), label=label)

    return Source(
        length=len(table.rows),
        get=get,
        stream=lambda: (get(index) for index in range(len(table.rows))),
        is_threadsafe=True,
    )


def _inputs(row: Mapping[str, Any], choice: Choice, folder: Path, index: int) -> dict[str, Any]:
    missing = [name for name in choice.inputs if row[name] is None]
    if missing:
        raise UnreadableSample(f"Row {index} has no {missing[0]!r}.")
    values = [row[name] for name in choice.inputs]
    if choice.form == "arrays" and len(values) > 1:
        return dict(zip(choice.inputs, values, strict=True))
    if choice.form == "image":
        return {UNNAMED: _image(values[0], folder, index)}
    if choice.form == "path":
        return {UNNAMED: folder / values[0]}
    return {UNNAMED: tuple(values) if len(values) == 2 else values[0]}


def _image(value: Any, folder: Path, index: int) -> bytes | Path:
    if isinstance(value, Mapping):
        data, place = value.get("bytes"), value.get("path")
        if data is not None:
            return data
        if place is None:
            raise UnreadableSample(f"The image of row {index} has neither bytes nor a path.")
        return folder / place
    return value


def _tables(path: Path, notes: list[str]) -> dict[str, _Table]:
    if path.is_file():
        return {"all": _Table(rows=_read_files([path]), folder=path.parent)}
    if not path.is_dir():
        raise DataError(f"The data {str(path)!r} don't exist; check the path after --data.")
    if (path / "dataset_dict.json").is_file():
        return _saved_parts(path, notes)
    if (path / "state.json").is_file():
        return {"all": _Table(rows=_saved(path), folder=path)}
    return _file_parts(path, notes)


def _saved_parts(path: Path, notes: list[str]) -> dict[str, _Table]:
    """The splits of a saved ``DatasetDict``, each in a folder of its own."""
    listed = _json(path / "dataset_dict.json").get("splits")
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{str(path / 'dataset_dict.json')!r} names no splits; save it again.")
    splits = [str(name) for name in listed]
    parts: dict[str, _Table] = {}
    for part, names in _by_part(splits, path, notes).items():
        if len(names) > 1:
            notes.append(f"of {', '.join(names)} only {names[0]} is read")
        parts[part] = _Table(rows=_saved(path / names[0]), folder=path / names[0])
    return parts


def _saved(folder: Path) -> ArrowRows:
    """One data set as ``save_to_disk`` wrote it."""
    if not (folder / "state.json").is_file():
        raise DataError(f"{str(folder)!r} has no 'state.json'; save the data set again.")
    state = _json(folder / "state.json")
    paths = _listed(folder, state.get("_data_files"))
    if not paths:
        raise DataError(f"{str(folder / 'state.json')!r} names no data files; save it again.")
    information = folder / "dataset_info.json"
    features = _json(information).get("features") if information.is_file() else None
    return ArrowRows(
        paths,
        indices=_listed(folder, state.get("_indices_data_files")),
        features=features if isinstance(features, Mapping) else None,
    )


def _listed(folder: Path, entries: Any) -> list[Path]:
    """Files beside ``state.json``; a name that leads elsewhere is cut down to its last part."""
    found = entries if isinstance(entries, list) else []
    names = [each.get("filename") for each in found if isinstance(each, Mapping)]
    return [folder / Path(name).name for name in names if isinstance(name, str)]


def _file_parts(path: Path, notes: list[str]) -> dict[str, _Table]:
    """Files by part, told from their names (``train-00000-of-00002``) or their folders'."""
    files = _files(path)
    configurations = {_configuration(file.relative_to(path)) for file in files}
    if len(configurations) > 1:
        names = ", ".join(sorted(each or "." for each in configurations))
        raise DataError(f"{str(path)!r} holds several tables ({names}); pass one of the folders.")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if set(by_split) == {""}:
        return {"all": _Table(rows=_read_files(files), folder=path)}
    parts: dict[str, list[Path]] = {}
    for split, found in by_split.items():
        if split:
            parts.setdefault(SPLIT_NAMES[split], []).extend(found)
        else:
            notes.append(f"files of no split left out: {', '.join(file.name for file in found)}")
    return {
        part: _Table(rows=_read_files(found), folder=found[0].parent)
        for part, found in parts.items()
    }


def _files(path: Path) -> list[Path]:
    """All files of the first format there is, at any depth, hidden folders aside."""
    found = [
        Path(folder, name)
        for folder, folders, names in os.walk(path)
        if not folders.sort() and not _is_hidden(Path(folder).relative_to(path))
        for name in sorted(names)
        if not name.startswith(".")
    ]
    for suffix in (*BINARY_SUFFIXES, *TEXT_SUFFIXES):
        of_format = [file for file in found if file.suffix.lower() == suffix]
        if of_format:
            return of_format
    raise DataError(f"{str(path)!r} has no {', '.join((*BINARY_SUFFIXES, *TEXT_SUFFIXES))} file.")


def _is_hidden(folder: Path) -> bool:
    return any(part.startswith(".") for part in folder.parts)


def _split_of(file: Path) -> str:
    for words in (file.stem, *reversed(file.parent.parts)):
        split = _known_split(words)
        if split:
            return split
    return ""


def _configuration(file: Path) -> str:
    kept = [part for part in file.parent.parts if part != "data" and not _known_split(part)]
    return "/".join(kept)


def _known_split(name: str) -> str:
    """The first word of a name that is a split's: validation of ``validation_matched``."""
    words = name.lower().replace("-", " ").replace("_", " ").replace(".", " ").split()
    return next((word for word in words if word in SPLIT_NAMES), "")


def _by_part(splits: Sequence[str], path: Path, notes: list[str]) -> dict[str, list[str]]:
    """Split names by part, the exact name first; ``DataError`` when none is known."""
    parts: dict[str, list[str]] = {}
    for name in sorted(splits, key=lambda name: name.lower() not in SPLIT_NAMES):
        if split := _known_split(name):
            parts.setdefault(SPLIT_NAMES[split], []).append(name)
    if not parts and len(splits) > 1:
        raise DataError(
            f"The data set {str(path)!r} has the splits {', '.join(splits)}, none of which is "
            "train, validation or test; pass the folder of one of them."
        )
    unknown = [name for name in splits if parts and not _known_split(name)]
    if unknown:
        notes.append(f"splits left out: {', '.join(unknown)}")
    return parts or {"all": list(splits)}


def _read_files(paths: Sequence[Path]) -> Rows:
    suffix = paths[0].suffix.lower()
    if suffix == ".parquet":
        return ParquetRows(paths)
    return ArrowRows(paths) if suffix == ".arrow" else read_text(paths)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(path)!r} can't be read ({error}); save the data set again."
        ) from None
    if not isinstance(found, dict):
        raise DataError(f"{str(path)!r} holds no JSON object; save the data set again.")
    return found


def _some_names(folder: Path) -> list[str]:
    """Visible names in a folder, a thousand at most."""
    try:
        with os.scandir(folder) as entries:
            some = itertools.islice(entries, MAX_SEEN_FILES)
            return sorted(entry.name for entry in some if not entry.name.startswith("."))
    except OSError:  # a folder that can't be listed is named by whoever reads it
        return []
