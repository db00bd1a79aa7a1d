"""Plans that a run ends with, for the next one: which run they serve, and which are handed on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from profiling_agent import loop
from profiling_agent.earlier_plans import EarlierPlan, PlanCache
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Candidate
from profiling_agent.report.live import SilentProgress
from record_factory import make_plan, make_profile, make_trial, make_workload
from test_profile_cache import Net

PLANS = [make_plan(seed=number) for number in range(6)]
TRIALS = [make_trial(f"t{n}", plan=plan) for n, plan in enumerate(PLANS)]


def cache(folder: Path | None, **changes: Any) -> PlanCache:
    fields: dict[str, Any] = {
        "folder": folder,
        "workload": SimpleNamespace(record=make_workload(), model=Net()),
        "machine": make_profile().machine,
        "deployment": Deployment(),
        "budget": Budget(max_drop=0.5),
    }
    return PlanCache(**fields | changes)


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
    assert cache(tmp_path, budget=Budget(max_drop=0.5, time_s=60.0)).find() == found
    cache(None).keep(TRIALS, nominated("t1"))
    assert cache(None).find() == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": Budget(max_drop=0.4)},
        {"budget": Budget(max_drop=0.5, objective="size")},
        {"workload": SimpleNamespace(record=make_workload(), model=Net(slope=0.2))},
        {"deployment": Deployment(batch_size=8)},
        {"machine": make_profile().machine.model_copy(update={"processor": "another"})},
    ],
)
def test_it_serves_the_same_model_machine_and_budget(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    cache(tmp_path).keep(TRIALS, nominated("t4"))
    assert cache(tmp_path, **changes).find() == ()


def test_what_a_run_did_not_come_to_is_handed_on_behind(tmp_path: Path) -> None:
    cache(tmp_path).keep(TRIALS, nominated("t0", "t1", "t2"))
    cache(tmp_path).keep([TRIALS[0], TRIALS[3]], nominated("t3"))
    assert [each.plan for each in cache(tmp_path).find()] == [PLANS[3], PLANS[1], PLANS[2]]
    cache(tmp_path).keep([TRIALS[5]], nominated("t5"))
    assert [each.plan for each in cache(tmp_path).find()] == [PLANS[5], PLANS[3], PLANS[1]]
    cache(tmp_path).keep(TRIALS, [])  # all tried, and none was worth naming
    assert len(cache(tmp_path).find()) == 3


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

    budget, deployment, machine = Budget(max_drop=0.5), Deployment(), make_profile().machine
    store = settings = beside = None

    def __init__(self) -> None:
        self.workload = SimpleNamespace(record=make_workload(), model=Net())
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

        def walk(self) -> None:
            self.state.candidates = nominated("t4", "t2")

    monkeypatch.setattr(loop, "take_profile", lambda _: make_profile())
    monkeypatch.setattr(loop, "_Search", Search)
    monkeypatch.setattr(loop, "Finish", Finish)
    monkeypatch.setattr(loop, "_say_what_is_provable", lambda *_: None)
    for name in ("random", "solver", "llm", "hybrid", "greedy", "paper"):
        loop._walk(Run(), SimpleNamespace(name=name))
    ended_with = [PLANS[4], PLANS[2]]
    assert began_with == [[], *[ended_with] * 3, [], []], "the rest is there to be compared with"
    monkeypatch.setenv("PROFILING_AGENT_CACHE", "off")
    loop._walk(Run(), SimpleNamespace(name="solver"))
    assert began_with[-1] == []
