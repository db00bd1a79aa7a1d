"""The parent's end of a probe: an opened artefact that predicts, is timed, and can be stopped."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from profiling_agent.errors import TrialError
from profiling_agent.machine.child import Child
from profiling_agent.records.common import Deployment

if TYPE_CHECKING:
    from profiling_agent.acquisition.workload import Workload

OPEN_TIMEOUT_S = 300.0
BLOCK_TIMEOUT_S = 300.0


class Predictor(Protocol):
    """Something opened for measuring; used by one caller at a time."""

    def logits(self, split: Path, start: int = 0, stop: int | None = None) -> np.ndarray: ...
    def prepare(self, split: Path) -> None: ...
    def time_block(self, seconds: float, min_calls: int, warmup: int) -> list[float]: ...
    def memory_bytes(self) -> int | None: ...
    @property
    def alive(self) -> bool: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


class ProbeProcess:
    """A predictor in a process of its own; ``TrialError`` when that dies, hangs or refuses.

    Stop it with ``pause`` while another is timed: idle thread pools spin.
    """

    def __init__(self, deployment: Deployment, memory_limit: int | None = None) -> None:
        self._deployment = deployment
        self._child = Child("profiling_agent.evaluation.probe", memory_limit=memory_limit)

    @classmethod
    def artefact(
        cls, folder: Path, runtime: str, deployment: Deployment, memory_limit: int | None = None
    ) -> ProbeProcess:
        probe = cls(deployment, memory_limit)
        probe._open("open_artefact", folder=str(folder), runtime=runtime)
        return probe

    @classmethod
    def eager(
        cls, data: Path, deployment: Deployment, memory_limit: int | None = None
    ) -> ProbeProcess:
        probe = cls(deployment, memory_limit)
        probe._open("open_eager", data=str(data))
        return probe

    def _open(self, method: str, **arguments: Any) -> None:
        try:
            self._child.ask(
                {"method": method, "threads": self._deployment.threads, **arguments},
                OPEN_TIMEOUT_S,
            )
        except BaseException:
            self.close()
            raise

    def logits(self, split: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="profiling-agent-") as folder:
            out = Path(folder) / "logits.npy"
            request = {
                "method": "logits",
                "split": str(split),
                "batch_size": self._deployment.batch_size,
                "start": start,
                "stop": stop,
                "out": str(out),
            }
            self._child.ask(request, timeout_s=3600.0)
            return np.load(out, allow_pickle=False)

    def prepare(self, split: Path) -> None:
        batch_size = self._deployment.batch_size
        request = {"method": "prepare", "split": str(split), "batch_size": batch_size}
        self._child.ask(request, OPEN_TIMEOUT_S)

    def check(self, folder: Path) -> list[float]:
        """What an artefact answers to the check inputs of its manifest; they are timed next."""
        request = {
            "method": "check",
            "folder": str(folder),
            "batch_size": self._deployment.batch_size,
        }
        return self._child.ask(request, OPEN_TIMEOUT_S)["answers"]

    def time_block(self, seconds: float, min_calls: int, warmup: int) -> list[float]:
        request = {
            "method": "time_block",
            "seconds": seconds,
            "min_calls": min_calls,
            "warmup": warmup,
        }
        return self._child.ask(request, BLOCK_TIMEOUT_S + seconds)["calls_ms"]

    def memory_bytes(self) -> int | None:
        return self._child.ask({"method": "memory"}, BLOCK_TIMEOUT_S)["bytes"]

    @property
    def alive(self) -> bool:
        return self._child.alive

    def pause(self) -> None:
        self._child.pause()

    def resume(self) -> None:
        self._child.resume()

    def close(self) -> None:
        self._child.close()


class LivePredictor:
    """The baseline of a live object: it can't be rebuilt elsewhere, so it runs in this process."""

    def __init__(self, workload: Workload, deployment: Deployment) -> None:
        from profiling_agent.evaluation.eager import EagerModel
        from profiling_agent.evaluation.probe import Probe

        self._deployment = deployment
        self._probe = Probe()
        self._probe._model = EagerModel(workload, None)

    def logits(self, split: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="profiling-agent-") as folder:
            out = str(Path(folder) / "logits.npy")
            with self._threads():
                self._guard(
                    self._probe.logits, str(split), self._deployment.batch_size, out, start, stop
                )
            return np.load(out, allow_pickle=False)

    def prepare(self, split: Path) -> None:
        self._guard(self._probe.prepare, str(split), self._deployment.batch_size)

    def time_block(self, seconds: float, min_calls: int, warmup: int) -> list[float]:
        with self._threads():
            return self._guard(self._probe.time_block, seconds, min_calls, warmup)["calls_ms"]

    def memory_bytes(self) -> int | None:
        return None  # this process holds much besides the model

    @property
    def alive(self) -> bool:
        return True

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _threads(self) -> Any:
        from profiling_agent.machine.torch_state import threads

        return threads(self._deployment.threads)

    @staticmethod
    def _guard(call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # whatever the user's forward raises
            raise TrialError(f"{type(error).__name__}: {error}") from error
