"""Where the time of an artefact goes, operator by operator, in a process of its own.

``python -m profiling_agent.profiling.deployed`` answers one request a line; only the artefact's
runtime is loaded there.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.deployment.telemetry import no_telemetry
from profiling_agent.machine.child import Child, die_with_parent
from profiling_agent.records.common import Deployment
from profiling_agent.records.profile import DeployedProfile, OperatorCost
from profiling_agent.records.trial import Trial

PASSES = 20
TIMEOUT_S = 120.0
_CALLS_S, _MIN_CALLS = 0.3, 5


def profile_artefact(
    folder: Path,
    split: Path,
    deployment: Deployment,
    *,
    passes: int = PASSES,
    memory_limit: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> DeployedProfile:
    """Operator times of an artefact on the first samples of a stored split.

    ``split`` is a folder of arrays as ``RunStore.data`` holds them. Raises ``TrialError`` when the
    artefact can't be opened or its runtime does not tell the times.
    """
    child = Child("profiling_agent.profiling.deployed", memory_limit=memory_limit)
    with contextlib.closing(child):
        answer = child.ask(
            {
                "folder": str(folder),
                "split": str(split),
                "batch_size": deployment.batch_size,
                "threads": deployment.threads,
                "passes": passes,
            },
            timeout_s,
        )
    operators = tuple(OperatorCost.model_validate(entry) for entry in answer["operators"])
    return DeployedProfile(
        runtime=answer["runtime"],
        scheme=answer["scheme"],
        deployment=deployment,
        total_ms=answer["total_ms"],
        unmapped_ms=sum(o.ms for o in operators if o.module is None),
        operators=operators,
    )


def profile_pairs(
    pairs: Sequence[tuple[Trial, Trial]],
    profile: Callable[[Trial], DeployedProfile | None],
    *,
    has_time: Callable[[], bool],
) -> tuple[DeployedProfile, ...]:
    """Profiles of pairs of controls, of which one alone says nothing: both of a pair or neither.

    ``profile`` gives None for one that can't be profiled; what stands in several pairs is profiled
    once. No pair is begun when ``has_time`` says no.
    """
    known: dict[str, DeployedProfile | None] = {}
    wanted: dict[str, DeployedProfile] = {}
    for pair in pairs:
        if not has_time():
            break
        for trial in pair:
            if trial.trial_id not in known:
                known[trial.trial_id] = profile(trial)
            if known[trial.trial_id] is None:
                break
        both = {trial.trial_id: known.get(trial.trial_id) for trial in pair}
        found = {name: value for name, value in both.items() if value is not None}
        if len(found) == len(pair):
            wanted |= found
    return tuple(wanted.values())


def _profile(folder: str, split: str, batch_size: int, threads: int, passes: int) -> dict[str, Any]:
    """The child's work: whole calls without a profiler, then the runtime's own operator times."""
    root = Path(folder)
    spec = importlib.util.spec_from_file_location("artefact_serve", root / "serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    with no_telemetry():
        spec.loader.exec_module(module)
    model = module.Model(root, threads=threads)
    manifest: dict[str, Any] = model.manifest
    prepared = model.prepare(_samples(Path(split), batch_size))
    total_ms = _time_calls(model, prepared)
    values = prepared.values() if isinstance(prepared, dict) else prepared
    runtime = manifest["runtime"]
    measured = importlib.import_module(f"profiling_agent.profiling.deployed_{runtime}")
    del model
    costs = measured.operator_costs(
        root, manifest, [np.asarray(value) for value in values], threads, passes
    )
    return {
        "runtime": runtime,
        "scheme": manifest["scheme"],
        "total_ms": total_ms,
        "operators": [cost.model_dump(mode="json") for cost in costs],
    }


def _samples(split: Path, batch_size: int) -> dict[str, np.ndarray]:
    """The first samples of a split, repeated when there are fewer than a batch."""
    samples: dict[str, np.ndarray] = {}
    for path in sorted(split.glob("*.npy")):
        if path.stem != "labels":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            samples[path.stem] = np.asarray(array[np.arange(batch_size) % len(array)])
    return samples


def _time_calls(model: Any, prepared: Any) -> float:
    calls: list[float] = []
    for _ in range(3):
        model.run(prepared)
    deadline = time.perf_counter() + _CALLS_S
    while len(calls) < _MIN_CALLS or time.perf_counter() < deadline:
        start = time.perf_counter_ns()
        model.run(prepared)
        calls.append((time.perf_counter_ns() - start) / 1e6)
    return statistics.median(calls)


def main() -> None:
    """Answer requests on stdin until it closes; what libraries print goes to stderr."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        for line in sys.stdin:
            try:
                answer = {"ok": True, **_profile(**json.loads(line))}
            except MemoryError:
                answer = {"ok": False, "error": "out of memory"}
            except Exception as error:  # the artefact's fault is the parent's to judge
                text = " ".join(str(error).split())[:500]
                answer = {"ok": False, "error": f"{type(error).__name__}: {text}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
