"""Networks that int8 may ruin, rescued by keeping a few layers float: accuracy and speed.

    python benchmarks/mixed_precision.py --out models --json benchmarks/results/mixed_precision.json

The two networks of `mobile_model.py` (trained first when ``--out`` has no weights, some minutes).
For each, `profiling-agent optimize` searches in a process of its own; then the plan in mixed
precision that it found, the same runtime's fp32 and its plain int8 are built anew, scored on the
demo's 10,000 test images and raced against each other and the eager original in one run.

The share of int8's speed-up that is kept is (mixed - 1) / (int8 - 1), both over the runtime's fp32.
Where plain int8 is within the budget there is nothing to rescue: what the run handed over is shown.
Exit code 1 when the rescue loses more than half a point or keeps less than 60 %, or when plain int8
ruins neither network (more than 3 points). Stop everything else on the machine first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from mobile_model import EPOCHS, NETWORKS, make
from static_accuracy import MAX_DROP, STATIC, Bench, mixed_trial, optimize

from profiling_agent.acquisition.demo import DEMO_DATA
from profiling_agent.acquisition.request import Request
from profiling_agent.building import WorkerBuilder
from profiling_agent.errors import ProfilingAgentError
from profiling_agent.evaluation.measure import FINAL, Protocol, Race, race
from profiling_agent.evaluation.predictor import Predictor, ProbeProcess
from profiling_agent.machine.processor import describe_machine
from profiling_agent.machine.threads import default_threads
from profiling_agent.records.common import Deployment, Interval
from profiling_agent.records.plan import Plan, Quantization
from profiling_agent.records.trial import RunRecord, Trial

HERE = Path(__file__).resolve().parent
EAGER, FLOAT, INT8, OURS = "eager", "fp32", "int8", "ours"
RUINED_POINTS = 3.0
KEPT_SHARE = 0.6
QUICK = Protocol(num_blocks=5, block_s=0.1)


def found_by(record: RunRecord) -> tuple[Trial, Plan] | None:
    """The mixed trial of a run where plain int8 is over the budget, else what it handed over.

    With its plan. A mixed plan that was handed over and also prunes is taken without its pruning,
    which would hide what the float layers cost.
    """
    plain = [
        trial.evaluation.on("search")
        for trial in record.trials
        if trial.is_control and trial.evaluation and trial.plan.quantization.scheme in STATIC
    ]
    drops = [accuracy.drop.estimate for accuracy in plain if accuracy and accuracy.drop]
    is_ruined = not drops or min(drops) > MAX_DROP
    mixed, verdict = mixed_trial(record), record.verdict
    if is_ruined and mixed is not None:
        return mixed, mixed.plan
    if verdict is None or verdict.trial_id is None:
        return None
    handed = next(t for t in record.trials if t.trial_id == verdict.trial_id)
    if not is_ruined:
        return handed, handed.plan
    if not handed.plan.quantization.keep_float:
        return None
    return handed, handed.plan.model_copy(update={"pruning": (), "repair": "none"})


def plans_of(ours: Plan, runtime: str) -> dict[str, Plan]:
    """What is compared: the runtime's fp32, its plain int8 of the same scheme, and ours."""
    scheme = ours.quantization.scheme
    int8 = scheme if scheme in STATIC else STATIC[0]
    plain = {FLOAT: "fp32", INT8: int8}
    return {
        name: Plan(
            runtime=runtime,  # pyright: ignore[reportArgumentType]
            quantization=Quantization(scheme=value),
            repair="none",
        )
        for name, value in plain.items()
    } | {OURS: ours}


def measure(name: str, args: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    weights = args.out / f"{name}.safetensors"
    if not weights.exists():
        make(name, args.epochs, args.out)
    model = f"{HERE}/mobile_model.py:{name}"
    deployment = Deployment(batch_size=1, threads=args.threads)
    row: dict[str, Any] = {"network": name, "deployment": deployment.model_dump(mode="json")}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary)
        arguments = [
            model, "--weights", str(weights), "--data", str(DEMO_DATA),
            "--runtime", args.runtime, "--threads", str(args.threads),
        ]  # fmt: skip
        record = optimize(arguments, folder / "run", args.minutes)
        row["verdict"] = record.verdict.model_dump(mode="json") if record.verdict else None
        found = found_by(record)
        if found is None:
            return row | {"failed": "the run measured no trial in mixed precision"}
        trial, plan = found
        row |= {"author": trial.author, "plan": plan.model_dump(mode="json")}
        request = Request(model=model, weights=str(weights), data=str(DEMO_DATA))
        bench = Bench.open(request, folder / "data", deployment)
        labels = bench.workload.splits["test"].labels
        row["original"] = bench.judge.value(bench.original, labels, bench.original)
        return row | compared(bench, plans_of(plan, plan.runtime), folder, protocol)


def compared(
    bench: Bench, plans: dict[str, Plan], folder: Path, protocol: Protocol
) -> dict[str, Any]:
    """Accuracy of each artefact, one race of all, and the share of int8's speed-up kept."""
    rows: dict[str, Any] = {}
    with contextlib.closing(WorkerBuilder(bench.data)) as builder:
        for name, plan in plans.items():
            rows[name] = bench.row(plan, folder / name, builder)
    built = [name for name, row in rows.items() if "failed" not in row]
    times = timed(bench, plans, built, folder, protocol)
    for name in built:
        rows[name]["timing"] = times.timing(name).model_dump()
        rows[name]["over_eager"] = times.speedup(name, EAGER).model_dump()
        if FLOAT in built and name != FLOAT:
            rows[name]["over_fp32"] = times.speedup(name, FLOAT).model_dump()
    return {
        "eager": times.timing(EAGER).model_dump(),
        "artefacts": rows,
        "kept_share": kept_share(times) if {FLOAT, INT8, OURS} <= set(built) else None,
    }


def timed(
    bench: Bench, plans: dict[str, Plan], built: list[str], folder: Path, protocol: Protocol
) -> Race:
    with contextlib.ExitStack() as stack:
        racers: dict[str, Predictor] = {EAGER: ProbeProcess.eager(bench.data, bench.deployment)}
        stack.callback(racers[EAGER].close)
        for name in built:
            racers[name] = ProbeProcess.artefact(
                folder / name, plans[name].runtime, bench.deployment
            )
            stack.callback(racers[name].close)
        return race(racers, bench.data / "calibration", protocol)


def kept_share(times: Race) -> float | None:
    """Of what plain int8 gains over fp32; None when it gains nothing."""
    gained = times.speedup(INT8, FLOAT).estimate - 1.0
    return (times.speedup(OURS, FLOAT).estimate - 1.0) / gained if gained > 0 else None


def drop_of(row: dict[str, Any], name: str) -> float | None:
    found = row.get("artefacts", {}).get(name, {})
    return found["accuracy"]["drop"]["estimate"] if "accuracy" in found else None


def faults_of(rows: list[dict[str, Any]]) -> list[str]:
    faults: list[str] = []
    for row in rows:
        name, drop, share = row["network"], drop_of(row, OURS), row.get("kept_share")
        if drop is None:
            reason = row.get("failed") or row["artefacts"][OURS]["failed"]
            faults.append(f"{name}: no rescue: {reason}")
        elif drop > MAX_DROP:
            faults.append(f"{name}: ours loses {drop:.2f} points, {MAX_DROP:g} may be lost")
        if drop is not None and (share is None or share < KEPT_SHARE):
            shown = "nothing that can be told" if share is None else f"{share:.0%}"
            faults.append(f"{name}: {shown} of int8's speed-up is kept, not {KEPT_SHARE:.0%}")
    lost = [drop_of(row, INT8) for row in rows]
    if not any(points is not None and points > RUINED_POINTS for points in lost):
        faults.append(f"plain int8 ruins none of these networks: {lost} points are lost")
    return faults


def show(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['network']}: {row['failed']}"
    kept = row["plan"]["quantization"]["keep_float"]
    lines = [
        f"{row['network']}: {row['original']:.2f} %, {row['plan']['runtime']}, {len(kept)} layers "
        f"kept float: {', '.join(kept) or 'none'}"
    ]
    for name, artefact in row["artefacts"].items():
        if "failed" in artefact:
            lines.append(f"  {name:6}{artefact['failed']}")
            continue
        accuracy = artefact["accuracy"]
        lines.append(
            f"  {name:6}{artefact['scheme']:18}{accuracy['value']:6.2f} %"
            f"  drop {accuracy['drop']['estimate']:6.2f} ({artefact['evidence']})"
            f"  agreement {accuracy['agreement']:.1%}  {artefact['timing']['median_ms']:.3f} ms"
            f"  over eager {_shown(artefact['over_eager'])}"
            f"  over fp32 {_shown(artefact.get('over_fp32'))}"
        )
    share = row["kept_share"]
    lines.append(f"  share of int8's speed-up kept: {'-' if share is None else f'{share:.0%}'}")
    return "\n".join(lines)


def _shown(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    interval = Interval.model_validate(ratio)
    return f"{interval.estimate:.2f}x [{interval.low:.2f}, {interval.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; default both")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of a training")
    parser.add_argument("--runtime", default="openvino", help="as of profiling-agent optimize")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each search")
    parser.add_argument("--quick", action="store_true", help="short races, half the minutes")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.quick:
        args.minutes /= 2
    rows: list[dict[str, Any]] = []
    for name in args.networks or NETWORKS:
        try:
            rows.append(measure(name, args, QUICK if args.quick else FINAL))
        except ProfilingAgentError as error:
            rows.append({"network": name, "failed": str(error)})
        print(show(rows[-1]), flush=True)
        if args.json is not None:
            results = {"machine": describe_machine().model_dump(mode="json"), "rows": rows}
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    faults = faults_of(rows)
    print("\n".join(faults) if faults else "rescued within the budget")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
