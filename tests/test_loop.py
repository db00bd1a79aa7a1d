"""One whole run through the command line, looked at from all sides; and runs that are cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from profiling_agent import workbench
from profiling_agent.api import optimize
from profiling_agent.building import WorkerBuilder
from profiling_agent.deployment.runtimes import RUNTIMES
from profiling_agent.errors import TrialError
from profiling_agent.finish import final_protocol
from profiling_agent.machine.processor import describe_machine
from profiling_agent.planning.planner import find_planner
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import EXIT_CODES, RunRecord, Trial
from profiling_agent.run_state import is_finished, read_state
from profiling_agent.workbench import Workbench
from small_workload import make_data, train, write_project

MAX_DROP, SECONDS = 2.0, 120
SERVE_CHECK = Path(__file__).resolve().parents[1] / "benchmarks" / "serve_check.py"


def command(project: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "profiling_agent.cli", "optimize", f"{project / 'model.py'}:model",
        "--weights", str(project / "weights.safetensors"),
        "--data", f"{project / 'data.py'}:val",
        "--max-drop", str(MAX_DROP), "--time-budget", f"{SECONDS}s", "--max-trials", "2",
        "--threads", "1", "--runtime", "onnxruntime,torch", "--out", str(out), "--json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    """A finished run: its folder and what ``--json`` printed."""
    out = tmp_path_factory.mktemp("run") / "result"
    done = subprocess.run(command(project, out), capture_output=True, text=True, timeout=290)
    assert "Traceback" not in done.stderr, done.stderr
    record = RunRecord.model_validate_json(done.stdout)
    assert record.verdict is not None
    assert done.returncode == EXIT_CODES[record.verdict.kind], done.stderr
    return out, record


class TestWholeRun:
    def test_ends_near_the_time_budget(self, run: tuple[Path, RunRecord]) -> None:
        assert (
            run[1].seconds <= 1.5 * SECONDS
        )  # a shared machine; benchmarks/main_job.py holds to 1.1

    def test_measures_every_control_of_every_runtime(self, run: tuple[Path, RunRecord]) -> None:
        controls = {trial.label for trial in run[1].trials if trial.is_control}
        offered = {
            f"{runtime} {scheme}"
            for runtime in ("onnxruntime", "torch")
            for scheme in RUNTIMES[runtime].schemes(describe_machine())
        }
        left_out = {o for o in offered if any(f"control {o} was" in w for w in run[1].warnings)}
        assert controls | left_out == offered
        assert "torch int8-dynamic" in offered and len(controls) >= 2

    def test_every_trial_tells_how_far_its_outputs_are_from_the_originals(
        self, run: tuple[Path, RunRecord]
    ) -> None:
        apart = {
            trial.label: accuracy.divergence
            for trial in run[1].trials
            if trial.is_control and trial.evaluation and (accuracy := trial.evaluation.on("search"))
        }
        same = apart["onnxruntime fp32"]
        assert same is not None and abs(same) < 1e-6
        assert all(value is not None for value in apart.values())
        assert all((value or 0.0) > 1e-5 for label, value in apart.items() if "int8" in label)

    def test_the_record_on_disk_is_the_one_printed(self, run: tuple[Path, RunRecord]) -> None:
        out, record = run
        assert RunRecord.read(out / "run.json") == record

    def test_splits_are_apart(self, run: tuple[Path, RunRecord]) -> None:
        splits = run[1].workload.splits
        assert {split.name for split in splits} == {"calibration", "search", "test"}
        assert len({split.sha256 for split in splits}) == 3
        assert sum(split.num_samples for split in splits) == 3000

    def test_candidates_are_journalled_before_the_test_split_is_opened(
        self, run: tuple[Path, RunRecord]
    ) -> None:
        kinds = [kind for kind, _ in RunStore(run[0]).journal.events()]
        assert kinds.index("candidates") < kinds.index("final")
        assert max(i for i, k in enumerate(kinds) if k == "trial") < kinds.index("candidates")
        for trial in run[1].trials:
            assert trial.evaluation is None or trial.evaluation.on("test") is None

    def test_the_verdict_follows_from_what_was_measured(self, run: tuple[Path, RunRecord]) -> None:
        record = run[1]
        verdict = record.verdict
        assert verdict is not None and verdict.trial_id is not None
        final = next(e for e in record.final if e.artefact == verdict.trial_id)
        assert final.speedup is not None and final.speedup.ratio == verdict.speedup
        assert verdict.drop is not None and verdict.drop.estimate <= MAX_DROP
        if verdict.kind == "ACCEPT":
            assert verdict.speedup_over_control is not None
            assert verdict.speedup_over_control.low > 1.0

    def test_the_artefact_gives_the_reported_accuracy_without_our_package(
        self, run: tuple[Path, RunRecord]
    ) -> None:
        out, record = run
        assert record.verdict is not None
        final = next(e for e in record.final if e.artefact == record.verdict.trial_id)
        accuracy = final.on("test")
        assert accuracy is not None
        assert served_accuracy(out) == accuracy.value

    def test_plans_are_a_pure_function_of_profile_journal_and_seed(
        self, run: tuple[Path, RunRecord]
    ) -> None:
        out, record = run
        profile = Profile.read(out / "profile.json")
        planner = find_planner(record.settings.planner)
        history = [trial for trial in record.trials if trial.is_control]
        ours = [trial for trial in record.trials if not trial.is_control]
        assert ours, "the time budget allows at least one plan"
        for trial in ours:
            proposal = planner.propose(profile, tuple(history), record.settings.budget, 0)
            assert proposal is not None and proposal.plan == trial.plan
            history.append(trial)

    def test_the_profile_has_the_operators_of_the_deployed_controls(
        self, run: tuple[Path, RunRecord]
    ) -> None:
        profile = Profile.read(run[0] / "profile.json")
        found = {(deployed.runtime, deployed.scheme) for deployed in profile.deployed}
        assert {("onnxruntime", "fp32"), ("onnxruntime", "int8-static")} <= found
        layers = {name for deployed in profile.deployed for name in deployed.module_ms()}
        assert {"mlp.fc1", "mlp.fc2"} & layers or {"fc1", "fc2"} & layers

    def test_achieved_ratios_are_counted(self, run: tuple[Path, RunRecord]) -> None:
        for trial in run[1].trials:
            if trial.status == "done" and trial.plan.pruning:
                assert trial.achieved is not None and trial.achieved.macs is not None
                assert trial.achieved.num_parameters < trial.achieved.original_parameters
                assert trial.achieved.macs < (trial.achieved.original_macs or 0)

    def test_the_report_is_redrawn_from_the_folder_alone(
        self, run: tuple[Path, RunRecord], tmp_path: Path
    ) -> None:
        out, record = run
        copy = tmp_path / "copy"
        shutil.copytree(out, copy)
        shutil.rmtree(copy / "data")
        before = (copy / "report.html").read_text()
        for name in ("report.html", "run.json"):
            (copy / name).unlink()
        done = cli("report", str(copy), "--json")
        assert done.returncode == 0, done.stderr
        assert RunRecord.model_validate_json(done.stdout) == record
        assert (copy / "report.html").read_text() == before

    def test_a_finished_run_is_not_run_again(
        self, run: tuple[Path, RunRecord], project: Path
    ) -> None:
        out, record = run
        assert is_finished(RunStore(out)) and not is_finished(RunStore(out / "nothing"))
        journal = (out / "journal.jsonl").read_bytes()
        done = subprocess.run(command(project, out), capture_output=True, text=True, timeout=120)
        assert RunRecord.model_validate_json(done.stdout) == record
        assert (out / "journal.jsonl").read_bytes() == journal

    def test_another_budget_in_the_same_folder_is_refused(
        self, run: tuple[Path, RunRecord], project: Path
    ) -> None:
        before = contents(run[0])
        for other in (["--seed", "1"], ["--data", f"{project / 'data.py'}:shuffled"]):
            more = command(project, run[0], *other)
            done = subprocess.run(more, capture_output=True, text=True, timeout=120)
            assert done.returncode == 4
            assert "--restart" in done.stderr
        assert contents(run[0]) == before, "a refusal leaves the run as it was"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def served_accuracy(out: Path) -> float:
    """Percent right on the run's test split, in a process that can't import this package."""
    done = subprocess.run(
        [sys.executable, "-I", str(SERVE_CHECK), str(out)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return float(done.stdout)


def cli(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "profiling_agent.cli", *arguments],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_a_killed_run_continues_and_measures_nothing_twice(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "result"
    more = ["--runtime", "torch", "--max-trials", "1", "--time-budget", "40s"]
    process = subprocess.Popen(
        command(project, out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal = out / "journal.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if journal.exists() and '"kind": "trial"' in journal.read_text():
            break
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with journal.open("a") as file:
        file.write('{"kind": "trial", "data": {"tri')
    before = [t.trial_id for t in read_state(RunStore(out)).trials]
    kept = read_state(RunStore(out)).trials[0]
    assert before
    done = subprocess.run(command(project, out, *more), capture_output=True, text=True, timeout=250)
    record = RunRecord.model_validate_json(done.stdout)
    assert record.verdict is not None
    done_twice = [
        Trial.model_validate(data)
        for kind, data in RunStore(out).journal.events()
        if kind == "trial" and data["trial_id"] == kept.trial_id
    ]
    assert done_twice[0] == kept and record.trials[0] == done_twice[-1]
    if len(done_twice) > 1:  # only its race, and only where the machine was busy
        again = done_twice[1].evaluation
        assert len(done_twice) == 2 and again is not None and kept.evaluation is not None
        assert again.accuracy == kept.evaluation.accuracy
    ids = [trial.trial_id for trial in record.trials]
    assert len(ids) == len(set(ids)) and ids[: len(before)] == before


def test_a_live_module_goes_through_the_same_loop(tmp_path: Path) -> None:
    net = train()
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    result = optimize(
        net,
        make_data(2400, seed=2),
        max_drop=MAX_DROP,
        out=tmp_path / "live",
        time_budget=20,
        max_trials=1,
        threads=1,
        runtimes=("torch",),
        show_progress=False,
    )
    assert result.verdict is not None
    assert {trial.isolation for trial in result.trials} == {"none"}
    assert any("live object" in warning for warning in result.warnings)
    for name, value in net.state_dict().items():
        assert np.array_equal(value.numpy(), weights[name].numpy())


def test_where_time_is_short_every_trial_looks_at_the_same_first_search_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "MIN_SEARCH", 281)
    monkeypatch.setattr(workbench, "SEARCH_SHARE", 0.0)
    result = optimize(
        train(),
        make_data(2400, seed=2),
        max_drop=MAX_DROP,
        out=tmp_path / "short",
        time_budget=20,
        max_trials=1,
        batch_size=4,
        threads=1,
        runtimes=("torch",),
        show_progress=False,
    )
    assert any("looks at 284 of the" in text for text in result.warnings)
    assert result.baseline is not None and result.verdict is not None
    measured = [result.baseline, *(t.evaluation for t in result.trials if t.evaluation)]
    assert len(measured) > 1
    on_search = [evaluation.on("search") for evaluation in measured]
    assert {accuracy.num_samples for accuracy in on_search if accuracy} == {284}
    assert result.verdict.drop is not None and result.verdict.drop.num_samples > 284


@pytest.mark.parametrize(
    ("call_ms", "batch_size", "there", "looked_at"),
    [
        (2.3, 1, 4000, 4000),
        (4.5, 1, 4000, 4000),  # 3,200 would fit the time: nearly all are all
        (4.5, 1, 9000, 2828),
        (4.3, 1, 9000, 2828),  # the first look at the latency varies
        (4.5, 64, 900_000, 181_056),  # whole batches
        (900.0, 1, 9000, 1000),
    ],
)
def test_how_many_search_samples_are_looked_at_hangs_little_on_the_first_look(
    call_ms: float, batch_size: int, there: int, looked_at: int
) -> None:
    bench = Workbench.__new__(Workbench)
    split = SimpleNamespace(num_samples=there)
    bench.workload = SimpleNamespace(record=SimpleNamespace(split=lambda _: split))
    bench.deployment = Deployment(batch_size=batch_size)
    bench.budget, said = Budget(max_drop=0.5, time_s=480.0), list[str]()
    bench.warn = said.append
    assert bench._search_samples(call_ms / 1e3) == looked_at
    assert [f"looks at {looked_at:,} of" in text for text in said] == [True] * (looked_at < there)


@pytest.mark.parametrize(("took", "looks"), [([9.0, 3.0, 4.0], 3), ([300.0, 200.0, 200.0], 1)])
def test_the_first_look_is_the_quietest_of_three_or_one_where_it_takes_long(
    took: list[float], looks: int
) -> None:
    times = iter([[99.0], *[[ms, ms] for ms in took]])
    predictor = SimpleNamespace(prepare=lambda _: None, time_block=lambda *_: next(times))
    bench = Workbench.__new__(Workbench)
    bench.store = SimpleNamespace(data=Path("data"))
    assert bench._seconds_a_call(predictor) == min(took[:looks]) / 1e3
    assert len(list(times)) == 3 - looks


def test_a_model_that_cannot_be_profiled_still_gets_an_answer(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(*_: object) -> None:
        raise TrialError("it did not answer within 60 s.")

    monkeypatch.setattr(WorkerBuilder, "profile", hangs)
    result = optimize(
        f"{project / 'model.py'}:model",
        f"{project / 'data.py'}:val",
        MAX_DROP,
        weights=str(project / "weights.safetensors"),
        out=tmp_path / "result",
        threads=1,
        runtimes=("torch",),
        time_budget=120.0,  # more than it takes: controls must leave time for a profile
        show_progress=False,
    )
    assert result.verdict is not None
    assert all(trial.is_control for trial in result.trials)
    assert any("can't be profiled" in text for text in result.warnings)


def test_the_last_race_is_never_too_short_to_carry_an_interval() -> None:
    assert final_protocol(10.0, 0.001).num_blocks >= 8
    assert final_protocol(1e6, 0.001).num_blocks == 24


def test_json_keeps_stdout_clean(run: tuple[Path, RunRecord]) -> None:
    json.loads((run[0] / "run.json").read_text())
