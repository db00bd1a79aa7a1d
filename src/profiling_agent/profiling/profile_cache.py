"""Profiles taken by earlier runs on this machine, for the next run on the same model and data.

A profile takes a fifth of a run's time, and two of the same model differ by how many samples there
was time for and by the machine's noise: enough for searches that start from them to end at
different plans. One that was taken in quiet serves all later runs that differ in budget, objective,
planner or data to search and test on. One JSON file for each, in the user's cache
(``user_cache.py``).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from torch import nn

from profiling_agent.acquisition.workload import Workload
from profiling_agent.deployment.runtimes import available
from profiling_agent.profiling.user_cache import file_of, keep, read_kept
from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.profile import Profile

MOST_KEPT = 64
"""Profiles in the folder; the oldest go."""
ENOUGH = 0.9
"""Of the seconds that a profile may take now, that another had; with more of them a profile looks
at more samples, groups and layers."""


class KeptProfile(Record):
    """A profile as it is stored, and the seconds it was given."""

    seconds: float
    profile: Profile


@dataclass(frozen=True, kw_only=True)
class ProfileCache:
    """The profile of one model, calibration split, machine and deployment.

    ``folder`` None finds and keeps nothing. What a forward reads outside its modules and their
    classes is not seen when it changes: an old profile then misleads the search, and its trials,
    which are measured, tell.
    """

    folder: Path | None
    workload: Workload
    machine: Machine
    deployment: Deployment
    version: str
    """Of this package."""

    def find(self, seconds: float) -> KeptProfile | None:
        """A profile that had about so many seconds or more, as one of this workload;
        ``reused_from`` tells when it was taken."""
        kept = read_kept(self._path(), KeptProfile)
        if kept is None or kept.seconds < ENOUGH * seconds:
            return None
        tables = tuple(
            table.model_copy(update={"is_reused": True}) for table in kept.profile.deployed_widths
        )
        profile = kept.profile.model_copy(
            update={
                "workload": self.workload.record,
                "runtimes": available(self.machine),
                "deployed_widths": tables,
                "seconds_spent": 0.0,
            }
        )
        return KeptProfile(seconds=kept.seconds, profile=profile)

    def keep(self, taken: KeptProfile) -> None:
        """Store a profile for later runs."""
        when = taken.profile.reused_from or f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        profile = taken.profile.model_copy(update={"reused_from": when})
        keep(self._path(), KeptProfile(seconds=taken.seconds, profile=profile), MOST_KEPT)

    def _path(self) -> Path | None:
        if self.folder is None:
            return None
        record, machine = self.workload.record, self.machine
        same = record.model_dump(
            mode="json", include={"model_sha256", "inputs", "preprocessing", "task"}
        )
        calibration = record.split("calibration")
        parts = (
            same, calibration.sha256, calibration.num_samples, architecture(self.workload.model),
            machine.processor, machine.architecture, machine.num_cores, machine.cpu_quota,
            machine.features, sorted(machine.versions.items()),
            self.deployment.model_dump(mode="json"), self.version,
        )  # fmt: skip
        return file_of(self.folder, parts)


def architecture(model: nn.Module) -> str:
    """A hash of what is computed, beside the weights: modules, their plain attributes, and the
    source of their classes where Python has it."""
    sha = hashlib.sha256()
    for line in _described(model):
        sha.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return sha.hexdigest()


def _described(model: nn.Module) -> Iterator[str]:
    seen: set[type] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        plain = {key: value for key, value in vars(module).items() if _is_plain(value)}
        plain.pop("training", None)
        yield f"{name} {kind.__module__}.{kind.__qualname__} {sorted(plain.items())}"
        if kind not in seen:
            seen.add(kind)
            yield _source(kind)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _source(kind: type) -> str:
    if kind.__module__.split(".")[0] == "torch":
        return ""  # its version is known
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
