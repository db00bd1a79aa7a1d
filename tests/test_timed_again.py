"""Trials that ran while the machine was busy: found by later races, timed again, kept in place."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.anchors import anchored, merged
from profiling_agent.beside import RACES, Beside, pooled
from profiling_agent.building import LocalBuilder
from profiling_agent.errors import TrialError
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.evaluation.measure import Protocol
from profiling_agent.evaluation.predictor import LivePredictor
from profiling_agent.finish import Finish
from profiling_agent.machine.torch_state import threads
from profiling_agent.planning.decide import best_control
from profiling_agent.planning.history import relative_latency
from profiling_agent.profiling.profile_cache import ControlLatency
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.evaluation import BuiltArtefact, Evaluation, Speedup
from profiling_agent.records.plan import Plan
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import RunSettings, Trial
from profiling_agent.report.live import SilentProgress
from profiling_agent.run_state import RunState, read_state
from profiling_agent.trial import Baseline, TrialRunner, timed_while_busy
from profiling_agent.workbench import MOST_AGAIN, Workbench
from record_factory import make_control, make_evaluation, make_interval, make_timing, make_trial
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
    quiet, busy, slow = raced("c2", 1.0, 4.0), raced("c1", 1.2, 16.0), raced("c3", 5.1, 1.0)
    screened = make_trial("t1", status="screened", reason="collapsed", evaluation=None)
    assert timed_while_busy([busy, quiet, slow, screened]) == [busy]
    assert timed_while_busy([busy]) == []  # nothing to compare with
    assert timed_while_busy([screened]) == timed_while_busy([]) == []


def test_a_race_is_doubted_by_what_the_fastest_control_took_in_it() -> None:
    busy, quiet, alone = beside("t1", 0.65), beside("t2", 0.43), raced("t3", 2.0, 2.0)
    assert timed_while_busy([busy, quiet, alone]) == [busy]
    assert timed_while_busy([busy, alone]) == []
    another = beside("t4", 0.3, "c2")  # a continued run may have another
    assert timed_while_busy([busy, another]) == []


def test_a_machine_that_became_slower_for_good_is_not_busy() -> None:
    fast = [beside(f"t{n}", 0.4) for n in range(1, 21)]
    slow = [beside(f"t{n}", 0.6) for n in range(21, 41)]
    names = {trial.trial_id for trial in timed_while_busy([*fast, *slow])}
    assert names == {f"t{n}" for n in range(21, 27)}  # those near the change may have been


def beside(trial_id: str, reference_ms: float, reference: str = "c1") -> Trial:
    trial = raced(trial_id, 2.0, 2.0)
    assert trial.evaluation is not None
    evaluation = trial.evaluation.model_copy(
        update={"reference": reference, "reference_ms": reference_ms}
    )
    return trial.model_copy(update={"evaluation": evaluation})


def test_a_trial_timed_again_takes_its_own_place(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    first, second, again = raced("c1", 1.0, 9.0), raced("c2", 1.0, 4.0), raced("c1", 1.0, 4.1)
    state = RunState()
    for trial in (first, second, again):
        state.keep(trial)
        store.journal.append("trial", trial)
    assert state.trials == read_state(store).trials == [again, second]


class Dying:
    """A control that dies as soon as it is timed."""

    alive = False

    def resume(self) -> None:
        raise TrialError("it died")


class BuiltOnce(LocalBuilder):
    """Builds the first plan; the others here are the same, and copied."""

    built: tuple[Path, BuiltArtefact] | None = None

    def build(
        self, plan: Plan, folder: Path, deployment: Deployment, timeout_s: float = 0.0
    ) -> BuiltArtefact:
        if self.built is None:
            self.built = folder, super().build(plan, folder, deployment)
        else:
            shutil.copytree(self.built[0], folder)
        return self.built[1]


def test_only_the_times_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = make_data(900)
    data = tmp_path / "data"
    workload = acquire(
        Request(model=train(), data=[(a, int(b)) for a, b in zip(x, y, strict=True)]), folder=data
    )
    judge = find_judge(workload.record.task, load_metric("accuracy"))
    deployment = Deployment(batch_size=1, threads=1)
    original = LivePredictor(workload, deployment)
    outputs = original.logits(data / "search")
    answers = judge.answers(outputs)
    runner = TrialRunner(
        builder=BuiltOnce(workload),
        workload=workload,
        baseline=Baseline(
            open=lambda: original,
            search=answers,
            outputs=outputs,
            ms=1e-6,  # never so fast again
        ),
        judge=judge,
        deployment=deployment,
        max_drop=1.0,
        data=data,
    )
    folder = tmp_path / "c1"
    trial = runner.run(
        "c1", Plan(runtime="onnxruntime"), "control", folder, is_control=True, protocol=SHORT
    )
    assert trial.status == "done", trial.reason
    assert "the machine was busy" in trial.reason
    assert trial.evaluation is not None
    busy, quiet = (
        trial.model_copy(update={"evaluation": slowed(trial.evaluation, factor)})
        for factor in (100.0, 0.01)
    )
    assert runner.time_again(quiet, folder, SHORT, None) == quiet  # no race will be so quiet
    again = runner.time_again(busy, folder, SHORT, None)
    assert again.evaluation is not None
    times = {"timing", "speedup", "throughput_per_s"}
    assert again.evaluation.timing != trial.evaluation.timing
    assert again.evaluation.model_dump(exclude=times) == trial.evaluation.model_dump(exclude=times)
    assert again.model_dump(exclude={"evaluation", "reason"}) == trial.model_dump(
        exclude={"evaluation", "reason"}
    )
    assert runner.time_again(trial, tmp_path / "gone", SHORT, None) == trial
    (beside,) = runner.time_together([trial], lambda _: folder, SHORT)
    assert beside.evaluation is not None and beside.evaluation.timing != trial.evaluation.timing
    assert beside.evaluation.accuracy == trial.evaluation.accuracy
    with pytest.raises(TrialError):
        runner.time_together([trial], lambda _: tmp_path / "gone", SHORT)
    assert trial.evaluation.reference_ms is None
    runner.watch([trial], lambda _: folder)
    with contextlib.closing(runner):
        plan = runner.run(
            "t1", Plan(runtime="onnxruntime"), "solver", tmp_path / "t1", protocol=SHORT
        )
        assert plan.evaluation is not None and plan.evaluation.reference_ms is not None
        assert plan.evaluation.timing is not None
        assert 0.2 < plan.evaluation.reference_ms / plan.evaluation.timing.median_ms < 5.0
        assert plan.evaluation.reference == "c1"
        known, took = relative_latency(trial), relative_latency(plan)
        assert known is not None and took == plan.evaluation.relative
        ratio = plan.evaluation.timing.median_ms / plan.evaluation.reference_ms
        assert took == pytest.approx(known * ratio, rel=0.5)
        (same,) = runner.time_together([trial], lambda _: folder, SHORT)
        assert relative_latency(same) == pytest.approx(known)  # its own reference
        for opened in runner.beside().values():
            opened.close()
        plan = runner.run(
            "t3", Plan(runtime="onnxruntime"), "solver", tmp_path / "t3", protocol=SHORT
        )
        assert plan.evaluation is not None and plan.evaluation.reference == "c1"  # opened again
        assert runner.beside("c1") == {}
        monkeypatch.setattr(runner, "beside", lambda *names: {"c1": Dying()})
        plan = runner.run(
            "t4", Plan(runtime="onnxruntime"), "solver", tmp_path / "t4", protocol=SHORT
        )
        assert plan.status == "done", plan.reason
        assert plan.evaluation is not None and plan.evaluation.reference is None
        monkeypatch.undo()
    runner.watch([trial], lambda _: tmp_path / "gone")
    plan = runner.run("t2", Plan(runtime="torch"), "solver", tmp_path / "t2", protocol=SHORT)
    assert plan.status == "done" and plan.evaluation is not None
    assert plan.evaluation.reference_ms is None


def slowed(evaluation: Evaluation, factor: float) -> Evaluation:
    """As if the original had taken so many times as long in its race."""
    assert evaluation.speedup is not None
    ratio = make_interval(factor * evaluation.speedup.ratio.estimate)
    return evaluation.model_copy(update={"speedup": Speedup(over="baseline", ratio=ratio)})


class Racing:
    """A runner whose races have these results."""

    def __init__(self, times: dict[str, float] | None) -> None:
        self.times, self.races = times, list[list[str]]()
        self.judge = None

    @property
    def raced(self) -> list[str]:
        """Who was in the first race."""
        return self.races[0] if self.races else []

    def time_together(
        self, trials: Sequence[Trial], folder: Any, protocol: Any, has_time: Any
    ) -> list[Trial]:
        self.races.append([trial.trial_id for trial in trials])
        if self.times is None:
            raise TrialError("t1 failed while it was timed")
        return [
            trial.model_copy(update={"evaluation": of(self.times[trial.trial_id])})
            for trial in trials
        ]


def nominated(
    runner: Racing,
    folder: Path,
    budget: Budget,
    said: list[str],
    more: Sequence[Trial] = (),
) -> list[str]:
    folder.mkdir(exist_ok=True)
    trials = [make_control("c1", "openvino", "int8-static", evaluation=of(4.0))]
    trials += [raced(f"t{n}", 1.0, gain) for n, gain in ((1, 7.5), (2, 5.0), (3, 6.0), (4, 7.0))]
    trials += more
    split = SimpleNamespace(num_samples=5000)
    store, baseline = RunStore(folder), make_evaluation()
    assert baseline.timing is not None
    finish = Finish(
        store=store,
        settings=RunSettings(budget=budget, deployment=Deployment()),
        workload=SimpleNamespace(record=SimpleNamespace(split=lambda _: split)),  # pyright: ignore
        state=RunState(trials=trials, baseline=baseline),
        beside=Beside(
            runner=runner,  # pyright: ignore[reportArgumentType]
            store=store,
            budget=budget,
            call_s=baseline.timing.median_ms / 1e3,
            progress=SilentProgress(),
            warn=said.append,
        ),
    )
    return [candidate.trial_id for candidate in finish.nominate()]


def of(speedup: float):
    return raced("c1", 1.0, speedup).evaluation


def test_the_fastest_plans_are_timed_beside_each_other_before_they_are_named(
    tmp_path: Path,
) -> None:
    """Of several races of their own the luckiest comes first."""
    said: list[str] = []
    lucky = Racing({"c1": 4.1, "t1": 5.9, "t2": 4.0, "t3": 6.1, "t4": 6.8})
    budget = Budget(max_drop=0.5, time_s=600.0)
    assert nominated(lucky, tmp_path, budget, said)[:3] == ["t4", "t3", "t1"]
    assert lucky.raced == ["c1", "t1", "t4", "t3", "t2"]  # the fastest first
    assert len(lucky.races) == RACES and set(lucky.races[-1]) == {"c1", "t1", "t3", "t4"}
    slower = Racing({"c1": 6.5, "t1": 5.9, "t2": 4.0, "t3": 6.1, "t4": 6.8})
    assert nominated(slower, tmp_path, budget, said) == ["t4"]  # the others don't beat the control
    busy = Racing({"c1": 2.0, "t1": 3.6, "t2": 2.4, "t3": 3.0, "t4": 3.5, "t5": 2.3, "t6": 2.4})
    five, slow = Budget(max_drop=0.5, time_s=228.0), [raced("t5", 1.0, 4.95), raced("t6", 1.0, 4.9)]
    named = nominated(busy, tmp_path / "busy", five, said, more=slow)
    assert "t6" not in busy.raced and named == ["t1", "t4", "t3"]  # though 4.9 is more than 3.6
    for other in (Budget(max_drop=0.5, time_s=60.0), Budget(max_drop=0.5, objective="size")):
        unasked = Racing({})
        assert nominated(unasked, tmp_path, other, said)[:1] in (["t1"], [])
        assert unasked.raced == []
    assert said == []
    assert nominated(Racing(None), tmp_path, budget, said)[0] == "t1"
    assert "could not be timed beside each other" in said[0]


class Changing(Racing):
    """Each race has other results, the last one's from then on."""

    def __init__(self, *times: dict[str, float]) -> None:
        super().__init__(times[0])
        self.later = list(times[1:])

    def time_together(
        self, trials: Sequence[Trial], folder: Any, protocol: Any, has_time: Any
    ) -> list[Trial]:
        again = super().time_together(trials, folder, protocol, has_time)
        self.times = self.later.pop(0) if self.later else self.times
        return again


def test_who_was_lucky_in_one_race_is_not_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"c1": 4.0, "t1": 7.1, "t2": 5.0, "t3": 6.0, "t4": 7.0, "t5": 7.05, "t6": 6.9}
    more = [raced("t5", 1.0, 7.05), raced("t6", 1.0, 6.9)]
    budget, said = Budget(max_drop=0.5, time_s=600.0), list[str]()
    racing = Changing(usual | {"t6": 9.0}, usual)
    assert nominated(racing, tmp_path, budget, said, more=more)[0] == "t1"
    first, *again = [set(names) for names in racing.races]
    assert first == set(usual)
    assert again == [{"c1", "t1", "t4", "t5", "t6"}] * (RACES - 1), "the fastest only"
    monkeypatch.setattr(Finish, "_has_time_to_race", lambda *_: False)
    hurried = Changing(usual | {"t6": 9.0}, usual)
    assert nominated(hurried, tmp_path / "hurried", budget, said, more=more)[0] == "t6"
    assert len(hurried.races) == 1


def test_a_place_is_the_mean_of_two_races_or_the_median_of_three() -> None:
    own = [raced("c1", 1.0, 4.0), raced("t1", 1.0, 8.0), raced("t2", 1.0, 8.2)]
    same = [raced("c1", 1.0, 2.0), raced("t1", 1.0, 4.0), raced("t2", 1.0, 4.0)]  # all half as fast
    assert places(pooled(own, [same])) == pytest.approx([1.0, 2.0, (2.05 * 2.0) ** 0.5])
    lucky = [raced("c1", 1.0, 4.0), raced("t1", 1.0, 8.0), raced("t2", 1.0, 10.0)]
    assert places(pooled(own, [lucky, same])) == pytest.approx([1.0, 2.0, 2.05])
    # a race of the lucky ones only says nothing of who was not in it, but for the scale
    four = [raced("c1", 1.0, 4.0), *(raced(f"t{n}", 1.0, 8.0) for n in range(1, 6))]
    less = [raced("c1", 1.0, 4.0), raced("t1", 1.0, 7.6), raced("t2", 1.0, 7.6)]
    whole = [*less, *(raced(f"t{n}", 1.0, 8.0) for n in range(3, 6))]
    assert places(pooled(four, [whole, less, less])) == pytest.approx([1, 1.9, 1.9, 2, 2, 2])
    left_out = raced("t3", 1.0, 7.9)
    assert pooled([*own, left_out], [same])[-1] == left_out
    assert pooled(own, []) == pooled(own, [[]]) == own


def places(trials: Sequence[Trial]) -> list[float]:
    """Times faster than the first."""
    took = [relative_latency(trial) or 0.0 for trial in trials]
    return [took[0] / each for each in took]


def bench_of(runner: Any, folder: Path, time_s: float) -> Workbench:
    """With three controls behind it, the last of them the fastest."""
    split = SimpleNamespace(num_samples=500)
    controls = [
        make_control(f"c{n}", "openvino", scheme, evaluation=of(speedup))
        for n, (scheme, speedup) in enumerate(
            [("int8-static", 4.5), ("fp32", 1.9), ("int8-static-bf16", 4.9)], start=1
        )
    ]
    settings = RunSettings(budget=Budget(max_drop=0.5, time_s=time_s), deployment=Deployment())
    made = Workbench(
        store=RunStore(folder),
        settings=settings,
        workload=SimpleNamespace(record=SimpleNamespace(split=lambda _: split)),  # pyright: ignore
        judge=runner.judge,
        state=RunState(trials=controls, baseline=make_evaluation()),
        progress=SilentProgress(),
        is_live=False,
        stack=contextlib.ExitStack(),
    )
    made.store.create()
    made.runner = runner
    return made


def test_the_fastest_controls_are_timed_beside_each_other_once(tmp_path: Path) -> None:
    """Plans start from them, so their order must not be that of the original's noise."""
    runner = Racing({"c1": 5.2, "c2": 2.0, "c3": 4.8})
    bench = bench_of(runner, tmp_path / "long", 600.0)
    for _ in range(2):
        bench._controls_beside()
    assert runner.raced == ["c3", "c1", "c2"]  # the fastest first
    events = list(bench.store.journal.events())
    assert [kind for kind, _ in events] == ["trial", "trial", "trial", "controls-timed"]
    first = best_control(bench.state.trials, bench.budget)
    assert first is not None and first.trial_id == "c1"
    assert read_state(bench.store).controls_timed

    for failing, time_s in ((Racing(None), 600.0), (Racing({}), 60.0)):
        other = bench_of(failing, tmp_path / str(time_s) / "run", time_s)
        before = list(other.state.trials)
        other._controls_beside()
        assert other.state.trials == before and not other.state.controls_timed
        assert bool(other.state.warnings) == (failing.times is None)

    plans = Racing({"c1": 4.0, "t1": 5.2, "t2": 6.1})
    bench = bench_of(plans, tmp_path / "plans", 600.0)
    bench.state.trials = [bench.state.trials[0], raced("t1", 1.0, 7.0), raced("t2", 1.0, 6.0)]
    before = list(bench.state.trials)
    assert bench.plans_beside() == "t2" and plans.raced == ["c1", "t1", "t2"]
    assert bench.state.trials == before, "trials that ran alone can only be compared so"
    plans.races = []
    assert bench.plans_beside() == "t2" and not plans.raced, "the same plans were timed"
    bench.state.trials.append(raced("t3", 1.0, 6.5))
    plans.times = {"c1": 4.0, "t1": 5.2, "t2": 6.1, "t3": 6.4}
    assert bench.plans_beside() == "t3" and set(plans.raced) == {"c1", "t1", "t2", "t3"}


class Quiet:
    """A runner that times trials again, while the machine is quiet."""

    judge, is_busy = None, False

    def __init__(self) -> None:
        self.timed = list[str]()

    def time_again(self, trial: Trial, *_: Any) -> Trial:
        self.timed.append(trial.trial_id)
        return trial


def test_controls_far_behind_are_not_timed_again_before_the_search_is_over(tmp_path: Path) -> None:
    runner = Quiet()
    bench = bench_of(runner, tmp_path, 600.0)
    close, slow, fastest = bench.state.trials
    bench.state.trials = [in_race_of(close, 2.0), in_race_of(slow, 2.0), in_race_of(fastest, 1.0)]
    bench.time_again()
    assert runner.timed == ["c1"]
    bench.time_again(at_last=True)
    assert runner.timed == ["c1", "c1", "c2"]


def in_race_of(trial: Trial, original_ms: float) -> Trial:
    """In its race the original took so long."""
    relative = relative_latency(trial)
    assert trial.evaluation is not None and relative is not None
    update = {"timing": make_timing(original_ms * relative)}
    return trial.model_copy(update={"evaluation": trial.evaluation.model_copy(update=update)})


SCHEMES = ("int8-static", "int8-static-bf16", "fp32", "bf16")


def latencies(*values: float) -> tuple[ControlLatency, ...]:
    return tuple(
        ControlLatency(runtime="openvino", scheme=scheme, relative=value)
        for scheme, value in zip(SCHEMES, values, strict=False)
    )


def timed_controls(*values: float, **fields: Any) -> list[Trial]:
    """Controls with these latencies over the original's, from one race."""
    return [
        make_control(
            f"c{number}",
            "openvino",
            scheme,
            evaluation=make_evaluation(f"c{number}", reference="c1", relative=relative),
            **fields,
        )
        for number, (scheme, relative) in enumerate(zip(SCHEMES, values, strict=False), start=1)
    ]


def with_reference(trial: Trial, reference: str) -> Trial:
    assert trial.evaluation is not None
    evaluation = trial.evaluation.model_copy(update={"reference": reference})
    return trial.model_copy(update={"evaluation": evaluation})


def taken(trials: Sequence[Trial]) -> dict[str, float | None]:
    return {trial.trial_id: relative_latency(trial) for trial in trials}


def test_controls_have_their_places_of_an_earlier_race_on_the_scale_of_this_one() -> None:
    """The first two have changed places since; the original is slower for all."""
    known = latencies(0.21, 0.205, 0.29)
    again = anchored(timed_controls(0.198, 0.202, 0.29, 0.5), known)
    scale = 0.202 / 0.205  # the median
    assert taken(again) == pytest.approx({"c1": 0.21 * scale, "c2": 0.202, "c3": 0.29 * scale})
    assert all(each.evaluation and each.evaluation.is_relative_kept for each in again)


@pytest.mark.parametrize(
    ("now", "names"),
    [
        pytest.param(timed_controls(0.21, 0.205, 0.5), {"c1", "c2"}, id="one has another place"),
        pytest.param(timed_controls(0.4, 0.4, 0.57), {"c1", "c2", "c3"}, id="all are slower"),
        pytest.param([], set(), id="nothing was measured"),
        pytest.param(timed_controls(0.2, 0.2, reason="it was busy"), set(), id="in a busy machine"),
        pytest.param([raced("c1", 1.0, 5.0)], set(), id="in a race of its own"),
    ],
)
def test_a_control_keeps_its_own_time_where_that_tells_more(
    now: list[Trial], names: set[str]
) -> None:
    assert set(taken(anchored(now, latencies(0.21, 0.205, 0.29)))) == names


def test_what_later_runs_know_of_the_controls_does_not_drift_and_is_completed() -> None:
    first = merged((), timed_controls(0.21, 0.205))
    assert first == latencies(0.21, 0.205)
    more = merged(first, timed_controls(0.1, 0.1025, 0.145))
    assert set(first) < set(more)
    third = next(each for each in more if each.scheme == "fp32")
    assert third.relative == pytest.approx(0.145 / ((0.1 / 0.21 + 0.1025 / 0.205) / 2))
    assert merged(first, timed_controls(0.3, 0.1, 0.2, reason="the machine was busy")) == first
    other = make_control("c9", "torch", "fp32", evaluation=make_evaluation("c9", relative=0.9))
    raced_alone = with_reference(other, "c9")
    assert merged(first, [raced_alone]) == first, "nothing tells its scale"


class Busy:
    """A runner whose last race was slowed or not, and whose next is quiet."""

    def __init__(self) -> None:
        self.is_busy, self.asked = True, list[str]()
        self.reference = dict[str, Any]()

    def time_again(self, trial: Trial, folder: Any, protocol: Any, deadline: Any) -> Trial:
        self.asked.append(trial.trial_id)
        return timed_controls(0.123)[0] if trial.is_control else trial

    def watch(self, trials: Sequence[Trial], folder: Any) -> None:
        self.reference = taken(trials)


def bench_with(runner: Busy, folder: Path) -> Workbench:
    bench = Workbench.__new__(Workbench)
    bench.store, bench.runner = RunStore(folder), runner  # type: ignore[assignment]
    bench.state, bench.progress = RunState(), SilentProgress()
    bench.state.baseline = make_evaluation()
    bench.settings = None  # type: ignore[assignment]
    bench.time_s, bench._times_again = 1e9, Counter()  # pyright: ignore[reportPrivateUsage]
    bench.reserve = lambda num_artefacts=3: 0.0  # type: ignore[method-assign]
    return bench


def test_trials_are_timed_again_when_the_machine_is_quiet_and_at_last(tmp_path: Path) -> None:
    runner = Busy()
    bench = bench_with(runner, tmp_path)
    for trial in (beside("t1", 0.65), beside("t2", 0.43)):
        bench.state.keep(trial)
    bench.time_again()
    assert runner.asked == []  # it would be as busy
    bench.time_again(at_last=True)
    assert runner.asked == ["t1"]
    runner.is_busy = False
    for _ in range(3):
        bench.time_again()
    assert runner.asked == ["t1"] * MOST_AGAIN


def test_a_control_timed_again_keeps_the_latency_that_plans_start_from(tmp_path: Path) -> None:
    """By its place in an earlier race; trials are measured by way of it."""
    runner = Busy()
    runner.is_busy = False
    bench = bench_with(runner, tmp_path)
    (slow, other) = timed_controls(0.2, 0.2)
    assert slow.evaluation is not None
    busy = slow.evaluation.model_copy(update={"reference_ms": 0.65})
    for trial in (slow.model_copy(update={"evaluation": busy}), other, beside("t2", 0.43)):
        bench.state.keep(trial)
    bench.anchor(latencies(0.21, 0.2))
    place = 0.21 * (0.2 / 0.21 + 1.0) / 2
    assert runner.reference["c1"] == pytest.approx(place), "the reference is where the rest are"
    bench.time_again()
    assert runner.asked == ["c1"]
    assert taken(bench.state.trials)["c1"] == pytest.approx(place)
    journalled = read_state(bench.store).trials
    assert taken(journalled) == taken(bench.state.trials[:2])
