"""Predicted against measured latency of pruned plans, in the runtime that serves.

    python benchmarks/prediction.py --json benchmarks/results/prediction.json
    python benchmarks/prediction.py --quick vit_b

ResNet-101, ViT-B/16 and Swin-B of timm with random weights, openvino's static int8 (or ``--pair``),
batch size 1. Widths are timed as `profiling-agent optimize` times them, in ``--seconds``; then
plans that were not timed are predicted from them as the planner does, built, and raced against the
control. Plans: a quarter off everything, a quarter off the MLPs alone, and draws by seed of a ratio
for each group. The error is that of the plan's time: predicted over measured, less one.

Exit code 1 when an error is over 15 %, or a plan that is predicted to be faster measures slower
than the control beyond the interval. Stop everything else on the machine first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
from paper_quantization import MODELS

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.request import Request
from profiling_agent.building import WorkerBuilder
from profiling_agent.compression.compress import Compressor
from profiling_agent.errors import ProfilingAgentError
from profiling_agent.evaluation.measure import TRIAL, Protocol, Race, race
from profiling_agent.evaluation.predictor import Predictor, ProbeProcess
from profiling_agent.evaluation.watch import Slowed
from profiling_agent.machine.processor import describe_machine
from profiling_agent.machine.threads import default_threads
from profiling_agent.planning.estimate import predict_saved_share
from profiling_agent.profiling.whole import profile_workload
from profiling_agent.records.common import Deployment
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial
from profiling_agent.widths import measure_deployed_widths

CHOSEN = ("resnet101", "vit_b", "swin_b")
WITHIN = 0.15
NUM_DRAWS, QUICK_DRAWS = 4, 1


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What the timing of widths needs of a trial runner."""

    builder: WorkerBuilder
    deployment: Deployment
    split: Path

    def beside(self, *names: str) -> dict[str, Predictor]:
        return {}

    def race(
        self, racers: Mapping[str, Predictor], protocol: Protocol, has_time: Callable[[], bool]
    ) -> tuple[Race, Slowed]:
        return race(racers, self.split, protocol), Slowed()

    def open(self, folder: Path, runtime: str) -> ProbeProcess:
        return ProbeProcess.artefact(folder, runtime, self.deployment)


def plan_of(pair: tuple[str, str], ratios: dict[str, float], why: str) -> Plan:
    return Plan(
        runtime=pair[0],  # pyright: ignore[reportArgumentType]
        pruning=tuple(
            PruningLine(
                match=regex.escape(name, special_only=True), ratio=ratio, importance="magnitude"
            )
            for name, ratio in sorted(ratios.items())
            if ratio > 0
        ),
        quantization=Quantization(scheme=pair[1]),
        repair="none",
        why=why,
    )


def plans(profile: Profile, pair: tuple[str, str], num_draws: int) -> list[Plan]:
    ids = [group.id for group in profile.groups]
    mlps = [name for name in ids if name.startswith("mlp:")] or ids
    made = [
        plan_of(pair, dict.fromkeys(ids, 0.25), "a quarter of everything"),
        plan_of(pair, dict.fromkeys(mlps, 0.25), "a quarter of the MLPs"),
    ]
    for seed in range(num_draws):
        draw = random.Random(seed)
        ratios = {name: draw.choice((0.0, 0.125, 0.25, 0.375, 0.5)) for name in ids}
        made.append(plan_of(pair, ratios, f"drawn by seed {seed}"))
    return made


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    pair = tuple(args.pair.split("/"))
    deployment = Deployment(batch_size=1, threads=args.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        data = folder / "data"
        workload = acquire(Request(model=f"timm:{MODELS[name][0]}", weights="random"), folder=data)
        profile = profile_workload(
            workload, describe_machine(), deployment,
            compressor=Compressor(workload), with_widths=False, with_sensitivity=False,
        )  # fmt: skip
        call_s = profile.total.median_ms / 1e3 if profile.total else 0.1
        with contextlib.closing(WorkerBuilder(data)) as builder:
            runner = Runner(builder=builder, deployment=deployment, split=data / "calibration")
            control = Trial(
                trial_id="c1", plan=plan_of(pair, {}, "off the shelf"), author="control",
                is_control=True, status="done",
            )  # fmt: skip
            builder.build(control.plan, folder / "c1", deployment)
            tables, missing = measure_deployed_widths(
                runner,  # pyright: ignore[reportArgumentType]
                profile, [control], folder / "width",
                control_folder=lambda trial_id: folder / trial_id,
                seconds=args.seconds, call_s=call_s,
            )  # fmt: skip
            profile = profile.model_copy(update={"deployed_widths": tables})
            result: dict[str, Any] = {
                "model": name,
                "pair": "/".join(pair),
                "tables": [table.model_dump(mode="json") for table in tables],
                "missing": [entry.model_dump() for entry in missing],
                "plans": [],
            }
            print(f"{name}: {len(tables)} shapes timed, {len(missing)} points missing", flush=True)
            num_draws = QUICK_DRAWS if args.quick else NUM_DRAWS
            for plan in plans(profile, pair, num_draws):
                row = compare(plan, profile, runner, folder, call_s)
                result["plans"].append(row)
                print(f"  {show(row)}", flush=True)
    return result


def compare(
    plan: Plan, profile: Profile, runner: Runner, folder: Path, call_s: float
) -> dict[str, Any]:
    """The plan's time over the control's: as predicted, and as measured in one race."""
    predicted = 1.0 - predict_saved_share(profile, plan)
    row: dict[str, Any] = {"plan": plan.why, "predicted": predicted}
    try:
        runner.builder.build(plan, folder / "plan", runner.deployment)
    except ProfilingAgentError as error:
        return row | {"failed": str(error)}
    runner.builder.pause()
    with contextlib.ExitStack() as stack:
        racers = {
            name: stack.enter_context(contextlib.closing(runner.open(folder / place, plan.runtime)))
            for name, place in (("control", "c1"), ("plan", "plan"))
        }
        times = race(racers, folder / "data" / "calibration", TRIAL.suited_to(call_s))
    measured = times.speedup("control", "plan")  # the plan's latency over the control's
    return row | {
        "measured": measured.model_dump(),
        "error": predicted / measured.estimate - 1.0,
        "control_ms": times.timing("control").median_ms,
        "plan_ms": times.timing("plan").median_ms,
    }


def show(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['plan']:24}FAILED: {row['failed']}"
    measured = row["measured"]
    return (
        f"{row['plan']:24}predicted {row['predicted']:.3f} of the control's time, measured "
        f"{measured['estimate']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}], error "
        f"{row['error']:+.1%}"
    )


def faults_of(result: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    for row in result["plans"]:
        named = f"{result['model']}, {row['plan']}"
        if "failed" in row:
            faults.append(f"{named}: {row['failed']}")
            continue
        if abs(row["error"]) > WITHIN:
            faults.append(f"{named}: the prediction is off by {row['error']:+.1%}")
        if row["measured"]["low"] > 1.0 > row["predicted"]:
            faults.append(f"{named}: slower than the control")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(CHOSEN)}; default all")
    parser.add_argument("--pair", default="openvino/int8-static", help="runtime/scheme")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the widths of a model")
    parser.add_argument("--quick", action="store_true", help="one draw in place of four")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": describe_machine().model_dump(mode="json"),
        "models": [],
    }
    faults: list[str] = []
    for name in args.models or CHOSEN:
        result = measure(name, args)
        results["models"].append(result)
        faults += faults_of(result)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(faults) if faults else f"every prediction within {WITHIN:.0%}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
