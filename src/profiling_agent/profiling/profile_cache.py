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
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from pydantic import Field
from torch import nn

from profiling_agent.acquisition.workload import Workload
from profiling_agent.deployment.runtimes import available
from profiling_agent.machine.processor import installed_versions
from profiling_agent.profiling.user_cache import file_of, keep, read_kept
from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.profile import Profile

MOST_KEPT = 64
"""Profiles in the folder; the oldest go."""
BESIDE = ("nncf", "onnx", "onnxscript", "timm", "torchvision", "transformers")
"""Packages that quantize, or that models come from: their versions count too."""
ENOUGH = 0.9
"""Of the seconds that a profile may take now, that another had; with more of them a profile looks
at more samples, groups and layers."""


class ControlLatency(Record):
    """What a control took over the original in eager mode."""

    runtime: str
    scheme: str
    relative: float = Field(gt=0)


class KeptProfile(Record):
    """A profile as it is stored, the seconds it was given, and the controls that had been timed
    beside each other."""

    seconds: float
    profile: Profile
    controls: tuple[ControlLatency, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ProfileCache:
    """The profile of one model, calibration split, machine and deployment.

    ``folder`` None finds and keeps nothing. What a forward reads outside its modules and their
    classes is not seen when it changes, nor is what they hold beside numbers, texts and functions:
    an old profile then misleads the search, and its trials, which are measured, tell.
    """

    folder: Path | None
    workload: Workload
    machine: Machine
    deployment: Deployment

    def find(self, seconds: float) -> KeptProfile | None:
        """A profile that had about so many seconds or more, as one of this workload;
        ``reused_from`` tells when it was taken."""
        kept = read_kept(self._path, KeptProfile)
        if kept is None or kept.seconds < ENOUGH * seconds:
            return None
        tables = tuple(
            table.model_copy(update={"is_reused": True}) for table in kept.profile.deployed_widths
        )
        profile = kept.profile.model_copy(
            update={
                "workload": self.workload.record,
                "deployed_widths": tables,
                "seconds_spent": 0.0,
            }
        )
        return kept.model_copy(update={"profile": profile})

    def keep(self, taken: KeptProfile) -> None:
        """Store a profile for later runs, but not in place of another that had more time."""
        there = read_kept(self._path, KeptProfile)
        is_it = there is not None and there.profile.reused_from == taken.profile.reused_from
        if there is not None and there.seconds > taken.seconds and not is_it:
            return
        when = taken.profile.reused_from or f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        profile = taken.profile.model_copy(update={"reused_from": when})
        keep(self._path, taken.model_copy(update={"profile": profile}), MOST_KEPT)

    @cached_property
    def _path(self) -> Path | None:
        if self.folder is None:
            return None
        parts = identity(self.workload, self.machine, self.deployment)
        return None if parts is None else file_of(self.folder, parts)


def identity(
    workload: Workload, machine: Machine, deployment: Deployment
) -> tuple[object, ...] | None:
    """What two runs have in common for which the same was measured, as lists and values; None for a
    model that can't be told from others."""
    described = architecture(workload.model)
    if described is None:
        return None
    record = workload.record
    same = record.model_dump(
        mode="json", include={"model_sha256", "inputs", "preprocessing", "task"}
    )
    calibration = record.split("calibration")
    return (
        same, calibration.sha256, calibration.num_samples, described,
        machine.processor, machine.architecture, machine.num_cores, machine.cpu_quota,
        machine.features, sorted((machine.versions | installed_versions(BESIDE)).items()),
        [offer.model_dump(mode="json") for offer in available(machine)],
        deployment.model_dump(mode="json"),
    )  # fmt: skip


def architecture(model: nn.Module) -> str | None:
    """A hash of what is computed, beside the weights: modules, their attributes as far as they are
    numbers, texts or functions, and the source of their classes; None where Python has no source,
    as of classes typed into a notebook."""
    sha, seen, of_every_module = hashlib.sha256(), set[type](), vars(nn.Module())
    try:
        for name, module in model.named_modules(remove_duplicate=False):
            own = {key: value for key, value in vars(module).items() if key not in of_every_module}
            plain = {key: _plain(value) for key, value in own.items()}
            sha.update(f"{name} {type(module).__qualname__} {sorted(plain.items())}\n".encode())
            for kind in type(module).__mro__:
                if kind not in seen and kind.__module__.split(".")[0] not in ("torch", "builtins"):
                    sha.update(inspect.getsource(kind).encode())
                seen.add(kind)
    except (OSError, TypeError, UnicodeError):
        return None
    return sha.hexdigest()


def _plain(value: object) -> object:
    """The value as far as it says the same in every process."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return sorted((str(key), str(_plain(each))) for key, each in value.items())
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)
