"""How many threads a deployment gets when nobody says: as many as can really run at once."""

from __future__ import annotations

import os
from pathlib import Path

from profiling_agent.machine.cgroup import cpu_quota
from profiling_agent.machine.processor import ROOT, core_ids, read_cpuinfo


def default_threads(root: Path = ROOT, allowed: frozenset[int] | None = None) -> int:
    """The smallest of the cgroup's quota, the cores this process may use and the physical cores.

    A quota is rounded down (a thread more than granted is throttled in the middle of a forward),
    hyperthreads of one core count once (they share the multipliers), and it is at least 1.
    ``allowed`` are logical processors, by default those of the scheduler's affinity.
    """
    if allowed is None:
        allowed = _affinity()
    cores = len(core_ids(read_cpuinfo(root), allowed))
    limits = [float(cores or (len(allowed) if allowed else os.cpu_count() or 1))]
    quota = cpu_quota(root)
    if quota is not None:
        limits.append(quota)
    return max(1, int(min(limits)))


def _affinity() -> frozenset[int] | None:
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return None
    return frozenset(os.sched_getaffinity(0))
