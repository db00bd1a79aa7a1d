"""Pruning and quantization in one search, over the best that quantization alone gives.

    python benchmarks/joint_search.py --json benchmarks/results/joint_search.json
    python benchmarks/joint_search.py --quick demo-resnet

ViT-Tiny on ImageNet, ResNet-56 on CIFAR-10 and the two demos, at batch sizes 1 and 8 and drops of
0.5, 1 and 2 points. For each workload and batch size original, controls and profile are measured
once, as a run of ``--minutes`` would, and the solver searches ``--trials`` plans for each drop; a
plan that an earlier drop tried is not measured again. Candidates are chosen on the search split.

``without_pruning`` is the fastest artefact that nothing was pruned in, control or mixed precision,
within the drop on search and test; ``with_pruning`` the fastest pruned one, likewise; their ratio,
with its interval, comes from one race of the two. Where nothing that prunes is faster the row says
so, and the archive of all trials stands beside it.

Nothing is asserted. Stop everything else on the machine first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from main_job import WORKLOADS, missing

from profiling_agent.ablation import Comparison, ablation_settings
from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.request import Request
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.machine.clock import now
from profiling_agent.machine.processor import describe_machine
from profiling_agent.machine.threads import default_threads
from profiling_agent.planning.history import feasible, relative_latency, search_drop
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import RunSettings, Trial
from profiling_agent.report.live import LineProgress
from profiling_agent.run_profile import take_profile
from profiling_agent.run_state import RunState
from profiling_agent.workbench import Workbench

NAMES = {
    "demo-vit": "demo-vit",
    "demo-resnet": "demo-resnet",
    "resnet56": "resnet56-cifar10",
    "vit-tiny": "vit-tiny-imagenet",
}
DROPS = (0.5, 1.0, 2.0)
BATCH_SIZES = (1, 8)
MOST_JUDGED = 3
"""Pruned artefacts that are judged on the test split, the fastest first, until one is within."""


def search(name: str, batch_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One workbench, and a row for each drop."""
    arguments = WORKLOADS[NAMES[name]].arguments
    data = arguments[arguments.index("--data") + 1] if "--data" in arguments else None
    request = Request(model=arguments[0], data=data)
    deployment = Deployment(batch_size=batch_size, threads=args.threads)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as temporary,
        contextlib.ExitStack() as stack,
    ):
        store = RunStore(Path(temporary) / "run")
        store.create()
        start = now()
        store.journal.clock = lambda: now() - start
        workload = acquire(request, folder=store.data)
        budget = Budget(max_drop=max(args.drops), time_s=60 * args.minutes, max_trials=args.trials)
        settings = RunSettings(
            budget=budget, deployment=deployment, runtimes=("torch", "onnxruntime", "openvino")
        )
        state = RunState(settings=settings, workload=workload.record, machine=describe_machine())
        bench = Workbench(
            store=store, settings=settings, workload=workload,
            judge=find_judge(workload.record.task, None), state=state,
            progress=LineProgress(args.log), is_live=False, stack=stack,
        )  # fmt: skip
        bench.set_up()
        profile = take_profile(bench)
        for drop in args.drops:
            bench.time_s = store.journal.clock() + 60 * args.minutes
            row: dict[str, Any] = {"workload": name, "batch_size": batch_size, "max_drop": drop}
            rows.append(row | at_drop(bench, profile, budget.model_copy(update={"max_drop": drop})))
            rows[-1]["seconds_so_far"] = now() - start
            print(show(rows[-1]), flush=True)
    return rows


def at_drop(bench: Workbench, profile: Profile | None, budget: Budget) -> dict[str, Any]:
    settings = ablation_settings(
        budget, deployment=bench.deployment, runtimes=bench.settings.runtimes,
        planners=("solver",), num_seeds=1, time_s=4 * budget.time_s,
    )  # fmt: skip
    comparison = Comparison(bench, settings)
    arm = comparison.walk(profile).arms[0]
    ids = {attempt.measured_as for attempt in arm.attempts}
    trials = [t for t in bench.state.trials if t.is_control or t.trial_id in ids]
    whole = first_within(comparison, [t for t in trials if not t.plan.pruning], budget, None)
    reference = whole[0].trial_id if whole else None
    pruned = first_within(comparison, [t for t in trials if t.plan.pruning], budget, reference)
    over = pruned[2] if pruned else None
    return {
        "without_pruning": whole and _summary(whole[0]) | {"test": _test(whole[1])},
        "with_pruning": pruned and _summary(pruned[0]) | {"test": _test(pruned[1])},
        "over_quantization": over and over.model_dump(),
        "ended": arm.ended,
        "archive": [_summary(trial) for trial in trials],
    }


def first_within(
    comparison: Comparison, trials: Sequence[Trial], budget: Budget, reference: str | None
) -> tuple[Trial, Accuracy, Any] | None:
    """The fastest on the search split that is within the drop on the test split too."""
    for trial in feasible(trials, budget)[:MOST_JUDGED]:
        test, over, why = comparison.judged(trial.trial_id, reference)
        if why:
            print(f"{trial.trial_id}: {why}", flush=True)
        if test is not None and test.drop is not None and test.drop.estimate <= budget.max_drop:
            return trial, test, over
    return None


def _test(accuracy: Accuracy) -> dict[str, Any]:
    return accuracy.model_dump(mode="json", include={"value", "drop", "upper_bound", "num_samples"})


def _summary(trial: Trial) -> dict[str, Any]:
    plan, achieved, relative = trial.plan, trial.achieved, relative_latency(trial)
    speedup = trial.evaluation.speedup if trial.evaluation else None
    return {
        "trial_id": trial.trial_id,
        "author": trial.author,
        "status": trial.status,
        "label": trial.label,
        "num_pruning_lines": len(plan.pruning),
        "num_kept_float": len(plan.quantization.keep_float),
        "macs_left": achieved.macs / achieved.original_macs
        if achieved and achieved.macs and achieved.original_macs
        else None,
        "speedup": speedup.ratio.model_dump() if speedup and relative else None,
        "search_drop": search_drop(trial),
    }


def show(row: dict[str, Any]) -> str:
    named = f"{row['workload']:12}batch {row['batch_size']}  {row['max_drop']:g} points"
    whole, pruned, over = (
        row[key] for key in ("without_pruning", "with_pruning", "over_quantization")
    )
    if whole is None:
        return f"{named}: nothing unpruned is within the drop"
    parts = [f"{named}: {whole['label']} {whole['speedup']['estimate']:.2f}x over eager"]
    if pruned is None or over is None:
        return f"{parts[0]}; no pruned one within the drop"
    verdict = "faster" if over["low"] > 1 else "slower" if over["high"] < 1 else "no faster"
    drop = pruned["test"]["drop"]["estimate"]
    parts.append(
        f"pruned {verdict}: {over['estimate']:.2f}x [{over['low']:.2f}, {over['high']:.2f}] over "
        f"it, {pruned['label']}, {pruned['macs_left']:.0%} of the MACs, drop {drop:.2f} on test "
        f"(bound {pruned['test']['upper_bound']:.2f})"
    )
    return "; ".join(parts)


def main() -> None:
    os.environ["PROFILING_AGENT_CACHE"] = "off"  # nothing from earlier runs
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of setting up, and of a drop")
    parser.add_argument("--trials", type=int, default=6, help="plans for each drop")
    parser.add_argument("--drops", type=float, nargs="+", default=list(DROPS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--quick", action="store_true", help="one point, batch 1, two plans")
    parser.add_argument("--log", type=argparse.FileType("w"), default="-", help="steps go here")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.quick:
        args.drops, args.batch_sizes, args.trials, args.minutes = [1.0], [1], 2, 3.0
    result: dict[str, Any] = {
        "machine": describe_machine().model_dump(mode="json"),
        "minutes": args.minutes,
        "trials": args.trials,
        "rows": [],
    }
    start = time.monotonic()
    for name in args.workloads or NAMES:
        absent = missing(NAMES[name])
        if absent is not None:
            print(f"{name}: skipped, {absent} is missing")
            continue
        for batch_size in args.batch_sizes:
            result["rows"] += search(name, batch_size, args)
            result["seconds"] = time.monotonic() - start
            if args.json is not None:
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
