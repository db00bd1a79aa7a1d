"""The main job on real models: verdict, speed-ups, size, and the artefact opened elsewhere.

    python benchmarks/main_job.py --json benchmarks/results/main_job.json
    python benchmarks/main_job.py --quick demo-vit

Each run is `profiling-agent optimize` in a process of its own; afterwards the artefact is opened in
a process that can't import this package and must give the reported accuracy to the digit. Workloads
whose files are missing are skipped by name. Stop everything else on the machine first.
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

HERE = Path(__file__).resolve().parent
WORKLOADS: dict[str, tuple[list[str], float, float]] = {
    # arguments, points of accuracy that may be lost, minutes
    "demo-vit": (["demo:vit"], 0.5, 3.5),
    "demo-resnet": (["demo:resnet"], 0.5, 4),
    "resnet56-cifar10": (
        [f"{HERE}/workloads.py:resnet56", "--data", f"{HERE}/workloads.py:cifar10"],
        0.5,
        8,
    ),
    "vit-tiny-imagenet": (
        [f"{HERE}/workloads.py:vit_tiny", "--data", f"{HERE}/workloads.py:imagenet"],
        1.0,
        10,
    ),
}
ASSETS = {
    "resnet56-cifar10": ["cifar10_exact_subset.npz", "cifar10_resnets/resnet56-4bfd9763.th"],
    "vit-tiny-imagenet": [
        "imagenet_val_650",
        "imagenet_sample_200",
        "vit_tiny_imagenet/vit_tiny_patch16_224.safetensors",
    ],
}
SERVED = """
import sys
sys.modules["profiling_agent"] = None
import numpy as np
run, batch_size = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, run + "/artefact")
import serve
from pathlib import Path
name = next(p for p in Path(run, "data", "test").glob("*.npy") if p.stem != "labels")
images, labels = np.load(name, mmap_mode="r"), np.load(run + "/data/test/labels.npy")
model = serve.Model(run + "/artefact")
right = 0
for start in range(0, len(images), batch_size):
    logits = model.logits(np.asarray(images[start:start + batch_size]))
    right += int((logits.argmax(1) == labels[start:start + batch_size]).sum())
print(repr(100.0 * (right / len(labels))))
"""


def missing(name: str) -> str | None:
    """The first file of a workload that isn't there."""
    folder = os.environ.get("PROFILING_AGENT_ASSETS", "")
    for file in ASSETS.get(name, []):
        if not folder or not Path(folder, file).exists():
            return file
    return None


def optimize(name: str, minutes: float, out: Path) -> dict[str, Any]:
    """One run: its record, its exit code and its wall time."""
    arguments, max_drop, _ = WORKLOADS[name]
    command = [
        sys.executable, "-m", "profiling_agent.cli", "optimize", *arguments,
        "--max-drop", str(max_drop), "--time-budget", f"{minutes}m", "--out", str(out), "--json",
    ]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - start
    if not done.stdout:
        return {"workload": name, "exit_code": done.returncode, "wall_s": seconds}
    record = json.loads(done.stdout)
    return summarise(name, record, out) | {
        "exit_code": done.returncode,
        "wall_s": round(seconds, 1),
        "time_budget_s": 60.0 * minutes,
        "max_drop": max_drop,
    }


def summarise(name: str, record: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the table shows, and the check of the artefact."""
    verdict = record["verdict"]
    final = next((e for e in record["final"] if e["artefact"] == verdict["trial_id"]), None)
    trials = [
        {
            "trial_id": t["trial_id"],
            "label": f"{t['plan']['runtime']} {t['plan']['quantization']['scheme']}",
            "author": t["author"],
            "status": t["status"],
            "speedup": _path(t, "evaluation", "speedup", "ratio"),
            "search_drop": _drop(t["evaluation"]),
        }
        for t in record["trials"]
    ]
    served = None if final is None else served_accuracy(record, out)
    reported = None if final is None else final["accuracy"][-1]["value"]
    return {
        "workload": name,
        "verdict": verdict,
        "original": record["baseline"],
        "handed_over": final,
        "served_accuracy": served,
        "served_equals_reported": None if served is None else served == reported,
        "trials": trials,
        "machine": record["machine"],
    }


def _path(value: Any, *keys: str) -> Any:
    for key in keys:
        value = None if value is None else value[key]
    return value


def _drop(evaluation: Any) -> Any:
    return None if evaluation is None else _path(evaluation["accuracy"][0], "drop", "estimate")


def served_accuracy(record: dict[str, Any], out: Path) -> float:
    batch_size = record["settings"]["deployment"]["batch_size"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SERVED, str(out), str(batch_size)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def show(row: dict[str, Any]) -> str:
    verdict = row.get("verdict")
    if verdict is None:
        return f"{row['workload']}: ended with exit code {row['exit_code']}"
    parts = [f"{row['workload']}: {verdict['kind']} ({row['wall_s']:.0f} s)"]
    for words, key in (("over the original", "speedup"), ("control", "speedup_over_control")):
        ratio = verdict[key]
        if ratio:
            parts.append(
                f"{ratio['estimate']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] {words}"
            )
    if verdict["drop"]:
        parts.append(f"drop {verdict['drop']['estimate']:.2f} ({verdict['evidence']})")
        parts.append(f"size {verdict['size_ratio']:.3f}")
        parts.append(f"served as reported: {row['served_equals_reported']}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; default all")
    parser.add_argument("--quick", action="store_true", help="half the time budget")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.workloads or WORKLOADS:
        absent = missing(name)
        if absent is not None:
            print(f"{name}: skipped, {absent} is missing")
            continue
        minutes = WORKLOADS[name][2] / (2 if args.quick else 1)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            rows.append(optimize(name, minutes, Path(folder) / "run"))
        print(show(rows[-1]), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
