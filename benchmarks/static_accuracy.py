"""What int8 costs in accuracy, runtime by runtime: ViT-Tiny on ImageNet, ResNet-56 on CIFAR-10.

    python benchmarks/static_accuracy.py --json benchmarks/results/static_accuracy.json
    python benchmarks/static_accuracy.py --mixed --only openvino vit_tiny

Every int8 scheme that this machine's runtimes offer, at the deployment's batch size 1 (dynamic
scales span the batch), on the 650 validation images and the 1,017 test images, calibrated on other
ones; beside them each runtime's fp32 and bf16. A row has the accuracy, what was lost against the
untouched model on the same images with its interval, whether the budget holds by the bound
(``proven``), by the estimate (``measured``) or not (``exceeded``), and how many predictions are the
original's.

With ``--mixed`` a run of `profiling-agent optimize --metric agreement` looks for the layers to keep
float, which it finds without labels and without the test images: all but 1 % of the answers on the
calibration images must stay as they were, half of what may change on the test images. The plan it
likes best is then built and scored like the others.

Nothing is timed here. What can't be built is a row with its reason. Exit code 1 when no static int8
of a model loses at most half a point, or when it agrees with the original on less than 96 % (98 %
for the mixed one).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset
from workloads import imagenet

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload
from profiling_agent.building import WorkerBuilder
from profiling_agent.deployment.runtimes import available
from profiling_agent.errors import ProfilingAgentError
from profiling_agent.evaluation.judge import Judge, find_judge
from profiling_agent.evaluation.predictor import Predictor, ProbeProcess
from profiling_agent.machine.processor import describe_machine
from profiling_agent.records.common import Deployment
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.plan import Plan, Quantization
from profiling_agent.records.trial import RunRecord, Trial

HERE = Path(__file__).resolve().parent
MAX_DROP = 0.5
AGREEMENT, MIXED_AGREEMENT = 0.96, 0.98
MIXED_MAX_DROP = 1.0
"""Points of agreement that the search for mixed precision may lose."""
STATIC = ("int8-static", "int8-static-bf16")


def imagenet_whole() -> dict[str, Any]:
    """All 650 validation images as test; the 200 sample images calibrate, and serve a search."""
    parts = imagenet()
    whole = ConcatDataset([parts["search"], parts["test"]])  # pyright: ignore[reportArgumentType]
    return {"calibration": parts["calibration"], "search": parts["calibration"], "test": whole}


MODELS: dict[str, tuple[str, str]] = {
    "vit_tiny": (f"{HERE}/workloads.py:vit_tiny", f"{HERE}/static_accuracy.py:imagenet_whole"),
    "resnet56": (f"{HERE}/workloads.py:resnet56", f"{HERE}/workloads.py:cifar10"),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One model with its data and its own answers on the test images, ready to score plans."""

    workload: Workload
    data: Path
    deployment: Deployment
    judge: Judge
    original: np.ndarray

    @classmethod
    def open(cls, request: Request, folder: Path, deployment: Deployment) -> Bench:
        """Acquire into ``folder`` and run the untouched model on the test images."""
        workload = acquire(request, folder=folder)
        judge = find_judge(workload.record.task, None)
        with contextlib.closing(ProbeProcess.eager(folder, deployment)) as eager:
            original = judge.answers(eager.logits(folder / "test"))
        return cls(
            workload=workload, data=folder, deployment=deployment, judge=judge, original=original
        )

    def score(self, predictor: Predictor) -> Accuracy:
        """Accuracy on the test images, paired with the original's."""
        ours = self.judge.answers(predictor.logits(self.data / "test"))
        return self.judge.score("test", ours, self.workload.splits["test"].labels, self.original)

    def row(self, plan: Plan, folder: Path, builder: WorkerBuilder) -> dict[str, Any]:
        """A plan built into ``folder`` and scored, or the reason why it can't be."""
        row: dict[str, Any] = {
            "runtime": plan.runtime,
            "scheme": plan.quantization.scheme,
            "keep_float": list(plan.quantization.keep_float),
        }
        try:
            built = builder.build(plan, folder, self.deployment)
            builder.pause()
            probe = ProbeProcess.artefact(folder, plan.runtime, self.deployment)
            with contextlib.closing(probe):
                accuracy = self.score(probe)
        except ProfilingAgentError as error:
            return row | {"failed": str(error)}
        return row | {
            "num_int8_layers": built.achieved.num_int8_layers,
            "num_float_layers": len(built.achieved.float_layers),
            "num_int8_operators": built.achieved.num_int8_operators,
            "num_products": built.achieved.num_products,
            "size_bytes": built.size_bytes,
            "accuracy": accuracy.model_dump(mode="json"),
            "evidence": evidence(accuracy),
        }


def evidence(accuracy: Accuracy, max_drop: float = MAX_DROP) -> str:
    """How well the budget holds: by the one-sided 95 % bound, by the estimate, or not."""
    assert accuracy.drop is not None
    if accuracy.upper_bound is not None and accuracy.upper_bound <= max_drop:
        return "proven"
    return "measured" if accuracy.drop.estimate <= max_drop else "exceeded"


def optimize(
    arguments: Sequence[str], out: Path, minutes: float, max_drop: float = MAX_DROP
) -> RunRecord:
    """The record of a run of the command line tool, which searches for ``minutes``."""
    command = [
        sys.executable, "-m", "profiling_agent.cli", "optimize", *arguments,
        "--max-drop", str(max_drop), "--time-budget", f"{minutes}m", "--out", str(out), "--json",
    ]  # fmt: skip
    alone = os.environ | {"PROFILING_AGENT_CACHE": "off"}  # nothing from earlier runs
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=alone)
    if not done.stdout:
        raise SystemExit(f"profiling-agent optimize ended with exit code {done.returncode}")
    return RunRecord.model_validate_json(done.stdout)


def mixed_trial(record: RunRecord, max_drop: float = MAX_DROP) -> Trial | None:
    """The fastest trial in mixed precision and nothing pruned that is within the budget on search.

    Without any within it, the one that loses least; None when no such trial was measured.
    """
    mixed = [
        trial
        for trial in record.trials
        if trial.evaluation is not None
        and trial.plan.quantization.scheme in STATIC
        and trial.plan.quantization.keep_float
        and not trial.plan.pruning
    ]
    within = [trial for trial in mixed if _search_drop(trial) <= max_drop]
    if within:
        return max(within, key=_speedup)
    return min(mixed, key=_search_drop, default=None)


def _search_drop(trial: Trial) -> float:
    accuracy = trial.evaluation.on("search") if trial.evaluation else None
    return accuracy.drop.estimate if accuracy and accuracy.drop else float("inf")


def _speedup(trial: Trial) -> float:
    speedup = trial.evaluation.speedup if trial.evaluation else None
    return speedup.ratio.estimate if speedup else 0.0


def plans(only: str | None) -> Iterator[Plan]:
    """One plan without pruning for each runtime and scheme of this machine."""
    for offer in available(describe_machine()):
        for scheme in offer.schemes:
            if only in (None, offer.runtime, f"{offer.runtime}/{scheme}"):
                yield Plan(
                    runtime=offer.runtime,  # pyright: ignore[reportArgumentType]
                    quantization=Quantization(scheme=scheme),
                    repair="none",
                )


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    model, data = MODELS[name]
    deployment = Deployment(batch_size=1, threads=args.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        bench = Bench.open(Request(model=model, data=data), folder / "data", deployment)
        labels = bench.workload.splits["test"].labels
        value = bench.judge.value(bench.original, labels, bench.original)
        result: dict[str, Any] = {
            "model": name,
            "num_samples": len(bench.original),
            "original": value,
            "deployment": deployment.model_dump(mode="json"),
            "rows": [],
        }
        print(f"{name}: {value:.2f} % of {len(bench.original):,} images", flush=True)
        chosen = list(plans(args.only))
        if args.quick:
            chosen = [plan for plan in chosen if plan.quantization.scheme in STATIC]
        with contextlib.closing(WorkerBuilder(folder / "data")) as builder:
            if args.mixed:
                chosen += mixed_plans(name, args, folder / "runs")
            for number, plan in enumerate(chosen):
                row = bench.row(plan, folder / f"artefact-{number}", builder)
                result["rows"].append(row)
                print(show(row), flush=True)
    return result


def mixed_plans(name: str, args: argparse.Namespace, folder: Path) -> list[Plan]:
    """For each runtime with static schemes, the plan in mixed precision that a run found."""
    runtimes = dict.fromkeys(
        plan.runtime for plan in plans(args.only) if plan.quantization.scheme in STATIC
    )
    model, data = MODELS[name]
    found: list[Plan] = []
    for runtime in runtimes:
        arguments = [
            model, "--data", data, "--runtime", runtime, "--threads", str(args.threads),
            "--metric", "agreement",
        ]  # fmt: skip
        record = optimize(arguments, folder / runtime, args.minutes, MIXED_MAX_DROP)
        trial = mixed_trial(record, MIXED_MAX_DROP)
        if trial is None:
            print(f"  {runtime}: no trial in mixed precision was measured", flush=True)
        else:
            found.append(trial.plan)
    return found


def faults_of(result: dict[str, Any]) -> list[str]:
    """What the best static rows of a model miss: of those in int8 throughout, and of the mixed."""
    faults: list[str] = []
    static = [r for r in result["rows"] if r["scheme"] in STATIC and "accuracy" in r]
    for kind, least in (("int8 throughout", AGREEMENT), ("mixed", MIXED_AGREEMENT)):
        rows = [r for r in static if bool(r["keep_float"]) == (kind == "mixed")]
        good = [
            r for r in rows if r["evidence"] != "exceeded" and r["accuracy"]["agreement"] >= least
        ]
        if rows and not good:
            faults.append(
                f"{result['model']}, {kind}: none loses at most {MAX_DROP:g} points and agrees on "
                f"{least:.0%}"
            )
    if not static:
        faults.append(f"{result['model']}: no static int8 was measured")
    return faults


def show(row: dict[str, Any]) -> str:
    name = f"{row['runtime']} {row['scheme']}" + (" mixed" if row["keep_float"] else "")
    if "failed" in row:
        return f"  {name:32}{row['failed']}"
    accuracy = row["accuracy"]
    drop = accuracy["drop"]
    return (
        f"  {name:32}{accuracy['value']:6.2f} %  drop {drop['estimate']:5.2f} "
        f"[{drop['low']:.2f}, {drop['high']:.2f}] {row['evidence']:9}"
        f"agreement {accuracy['agreement']:.1%}  {row['num_int8_layers']} layers int8, "
        f"{row['num_float_layers']} float"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default all")
    parser.add_argument("--only", help="one runtime, or runtime/scheme")
    parser.add_argument("--quick", action="store_true", help="static schemes alone")
    parser.add_argument("--mixed", action="store_true", help="also search for mixed precision")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": describe_machine().model_dump(mode="json"),
        "max_drop": MAX_DROP,
        "models": [],
    }
    faults: list[str] = []
    for name in args.models or MODELS:
        try:
            result = measure(name, args)
        except ProfilingAgentError as error:
            print(f"{name}: {error}")
            continue
        results["models"].append(result)
        faults += faults_of(result)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(faults) if faults else "all within the budget")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
