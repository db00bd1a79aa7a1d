"""Widths timed by earlier runs on this machine, for the next model that has the same shapes.

What a narrower layer saves depends on the machine, the runtime with its version, the scheme, the
deployment and the shape, and not on weights or data. One small JSON file for each, in the user's
cache (``user_cache.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from profiling_agent.profiling.user_cache import file_of, keep, read_kept
from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.profile import DeployedWidths, SharePoint


class KeptWidths(Record):
    """A table as it is stored: shares of a whole model that took ``whole_ms``."""

    whole_ms: float
    points: tuple[SharePoint, ...]


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
        kept = read_kept(self._path(runtime, scheme, shape_class), KeptWidths)
        if kept is None or not whole_ms:
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
        """Store a table."""
        path = self._path(table.runtime, table.scheme, table.shape_class)
        if whole_ms:
            keep(path, KeptWidths(whole_ms=whole_ms, points=table.points))

    def _path(self, runtime: str, scheme: str, shape_class: str) -> Path | None:
        machine, version = self.machine, self.machine.versions.get(runtime)
        parts = (
            machine.processor, machine.architecture, machine.num_cores, machine.cpu_quota,
            machine.features, runtime, version, scheme, self.deployment.batch_size,
            self.deployment.threads, shape_class,
        )  # fmt: skip
        return file_of(self.folder, parts)
