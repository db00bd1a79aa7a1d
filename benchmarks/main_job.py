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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VIT_TINY = "vit_tiny_imagenet/vit_tiny_patch16_224.safetensors"
PHOTOS = ["--data", "{assets}/imagenet_val_650", "--classes", "{assets}/imagenet_classes.txt"]
IMAGENET = ["imagenet_val_650", "imagenet_classes.txt"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command: its arguments, what may be lost, minutes, and what it stands on.

    ``made_by`` is a script that makes the model's folder, ``{made}`` in the arguments.
    """

    arguments: list[str]
    max_drop: float
    minutes: float
    needs: list[str] = field(default_factory=list)
    made_by: str | None = None


WORKLOADS = {
    "demo-vit": Job(arguments=["demo:vit"], max_drop=0.5, minutes=5),
    "demo-resnet": Job(arguments=["demo:resnet"], max_drop=0.5, minutes=5),
    "resnet56-cifar10": Job(
        arguments=[f"{HERE}/workloads.py:resnet56", "--data", f"{HERE}/workloads.py:cifar10"],
        max_drop=0.5,
        minutes=8,
        needs=["cifar10_exact_subset.npz", "cifar10_resnets/resnet56-4bfd9763.th"],
    ),
    "vit-tiny-imagenet": Job(
        arguments=[f"{HERE}/workloads.py:vit_tiny", "--data", f"{HERE}/workloads.py:imagenet"],
        max_drop=1.0,
        minutes=10,
        needs=["imagenet_sample_200", VIT_TINY, *IMAGENET],
    ),
    "timm-vit-tiny": Job(
        arguments=["timm:vit_tiny_patch16_224", "--weights", f"{{assets}}/{VIT_TINY}", *PHOTOS],
        max_drop=1.0,
        minutes=8,
        needs=[VIT_TINY, *IMAGENET],
    ),
    "hf-vit-tiny": Job(
        arguments=["hf:{made}", *PHOTOS],
        max_drop=1.0,
        minutes=8,
        needs=[VIT_TINY, *IMAGENET],
        made_by="image_model.py",
    ),
    "hf-minilm-sst2": Job(
        arguments=[
            "hf:{made}", "--data", "{assets}/sst2/dev.tsv", "--test-data", "{assets}/sst2/test.tsv",
        ],
        max_drop=1.0,
        minutes=6,
        needs=["sst2/train.tsv"],
        made_by="text_classifier.py",
    ),
    "timm-vit-base-agreement": Job(
        arguments=[
            "timm:vit_base_patch16_224", "--weights", "random", "--metric", "agreement",
            "--data", "{assets}/imagenet_val_650",
        ],
        max_drop=1.0,
        minutes=10,
        needs=IMAGENET,
    ),
}  # fmt: skip


def missing(name: str) -> str | None:
    """The first file of a workload that isn't there."""
    folder = os.environ.get("PROFILING_AGENT_ASSETS", "")
    for file in WORKLOADS[name].needs:
        if not folder or not Path(folder, file).exists():
            return file
    return None


def optimize(name: str, minutes: float, out: Path) -> dict[str, Any]:
    """One run: its record, its exit code and its wall time."""
    job, made = WORKLOADS[name], out.with_name("model")
    if job.made_by is not None:
        subprocess.run([sys.executable, str(HERE / job.made_by), str(made)], check=True)
    places = {"assets": os.environ.get("PROFILING_AGENT_ASSETS", ""), "made": str(made)}
    command = [
        sys.executable, "-m", "profiling_agent.cli", "optimize",
        *(argument.format(**places) for argument in job.arguments),
        "--max-drop", str(job.max_drop), "--time-budget", f"{minutes}m", "--out", str(out),
        "--json",
    ]  # fmt: skip
    start = time.monotonic()
    alone = os.environ | {"PROFILING_AGENT_CACHE": "off"}  # nothing from earlier runs
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=alone)
    seconds = time.monotonic() - start
    if not done.stdout:
        return {"workload": name, "exit_code": done.returncode, "wall_s": seconds}
    record = json.loads(done.stdout)
    return summarise(name, record, out) | {
        "exit_code": done.returncode,
        "wall_s": round(seconds, 1),
        "time_budget_s": 60.0 * minutes,
        "max_drop": job.max_drop,
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
    served = None if final is None else ask_artefact(out)
    reported = None if final is None else final["accuracy"][-1]["value"]
    return {
        "workload": name,
        "verdict": verdict,
        "original": record["baseline"],
        "handed_over": final,
        "served_accuracy": served,
        "served_equals_reported": None if served is None else served == reported,
        "data": None if final is None else data_rate(record, out),
        "trials": trials,
        "machine": record["machine"],
    }


def _path(value: Any, *keys: str) -> Any:
    for key in keys:
        value = None if value is None else value[key]
    return value


def _drop(evaluation: Any) -> Any:
    return None if evaluation is None else _path(evaluation["accuracy"][0], "drop", "estimate")


def data_rate(record: dict[str, Any], out: Path) -> dict[str, float]:
    """Samples a second: read and prepared, and the fastest model's that was seen in the run."""
    read = record["workload"]["reading"]["samples_per_s"]
    prepared = ask_artefact(out, "prepare")
    seen = [t["evaluation"]["throughput_per_s"] for t in record["trials"] if t["evaluation"]]
    together = 1.0 / (1.0 / read + 1.0 / prepared)
    return {
        "read_per_s": read,
        "prepared_per_s": prepared,
        "fastest_model_per_s": max(seen),
        "ratio": together / max(seen),
    }


def ask_artefact(out: Path, *what: str) -> float:
    done = subprocess.run(
        [sys.executable, "-I", str(HERE / "serve_check.py"), str(out), *what],
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
    if row.get("data"):
        parts.append(f"data {row['data']['ratio']:.1f} times the fastest model's rate")
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
        minutes = WORKLOADS[name].minutes / (2 if args.quick else 1)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            rows.append(optimize(name, minutes, Path(folder) / "run"))
        print(show(rows[-1]), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
