"""The paper's quantization row: dynamic int8 of every linear layer, its size and its latency.

    python benchmarks/paper_quantization.py --json benchmarks/results/paper_quantization.json
    python benchmarks/paper_quantization.py --quick resnet101

ResNet-101, ViT-B/16, DeiT-B and Swin-B of timm with random weights, so sizes and times mean
something and accuracy doesn't. Each is built as the loop builds its controls, then raced at batch
size 1 by the loop's own protocol, every racer in a process of its own:

- eager: the untouched module in PyTorch, fp32;
- paper: the same module after torch's `quantize_dynamic`, eager, as the paper measured it;
- int8: our torch artefact of the same numbers;
- onnxruntime: ONNX Runtime's fp32 artefact.

Sizes are those of the artefacts' model files, beside the files that `torch.save` writes for a state
dict, which is what the paper measured. Exit code 1 when a reduction is more than a point off the
expected one. Stop everything else on the machine first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.hubs.found import find_model
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload
from profiling_agent.deployment.artefact import baseline_size, build_artefact
from profiling_agent.deployment.lowered import plain_linears
from profiling_agent.deployment.torch_runtime import (
    inference_copy,
    int8_engine,
    quantize_dynamic,
    quiet_quantization,
)
from profiling_agent.errors import MissingDependency, TrialError
from profiling_agent.evaluation.measure import FINAL, Protocol, Race, race
from profiling_agent.evaluation.predictor import ProbeProcess
from profiling_agent.machine.processor import describe_machine
from profiling_agent.machine.threads import default_threads
from profiling_agent.profiling.static import count
from profiling_agent.records.common import Deployment, Interval
from profiling_agent.records.evaluation import Achieved, BuiltArtefact
from profiling_agent.records.plan import Plan, Quantization

MODELS: dict[str, tuple[str, str, float]] = {
    # timm's name, the paper's name, percent of the file that int8 of the linear layers saves
    "resnet101": ("resnet101", "ResNet-101", 3.4),
    "vit_b": ("vit_base_patch16_224", "ViT-B/16", 74.0),
    "deit_b": ("deit_base_patch16_224", "DeiT-B", 74.0),
    "swin_b": ("swin_base_patch4_window7_224", "Swin-B", 74.0),
}
TOLERANCE_POINTS = 1.0
QUICK = Protocol(num_blocks=5, block_s=0.1, min_calls=1, warmup=1)
ARTEFACTS = {"int8": ("torch", "int8-dynamic"), "onnxruntime": ("onnxruntime", "fp32")}


def _quantized(name: str) -> nn.Module:
    """The paper's module: timm's with its linear layers swapped by torch's dynamic int8 ones."""
    model = inference_copy(find_model(_reference(name), "random").module)
    return quantize_dynamic(model, tuple(plain_linears(model)))


def _reference(name: str) -> str:
    return f"timm:{MODELS[name][0]}"


# Factories that a probe can call in a process of its own.
resnet101_int8 = partial(_quantized, "resnet101")
vit_b_int8 = partial(_quantized, "vit_b")
deit_b_int8 = partial(_quantized, "deit_b")
swin_b_int8 = partial(_quantized, "swin_b")


def build(workload: Workload, folder: Path, deployment: Deployment) -> dict[str, BuiltArtefact]:
    """The artefacts of the table, unpruned as a control's; those that can't be built say why."""
    model, example = workload.model, workload.example(deployment.batch_size)
    macs = count(model, example).module("").macs
    achieved = Achieved(
        num_parameters=workload.record.num_parameters,
        original_parameters=workload.record.num_parameters,
        macs=macs,
        original_macs=macs,
        kept={},
        widths={},
        num_int8_layers=0,
    )
    built: dict[str, BuiltArtefact] = {}
    for name, (runtime, scheme) in ARTEFACTS.items():
        plan = Plan(
            runtime=runtime,  # pyright: ignore[reportArgumentType]
            quantization=Quantization(scheme=scheme),
            repair="none",
        )
        try:
            built[name] = build_artefact(
                model, workload.record, example, plan, achieved, folder / name, deployment
            )
        except (TrialError, MissingDependency) as error:
            print(f"  {name}: not built: {error}")
    return built


def saved_bytes(model: nn.Module) -> int:
    """Bytes of what ``torch.save`` writes for the state dict, the paper's measure of size."""
    file = io.BytesIO()
    with quiet_quantization():
        torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


def timed(
    data: Path,
    int8_data: Path,
    folder: Path,
    built: dict[str, BuiltArtefact],
    deployment: Deployment,
    protocol: Protocol,
) -> Race:
    """Race the untouched module, the paper's and the artefacts, each in its own process."""
    with contextlib.ExitStack() as stack:
        racers = {
            "eager": ProbeProcess.eager(data, deployment),
            "paper": ProbeProcess.eager(int8_data, deployment),
        }
        for name, artefact in built.items():
            racers[name] = ProbeProcess.artefact(folder / name, artefact.runtime, deployment)
        for racer in racers.values():
            stack.callback(racer.close)
        return race(racers, data / "calibration", protocol)


def measure(name: str, deployment: Deployment, protocol: Protocol) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        data, int8_data = folder / "data", folder / "int8_data"
        workload = acquire(Request(model=_reference(name), weights="random"), folder=data)
        factory = f"{Path(__file__).resolve()}:{name}_int8"
        acquire(Request(model=factory), folder=int8_data)
        built = build(workload, folder, deployment)
        times = timed(data, int8_data, folder, built, deployment, protocol)
        sizes = measure_sizes(name, workload, built)
    racers = ["eager", "paper", *built]
    return {
        "model": MODELS[name][1],
        "timm": MODELS[name][0],
        "num_int8_layers": built["int8"].achieved.num_int8_layers if "int8" in built else None,
        "sizes": sizes,
        "timing": {racer: times.timing(racer).model_dump() for racer in racers},
        "over_eager": _ratios(times, racers, "eager"),
        "over_onnxruntime": _ratios(times, racers, "onnxruntime"),
        "parity": {racer: artefact.parity for racer, artefact in built.items()},
    }


def measure_sizes(name: str, workload: Workload, built: dict[str, BuiltArtefact]) -> dict[str, Any]:
    paper = saved_bytes(workload.model), saved_bytes(_quantized(name))
    original = baseline_size(workload.model)
    int8 = built["int8"].size_bytes if "int8" in built else None
    return {
        "original_bytes": original,
        "int8_bytes": int8,
        "reduction_percent": None if int8 is None else 100.0 * (1.0 - int8 / original),
        "paper_original_bytes": paper[0],
        "paper_int8_bytes": paper[1],
        "paper_reduction_percent": 100.0 * (1.0 - paper[1] / paper[0]),
        "expected_percent": MODELS[name][2],
    }


def _ratios(times: Race, racers: list[str], over: str) -> dict[str, Any]:
    """Speed-ups of all others over one racer; empty when that one could not be built."""
    if over not in racers:
        return {}
    return {name: times.speedup(name, over).model_dump() for name in racers if name != over}


def faults_of(row: dict[str, Any]) -> list[str]:
    sizes = row["sizes"]
    faults: list[str] = []
    for key in ("reduction_percent", "paper_reduction_percent"):
        value, expected = sizes[key], sizes["expected_percent"]
        if value is None or abs(value - expected) > TOLERANCE_POINTS:
            faults.append(f"{row['model']}: {key} is {value}, expected {expected:g}")
    return faults


def show(row: dict[str, Any]) -> str:
    sizes = row["sizes"]
    lines = [
        f"{row['model']}: {row['num_int8_layers']} linear layers in int8; "
        f"{sizes['original_bytes'] / 1e6:.1f} -> {(sizes['int8_bytes'] or 0) / 1e6:.1f} MB "
        f"(-{sizes['reduction_percent'] or 0:.1f} %), by torch.save "
        f"{sizes['paper_original_bytes'] / 1e6:.1f} -> {sizes['paper_int8_bytes'] / 1e6:.1f} MB "
        f"(-{sizes['paper_reduction_percent']:.1f} %); expected -{sizes['expected_percent']:g} %"
    ]
    for name, timing in row["timing"].items():
        eager, onnx = (row[key].get(name) for key in ("over_eager", "over_onnxruntime"))
        lines.append(
            f"  {name:12}{timing['median_ms']:8.1f} ms  over eager {_shown(eager)}"
            f"  over onnxruntime {_shown(onnx)}"
        )
    return "\n".join(lines)


def _shown(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return f"{'-':19}"
    interval = Interval.model_validate(ratio)
    return f"{interval.estimate:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default all")
    parser.add_argument("--quick", action="store_true", help="5 short blocks of each racer")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    deployment = Deployment(threads=args.threads)
    results: dict[str, Any] = {
        "machine": describe_machine().model_dump(mode="json"),
        "deployment": deployment.model_dump(mode="json"),
        "int8_engine": int8_engine(),
        "rows": [],
    }
    faults: list[str] = []
    for name in args.models or MODELS:
        try:
            row = measure(name, deployment, QUICK if args.quick else FINAL)
        except MissingDependency as error:
            sys.exit(f"{name}: {error}")
        results["rows"].append(row)
        faults += faults_of(row)
        print(show(row), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(faults) if faults else "all sizes as expected")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
