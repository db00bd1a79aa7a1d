"""Trials that ran while the machine was busy: found by later races, timed again, kept in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.evaluation.measure import Protocol
from profiling_agent.evaluation.predictor import LivePredictor
from profiling_agent.finish import answers_of_original
from profiling_agent.machine.torch_state import threads
from profiling_agent.records.common import Deployment
from profiling_agent.records.evaluation import Speedup
from profiling_agent.records.plan import Plan
from profiling_agent.records.store import RunStore
from profiling_agent.run_state import RunState, read_state
from profiling_agent.trial import Baseline, LocalBuilder, TrialRunner, timed_while_busy
from record_factory import make_evaluation, make_interval, make_timing, make_trial
from small_workload import make_data, train

SHORT = Protocol(num_blocks=6, block_s=0.005)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def raced(trial_id: str, ms: float, speedup: float):
    ratio = make_interval(speedup)
    evaluation = make_evaluation(
        trial_id, timing=make_timing(ms), speedup=Speedup(over="baseline", ratio=ratio)
    )
    return make_trial(trial_id, evaluation=evaluation)


def test_a_race_is_doubted_by_what_the_original_took_in_it() -> None:
    quiet, busy, slow = raced("c2", 1.0, 4.0), raced("c1", 1.2, 16.0), raced("c3", 5.5, 1.0)
    screened = make_trial("t1", status="screened", reason="collapsed", evaluation=None)
    assert timed_while_busy([busy, quiet, slow, screened]) == [busy]
    assert timed_while_busy([busy]) == []  # nothing to compare with
    assert timed_while_busy([screened]) == timed_while_busy([]) == []


def test_a_trial_timed_again_takes_its_own_place(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first, second, again = raced("c1", 1.0, 9.0), raced("c2", 1.0, 4.0), raced("c1", 1.0, 4.1)
    state = RunState()
    for trial in (first, second, again):
        state.keep(trial)
        store.journal.append("trial", trial)
    assert state.trials == read_state(store).trials == [again, second]


def test_only_the_times_are_measured_anew(tmp_path: Path) -> None:
    x, y = make_data(900)
    data = tmp_path / "data"
    workload = acquire(
        Request(model=train(), data=[(a, int(b)) for a, b in zip(x, y, strict=True)]), folder=data
    )
    judge = find_judge(workload.record.task, load_metric("accuracy"))
    deployment = Deployment(batch_size=1, threads=1)
    original = LivePredictor(workload, deployment)
    answers = answers_of_original(original, judge, data, "search")
    runner = TrialRunner(
        builder=LocalBuilder(workload),
        workload=workload,
        baseline=Baseline(open=lambda: original, search=answers, ms=1e-6),  # never so fast again
        judge=judge,
        deployment=deployment,
        max_drop=1.0,
        data=data,
    )
    folder = tmp_path / "c1"
    trial = runner.run(
        "c1", Plan(runtime="torch"), "control", folder, is_control=True, protocol=SHORT
    )
    assert trial.status == "done", trial.reason
    assert "the machine was busy" in trial.reason
    again = runner.time_again(trial, folder, SHORT, None)
    assert again.evaluation is not None and trial.evaluation is not None
    times = {"timing", "speedup", "throughput_per_s"}
    assert again.evaluation.timing != trial.evaluation.timing
    assert again.evaluation.model_dump(exclude=times) == trial.evaluation.model_dump(exclude=times)
    assert again.model_dump(exclude={"evaluation", "reason"}) == trial.model_dump(
        exclude={"evaluation", "reason"}
    )
    assert runner.time_again(trial, tmp_path / "gone", SHORT, None) == trial
