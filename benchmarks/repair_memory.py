"""Peak memory of pruning with repair, over the model's own peak at inference: ViT-B/16.

    python benchmarks/repair_memory.py --json benchmarks/results/repair_memory.json

Each in a process of its own, which tells the most memory that was resident (``VmHWM``): the
model in eager PyTorch on one image; the same on a batch of 32, as calibration runs; and a plan that
cuts a quarter of all MLPs and heads with optimal-brain scores and least squares, from groups to the
model that is left, with 512 calibration images. An empty process with torch loaded is beside them.
Random weights and images: memory depends on neither. Exit code 1 when repair takes 3 times as much
as inference on one image, or more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

TIMM_NAME = "vit_base_patch16_224"
NUM_IMAGES = 512
LIMIT = 3.0
JOBS = ("empty", "inference", "batch of 32", "repair")


def images() -> dict[str, Any]:
    """Random images as calibration split, of the size that the model takes."""
    rng = np.random.default_rng(0)
    return {"calibration": rng.standard_normal((NUM_IMAGES, 3, 224, 224), dtype=np.float32)}


def work(job: str, folder: Path) -> None:
    """One job in this process; prints the peak of resident memory and the seconds as JSON."""
    from profiling_agent.acquisition.acquire import reopen
    from profiling_agent.acquisition.workload import compute_logits
    from profiling_agent.compression.compress import Compressor
    from profiling_agent.records.plan import Plan, PruningLine

    start = time.monotonic()
    if job != "empty":
        workload = reopen(folder)
        compressor = Compressor(workload)
        if job == "repair":
            line = PruningLine(match="(mlp|heads):.*", ratio=0.25)
            left = compressor.compress(Plan(runtime="torch", pruning=(line,)))
            assert left.achieved.num_parameters < left.achieved.original_parameters
        else:
            with torch.inference_mode():
                for _ in range(2):
                    compute_logits(
                        workload.model, workload.example(1 if job == "inference" else 32)
                    )
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line)) * 1024
    print(json.dumps({"peak_bytes": peak, "seconds": time.monotonic() - start}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=TIMM_NAME, help="another model of timm")
    parser.add_argument("--quick", action="store_true", help="has no effect: it takes a minute")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        work(args.job, args.folder)
        return

    from profiling_agent.acquisition.acquire import acquire
    from profiling_agent.acquisition.request import Request
    from profiling_agent.machine.processor import describe_machine

    results: dict[str, Any] = {
        "machine": describe_machine().model_dump(mode="json"),
        "model": args.model,
        "num_images": NUM_IMAGES,
        "jobs": {},
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as temporary:
        folder = Path(temporary) / "data"
        data = f"{Path(__file__).resolve()}:images"
        acquire(Request(model=f"timm:{args.model}", weights="random", data=data), folder=folder)
        for job in JOBS:
            command = [sys.executable, __file__, "--job", job, "--folder", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results["jobs"][job] = json.loads(done.stdout)
            taken = results["jobs"][job]
            print(f"{job:12}{taken['peak_bytes'] / 1e6:8.0f} MB  {taken['seconds']:6.1f} s")
    peaks = {job: taken["peak_bytes"] for job, taken in results["jobs"].items()}
    results["ratio"] = peaks["repair"] / peaks["inference"]
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"repair takes {results['ratio']:.2f} times the memory of inference on one image")
    sys.exit(results["ratio"] >= LIMIT)


if __name__ == "__main__":
    main()
