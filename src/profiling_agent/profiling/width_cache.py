"""Widths timed by earlier runs on this machine, for the next model that has the same shapes.

What a narrower layer saves depends on the machine, the runtime with its version, the scheme, the
deployment and the shape, and not on weights or data. One small JSON file for each, in the folder
that ``PROFILING_AGENT_CACHE`` names (else ``profiling-agent`` in the user's cache folder; ``off``
keeps nothing). The files may be deleted at any time; one that can't be read is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiling_agent.errors import StorageError
from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.profile import DeployedWidths, SharePoint
from profiling_agent.records.store import write_text

VARIABLE = "PROFILING_AGENT_CACHE"
OFF = "off"


class KeptWidths(Record):
    """A table as it is stored: shares of a whole model that took ``whole_ms``."""

    whole_ms: float
    points: tuple[SharePoint, ...]


def default_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where tables are kept on this machine; None when they shall not be."""
    named = environment.get(VARIABLE, "")
    if named.strip().lower() == OFF:
        return None
    if named:
        return Path(named) / "widths"
    try:
        caches = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        return None
    return Path(caches) / "profiling-agent" / "widths"


@dataclass(frozen=True, kw_only=True)
class WidthCache:
    """Tables of one machine and deployment; ``folder`` None finds and keeps nothing."""

    folder: Path | None
    machine: Machine
    deployment: Deployment

    def find(
        self, runtime: str, scheme: str, shape_class: str, whole_ms: float | None
    ) -> DeployedWidths | None:
        """The table of a shape, as shares of a model that takes ``whole_ms`` without pruning."""
        path = self._path(runtime, scheme, shape_class)
        if path is None or not whole_ms:
            return None
        try:
            kept = KeptWidths.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        scale = kept.whole_ms / whole_ms
        points = tuple(
            SharePoint(
                width=point.width,
                saved=point.saved * scale,
                low=point.low * scale,
                high=point.high * scale,
            )
            for point in kept.points
        )
        return DeployedWidths(
            runtime=runtime, scheme=scheme, shape_class=shape_class, points=points, is_reused=True
        )

    def keep(self, table: DeployedWidths, whole_ms: float | None) -> None:
        """Store a table; a disk that refuses costs the next run its time and nothing else."""
        path = self._path(table.runtime, table.scheme, table.shape_class)
        if path is None or not whole_ms:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, KeptWidths(whole_ms=whole_ms, points=table.points).to_json())
        except (OSError, StorageError):
            return

    def _path(self, runtime: str, scheme: str, shape_class: str) -> Path | None:
        if self.folder is None:
            return None
        machine, version = self.machine, self.machine.versions.get(runtime)
        parts: Sequence[object] = (
            machine.processor, machine.architecture, machine.num_cores, machine.cpu_quota,
            machine.features, runtime, version, scheme, self.deployment.batch_size,
            self.deployment.threads, shape_class,
        )  # fmt: skip
        return self.folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"
