"""What machine this is: a time holds for the processor, the quota and the software it was taken on.

Never imports torch, so that planning, reports and ``--help`` may ask. Files are read below
``root``, so that tests can lay out another machine in a folder.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from profiling_agent.machine.cgroup import cpu_quota, memory_limit
from profiling_agent.records.common import Machine

ROOT = Path("/")

#: Instruction sets that decide which kernels a runtime picks, x86 first, then Arm.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)
DISTRIBUTIONS = ("torch", "onnxruntime", "openvino", "numpy", "profiling-agent")

#: sysctl's words for the same instruction sets (macOS has no /proc).
_SYSCTL_FEATURES = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
}


def describe_machine(root: Path = ROOT) -> Machine:
    """The machine below ``root``, as this process may use it; on macOS best effort by sysctl."""
    if not (root / "proc" / "cpuinfo").exists() and platform.system() == "Darwin":
        return _describe_mac()
    entries = read_cpuinfo(root)
    return Machine(
        processor=_processor_name(entries),
        architecture=platform.machine(),
        num_cores=len(core_ids(entries)) or os.cpu_count() or 1,
        cpu_quota=cpu_quota(root),
        features=_features(entries),
        memory_bytes=_memory_bytes(root),
        system=f"{platform.system()} {platform.release()}",
        versions=read_versions(),
    )


def read_cpuinfo(root: Path = ROOT) -> list[dict[str, str]]:
    """One dict for each logical processor of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = (root / "proc" / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    entries: list[dict[str, str]] = []
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        key = key.strip()
        if not colon:
            continue
        if key == "processor":
            entries.append({})
        if entries:
            entries[-1][key] = value.strip()
    return entries


def core_ids(
    entries: list[dict[str, str]], allowed: frozenset[int] | None = None
) -> set[tuple[str, str]]:
    """Physical cores among the logical processors ``allowed`` (all for None).

    Two hyperthreads of one core are one; a processor that doesn't name its core is a core.
    """
    cores: set[tuple[str, str]] = set()
    for entry in entries:
        number = entry.get("processor", "")
        if allowed is not None and not (number.isdigit() and int(number) in allowed):
            continue
        core = entry.get("core id")
        cores.add((entry.get("physical id", "0"), core) if core else ("processor", number))
    return cores


def read_versions() -> dict[str, str]:
    """Versions of python and of the packages that are installed and matter for a measurement."""
    return {"python": platform.python_version()} | installed_versions(DISTRIBUTIONS)


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Of these packages, those that are installed."""
    versions: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _processor_name(entries: list[dict[str, str]]) -> str:
    first = entries[0] if entries else {}
    if first.get("model name"):
        return first["model name"]
    if "CPU part" in first:
        return f"Arm implementer {first.get('CPU implementer', '?')} part {first['CPU part']}"
    return platform.processor() or platform.machine()


def _features(entries: list[dict[str, str]]) -> tuple[str, ...]:
    first = entries[0] if entries else {}
    found = set((first.get("flags") or first.get("Features") or "").split())
    return tuple(name for name in FEATURES if name in found)


def _memory_bytes(root: Path) -> int:
    total = 0
    try:
        text = (root / "proc" / "meminfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    limit = memory_limit(root)
    if limit is None:
        return total
    return min(limit, total) if total else limit


def _describe_mac() -> Machine:
    present = {name for key, name in _SYSCTL_FEATURES.items() if _sysctl(key) == "1"}
    return Machine(
        processor=_sysctl("machdep.cpu.brand_string") or platform.machine(),
        architecture=platform.machine(),
        num_cores=int(_sysctl("hw.physicalcpu") or os.cpu_count() or 1),
        cpu_quota=None,
        features=tuple(name for name in FEATURES if name in present),
        memory_bytes=int(_sysctl("hw.memsize") or 0),
        system=f"{platform.system()} {platform.release()}",
        versions=read_versions(),
    )


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
