"""Whose turn it is to propose, with planners and a store that need no model and no measurement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import pytest

from profiling_agent.earlier_plans import EarlierPlan
from profiling_agent.llm.faults import FinalFault
from profiling_agent.planning.advised import AdvisedPlanner
from profiling_agent.planning.planner import Advised, AdvisedName, Planner, Proposal
from profiling_agent.proposing import Proposals
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.llm import Guard, LlmSettings, LlmUsage
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import RunSettings, Trial
from profiling_agent.report.live import SilentProgress
from profiling_agent.run_state import RunState, read_state
from record_factory import make_trial
from scripted_llm import Scripted, Step, client_of, lost, said
from test_planning import controls_of, profile_of, tried

PROFILE = profile_of()
SAID = Guard(action="rejected", author="llm", reason="The answer is not JSON.")


def plan_at(ratio: float, **fields: str) -> Plan:
    return Plan(
        runtime="onnxruntime",
        pruning=(PruningLine(match=fields.pop("match", "mlp:a.fc1"), ratio=ratio),),
        quantization=Quantization(scheme="fp32"),
    )


NOT_HERE = Plan(runtime="openvino")
NO_GROUP = plan_at(0.5, match="mlp:nope")


class Behind:
    """The planner behind: a new plan whenever it is asked, ``limit`` at most."""

    name = "solver"

    def __init__(self, limit: int = 1000, *, plan: Plan | None = None) -> None:
        self.num_asked, self._limit, self._plan = 0, limit, plan

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        self.num_asked += 1
        if self.num_asked > self._limit:
            return None
        return Proposal(plan=self._plan or plan_at(0.3 + 0.001 * self.num_asked))


class Asked:
    """A planner over a model that proposes these plans, then what ``then`` gives, if anything."""

    name = "llm"

    def __init__(
        self,
        plans: Iterable[Plan | None],
        reserve: Planner | None,
        *,
        guards: Sequence[Guard] = (),
        then: Callable[[int], Plan | None] = lambda _: None,
    ) -> None:
        self.plans, self.reserve, self._guards, self._then = list(plans), reserve, guards, then
        self.num_asked, self.allowed = 0, list[float]()
        self.usage = LlmUsage(model="scripted")
        self._waiting: tuple[Guard, ...] = ()

    def allow(self, seconds: float) -> None:
        self.allowed.append(seconds)

    def recall(self, trials: Sequence[Trial], guards: Sequence[Guard]) -> None:
        self.recalled = (len(trials), len(guards))

    def take_guards(self) -> tuple[Guard, ...]:
        taken, self._waiting = self._waiting, ()
        return taken

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        self.num_asked += 1
        self.usage = LlmUsage(model="scripted", requests=self.num_asked)
        self._waiting = tuple(self._guards)
        plan = self.plans.pop(0) if self.plans else self._then(self.num_asked)
        return None if plan is None else Proposal(plan=plan, author="llm")


def endless(number: int) -> Plan:
    return plan_at(0.6 + 0.001 * number)


class Search:
    """Proposals over a fresh store, or the one of a run before; ``run`` carries each of them out.

    A trial loses ``drop`` points; a walk that goes on for ever fails the test.
    """

    def __init__(
        self,
        planner: Planner,
        folder: Path,
        *,
        max_trials: int = 12,
        trials_left: Callable[[], int | None] = lambda: None,
        runtimes: tuple[str, ...] = ("torch", "onnxruntime", "openvino"),
        earlier: Sequence[EarlierPlan] = (),
    ) -> None:
        self.store = RunStore(folder)
        known = read_state(self.store)
        self.state = RunState(trials=known.trials or controls_of(), guards=known.guards,
                              rejections=known.rejections, llm=known.llm)  # fmt: skip
        self.warnings: list[str] = []
        self.proposals = Proposals(
            planner=planner,
            store=self.store,
            state=self.state,
            settings=RunSettings(
                budget=Budget(max_drop=0.5, max_trials=max_trials),
                deployment=Deployment(),
                planner=planner.name,
                runtimes=runtimes,
            ),
            progress=SilentProgress(),
            warn=self.warnings.append,
            trials_left=trials_left,
            seconds_to_ask=lambda: 7.0,
            earlier=earlier,
        )

    def run(self, *, drop: float = 0.1, steps: int = 50) -> list[str]:
        """The authors of the trials, in order."""
        authors: list[str] = []
        for number, proposal, author in self.proposals.walk(PROFILE):
            assert number == len(authors) + 1 <= steps
            trial = tried(number, proposal.plan, 0.6, drop).model_copy(update={"author": author})
            self.state.trials.append(trial)
            self.proposals.look_back(trial)
            authors.append(author)
        return authors

    def events(self, kind: str) -> list[dict[str, object]]:
        return [data for each, data in self.store.journal.events() if each == kind]


def test_the_scripted_planners_are_planners() -> None:
    assert isinstance(Asked([], Behind()), Advised)
    assert not isinstance(Behind(), Advised)


# ---- plans of earlier runs ----------------------------------------------------------------------

EARLIER = [
    EarlierPlan(plan=plan, author=author)
    for plan, author in (
        (NOT_HERE, "solver"),  # no control of this run
        (NO_GROUP, "solver"),
        (plan_at(0.4), "solver"),
        (plan_at(0.5), "llm, in an earlier run"),
        (plan_at(0.6), "llm+solver"),
    )
]


@pytest.mark.parametrize(
    ("max_trials", "in_time", "theirs"), [(12, None, 3), (7, None, 2), (12, 4, 1), (2, None, 0)]
)
def test_plans_of_earlier_runs_are_tried_first_if_they_are_few_of_all(
    max_trials: int, in_time: int | None, theirs: int, tmp_path: Path
) -> None:
    planner = Asked([], Behind(), then=endless)
    search = Search(planner, tmp_path, max_trials=max_trials, earlier=EARLIER)
    if in_time is not None:
        search.proposals.trials_left = lambda: in_time - len(search.state.trials[3:])
    authors = search.run(drop=2.0)
    marked = [
        "solver, in an earlier run",
        "llm, in an earlier run",
        "llm+solver, in an earlier run",
    ]
    assert authors[:theirs] == marked[:theirs]
    assert authors[theirs] == "llm"
    ours = search.state.trials[3:]
    assert [trial.is_earlier for trial in ours[:theirs]] == [True] * theirs
    assert not any(trial.is_earlier for trial in ours[theirs:])
    assert [trial.plan for trial in ours[:theirs]] == [each.plan for each in EARLIER[2:][:theirs]]
    guarded = {guard.trial_id for guard in search.state.guards if guard.action == "rollback"}
    assert not guarded & {trial.trial_id for trial in ours[:theirs]}, "no model wrote them"
    assert search.state.rejections == []


def test_a_continued_run_tries_them_once(tmp_path: Path) -> None:
    first = Search(Behind(1), tmp_path, earlier=EARLIER)
    assert len(first.run()) == 4
    for trial in first.state.trials:
        first.store.journal.append("trial", trial)
    behind = Behind(plan=plan_at(0.9))
    more = [EarlierPlan(plan=plan_at(0.7), author="solver"), *EARLIER]  # another run's, since
    again = Search(behind, tmp_path, max_trials=30, earlier=more)
    proposed = [author for _, _, author in islice(again.proposals.walk(PROFILE), 1)]
    assert proposed == ["solver"]
    killed = Search(behind, tmp_path, max_trials=30, earlier=EARLIER)
    killed.state.trials = [*controls_of(), *first.state.trials[3:5]]
    (third,) = islice(killed.proposals.walk(PROFILE), 1)
    assert (third[0], third[1].plan) == (3, EARLIER[4].plan)


def test_after_one_that_fails_the_planner_goes_on(tmp_path: Path) -> None:
    """Or two in a row would have the solver give up their runtime and scheme."""
    search = Search(Behind(), tmp_path, max_trials=30, earlier=EARLIER)
    (first,) = islice(search.proposals.walk(PROFILE), 1)
    failed = tried(1, first[1].plan, 0.6, 0.1)
    search.state.trials.append(failed.model_copy(update={"status": "failed", "author": first[2]}))
    (second,) = islice(search.proposals.walk(PROFILE), 1)
    assert second[2] == "solver"


# ---- the reserve --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_trials", "theirs"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (12, 10)]
)
def test_the_last_trials_are_the_solvers(max_trials: int, theirs: int, tmp_path: Path) -> None:
    """Two of them, and never more than half of a short run."""
    planner = Asked([], Behind(), then=endless)
    found = Search(planner, tmp_path, max_trials=max_trials).run()
    assert found == ["llm"] * theirs + ["solver"] * (max_trials - theirs)
    assert planner.num_asked == theirs
    assert planner.allowed == [7.0] * theirs


@pytest.mark.parametrize(
    ("left", "theirs"), [([9, 8, 7, 6], 4), ([None, 3, 2, 1], 2), ([2] * 4, 2), ([0] * 4, 0)]
)
def test_what_there_is_time_for_counts_too(
    left: list[int | None], theirs: int, tmp_path: Path
) -> None:
    times = iter([*left, *[1] * 20])
    search = Search(Asked([], Behind(), then=endless), tmp_path, trials_left=lambda: next(times))
    assert search.run() == ["llm"] * theirs + ["solver"] * (12 - theirs)


def test_a_planner_with_nobody_behind_has_all_trials(tmp_path: Path) -> None:
    for number, planner in enumerate((Behind(), Asked([], None, then=endless))):
        search = Search(planner, tmp_path / str(number), max_trials=4, trials_left=lambda: 1)
        (tmp_path / str(number)).mkdir()
        assert search.run() == [planner.name] * 4
        assert not search.proposals.hand_over("enough")


# ---- handing over -------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0, 1, 3])
def test_when_the_planner_has_nothing_left_the_one_behind_goes_on(
    given: int, tmp_path: Path
) -> None:
    planner = Asked([endless(i) for i in range(given)], Behind())
    search = Search(planner, tmp_path, max_trials=8)
    assert search.run() == ["llm"] * given + ["solver"] * (8 - given)
    assert planner.num_asked == given + 1  # never again once it has ended
    assert search.proposals.since == given
    assert not search.proposals.hand_over("enough")
    assert search.warnings == []


@pytest.mark.parametrize("bad", [NOT_HERE, NO_GROUP, endless(0)])
def test_a_refused_plan_hands_over(bad: Plan, tmp_path: Path) -> None:
    planner = Asked([endless(0), bad], Behind(), then=endless)
    search = Search(planner, tmp_path, max_trials=6)
    assert search.run() == ["llm", *["solver"] * 5]
    assert planner.num_asked == 2
    (rejection,) = search.state.rejections
    assert (rejection.plan, rejection.author) == (bad, "llm")
    assert len(search.events("rejection")) == len(search.warnings) == 1
    assert "'llm' proposed a bad plan" in search.warnings[0]


def test_a_runtime_that_was_excluded_is_refused(tmp_path: Path) -> None:
    search = Search(Asked([endless(0)], Behind()), tmp_path, runtimes=("torch",))
    assert search.run() == []  # the planner behind proposes for it too
    assert [each.author for each in search.state.rejections] == ["llm", "solver"]
    assert "excluded by --runtime" in search.state.rejections[0].reason


@pytest.mark.parametrize("max_trials", [1, 2, 12, 10_000])
@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("plan", [None, NOT_HERE, NO_GROUP])
def test_nothing_goes_on_for_ever(
    plan: Plan | None, limit: int, max_trials: int, tmp_path: Path
) -> None:
    """Neither has a plan, or only bad ones, which it would propose again and again."""
    reserve = Behind(limit if plan is None else 10**9, plan=plan)
    planner = Asked([], reserve, then=lambda _: plan)
    search = Search(planner, tmp_path, max_trials=max_trials)
    assert len(search.run()) <= limit
    assert planner.num_asked <= 1
    assert reserve.num_asked <= 2 + limit
    assert len(search.state.rejections) <= 2


def test_without_anybody_behind_a_bad_plan_ends_it(tmp_path: Path) -> None:
    for number, end in enumerate((None, NO_GROUP)):
        folder = tmp_path / str(number)
        folder.mkdir()
        planner = Asked([endless(0), end], None, then=endless)
        search = Search(planner, folder)
        assert search.run() == ["llm"]
        assert planner.num_asked == 2
        assert search.proposals.since is None
    assert Search(Behind(3), tmp_path).run() == ["solver"] * 3


def test_a_loop_that_loses_patience_may_hand_over_once(tmp_path: Path) -> None:
    search = Search(Asked([], Behind(), then=endless), tmp_path, max_trials=9)
    walk = search.proposals.walk(PROFILE)
    authors: list[str] = []
    for number, proposal, author in walk:
        search.state.trials.append(tried(number, proposal.plan, 0.6, 0.1))
        authors.append(author)
        if number == 4:
            assert search.proposals.hand_over("enough")
            assert search.proposals.since == 4
        elif number > 4:
            assert not search.proposals.hand_over("enough")
    assert authors == ["llm"] * 4 + ["solver"] * 5


def test_a_continued_run_does_not_ask_again_after_handing_over(tmp_path: Path) -> None:
    first = Search(Asked([endless(0)], Behind(2)), tmp_path)
    assert first.run() == ["llm", "solver", "solver"]
    (guard,) = first.events("guard")
    assert (guard["action"], guard["trial_id"]) == ("handover", "t2")
    assert "llm has nothing left" in str(guard["reason"])
    for trial in first.state.trials:
        first.store.journal.append("trial", trial)
    planner = Asked([], Behind(plan=plan_at(0.5)), then=endless)
    second = Search(planner, tmp_path)
    assert second.proposals.since == 1
    number, _, author = next(second.proposals.walk(PROFILE))
    assert (number, author, planner.num_asked) == (4, "solver", 0)


# ---- with a planner that asks -------------------------------------------------------------------


def answers(count: int) -> list[str]:
    ratios = [0.2 + 0.02 * number for number in range(count)]
    return [said(("mlp:b\\.fc1", ratio), scheme="fp32") for ratio in ratios]


def advised(name: AdvisedName, steps: Sequence[Step], **settings: int) -> AdvisedPlanner:
    client = client_of(Scripted(steps), max_retries=0)
    return AdvisedPlanner(name, client, LlmSettings(model="scripted", **settings))


@pytest.mark.parametrize(
    ("steps", "settings", "theirs"),
    [
        ([*answers(3), FinalFault("The key is wrong.")], {}, 3),
        ([*answers(2), said(done=True)], {}, 2),
        (answers(9), {"rounds": 4}, 4),
        (answers(9), {}, 6),
    ],
)
def test_when_the_model_ends_the_solver_has_the_rest(
    steps: list[Step], settings: dict[str, int], theirs: int, tmp_path: Path
) -> None:
    search = Search(advised("llm", steps, **settings), tmp_path, max_trials=8)
    found = search.run()
    assert found[:theirs] == ["llm"] * theirs
    assert set(found[theirs:]) == {"solver"}
    assert search.state.rejections == [] and search.warnings == []


@pytest.mark.parametrize("name", ["llm", "hybrid"])
@pytest.mark.parametrize("step", ["no", said(), said(("mlp:a\\.fc1", 0.5)), lost()])
def test_a_model_that_says_one_thing_for_ever_ends_as_well(
    step: Step, name: AdvisedName, tmp_path: Path
) -> None:
    search = Search(advised(name, [step]), tmp_path, max_trials=9)
    authors = search.run()
    assert authors and authors.count("llm") + authors.count("llm+solver") <= 2
    assert search.state.rejections == []
    plans = [trial.plan.plan_id for trial in search.state.trials]
    assert len(set(plans)) == len(plans)


@pytest.mark.parametrize("name", ["llm", "hybrid"])
def test_a_model_that_is_not_asked_again_is_counted_once(name: AdvisedName, tmp_path: Path) -> None:
    """As a hand-over: the solver stepped in for two questions, and not for a third."""
    search = Search(advised(name, ["prose"]), tmp_path, max_trials=9)
    assert set(search.run()) == {"solver"}
    counts = Counter(guard.action for guard in search.state.guards)
    assert counts == {"rejected": 4, "fallback": 2, "handover": 1}
    handed = search.state.guards[-1]
    assert (handed.author, handed.trial_id) == ("loop", "t3")
    wanted = "the model is not asked again: 2 questions in a row in vain; solver goes on"
    assert handed.reason == wanted
    assert len(search.events("guard")) == 7


def walked(search: Search, count: int, *, is_underway: bool) -> None:
    """A process that is killed after so many trials of its own, or in the middle of the next."""
    for number, proposal, author in search.proposals.walk(PROFILE):
        if number <= count:
            trial = tried(number, proposal.plan, 0.6, 0.1).model_copy(update={"author": author})
            search.state.trials.append(trial)
        if number == count + is_underway:
            break
    for trial in search.state.trials:
        search.store.journal.append("trial", trial)


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (["prose"], {}),
        ([f"prose {number}" for number in range(50)], {}),
        ([f"prose {number}" for number in range(50)], {"rounds": 1}),
        ([answers(1)[0], "prose"], {}),
        (["prose", "prose", *answers(1), "prose"], {}),
        (answers(9), {"rounds": 3}),
    ],
)
@pytest.mark.parametrize("name", ["llm", "hybrid"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("is_underway", [False, True])
def test_a_continued_run_asks_as_often_as_one_that_was_not_killed(
    steps: list[Step],
    settings: dict[str, int],
    name: AdvisedName,
    count: int,
    is_underway: bool,
    tmp_path: Path,
) -> None:
    def search(folder: Path, provider: Scripted) -> Search:
        folder.mkdir(exist_ok=True)
        client = client_of(provider, folder)
        values = LlmSettings(model="scripted", **settings)
        return Search(AdvisedPlanner(name, client, values), folder, max_trials=9)

    whole, halves = Scripted(steps), Scripted(steps)
    first = search(tmp_path / "whole", whole)
    walked(first, 9, is_underway=False)
    walked(search(tmp_path / "halves", halves), count, is_underway=is_underway)
    second = search(tmp_path / "halves", halves)
    walked(second, 9, is_underway=False)
    assert len(halves.asked) == len(whole.asked)
    assert second.state.guards == first.state.guards
    assert [t.author for t in second.state.trials] == [t.author for t in first.state.trials]


# ---- what is journalled -------------------------------------------------------------------------


def test_guards_are_journalled_once_with_their_trial(tmp_path: Path) -> None:
    planner = Asked([endless(0), endless(1)], Behind(), guards=[SAID])
    search = Search(planner, tmp_path, max_trials=5)
    search.run()
    ids = [guard.trial_id for guard in search.state.guards]
    # at last it had an answer that led to no trial, and the planner behind took over
    assert ids == ["t1", "t2", None, "t3"]
    assert [event["trial_id"] for event in search.events("guard")] == ids
    assert read_state(search.store).guards == search.state.guards


def test_a_continued_run_says_nothing_twice(tmp_path: Path) -> None:
    """Its first trial wasn't finished: the same answers come again, out of the transcript."""
    for _ in range(3):
        search = Search(Asked([endless(0)], Behind(), guards=[SAID]), tmp_path)
        number, _, author = next(search.proposals.walk(PROFILE))
        assert (number, author) == (1, "llm")
        assert [guard.trial_id for guard in search.state.guards] == ["t1"]
        assert len(search.events("guard")) == 1
        assert len(search.events("llm")) == 1


def test_what_the_asking_has_cost_is_journalled_when_it_changes(tmp_path: Path) -> None:
    planner = Asked([endless(0), endless(1)], Behind())
    search = Search(planner, tmp_path, max_trials=8)
    search.run()
    assert [event["requests"] for event in search.events("llm")] == [1, 2, 3]
    assert search.state.llm == LlmUsage(model="scripted", requests=3) == planner.usage


def test_a_model_that_was_never_asked_has_cost_nothing(tmp_path: Path) -> None:
    search = Search(Asked([endless(0)], Behind()), tmp_path, max_trials=4, trials_left=lambda: 0)
    assert search.run() == ["solver"] * 4
    assert search.events("llm") == search.events("guard") == []
    assert search.state.llm is None


# ---- looking back -------------------------------------------------------------------------------


def test_a_plan_that_lost_too_much_is_rolled_back(tmp_path: Path) -> None:
    search = Search(Asked([endless(0), endless(1)], Behind()), tmp_path, max_trials=4)
    search.run(drop=3.0)
    assert [(guard.action, guard.author, guard.trial_id) for guard in search.state.guards] == [
        ("rollback", "loop", "t1"),
        ("rollback", "loop", "t2"),
    ]
    first = search.state.guards[0].reason
    assert first == "it lost 3.00 points; the search goes back to c3 (onnxruntime int8-dynamic)"
    assert len(search.events("guard")) == 2


def looked_back(search: Search, *trials: Trial) -> list[str]:
    for trial in trials:
        search.state.trials.append(trial)
        search.proposals.look_back(trial)
    return [guard.reason for guard in search.state.guards]


def test_a_collapse_goes_back_to_the_original_when_nothing_holds(tmp_path: Path) -> None:
    search = Search(Asked([], Behind()), tmp_path)
    search.state.trials.clear()
    screened = make_trial("t1", author="llm+solver", status="screened", reason="it collapsed")
    (reason,) = looked_back(search, screened)
    assert reason == "it collapsed; the search goes back to the original"
    assert len(search.events("guard")) == 1


def test_what_needs_no_rollback(tmp_path: Path) -> None:
    good, bad = tried(1, endless(0), 0.6, 0.1), tried(2, endless(1), 0.6, 3.0)
    failed = make_trial("t3", author="llm", status="failed", reason="out of memory")
    search = Search(Asked([], Behind()), tmp_path)
    assert looked_back(search, good.model_copy(update={"author": "llm"}), bad, failed) == []
    theirs = bad.model_copy(update={"author": "llm"})
    for planner in (Behind(), Asked([], None)):  # nobody behind: the paper's way has no rollback
        assert looked_back(Search(planner, tmp_path), theirs) == []
