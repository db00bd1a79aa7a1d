"""What earlier runs on this machine measured and found, kept in the user's cache folder.

``PROFILING_AGENT_CACHE`` names the folder (else ``profiling-agent`` in the user's cache folder);
``off`` finds and keeps nothing. The files may be deleted at any time; one that can't be read is
measured anew, and a disk that refuses costs the next run its time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from profiling_agent.errors import StorageError
from profiling_agent.records.base import Record
from profiling_agent.records.store import write_text

VARIABLE = "PROFILING_AGENT_CACHE"
OFF = "off"

Kept = TypeVar("Kept", bound=Record)


def user_folder(kind: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where measurements of a kind are kept on this machine; None when they shall not be."""
    named = environment.get(VARIABLE, "")
    if named.strip().lower() == OFF:
        return None
    if named:
        return Path(named) / kind
    try:
        caches = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return Path(caches) / "profiling-agent" / kind


def file_of(folder: Path | None, parts: Any) -> Path | None:
    """The file of what these parts, lists and values, have in common."""
    if folder is None:
        return None
    return folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"


def read_kept(path: Path | None, kind: type[Kept]) -> Kept | None:
    """The record that was kept; None where there is none that can be read."""
    if path is None:
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(path: Path | None, record: Record, most: int | None = None) -> None:
    """Write the record, and delete the oldest of its folder above so many."""
    if path is None:
        return
    with contextlib.suppress(OSError, StorageError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, record.to_json())
        if most is not None:
            by_age = sorted(path.parent.glob("*.json"), key=lambda file: -file.stat().st_mtime)
            for file in by_age[most:]:
                file.unlink(missing_ok=True)
