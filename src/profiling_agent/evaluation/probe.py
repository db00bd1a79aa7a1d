"""The process in which one artefact is measured: ``python -m profiling_agent.evaluation.probe``.

It opens the artefact as its user will, through its own ``serve.py``, or the untouched model in
eager mode, and answers requests, one JSON object a line. Only the artefact's runtime is loaded
here, so that memory and time are the artefact's own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from profiling_agent.deployment.telemetry import no_telemetry
from profiling_agent.machine.child import die_with_parent


class _Model(Protocol):
    def prepare(self, inputs: dict[str, np.ndarray]) -> Any: ...
    def run(self, prepared: Any) -> np.ndarray: ...
    def logits(self, inputs: dict[str, np.ndarray]) -> np.ndarray: ...


class Probe:
    """Holds one model; each public method answers one request."""

    def __init__(self) -> None:
        self._model: _Model | None = None
        self._prepared: Any = None
        self._empty_bytes: int | None = None

    def open_artefact(self, folder: str, runtime: str, threads: int) -> dict[str, Any]:
        with no_telemetry():
            importlib.import_module(runtime)
        self._empty_bytes = _status_bytes("RssAnon")
        spec = importlib.util.spec_from_file_location("artefact_serve", Path(folder) / "serve.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._model = module.Model(folder, threads=threads)
        return {}

    def open_eager(self, data: str, threads: int) -> dict[str, Any]:
        from profiling_agent.evaluation.eager import EagerModel

        self._empty_bytes = _status_bytes("RssAnon")  # torch, and what is ours, is loaded by now
        self._model = EagerModel(Path(data), threads)
        return {}

    def logits(
        self, split: str, batch_size: int, out: str, start: int = 0, stop: int | None = None
    ) -> dict[str, Any]:
        """Logits of a split's samples from ``start`` to ``stop``, in batches of that size."""
        assert self._model is not None
        inputs = _split_inputs(Path(split))
        total = len(next(iter(inputs.values())))
        total = total if stop is None else min(stop, total)
        parts: list[np.ndarray] = []
        for first in range(start, total, batch_size):
            rows = slice(first, min(first + batch_size, total))
            raw = {name: np.asarray(array[rows]) for name, array in inputs.items()}
            parts.append(np.asarray(self._model.logits(raw), dtype=np.float32))
        np.save(out, np.concatenate(parts))
        return {"num_samples": total - start}

    def prepare(self, split: str, batch_size: int) -> dict[str, Any]:
        """Fix the batch that is timed: the first samples, repeated when there are fewer."""
        assert self._model is not None
        inputs = _split_inputs(Path(split))
        rows = np.arange(batch_size) % len(next(iter(inputs.values())))
        raw = {name: np.asarray(array[rows]) for name, array in inputs.items()}
        self._prepared = self._model.prepare(raw)
        return {}

    def check(self, folder: str, batch_size: int) -> dict[str, Any]:
        """Answers to the check inputs of an artefact's manifest; they become what is timed."""
        from profiling_agent.deployment.opened import check_inputs_of, feed_of

        assert self._model is not None
        check = check_inputs_of(Path(folder))
        answers = check.answered_by(self._model).answers
        self._prepared = feed_of(self._model, check.draw(batch_size))
        return {"answers": list(answers)}

    def time_block(self, seconds: float, min_calls: int, warmup: int) -> dict[str, Any]:
        """Milliseconds of each call; the first ``warmup`` calls are not in it."""
        assert self._model is not None
        run, prepared = self._model.run, self._prepared
        for _ in range(warmup):
            run(prepared)
        gc.collect()
        gc.disable()
        calls: list[float] = []
        deadline = time.perf_counter() + seconds
        try:
            while len(calls) < min_calls or time.perf_counter() < deadline:
                start = time.perf_counter_ns()
                run(prepared)
                calls.append((time.perf_counter_ns() - start) / 1e6)
        finally:
            gc.enable()
        return {"calls_ms": calls}

    def memory(self) -> dict[str, Any]:
        """Peak anonymous bytes during a few calls, less those of a process with only the runtime.

        Pages of files don't count: how many of a library's are resident depends on the page cache.
        """
        assert self._model is not None
        if self._empty_bytes is None or not _reset_peak():
            return {"bytes": None, "reason": "this system does not tell the peak of a process"}
        for _ in range(3):
            self._model.run(self._prepared)
        peak, resident, anonymous = (_status_bytes(f) for f in ("VmHWM", "VmRSS", "RssAnon"))
        if peak is None or resident is None or anonymous is None:
            return {"bytes": None, "reason": "this system does not tell the memory of a process"}
        of_files = resident - anonymous
        return {"bytes": max(0, peak - of_files - self._empty_bytes)}


def _split_inputs(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.stem: np.load(path, mmap_mode="r", allow_pickle=False)
        for path in sorted(folder.glob("*.npy"))
        if path.stem != "labels"
    }


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _answer(probe: Probe, line: str) -> dict[str, Any]:
    request = json.loads(line)
    method: Callable[..., dict[str, Any]] = getattr(probe, request.pop("method"))
    try:
        return {"ok": True, **method(**request)}
    except MemoryError:
        return {"ok": False, "error": "out of memory"}
    except Exception as error:  # the artefact's fault is the parent's to judge
        text = " ".join(str(error).split())[:500]
        return {"ok": False, "error": f"{type(error).__name__}: {text}"}


def main() -> None:
    """Answer requests on stdin until it closes; what libraries print goes to stderr."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    probe = Probe()
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        for line in sys.stdin:
            answers.write(json.dumps(_answer(probe, line)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
