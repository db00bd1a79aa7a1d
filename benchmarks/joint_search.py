"""Pruning and quantization in one search, over the best that quantization alone gives.

    python benchmarks/joint_search.py --json benchmarks/results/joint_search.json
    python benchmarks/joint_search.py --quick vit-tiny

ViT-Tiny on ImageNet, ResNet-56 on CIFAR-10 and the two demos, at drops of 0.5, 1 and 2 points and
batch sizes 1 and 8: one run of `profiling-agent optimize` each, in a process of its own. From the
record of the run: what was handed over and its speed over eager; the fastest artefact that nothing
was pruned in and that was within the same budget, a control or one in mixed precision; and the
ratio of the two, with its interval, from the run's final race where both took part, else from the
trials. Where nothing that prunes is faster the row says so, and the archive of the run's trials
stands in the results.

Nothing is asserted but that no handed-over artefact is slower than its control. Stop everything
else on the machine first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from main_job import WORKLOADS, missing

NAMES = {
    "vit-tiny": "vit-tiny-imagenet",
    "resnet56": "resnet56-cifar10",
    "demo-vit": "demo-vit",
    "demo-resnet": "demo-resnet",
}
DROPS = (0.5, 1.0, 2.0)
BATCH_SIZES = (1, 8)
VERDICT = ("kind", "trial_id", "speedup", "speedup_over_control", "drop", "evidence")


def run(name: str, drop: float, batch_size: int, minutes: float) -> dict[str, Any]:
    job = WORKLOADS[NAMES[name]]
    row: dict[str, Any] = {"workload": name, "max_drop": drop, "batch_size": batch_size}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        command = [
            sys.executable, "-m", "profiling_agent.cli", "optimize", *job.arguments,
            "--max-drop", str(drop), "--batch-size", str(batch_size),
            "--time-budget", f"{minutes}m", "--out", str(Path(temporary) / "run"), "--json",
        ]  # fmt: skip
        start = time.monotonic()
        alone = os.environ | {"PROFILING_AGENT_CACHE": "off"}  # nothing from earlier runs
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=alone)
        row |= {"exit_code": done.returncode, "wall_s": time.monotonic() - start}
    return row | described(json.loads(done.stdout), drop) if done.stdout else row


def described(record: dict[str, Any], drop: float) -> dict[str, Any]:
    """The verdict beside the fastest trial that pruned nothing, and all trials."""
    verdict = record["verdict"]
    trials = [trial for trial in record["trials"] if trial["evaluation"] is not None]
    whole = [t for t in trials if not t["plan"]["pruning"] and _drop(t) <= drop and _speed(t)]
    pruned = [t for t in trials if t["plan"]["pruning"] and _drop(t) <= drop and _speed(t)]
    best_whole, best_pruned = (max(some, key=_speed, default=None) for some in (whole, pruned))
    handed = next((t for t in trials if t["trial_id"] == verdict["trial_id"]), None)
    return {
        "verdict": {key: verdict[key] for key in VERDICT},
        "handed_over": None if handed is None else _summary(handed),
        "best_without_pruning": None if best_whole is None else _summary(best_whole),
        "best_with_pruning": None if best_pruned is None else _summary(best_pruned),
        "over_quantization": _over(record, handed, best_whole),
        "archive": [_summary(trial) for trial in trials],
    }


def _over(
    record: dict[str, Any], handed: dict[str, Any] | None, whole: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Handed over against the fastest unpruned one, both over eager: finally, or as trials."""
    if handed is None or whole is None:
        return None
    final = {e["artefact"]: e for e in record["final"] if e["speedup"] is not None}
    names = (handed["trial_id"], whole["trial_id"])
    both = all(name in final for name in names)
    ours, theirs = (final[n]["speedup"]["ratio"] for n in names) if both else (
        trial["evaluation"]["speedup"]["ratio"] for trial in (handed, whole)
    )  # fmt: skip
    return {
        "estimate": ours["estimate"] / theirs["estimate"],
        "low": ours["low"] / theirs["high"],
        "high": ours["high"] / theirs["low"],
        "in_final_race": both,
    }


def _drop(trial: dict[str, Any]) -> float:
    drop = trial["evaluation"]["accuracy"][0]["drop"] if trial["evaluation"]["accuracy"] else None
    return float("inf") if drop is None else drop["estimate"]


def _speed(trial: dict[str, Any]) -> float:
    speedup = trial["evaluation"]["speedup"]
    return 0.0 if speedup is None else speedup["ratio"]["estimate"]


def _summary(trial: dict[str, Any]) -> dict[str, Any]:
    plan, achieved = trial["plan"], trial["achieved"]
    return {
        "trial_id": trial["trial_id"],
        "author": trial["author"],
        "label": f"{plan['runtime']} {plan['quantization']['scheme']}",
        "num_pruned_groups": len(plan["pruning"]),
        "num_kept_float": len(plan["quantization"]["keep_float"]),
        "macs_left": achieved["macs"] / achieved["original_macs"]
        if achieved and achieved["macs"] and achieved["original_macs"]
        else None,
        "speedup": trial["evaluation"]["speedup"] and trial["evaluation"]["speedup"]["ratio"],
        "search_drop": None if _drop(trial) == float("inf") else _drop(trial),
    }


def show(row: dict[str, Any]) -> str:
    named = f"{row['workload']:12}batch {row['batch_size']}  {row['max_drop']:g} points"
    if "verdict" not in row:
        return f"{named}: ended with exit code {row['exit_code']}"
    verdict, ours, whole = row["verdict"], row["handed_over"], row["best_without_pruning"]
    if ours is None or verdict["speedup"] is None:
        return f"{named}: {verdict['kind']}"
    parts = [
        f"{named}: {verdict['kind']} {ours['label']}, {ours['num_pruned_groups']} pruned, "
        f"{ours['num_kept_float']} float",
        f"{verdict['speedup']['estimate']:.2f}x over eager",
    ]
    if row["over_quantization"] and whole:
        ratio = row["over_quantization"]
        parts.append(
            f"{ratio['estimate']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] over "
            f"{whole['label']} with {whole['num_kept_float']} float"
        )
    if verdict["drop"]:
        parts.append(f"drop {verdict['drop']['estimate']:.2f} ({verdict['evidence']})")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each run")
    parser.add_argument("--drops", type=float, nargs="+", default=list(DROPS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument(
        "--quick", action="store_true", help="one point and batch size 1, half time"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.quick:
        args.drops, args.batch_sizes, args.minutes = [1.0], [1], args.minutes / 2
    rows: list[dict[str, Any]] = []
    for name in args.workloads or NAMES:
        absent = missing(NAMES[name])
        if absent is not None:
            print(f"{name}: skipped, {absent} is missing")
            continue
        for batch_size in args.batch_sizes:
            for drop in args.drops:
                rows.append(run(name, drop, batch_size, args.minutes))
                print(show(rows[-1]), flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    slower = [
        row for row in rows
        if (over := row.get("verdict", {}).get("speedup_over_control")) and over["high"] < 1.0
    ]  # fmt: skip
    for row in slower:
        print(f"slower than its control: {show(row)}")
    sys.exit(bool(slower))


if __name__ == "__main__":
    main()
