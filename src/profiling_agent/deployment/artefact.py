"""The folder handed to the user: built whole or not at all, reloaded and compared before it counts.

serve.py  manifest.json  plan.json  and the model files of one runtime
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.deployment.exporting import first_line
from profiling_agent.deployment.lowered import Calibration, Lowered, Lowering, Runtime
from profiling_agent.deployment.opened import (
    MANIFEST,
    PACKAGES,
    SERVE,
    CheckInputs,
    check_artefact,
    feed_of,
)
from profiling_agent.deployment.runtimes import get_runtime
from profiling_agent.deployment.serving import serve_text
from profiling_agent.deployment.telemetry import no_telemetry
from profiling_agent.errors import ArtefactError, MissingDependency, StorageError, TrialError
from profiling_agent.machine.processor import describe_machine
from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment
from profiling_agent.records.evaluation import Achieved, BuiltArtefact
from profiling_agent.records.plan import Plan
from profiling_agent.records.workload import WorkloadRecord

PLAN = "plan.json"
PARITY_TOLERANCE = 1e-3
_serial = itertools.count()


class ServedModel(Protocol):
    """``Model`` of an artefact's ``serve.py``; ``logits`` is ``run(prepare(inputs))``."""

    manifest: dict[str, Any]

    def prepare(self, inputs: Any) -> Any: ...

    def run(self, prepared: Any) -> np.ndarray: ...

    def logits(self, inputs: Any) -> np.ndarray: ...

    def predict(self, inputs: Any) -> list[Any]: ...


def build_artefact(
    model: nn.Module,
    workload: WorkloadRecord,
    example: dict[str, Tensor],
    plan: Plan,
    achieved: Achieved,
    folder: Path,
    deployment: Deployment,
    calibration: Calibration | None = None,
) -> BuiltArtefact:
    """Lower a model by its plan into ``folder`` and return what lies there.

    ``example`` holds preprocessed inputs (batch, ...) by name, at the deployment's batch size where
    a model can't take any other. The files are written to a sibling folder, reloaded through their
    own ``serve.py``, compared with the module and only then moved into place; an artefact that was
    there before is replaced. Raises ``StorageError``, ``TrialError``, ``MissingDependency`` or
    ``PlanError``; the model is left as it was.
    """
    started = time.monotonic()
    runtime = get_runtime(plan.runtime)
    _refuse_foreign(folder)
    example = {spec.name: example[spec.name] for spec in workload.inputs}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            lowering = Lowering(
                quantization=plan.quantization,
                machine=describe_machine(),
                deployment=deployment,
                calibration=calibration,
            )
            built = _build(
                runtime, model, workload, example, plan, achieved, draft, lowering, started
            )
            draft.chmod(0o755)
            _move(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except (StorageError, MissingDependency):
        raise
    except OSError as error:
        raise StorageError(
            f"Can't write the artefact {str(folder)!r}: {error.strerror or error}. Free space or "
            "pass another folder with --out."
        ) from error
    return built


def open_artefact(folder: Path, threads: int | None = None) -> ServedModel:
    """The artefact's own ``Model``, loaded from its ``serve.py`` under a name of its own.

    ``ArtefactError`` says what is missing; ``MissingDependency`` which runtime to install.
    """
    check_artefact(folder)
    try:
        return _import_serve(folder / SERVE).Model(folder, threads)
    except Exception as error:  # a damaged file can fail in any way
        raise ArtefactError(
            f"The artefact {str(folder)!r} can't be opened: {first_line(error)}. Build it again."
        ) from error


def baseline_size(model: nn.Module) -> int:
    """Bytes of the model as a safetensors file in its own dtypes, shared tensors once."""
    entries: dict[str, Any] = {}
    seen: set[tuple[Any, ...]] = set()
    offset = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES.get(tensor.dtype, "F32"),
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = len(json.dumps(entries, separators=(",", ":")).encode())
    return 8 + (header + 7) // 8 * 8 + offset


_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _build(
    runtime: Runtime,
    model: nn.Module,
    workload: WorkloadRecord,
    example: dict[str, Tensor],
    plan: Plan,
    achieved: Achieved,
    draft: Path,
    lowering: Lowering,
    started: float,
) -> BuiltArtefact:
    deployment = lowering.deployment
    lowered = runtime.lower(model, example, lowering, draft)
    (draft / SERVE).write_text(serve_text(runtime.name), encoding="utf-8")
    (draft / PLAN).write_text(plan.to_json(), encoding="utf-8")
    built = BuiltArtefact(
        runtime=runtime.name,
        scheme=plan.quantization.scheme,
        model_files=lowered.model_files,
        size_bytes=sum((draft / name).stat().st_size for name in lowered.model_files),
        weight_bytes=lowered.weight_bytes,
        achieved=achieved.model_copy(
            update={
                "num_int8_layers": len(lowered.int8_layers),
                "float_layers": lowered.float_layers,
                "num_int8_operators": lowered.num_int8_operators,
                "num_products": lowered.num_products,
            }
        ),
        parity=None,
        seconds=0.0,
    )
    _write_manifest(draft, built, lowered, workload, lowering, None)
    parity, check = _check_parity(runtime, model, example, plan, draft, lowered, deployment)
    seconds = round(time.monotonic() - started, 3)
    built = built.model_copy(update={"parity": parity, "seconds": seconds})
    _write_manifest(draft, built, lowered, workload, lowering, check)
    return built


def _write_manifest(
    draft: Path,
    built: BuiltArtefact,
    lowered: Lowered,
    workload: WorkloadRecord,
    lowering: Lowering,
    check: CheckInputs | None,
) -> None:
    manifest = {
        "schema_version": 1,
        "name": workload.name,
        "runtime": built.runtime,
        "scheme": built.scheme,
        "inputs": [_dump(spec) for spec in workload.inputs],
        "preprocessing": _dump(workload.preprocessing),
        "num_classes": workload.task.num_classes,
        "class_names": list(workload.task.class_names),
        "answers": list(workload.task.answers),
        "dynamic_batch": lowered.fixed_batch is None,
        "batch_size": lowered.fixed_batch,
        "int8_layers": list(lowered.int8_layers),
        "notes": list(lowered.notes),
        "deployment": _dump(lowering.deployment),
        "machine": _dump(lowering.machine),
        "check": check.model_dump(mode="json") if check is not None else None,
        "kept": {group: list(units) for group, units in built.achieved.kept.items()},
        "versions": {package: metadata.version(package) for package in PACKAGES[built.runtime]},
        "built": _dump(built),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _dump(record: Record) -> Any:
    return record.model_dump(mode="json")


def _check_parity(
    runtime: Runtime,
    model: nn.Module,
    example: dict[str, Tensor],
    plan: Plan,
    draft: Path,
    lowered: Lowered,
    deployment: Deployment,
) -> tuple[float | None, CheckInputs]:
    """Largest absolute difference of the reloaded artefact's logits to the reference's.

    ``TrialError`` when it is not small beside the logits, when a value is not finite or when the
    shape is another; None for a scheme without an exact reference. And what the artefact answers
    to inputs that anyone can make again.
    """
    threads = torch.get_num_threads()
    try:
        served = open_artefact(draft, deployment.threads)
    except ArtefactError as error:
        reason = first_line(error.__cause__ or error)
        raise TrialError(
            f"{runtime.name} can't open what was built for it: {reason}. Try another runtime or "
            "scheme."
        ) from error
    try:
        parity: float | None = 0.0
        for inputs in _parity_inputs(example, lowered.fixed_batch):
            difference = _difference(runtime, model, inputs, plan, served, lowered)
            parity = None if difference is None or parity is None else max(parity, difference)
        arrays = {name: value.numpy() for name, value in example.items()}
        return parity, CheckInputs.like(arrays).answered_by(served)
    finally:
        torch.set_num_threads(threads)


def _parity_inputs(example: dict[str, Tensor], fixed_batch: int | None) -> list[dict[str, Tensor]]:
    # A free batch axis is tried at a size that was not traced.
    one = {name: value[:1] for name, value in example.items()}
    return [example, one] if fixed_batch is None else [example]


def _difference(
    runtime: Runtime,
    model: nn.Module,
    inputs: dict[str, Tensor],
    plan: Plan,
    served: ServedModel,
    lowered: Lowered,
) -> float | None:
    arrays = tuple(np.ascontiguousarray(value.numpy()) for value in inputs.values())
    prepared = feed_of(served, arrays)
    try:
        logits = served.run(prepared)
    except Exception as error:  # a runtime raises what it likes
        raise TrialError(
            f"The artefact fails on a batch of {len(arrays[0])}: {first_line(error)}. Try another "
            "runtime."
        ) from error
    reference = runtime.reference(model, inputs, plan.quantization)
    batch = len(arrays[0])
    if logits.shape[0] != batch or not np.isfinite(logits).all():
        raise TrialError(
            f"The artefact's logits for {batch} samples have shape {logits.shape} and "
            f"{'are finite' if np.isfinite(logits).all() else 'are not all finite'}. "
            "Try another runtime or scheme."
        )
    if reference is None:
        return None
    expected = reference.numpy()
    if expected.shape != logits.shape:
        raise TrialError(
            f"The artefact returns logits of shape {logits.shape} where the model returns "
            f"{expected.shape}. Try another runtime."
        )
    difference = float(np.abs(expected - logits).max())
    largest = max(1.0, float(np.abs(expected).max()))
    if lowered.int8_layers == () and not difference <= PARITY_TOLERANCE * largest:
        raise TrialError(
            f"The artefact's logits differ from the model's by {difference:.3g} where the largest "
            f"is {largest:.3g}. Try another runtime."
        )
    return difference


def _import_serve(path: Path) -> ModuleType:
    name = f"profiling_agent_served_{next(_serial)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    write_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # an artefact holds what its manifest says and nothing else
    try:
        with no_telemetry():
            spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = write_bytecode
    return module


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StorageError(f"{str(folder)!r} is a file. Pass a folder with --out.")
    if any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise StorageError(
            f"{str(folder)!r} holds other things than an artefact. Pass an empty folder with --out."
        )


def _move(draft: Path, folder: Path) -> None:
    """Put the draft in place; what was there goes aside first and comes back if that fails."""
    if not folder.exists():
        draft.replace(folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    folder.replace(aside)
    try:
        draft.replace(folder)
    except OSError:
        aside.replace(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
