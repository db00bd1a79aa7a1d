"""Accuracy against multiply-accumulates without training: magnitude, VBP's mean shift, and ours.

    python benchmarks/pruning_curve.py --json benchmarks/results/pruning_curve.json
    python benchmarks/pruning_curve.py --quick vit_tiny

ViT-Tiny on 650 ImageNet validation images and ResNet-56 on the first 1,017 CIFAR-10 test images.
Statistics, repair and sensitivity see calibration images alone (200 other ImageNet images, 512 of
CIFAR-10's training images), no labels. All methods cut the same groups to the same MACs:

    magnitude        one ratio for all groups but residual streams, no repair
    variance         one ratio likewise, VBP's activation variance and mean shift (2507.12988)
    torch-pruning    its BasePruner with magnitude importance and its defaults, without training
    ours             ratios by measured sensitivity, optimal-brain scores, least-squares repair
    ours, ...        the same ratios and repair with the units chosen by another importance

With ``--latency`` the points of ours are also built for every runtime and raced against the whole
model in the same runtime and scheme; ``--latency-of RESULTS`` does that alone, with the plans of an
earlier run, and writes them to it. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from static_accuracy import MODELS
from torch import nn

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload, compute_logits
from profiling_agent.building import WorkerBuilder
from profiling_agent.compression.compress import Compressor
from profiling_agent.deployment.runtimes import available
from profiling_agent.errors import ProfilingAgentError
from profiling_agent.evaluation.measure import Protocol, race
from profiling_agent.evaluation.predictor import ProbeProcess
from profiling_agent.evaluation.statistics import accuracy_interval
from profiling_agent.machine.processor import describe_machine
from profiling_agent.planning.history import Pair
from profiling_agent.planning.solver import solve
from profiling_agent.profiling.static import count
from profiling_agent.profiling.whole import profile_workload
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.profile import Profile

CUTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
QUICK_CUTS = (0.15, 0.25)
FORWARDS = 25
"""What sensitivity and planning for ViT-Tiny may cost, in forwards over the test images."""
SCHEMES = ("fp32", "int8-static")
CLOSE = 0.004
"""Of the MACs: a cut this little above the wanted one is taken."""
MAX_STEPS = 22
OTHER_IMPORTANCE = ("magnitude", "variance", "taylor")
RACE = Protocol(num_blocks=8, block_s=0.15)


class Bench:
    def __init__(self, name: str, folder: Path) -> None:
        model, data = MODELS[name]
        self.name, self.folder = name, folder
        self.workload: Workload = acquire(Request(model=model, data=data), folder=folder)
        self.compressor = Compressor(self.workload)
        self.macs = self.count(self.workload.model)
        self.forward_s = 0.0

    def count(self, model: nn.Module) -> int:
        return count(model, self.workload.example(1)).module("").macs

    @torch.inference_mode()
    def accuracy(self, model: nn.Module) -> dict[str, Any]:
        split = self.workload.splits["test"]
        assert split.labels is not None
        start, right = time.perf_counter(), []
        for raw, labels in split.batches(50):
            answers = compute_logits(model, self.workload.tensors(raw)).argmax(-1).numpy()
            right.append(answers == labels)
        self.forward_s = self.forward_s or time.perf_counter() - start
        interval = accuracy_interval(np.concatenate(right))
        return {"accuracy": interval.estimate, "interval": interval.model_dump()}

    def point(self, plan: Plan) -> dict[str, Any]:
        model = self.compressor.compress(plan).model
        return {"cut": 1.0 - self.count(model) / self.macs} | self.accuracy(model)

    def inner(self) -> list[str]:
        """Groups inside blocks: those that no residual stream passes through."""
        groups = self.compressor.discovery.groups
        return [g.id for g in groups if sum(m.axis == "out" and m.tensor is None for m in g.members)
                <= 2]  # fmt: skip

    def to_cut(self, wanted: float, plan_at: Callable[[float], Plan | None], top: float) -> Plan:
        """The plan whose MACs are just below the wanted cut, by bisection of a logarithm.

        The number lies between a millionth and ``top``.
        """
        low, high, best = 1e-6, top, None
        for _ in range(MAX_STEPS):
            middle = (low * high) ** 0.5
            plan = plan_at(middle)
            cut = 0.0 if plan is None else self.cut_of(plan)
            if cut >= wanted:
                high, best = middle, plan
                if cut < wanted + CLOSE:
                    break
            else:
                low = middle
        if best is None:
            raise SystemExit(f"{self.name}: no plan cuts {wanted:.0%} of the MACs")
        return best

    def cut_of(self, plan: Plan) -> float:
        bare = plan.model_copy(
            update={
                "repair": "none",
                "pruning": tuple(
                    line.model_copy(update={"importance": "magnitude"}) for line in plan.pruning
                ),
            }
        )
        return 1.0 - self.count(self.compressor.compress(bare).model) / self.macs


def uniform(bench: Bench, importance: Any, repair: Any, wanted: float) -> Plan:
    """One ratio for all; where a head more or less is too large a step, for all but the heads."""
    ids = bench.inner()
    plan = _uniform(bench, ids, importance, repair, wanted)
    if bench.cut_of(plan) > wanted + 5 * CLOSE:
        without_heads = [name for name in ids if not name.startswith("heads:")]
        plan = _uniform(bench, without_heads, importance, repair, wanted)
    return plan


def _uniform(bench: Bench, ids: list[str], importance: Any, repair: Any, wanted: float) -> Plan:
    def plan_at(ratio: float) -> Plan:
        lines = tuple(
            PruningLine(match=_exactly(name), ratio=ratio, importance=importance) for name in ids
        )
        return Plan(runtime="torch", pruning=lines, repair=repair)

    return bench.to_cut(wanted, plan_at, 0.95)


def _exactly(name: str) -> str:
    import regex

    return regex.escape(name, special_only=True)


def ours(profile: Profile, bench: Bench, wanted: float) -> Plan:
    pair = Pair(runtime="torch", scheme="fp32")

    def plan_at(allowance: float) -> Plan | None:
        proposal = solve(pair, profile, (), Budget(max_drop=1.0), 0, allowance)
        return None if proposal is None else proposal.plan

    return bench.to_cut(wanted, plan_at, 20.0)


def torch_pruning(bench: Bench, wanted: float) -> nn.Module:
    """Its pruner on the untouched model, with the ratio that gives the wanted cut."""
    import torch_pruning as tp

    low, high, best = 0.0, 0.9, None
    for _ in range(10):
        ratio = (low + high) / 2
        model = copy.deepcopy(bench.workload.model)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
        pruner = tp.pruner.BasePruner(
            model,
            next(iter(bench.workload.example(2).values())),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            num_heads=heads,
            ignored_layers=[last],
        )
        pruner.step()
        for module in model.modules():
            if getattr(module, "qkv", None) in pruner.num_heads:
                module.num_heads = pruner.num_heads[module.qkv]  # pyright: ignore
                module.head_dim = module.qkv.out_features // (3 * module.num_heads)  # pyright: ignore
        model.eval()
        if 1.0 - bench.count(model) / bench.macs >= wanted:
            high, best = ratio, model
        else:
            low = ratio
    assert best is not None
    return best


def measure(name: str, cuts: Sequence[float], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        bench = Bench(name, Path(temporary) / "data")
        whole = bench.accuracy(bench.workload.model)
        print(f"{name}: {whole['accuracy']:.2f} % at {bench.macs / 1e6:.0f} MMACs", flush=True)
        start = time.perf_counter()
        profile = profile_workload(
            bench.workload, describe_machine(), Deployment(batch_size=1, threads=args.threads),
            seconds=1e6, compressor=bench.compressor, with_widths=False,
        )  # fmt: skip
        spent = time.perf_counter() - start
        result: dict[str, Any] = {
            "model": name,
            "num_samples": bench.workload.splits["test"].info.num_samples,
            "macs": bench.macs,
            "whole": whole,
            "planning_s": spent,
            "planning_forwards": spent / bench.forward_s,
            "points": [],
        }
        print(f"  sensitivity took {spent / bench.forward_s:.1f} forwards over the test images")
        plans: dict[float, Plan] = {}
        for wanted in cuts:
            plans[wanted] = ours(profile, bench, wanted)
            point: dict[str, Any] = {"wanted": wanted, "ours": bench.point(plans[wanted])}
            for method, importance, repair in (
                ("magnitude", "magnitude", "none"),
                ("variance", "variance", "mean-shift"),
            ):
                point[method] = bench.point(uniform(bench, importance, repair, wanted))
            for importance in OTHER_IMPORTANCE:
                point[f"ours, {importance}"] = bench.point(with_units_by(plans[wanted], importance))
            point["torch_pruning"] = attempted(lambda w=wanted: of_torch_pruning(bench, w))
            point["plan"] = plans[wanted].model_dump(mode="json")
            result["points"].append(point)
            print(show(point), flush=True)
        if args.latency:
            result["latency"] = latencies(bench, plans, args.threads, Path(temporary))
        return result


def add_latencies(path: Path, names: Sequence[str], threads: int) -> None:
    """The times of the points that a file of results holds, written into it."""
    results = json.loads(path.read_text())
    results["latency_machine"] = describe_machine().model_dump(mode="json")
    for result in results["models"]:
        if result["model"] not in names:
            continue
        plans = {point["wanted"]: Plan.model_validate(point["plan"]) for point in result["points"]}
        print(f"{result['model']}:", flush=True)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
            bench = Bench(result["model"], Path(temporary) / "data")
            result["latency"] = latencies(bench, plans, threads, Path(temporary))
        path.write_text(json.dumps(results, indent=1) + "\n")


def with_units_by(plan: Plan, importance: str) -> Plan:
    lines = tuple(line.model_copy(update={"importance": importance}) for line in plan.pruning)
    return plan.model_copy(update={"pruning": lines})


def of_torch_pruning(bench: Bench, wanted: float) -> dict[str, Any]:
    model = torch_pruning(bench, wanted)
    return {"cut": 1.0 - bench.count(model) / bench.macs} | bench.accuracy(model)


def attempted(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # whatever it raises is the result
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def latencies(
    bench: Bench, plans: dict[float, Plan], threads: int, folder: Path
) -> list[dict[str, Any]]:
    """Every point in every runtime, raced against the whole model there."""
    deployment = Deployment(batch_size=1, threads=threads)
    rows: list[dict[str, Any]] = []
    for offer in available(describe_machine()):
        for scheme in (s for s in offer.schemes if s in SCHEMES):
            built: dict[str, Path] = {}
            with contextlib.closing(WorkerBuilder(bench.folder)) as builder:
                for key, plan in {"whole": Plan(runtime="torch"), **plans}.items():
                    place = folder / f"{offer.runtime}-{scheme}-{key}"
                    asked = plan.model_copy(
                        update={
                            "runtime": offer.runtime,
                            "quantization": Quantization(scheme=scheme),
                        }
                    )
                    try:
                        builder.build(asked, place, deployment)
                        built[str(key)] = place
                    except ProfilingAgentError as error:
                        rows.append(
                            {"runtime": offer.runtime, "scheme": scheme, "failed": str(error)}
                        )
            with contextlib.ExitStack() as stack:
                racers = {
                    key: stack.enter_context(
                        contextlib.closing(ProbeProcess.artefact(place, offer.runtime, deployment))
                    )
                    for key, place in built.items()
                }
                if "whole" not in racers:
                    continue
                times = race(racers, bench.folder / "calibration", RACE)
            row = {
                "runtime": offer.runtime,
                "scheme": scheme,
                "whole_ms": times.timing("whole").median_ms,
                "speedup": {
                    key: times.speedup(key, "whole").model_dump() for key in built if key != "whole"
                },
            }
            rows.append(row)
            shown = "  ".join(
                f"-{float(k):.0%} {v['estimate']:.2f}x" for k, v in row["speedup"].items()
            )
            print(
                f"  {offer.runtime} {scheme}: {row['whole_ms']:.2f} ms whole; {shown}", flush=True
            )
    return rows


def faults_of(result: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    whole = result["whole"]["accuracy"]
    at = {point["wanted"]: point["ours"]["accuracy"] for point in result["points"]}
    if result["model"] == "vit_tiny":
        wanted = {0.15: 0.92 * whole, 0.25: 0.75 * whole}
        if result["planning_forwards"] > FORWARDS:
            faults.append(
                f"planning took {result['planning_forwards']:.1f} forwards, not {FORWARDS}"
            )
    else:
        wanted = {0.3: whole - 1.5, 0.5: whole - 7.0}
    for cut, least in wanted.items():
        if cut in at and at[cut] < least:
            faults.append(
                f"{result['model']} at -{cut:.0%}: {at[cut]:.2f} %, {least:.2f} % is wanted"
            )
    return faults


def show(point: dict[str, Any]) -> str:
    methods = [name for name in point if name not in ("wanted", "plan")]
    shown = "  ".join(
        f"{name} {point[name]['accuracy']:6.2f} % (-{point[name]['cut']:.1%})"
        if "accuracy" in point[name]
        else f"{name} failed"
        for name in methods
    )
    return f"  -{point['wanted']:.0%}: {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default both")
    parser.add_argument("--quick", action="store_true", help="two cuts")
    parser.add_argument("--latency", action="store_true", help="also time each point")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--latency-of", type=Path, help="file of results; only its points' times")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.latency_of is not None:
        add_latencies(args.latency_of, args.models or list(MODELS), args.threads)
        return
    results: dict[str, Any] = {
        "machine": describe_machine().model_dump(mode="json"),
        "models": [],
    }
    faults: list[str] = []
    for name in args.models or MODELS:
        result = measure(name, QUICK_CUTS if args.quick else CUTS, args)
        results["models"].append(result)
        faults += faults_of(result)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(faults) if faults else "all targets reached")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
