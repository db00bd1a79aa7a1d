"""Rows of parquet and arrow files, without having the files in memory.

Parquet is read a row group at a time, the last few are kept. The arrow files that Hugging Face's
``save_to_disk`` writes are memory-mapped. pyarrow is enough for both.
"""

from __future__ import annotations

import bisect
import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.acquisition.data import UnreadableSample
from profiling_agent.acquisition.formats.columns import Column, Kind
from profiling_agent.errors import DataError, MissingDependency

CACHE_BYTES = 512 * 2**20
LARGE_GROUP_BYTES = 2**30
LFS_START = b"version https://git-lfs"


def load_pyarrow(name: str = "pyarrow") -> Any:
    """The library, or one of its modules; ``MissingDependency`` with the install line."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"Reading parquet and arrow files needs pyarrow ({error}); run "
            "pip install 'profiling-agent[parquet]'."
        ) from error


class ParquetRows:
    """Rows of parquet files of one schema, in the order given."""

    def __init__(self, paths: Sequence[Path]) -> None:
        parquet = load_pyarrow("pyarrow.parquet")
        self._files: list[Any] = []
        self._groups: list[tuple[Any, int]] = []
        self._starts = [0]
        self._cache: OrderedDict[tuple[int, tuple[str, ...]], Any] = OrderedDict()
        self._lock = threading.Lock()
        largest = 0
        for path in paths:
            with _reading(path):
                file = parquet.ParquetFile(path, memory_map=True)
                for group in range(file.num_row_groups):
                    described = file.metadata.row_group(group)
                    largest = max(largest, described.total_byte_size)
                    self._groups.append((file, group))
                    self._starts.append(self._starts[-1] + described.num_rows)
            self._files.append(file)
        self.columns = _one_schema([file.schema_arrow for file in self._files], paths, {})
        self.notes = (
            (f"a row group of {largest / 2**30:.1f} GB is held in memory while it is read",)
            if largest > LARGE_GROUP_BYTES
            else ()
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def get(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        group = bisect.bisect_right(self._starts, index) - 1
        table = self._group(group, tuple(names))
        return {name: _value(table[name][index - self._starts[group]]) for name in names}

    def column(self, name: str) -> list[Any]:
        with _reading(None):
            tables = [file.read(columns=[name]) for file in self._files]
            return [value for table in tables for value in table[name].to_pylist()]

    def example(self, name: str) -> Any:
        with _reading(None):
            for file in self._files:
                for batch in file.iter_batches(batch_size=16, columns=[name]):
                    return next(
                        (each for each in batch[name].to_pylist() if each is not None), None
                    )
        return None

    def _group(self, number: int, names: tuple[str, ...]) -> Any:
        """One row group's columns; the ones read last are kept, up to 512 MB."""
        with self._lock:
            key = (number, names)
            if key not in self._cache:
                file, group = self._groups[number]
                with _reading(None):
                    self._cache[key] = file.read_row_group(group, columns=list(names))
                while len(self._cache) > 1 and self._num_cached_bytes() > CACHE_BYTES:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            return self._cache[key]

    def _num_cached_bytes(self) -> int:
        return sum(table.nbytes for table in self._cache.values())


class ArrowRows:
    """Rows of memory-mapped arrow files; ``indices`` picks and orders them.

    ``features`` are those of Hugging Face's ``dataset_info.json``, for files that don't state them.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        indices: Sequence[Path] = (),
        features: Mapping[str, Any] | None = None,
    ) -> None:
        tables = [read_arrow(path) for path in paths]
        self.columns = _one_schema([table.schema for table in tables], paths, features or {})
        # One schema in names and types, but its metadata may differ between the files.
        bare = [table.replace_schema_metadata(None) for table in tables]
        self._table = load_pyarrow().concat_tables(bare)
        self._indices = (
            np.concatenate([np.asarray(read_arrow(path).column(0)) for path in indices])
            if indices
            else None
        )
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self._table.num_rows if self._indices is None else len(self._indices)

    def get(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        row = index if self._indices is None else int(self._indices[index])
        return {name: _value(self._table[name][row]) for name in names}

    def column(self, name: str) -> list[Any]:
        values = self._table[name]
        return (values if self._indices is None else values.take(self._indices)).to_pylist()

    def example(self, name: str) -> Any:
        values = self._table[name].slice(0, 16).to_pylist()
        return next((each for each in values if each is not None), None)


def read_arrow(path: Path) -> Any:
    """A memory-mapped table from an arrow file, in the stream format or the file format."""
    arrow = load_pyarrow()
    with _reading(path):
        mapped = arrow.memory_map(str(path))
        try:
            return arrow.ipc.open_stream(mapped).read_all()
        except arrow.ArrowInvalid:
            mapped.seek(0)
            return arrow.ipc.open_file(mapped).read_all()


@contextmanager
def _reading(path: Path | None) -> Iterator[None]:
    arrow = load_pyarrow()
    try:
        if path is not None and path.is_file():
            with path.open("rb") as file:
                if file.read(len(LFS_START)) == LFS_START:
                    raise DataError(
                        f"{str(path)!r} is a pointer of Git LFS, not the data; run 'git lfs pull'."
                    )
        yield
    except (arrow.ArrowException, OSError) as error:
        what = "A parquet file" if path is None else repr(str(path))
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{what} is damaged or can't be read ({first}).") from None


def _one_schema(
    schemas: Sequence[Any], paths: Sequence[Path], features: Mapping[str, Any]
) -> tuple[Column, ...]:
    for schema, path in zip(schemas, paths, strict=True):
        if schema.names != schemas[0].names or schema.types != schemas[0].types:
            raise DataError(
                f"{str(path)!r} has other columns than {str(paths[0])!r} ({', '.join(schema.names)}"
                f" and {', '.join(schemas[0].names)}); pass files of one table."
            )
    stated = {**features, **_features(schemas[0].metadata)}
    return tuple(_column(field, stated.get(field.name)) for field in schemas[0])


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Hugging Face's features from the schema's metadata."""
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = found["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _column(field: Any, feature: Any) -> Column:
    stated = feature if isinstance(feature, Mapping) else {}
    names = stated.get("names") if stated.get("_type") == "ClassLabel" else None
    return Column(
        name=field.name,
        kind=_kind(field.type),
        class_names=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def _kind(kind: Any) -> Kind:
    types = load_pyarrow("pyarrow.types")
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_integer(kind) or types.is_boolean(kind):
        return "integer"
    if types.is_floating(kind):
        return "float"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "binary"
    if types.is_struct(kind):
        return "image" if kind.get_field_index("bytes") >= 0 else "other"
    if _is_list(kind):
        inner = _kind(kind.value_type)
        return "list" if inner in ("integer", "float", "list") else "other"
    return "other"


def _is_list(kind: Any) -> bool:
    types = load_pyarrow("pyarrow.types")
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _value(scalar: Any) -> Any:
    if _is_list(scalar.type) and _kind(scalar.type) == "list":
        return _array(scalar)
    return scalar.as_py()


def _array(scalar: Any) -> np.ndarray | None:
    """Nested lists as one array; ``UnreadableSample`` when their lengths differ."""
    values = scalar.values
    if values is None:
        return None
    shape = [len(values)]
    while _is_list(values.type):
        lengths = {len(each) if each is not None else -1 for each in _inner(values)}
        if len(lengths) > 1:
            raise UnreadableSample(f"A row has lists of different lengths ({sorted(lengths)}).")
        shape.append(lengths.pop() if lengths else 0)
        values = values.flatten()
    if values.null_count:
        raise UnreadableSample("A row has lists with missing numbers.")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _inner(values: Any) -> Iterator[Any]:
    return (each.values for each in values)
