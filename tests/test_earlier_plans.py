"""Plans that a run ends with, for the next one: which run they serve, and which are handed on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiling_agent import loop
from profiling_agent.earlier_plans import EarlierPlan, PlanCache
from profiling_agent.errors import ModelError
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Candidate, RunSettings
from profiling_agent.records.workload import SplitName
from profiling_agent.report.live import SilentProgress
from record_factory import make_plan, make_profile, make_split, make_trial, make_workload
from test_profile_cache import Net

PLANS = [make_plan(seed=number) for number in range(6)]
TRIALS = [make_trial(f"t{n}", plan=plan) for n, plan in enumerate(PLANS)]


def cache(folder: Path | None, **changes: Any) -> PlanCache:
    fields: dict[str, Any] = {
        "folder": folder,
        "workload": workload(splits=splits()),
        "machine": make_profile().machine,
        "settings": settings(),
    }
    return PlanCache(**fields | changes)


def settings(deployment: Deployment | None = None, **changes: Any) -> RunSettings:
    runtimes = changes.pop("runtimes", ("torch", "openvino"))
    return RunSettings(
        budget=Budget(**{"max_drop": 0.5} | changes),
        deployment=deployment or Deployment(),
        runtimes=runtimes,
    )


def workload(model: Net | None = None, **record: Any) -> Any:
    return SimpleNamespace(record=make_workload(**record), model=model or Net())


def splits(**sizes: int) -> Any:
    names: tuple[SplitName, ...] = ("calibration", "search", "test")
    return tuple(make_split(name, sizes.get(name, 500)) for name in names)


def nominated(*names: str) -> list[Candidate]:
    return [
        Candidate(trial_id=name, predicted_drop=0.3, objective_value=0.1 * rank)
        for rank, name in enumerate(names, start=1)
    ]


def test_a_run_hands_on_what_its_search_nominated(tmp_path: Path) -> None:
    assert cache(tmp_path).find() == ()
    cache(tmp_path).keep(TRIALS, nominated("t4", "t2"))
    found = cache(tmp_path).find()
    assert [each.plan for each in found] == [PLANS[4], PLANS[2]]
    assert found[0].author == TRIALS[4].author
    assert cache(tmp_path, settings=settings(time_s=60.0)).find() == found
    cache(None).keep(TRIALS, nominated("t1"))
    assert cache(None).find() == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": settings(max_drop=0.4)},
        {"settings": settings(objective="size")},
        {"settings": settings(evidence="proven")},
        {"settings": settings(runtimes=("torch",))},
        {"settings": settings(Deployment(batch_size=8))},
        {"workload": workload(Net(slope=0.2))},
        {"workload": workload(splits=splits(search=900))},
        {"workload": workload(splits=splits(test=900))},
        {"machine": make_profile().machine.model_copy(update={"processor": "another"})},
    ],
)
def test_it_serves_the_same_model_splits_machine_and_settings(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    cache(tmp_path).keep(TRIALS, nominated("t4"))
    assert cache(tmp_path, **changes).find() == ()


def test_what_a_run_did_not_come_to_goes_before_what_it_found(tmp_path: Path) -> None:
    """A short run may have had no time for them."""

    def found() -> list[Plan]:
        return [each.plan for each in cache(tmp_path).find()]

    cache(tmp_path).keep(TRIALS, nominated("t0", "t1", "t2"))
    cache(tmp_path).keep([TRIALS[0], TRIALS[3]], nominated("t3"))
    assert found() == [PLANS[1], PLANS[2], PLANS[3]]
    cache(tmp_path).keep([TRIALS[5]], nominated("t5"))
    assert found() == [PLANS[1], PLANS[2], PLANS[3], PLANS[5]]
    cache(tmp_path).keep([TRIALS[5]], nominated("t5"))
    assert found() == [PLANS[1], PLANS[2], PLANS[3], PLANS[5]]
    cache(tmp_path).keep([], [])  # a run that came to nothing
    assert found() == [PLANS[1], PLANS[2], PLANS[3], PLANS[5]]
    cache(tmp_path).keep(TRIALS, [])  # all tried, and none was worth naming
    assert found() == []


def test_a_broken_file_is_none(tmp_path: Path) -> None:
    cache(tmp_path).keep(TRIALS, nominated("t4"))
    (path,) = tmp_path.iterdir()
    path.write_text("{", encoding="utf-8")
    assert cache(tmp_path).find() == ()


def test_the_author_of_a_plan_is_marked_once() -> None:
    first = EarlierPlan(plan=PLANS[0], author="llm+solver")
    assert first.marked == "llm+solver, in an earlier run"
    assert EarlierPlan(plan=PLANS[0], author=first.marked).marked == first.marked


class Run:
    """What the loop needs of a bench; its search finds ``TRIALS``, and nominates two of them."""

    settings, machine = settings(), make_profile().machine
    store = beside = None

    def __init__(self) -> None:
        self.workload = workload()
        self.state = SimpleNamespace(trials=[], candidates=None)
        self.progress = SilentProgress()
        self.runner = SimpleNamespace(builder=SimpleNamespace(close=int), close=int)

    def set_up(self) -> None: ...

    def time_again(self, *, at_last: bool) -> None: ...


def test_a_later_run_begins_with_what_the_first_nominated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROFILING_AGENT_CACHE", str(tmp_path))
    began_with: list[list[Plan]] = []

    class Search:
        def __init__(self, bench: Run, _: Any) -> None:
            self.bench = bench

        def walk(self, _: Profile, earlier: Sequence[EarlierPlan]) -> None:
            began_with.append([each.plan for each in earlier])
            self.bench.state.trials += TRIALS

    class Finish:
        def __init__(self, *, state: Any, **_: Any) -> None:
            self.state = state

        def nominate(self) -> list[Candidate]:
            return nominated("t4", "t2")

        def walk(self, _: Sequence[Candidate]) -> None:
            raise ModelError("the test split can't be read")

    monkeypatch.setattr(loop, "take_profile", lambda _: make_profile())
    monkeypatch.setattr(loop, "_Search", Search)
    monkeypatch.setattr(loop, "Finish", Finish)
    monkeypatch.setattr(loop, "_say_what_is_provable", lambda *_: None)
    for name in ("random", "solver", "llm", "hybrid", "greedy", "paper"):
        with pytest.raises(ModelError):
            loop._walk(Run(), SimpleNamespace(name=name))
    ended_with = [PLANS[4], PLANS[2]]
    compared = "to be compared with: they begin with nothing, and hand nothing on"
    assert began_with == [[], [], ended_with, ended_with, [], []], compared
    monkeypatch.setenv("PROFILING_AGENT_CACHE", "off")
    with pytest.raises(ModelError):
        loop._walk(Run(), SimpleNamespace(name="solver"))
    assert began_with[-1] == []
