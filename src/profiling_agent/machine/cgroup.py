"""What the control groups grant: a container may own two of sixty-four cores, and only they say so.

Version 2 is one tree, version 1 one tree for each controller. A container may see its own group
mounted as the root, so the path named in /proc/self/cgroup need not exist: every folder from there
up to the mount is asked, and the tightest limit counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path


def cpu_quota(root: Path) -> float | None:
    """Cores granted (1.5 for one and a half); None when unlimited."""
    return _tightest(
        [
            *_limits(root, "", _read_cpu_max),
            *_limits(root, "cpu", _read_cfs_quota),
        ]
    )


def memory_limit(root: Path) -> int | None:
    """Bytes granted; None when unlimited. Version 1 says unlimited with a number near 2**63."""
    limit = _tightest(
        [
            *_limits(root, "", lambda folder: _read_number(folder / "memory.max")),
            *_limits(root, "memory", lambda folder: _read_number(folder / "memory.limit_in_bytes")),
        ]
    )
    return int(limit) if limit is not None and limit < 2**60 else None


def _tightest(limits: list[float]) -> float | None:
    return min(limits, default=None)


def _limits(root: Path, controller: str, read: Callable[[Path], float | None]) -> Iterator[float]:
    for folder in _folders(root, controller):
        value = read(folder)
        if value is not None:
            yield value


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's group and those above it; ``controller`` empty for version 2."""
    for controllers, path in _memberships(root):
        if controller not in controllers.split(","):
            continue
        for mount in _mounts(root, controllers):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for length in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:length])


def _memberships(root: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each line of /proc/self/cgroup."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    fields = [line.split(":", 2) for line in lines]
    return [(field[1], field[2]) for field in fields if len(field) == 3]


def _mounts(root: Path, controllers: str) -> list[Path]:
    base = root / "sys" / "fs" / "cgroup"
    if not controllers:
        return [base, base / "unified"]
    return [base / controllers, *(base / name for name in controllers.split(","))]


def _read_cpu_max(folder: Path) -> float | None:
    fields = _read(folder / "cpu.max").split()
    if len(fields) != 2 or fields[0] == "max":
        return None
    return int(fields[0]) / int(fields[1])


def _read_cfs_quota(folder: Path) -> float | None:
    quota = _read_number(folder / "cpu.cfs_quota_us")
    period = _read_number(folder / "cpu.cfs_period_us")
    if quota is None or not period or quota <= 0:
        return None
    return quota / period


def _read_number(path: Path) -> float | None:
    text = _read(path)
    return float(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
