"""The base of everything that crosses a boundary: frozen, strict about unknown fields, hashable."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from profiling_agent.errors import PlanError


class Record(BaseModel):
    """A frozen value; two records with the same fields are equal.

    >>> class Point(Record):
    ...     x: int
    >>> Point(x=1) == Point.from_json('{"x": 1}')
    True
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    def to_json(self, *, indent: int | None = 2) -> str:
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str, *, source: str = "the text") -> Self:
        """Parse, or raise ``PlanError`` that names each field at fault and where it came from."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(
                f"{source} is not a valid {cls.__name__.lower()}: {describe_faults(error)}."
            ) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record file; ``PlanError`` when it is missing, not text or not this record."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"Can't read {str(path)!r}: {error}.") from None
        return cls.from_json(text, source=repr(str(path)))

    def digest(self, *, exclude: set[str] | None = None) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON form."""
        canonical = json.dumps(self.model_dump(mode="json", exclude=exclude), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def describe_faults(error: ValidationError, limit: int = 4) -> str:
    """The faults of a validation in words: ``field 'pruning.0.ratio': ... (got 1.5)``."""
    faults = error.errors(include_url=False, include_context=False)
    parts = [_describe(fault) for fault in faults[:limit]]
    if len(faults) > limit:
        parts.append(f"and {len(faults) - limit} more")
    return "; ".join(parts)


def _describe(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"])
    message = message[:1].lower() + message[1:]
    if fault["type"] == "extra_forbidden":
        return f"unknown field {place!r}"
    if fault["type"] == "missing":
        return f"field {place!r} is missing"
    if fault["type"] == "secret":  # not to be said again
        return message
    got = repr(fault["input"])
    shown = got if len(got) <= 60 else got[:57] + "..."
    return f"field {place!r}: {message} (got {shown})" if place else f"{message} (got {shown})"
