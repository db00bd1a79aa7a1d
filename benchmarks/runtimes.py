"""Every runtime and scheme of this machine on the paper's architectures: time, size, memory.

    python benchmarks/runtimes.py --json benchmarks/results/runtimes.json
    python benchmarks/runtimes.py --quick --only openvino vit_b

ViT-B/16, DeiT-B, Swin-B and ResNet-101 of timm with random weights, which are good for costs and
say nothing of accuracy; static schemes calibrate on random inputs. Each artefact is built as the
loop builds its controls and raced by the loop's own protocol, every racer in a process of its own,
against the untouched module in eager PyTorch and ONNX Runtime's fp32. There are too many racers to
hold at once, so they run in groups, each with its own pair of these two: a ratio never crosses
groups. The paper's own way, ``quantize_dynamic`` of the eager module, runs too.

Throughput is that of two workers, processes of one thread each that run at the same time, at batch
size 1.

What can't be built or run is a row with its reason. Exit code 1 when the best static int8 of an
architecture misses its target at batch size 1. Stop everything else on the machine first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paper_quantization import MODELS
from torch import nn

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.hubs.found import find_model
from profiling_agent.acquisition.request import Request
from profiling_agent.building import WorkerBuilder
from profiling_agent.deployment.artefact import baseline_size
from profiling_agent.deployment.lowered import plain_linears
from profiling_agent.deployment.opened import read_manifest
from profiling_agent.deployment.runtimes import available
from profiling_agent.deployment.torch_runtime import inference_copy, quantize_dynamic
from profiling_agent.errors import ProfilingAgentError
from profiling_agent.evaluation.measure import FINAL, Protocol, Race, race
from profiling_agent.evaluation.predictor import Predictor, ProbeProcess
from profiling_agent.machine.clock import summarise
from profiling_agent.machine.processor import describe_machine
from profiling_agent.machine.threads import default_threads
from profiling_agent.records.common import Deployment, Interval
from profiling_agent.records.evaluation import BuiltArtefact
from profiling_agent.records.plan import Plan, Quantization
from profiling_agent.records.profile import RuntimeSchemes

TIMM_NAME = "BENCHMARK_TIMM_NAME"  # the paper's module is rebuilt in its probe, which inherits it
EAGER, PAPER, ONNX = "eager", "paper", "onnxruntime fp32"
GROUP_SIZE = 6
LATENCY = replace(FINAL, num_blocks=8)
LARGE_BATCH = replace(LATENCY, num_blocks=5, min_calls=1, warmup=1)
QUICK = Protocol(num_blocks=5, block_s=0.1, min_calls=1, warmup=1)
NUM_WORKERS = 2
WORK = Protocol(num_blocks=5, block_s=0.6, min_calls=1, warmup=1)
QUICK_WORK = Protocol(num_blocks=5, block_s=0.3, min_calls=1, warmup=1)
CALM = 1.25
"""How far an anchor's times in different groups may lie apart on a machine left alone."""
STATIC = ("int8-static", "int8-static-bf16")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the best static int8 must reach at batch size 1; ``size`` as a share of the original."""

    over_eager: float
    over_onnxruntime: float
    size: float | None = None


TARGETS = {
    "vit_b": Target(over_eager=3.3, over_onnxruntime=2.8),
    "swin_b": Target(over_eager=4.0, over_onnxruntime=3.0),
    "resnet101": Target(over_eager=5.5, over_onnxruntime=3.5, size=0.27),
}


def paper_model() -> nn.Module:
    """The module as the paper measures it: linear layers swapped by torch's dynamic int8 ones."""
    model = inference_copy(find_model(f"timm:{os.environ[TIMM_NAME]}", "random").module)
    return quantize_dynamic(model, tuple(plain_linears(model)))


class Workers:
    """Two one-thread processes of one artefact that work at the same time, as one predictor."""

    def __init__(self, open_one: Callable[[], ProbeProcess]) -> None:
        self._probes: list[ProbeProcess] = []
        try:
            for _ in range(NUM_WORKERS):
                self._probes.append(open_one())
        except BaseException:
            self.close()
            raise

    def prepare(self, split: Path) -> None:
        for probe in self._probes:
            probe.prepare(split)

    def time_block(self, seconds: float, min_calls: int, warmup: int) -> list[float]:
        """Milliseconds of the calls of both."""
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            blocks = pool.map(lambda p: p.time_block(seconds, min_calls, warmup), self._probes)
            return [call for block in blocks for call in block]

    def logits(self, split: Path, start: int = 0, stop: int | None = None) -> Any:
        return self._probes[0].logits(split, start, stop)

    def memory_bytes(self) -> int | None:
        return None

    @property
    def alive(self) -> bool:
        return all(probe.alive for probe in self._probes)

    def pause(self) -> None:
        for probe in self._probes:
            probe.pause()

    def resume(self) -> None:
        for probe in self._probes:
            probe.resume()

    def close(self) -> None:
        for probe in self._probes:
            probe.close()


class Racers:
    """The racers of one model: artefacts that were built, the eager module and the paper's."""

    def __init__(self, folder: Path, data: Path, paper_data: Path) -> None:
        self.folder, self._data, self._paper_data = folder, data, paper_data
        self.built: dict[str, BuiltArtefact] = {}
        self.failed: dict[str, str] = {}

    def open(self, name: str, deployment: Deployment) -> ProbeProcess:
        if name == EAGER:
            return ProbeProcess.eager(self._data, deployment)
        if name == PAPER:
            return ProbeProcess.eager(self._paper_data, deployment)
        return ProbeProcess.artefact(self.place(name), self.built[name].runtime, deployment)

    def place(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def build(
        self, builder: WorkerBuilder, offers: Sequence[RuntimeSchemes], deployment: Deployment
    ) -> None:
        """Build what is offered, as a control is built; what has a free batch axis stays."""
        for offer in offers:
            for scheme in offer.schemes:
                name = f"{offer.runtime} {scheme}"
                if name in self.built and read_manifest(self.place(name))["dynamic_batch"]:
                    continue
                plan = Plan(
                    runtime=offer.runtime,  # pyright: ignore[reportArgumentType]
                    quantization=Quantization(scheme=scheme),
                    repair="none",
                )
                self.built.pop(name, None)
                try:
                    self.built[name] = builder.build(plan, self.place(name), deployment)
                except ProfilingAgentError as error:
                    self.failed[name] = f"not built: {error}"
                    print(f"  {name}: {self.failed[name]}", flush=True)

    def groups(self) -> Iterator[list[str]]:
        """Names that race together: a few, after the two that all are compared with."""
        anchors = [name for name in (EAGER, ONNX) if name == EAGER or name in self.built]
        others = [name for name in (PAPER, *self.built) if name not in anchors]
        for start in range(0, max(1, len(others)), GROUP_SIZE):
            yield [*anchors, *others[start : start + GROUP_SIZE]]

    def race(
        self,
        names: Sequence[str],
        opened: Callable[[str], Predictor],
        protocol: Protocol,
    ) -> tuple[Race, dict[str, int | None]]:
        """One interleaved race and the peak memory of each; who can't run is left out, noted."""
        with contextlib.ExitStack() as stack:
            racers: dict[str, Predictor] = {}
            for name in names:
                try:
                    racers[name] = opened(name)
                    stack.callback(racers[name].close)
                    racers[name].prepare(self._data / "calibration")
                    racers[name].time_block(0.0, 1, 0)
                    racers[name].pause()
                except ProfilingAgentError as error:
                    racers.pop(name, None)
                    self.failed[name] = f"not run: {error}"
                    print(f"  {name}: {self.failed[name]}", flush=True)
            call_s = racers[EAGER].time_block(0.0, 1, 0)[0] / 1e3
            racers[EAGER].pause()
            times = race(racers, self._data / "calibration", protocol.suited_to(call_s))
            memory = {name: racer.memory_bytes() for name, racer in racers.items()}
        return times, memory


def measure(
    name: str, timm_name: str, batch_sizes: Sequence[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each batch size."""
    os.environ[TIMM_NAME] = timm_name
    offers = _chosen(available(describe_machine()), args.only)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        racers = Racers(folder, folder / "data", folder / "paper_data")
        request = Request(model=f"timm:{timm_name}", weights="random")
        original_bytes = baseline_size(acquire(request, folder=folder / "data").model)
        factory = f"{Path(__file__).resolve()}:paper_model"
        acquire(Request(model=factory), folder=folder / "paper_data")
        for batch_size in batch_sizes:
            deployment = Deployment(batch_size=batch_size, threads=args.threads)
            with contextlib.closing(WorkerBuilder(folder / "data")) as builder:
                racers.build(builder, offers, deployment)
            yield {
                "model": name,
                "timm": timm_name,
                "deployment": deployment.model_dump(mode="json"),
                "original_bytes": original_bytes,
                "racers": timed(racers, deployment, quick=args.quick),
                "failed": dict(racers.failed),
            }


def _chosen(offers: Sequence[RuntimeSchemes], only: str | None) -> list[RuntimeSchemes]:
    """Offers without the schemes that ``--only`` leaves out; ONNX Runtime's fp32 always stays."""
    return [
        offer.model_copy(
            update={
                "schemes": tuple(
                    scheme
                    for scheme in offer.schemes
                    if only is None
                    or f"{offer.runtime} {scheme}" == ONNX
                    or only in (offer.runtime, f"{offer.runtime}/{scheme}")
                )
            }
        )
        for offer in offers
    ]


def timed(racers: Racers, deployment: Deployment, *, quick: bool) -> dict[str, Any]:
    """What was measured of each racer, by name; the anchors' own numbers are the first group's."""
    latency, work = (QUICK, QUICK_WORK) if quick else (LATENCY, WORK)
    with_workers = deployment.batch_size == 1
    if not with_workers:
        latency = LARGE_BATCH
    one_thread = deployment.model_copy(update={"threads": 1})
    rows: dict[str, Any] = {}
    for names in racers.groups():
        times, memory = racers.race(names, lambda n: racers.open(n, deployment), latency)
        pairs = Race(blocks={})
        if with_workers:
            pairs, _ = racers.race(
                names, lambda n: Workers(lambda: racers.open(n, one_thread)), work
            )
        for name in names:
            if name not in rows and name in times.blocks:
                rows[name] = {
                    **_described(racers.built.get(name)),
                    "timing": times.timing(name).model_dump(),
                    "over_eager": _ratio(times, name, EAGER),
                    "over_onnxruntime": _ratio(times, name, ONNX),
                    "anchors_ms": {
                        anchor: times.timing(anchor).median_ms
                        for anchor in (EAGER, ONNX)
                        if anchor in times.blocks
                    },
                    "memory_bytes": memory[name],
                    "workers": _throughput(pairs, name, deployment.batch_size),
                }
    return rows


def _described(built: BuiltArtefact | None) -> dict[str, Any]:
    if built is None:
        return {}
    return {
        "runtime": built.runtime,
        "scheme": built.scheme,
        "size_bytes": built.size_bytes,
        "weight_bytes": built.weight_bytes,
        "num_int8_layers": built.achieved.num_int8_layers,
        "num_int8_operators": built.achieved.num_int8_operators,
        "num_products": built.achieved.num_products,
        "parity": built.parity,
        "build_s": built.seconds,
    }


def _ratio(times: Race, name: str, over: str) -> dict[str, Any] | None:
    if name == over or over not in times.blocks:
        return None
    return times.speedup(name, over).model_dump()


def _throughput(pairs: Race, name: str, batch_size: int) -> dict[str, Any] | None:
    """Samples a second of both workers together, and that over the anchors'."""
    if name not in pairs.blocks:
        return None
    busy_s = [sum(block) / 1e3 / NUM_WORKERS for block in pairs.blocks[name]]
    rates = [
        batch_size * len(block) / seconds
        for block, seconds in zip(pairs.blocks[name], busy_s, strict=True)
    ]
    return {
        "per_s": summarise([[rate] for rate in rates]).model_dump()["interval_ms"],
        "over_eager": _ratio(pairs, name, EAGER),
        "over_onnxruntime": _ratio(pairs, name, ONNX),
    }


def disturbed(row: dict[str, Any]) -> list[str]:
    """Anchors whose times in the groups lie too far apart to have been left alone."""
    faults: list[str] = []
    for anchor in (EAGER, ONNX):
        known = [racer["anchors_ms"].get(anchor) for racer in row["racers"].values()]
        seen = [time for time in known if time is not None]
        if seen and max(seen) > CALM * min(seen):
            faults.append(
                f"{row['model']}: {anchor} took {min(seen):.1f} to {max(seen):.1f} ms; something "
                "else ran on this machine"
            )
    return faults


def missed(row: dict[str, Any]) -> list[str]:
    """What the best static int8 misses of its target."""
    target = TARGETS.get(row["model"])
    if target is None or row["deployment"]["batch_size"] != 1:
        return []
    static = [r for r in row["racers"].values() if r.get("scheme") in STATIC]
    if not static:
        return [f"{row['model']}: no static int8 was measured"]
    best = min(static, key=lambda r: r["timing"]["median_ms"])
    named = f"{row['model']}: {best['runtime']} {best['scheme']}"
    faults = []
    for key in ("over_eager", "over_onnxruntime"):
        ratio, wanted = best[key], getattr(target, key)
        if ratio is None or ratio["estimate"] < wanted:
            faults.append(f"{named} is {_shown(ratio).strip()} {key}, {wanted:g}x is wanted")
    share = best["size_bytes"] / row["original_bytes"]
    if target.size is not None and share > target.size:
        faults.append(f"{named} has {share:.1%} of the original's bytes, not {target.size:.0%}")
    return faults


def show(row: dict[str, Any]) -> str:
    deployment = row["deployment"]
    lines = [
        f"{row['model']}: batch {deployment['batch_size']}, {deployment['threads']} threads; "
        f"original {row['original_bytes'] / 1e6:.1f} MB"
    ]
    for name, racer in row["racers"].items():
        size, memory, workers = (racer.get(k) for k in ("size_bytes", "memory_bytes", "workers"))
        lines.append(
            f"  {name:28}{racer['timing']['median_ms']:8.1f} ms"
            f"  over eager {_shown(racer['over_eager'])}"
            f"  over onnxruntime {_shown(racer['over_onnxruntime'])}"
            f"  {_megabytes(size)} file  {_megabytes(memory)} peak"
            f"  {workers['per_s']['estimate'] if workers else float('nan'):8.1f} a second"
        )
    lines += [f"  {name:28}{reason}" for name, reason in row["failed"].items()]
    return "\n".join(lines)


def _shown(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return f"{'-':19}"
    interval = Interval.model_validate(ratio)
    return f"{interval.estimate:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def _megabytes(value: int | None) -> str:
    return f"{'-':>9}" if value is None else f"{value / 1e6:6.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default all")
    parser.add_argument("--model", help="any model of timm in their place")
    parser.add_argument("--only", help="one runtime, or runtime/scheme")
    parser.add_argument("--quick", action="store_true", help="5 short blocks, batch size 1 alone")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    chosen = {name: MODELS[name][0] for name in args.models or MODELS}
    if args.model is not None:
        chosen = {args.model: args.model}
    machine = describe_machine()
    results: dict[str, Any] = {
        "machine": machine.model_dump(mode="json"),
        "runtimes": [offer.model_dump(mode="json") for offer in available(machine)],
        "rows": [],
    }
    faults: list[str] = []
    for name, timm_name in chosen.items():
        for row in measure(name, timm_name, [1] if args.quick else args.batch_sizes, args):
            results["rows"].append(row)
            faults += missed(row) + disturbed(row)
            print(show(row), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(faults) if faults else "all targets reached on a calm machine")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
