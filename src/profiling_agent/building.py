"""Plans turned into artefact folders, in a worker of its own.

Building happens in a warm worker, ``python -m profiling_agent.building``, so that a crash, a hang
or an empty memory is an error with its reason. A live module without an importable factory is built
in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from profiling_agent.acquisition.acquire import reopen
from profiling_agent.acquisition.workload import Workload
from profiling_agent.compression.compress import Compressor
from profiling_agent.deployment.artefact import build_artefact
from profiling_agent.deployment.lowered import Calibration
from profiling_agent.errors import ProfilingAgentError
from profiling_agent.machine.child import Child, die_with_parent
from profiling_agent.machine.processor import describe_machine
from profiling_agent.machine.torch_state import seed_everything, threads
from profiling_agent.profiling.static import count
from profiling_agent.profiling.whole import profile_workload
from profiling_agent.records.common import Deployment
from profiling_agent.records.evaluation import BuiltArtefact
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile

BUILD_TIMEOUT_S = 1800.0
QUANTIZATION_SAMPLES = 300
"""Calibration samples that static quantization looks at, as NNCF does by default."""
PROFILE_GRACE_S = 120.0
"""For opening the model and for costs, which are measured in full however long that takes."""


class Builder(Protocol):
    """Profiles the workload and turns plans into artefact folders."""

    isolation: Any

    def profile(self, deployment: Deployment, seconds: float) -> Profile: ...
    def build(
        self, plan: Plan, folder: Path, deployment: Deployment, timeout_s: float = ...
    ) -> BuiltArtefact: ...
    def pause(self) -> None: ...
    def close(self) -> None: ...


class LocalBuilder:
    """Builds in this process; the worker's hands, and the way for live modules."""

    isolation = "none"

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    @cached_property
    def _compressor(self) -> Compressor:
        return Compressor(self._workload)

    def profile(self, deployment: Deployment, seconds: float) -> Profile:
        return profile_workload(
            self._workload,
            describe_machine(),
            deployment,
            seconds=seconds,
            compressor=self._compressor,
        )

    def build(
        self,
        plan: Plan,
        folder: Path,
        deployment: Deployment,
        timeout_s: float = BUILD_TIMEOUT_S,
    ) -> BuiltArtefact:
        """Carry a plan out into ``folder``; any ``ProfilingAgentError`` says why it can't be.

        Nothing ends it here after ``timeout_s``; the worker's parent does.
        """
        seed_everything(plan.seed)
        with threads(deployment.threads):
            compressed = self._compressor.compress(plan)
            example = self._workload.example(deployment.batch_size)
            one = self._workload.example(1)
            achieved = compressed.achieved.model_copy(
                update={
                    "macs": count(compressed.model, one).module("").macs,
                    "original_macs": self._original_macs,
                }
            )
            record = self._workload.record
            return build_artefact(
                compressed.model,
                record,
                example,
                plan,
                achieved,
                folder,
                deployment,
                calibration_of(self._workload),
            )

    @cached_property
    def _original_macs(self) -> int:
        return count(self._workload.model, self._workload.example(1)).module("").macs

    def pause(self) -> None:
        pass

    def close(self) -> None:
        pass


def calibration_of(workload: Workload) -> Calibration | None:
    """The workload's calibration samples as static quantization reads them; None without data."""
    split = workload.splits.get("calibration")
    if split is None:
        return None
    num_samples = min(split.info.num_samples, QUANTIZATION_SAMPLES)

    def batches(size: int) -> Iterator[dict[str, np.ndarray]]:
        whole = max(size, num_samples // size * size)
        for raw, _labels in split.batches(size, whole):
            tensors = workload.tensors(raw)
            yield {name: tensor.numpy() for name, tensor in tensors.items()}

    return Calibration(num_samples=num_samples, batches=batches)


class WorkerBuilder:
    """Builds in a warm worker, replaced when it fails."""

    isolation = "process"

    def __init__(self, data: Path, memory_limit: int | None = None) -> None:
        self._data = data
        self._memory_limit = memory_limit
        self._child: Child | None = None

    def profile(self, deployment: Deployment, seconds: float) -> Profile:
        request = {"method": "profile", "deployment": _dump(deployment), "seconds": seconds}
        answer = self._ask(request, timeout_s=2 * seconds + PROFILE_GRACE_S)
        return Profile.model_validate(answer["profile"])

    def build(
        self,
        plan: Plan,
        folder: Path,
        deployment: Deployment,
        timeout_s: float = BUILD_TIMEOUT_S,
    ) -> BuiltArtefact:
        request = {
            "method": "build",
            "plan": _dump(plan),
            "folder": str(folder),
            "deployment": _dump(deployment),
        }
        return BuiltArtefact.model_validate(self._ask(request, timeout_s)["built"])

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._child is None or not self._child.alive:
            self.close()
            self._child = Child("profiling_agent.building", memory_limit=self._memory_limit)
            try:
                self._child.ask({"method": "open", "data": str(self._data)}, timeout_s=600.0)
            except BaseException:
                self.close()
                raise
        return self._child.ask(request, timeout_s)

    def pause(self) -> None:
        if self._child is not None:
            self._child.pause()

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


def _dump(record: Any) -> dict[str, Any]:
    return record.model_dump(mode="json")


class _Worker:
    """The worker's end: answers ``open``, ``profile`` and ``build``."""

    def __init__(self) -> None:
        self._builder: LocalBuilder | None = None

    def open(self, data: str) -> dict[str, Any]:
        self._builder = LocalBuilder(reopen(Path(data)))
        return {}

    def profile(self, deployment: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        assert self._builder is not None
        profile = self._builder.profile(Deployment.model_validate(deployment), seconds)
        return {"profile": _dump(profile)}

    def build(
        self, plan: Mapping[str, Any], folder: str, deployment: Mapping[str, Any]
    ) -> dict[str, Any]:
        assert self._builder is not None
        built = self._builder.build(
            Plan.model_validate(plan), Path(folder), Deployment.model_validate(deployment)
        )
        return {"built": _dump(built)}


def main() -> None:
    """Answer requests on stdin until it closes; what libraries print goes to stderr."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = {"ok": True, **getattr(worker, request.pop("method"))(**request)}
            except ProfilingAgentError as error:
                answer = {"ok": False, "error": str(error)}
            except MemoryError:
                answer = {"ok": False, "error": "out of memory"}
            except Exception as error:  # a fault in one plan must not end the run
                text = " ".join(str(error).split())[:800]
                answer = {"ok": False, "error": f"{type(error).__name__}: {text}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
