"""Planners compared: who proposes what, what is measured once, and what the table says."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from profiling_agent import arms
from profiling_agent.ablation import Comparison, ablation_settings
from profiling_agent.cli import app
from profiling_agent.errors import BudgetError, TrialError
from profiling_agent.planning.advised import AdvisedPlanner
from profiling_agent.planning.effects import effect
from profiling_agent.planning.hypervolume import gain, hypervolume
from profiling_agent.planning.planner import Planner, find_planner
from profiling_agent.records.ablation import AblationRecord, Arm
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.llm import LlmSettings
from profiling_agent.records.plan import Plan
from profiling_agent.records.trial import Trial
from profiling_agent.report.ablation_chart import curves_of, gains_chart
from profiling_agent.report.ablation_html import render_ablation_html
from profiling_agent.report.ablation_summary import rows_of, titles_of
from profiling_agent.report.live import SilentProgress
from profiling_agent.run_state import RunState
from record_factory import make_accuracy, make_evaluation, make_machine, make_workload
from scripted_llm import Scripted, Step, client_of, lost, said
from small_workload import write_project
from test_planning import BUDGET, FP32, INT8, controls_of, profile_of, tried

LLM = LlmSettings(model="test:scripted")
GOOD = said(("mlp:a.fc1", 0.5))


def settings_of(planners: Sequence[str] | None, **fields: Any) -> Any:
    values: dict[str, Any] = {
        "deployment": Deployment(),
        "runtimes": ("onnxruntime", "openvino", "torch"),
        "planners": planners,
        "num_seeds": 1,
    }
    budget = BUDGET.model_copy(update={"max_trials": fields.pop("max_trials", 4)})
    return ablation_settings(budget, **values | fields)


class Lines:
    """A journal in memory."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any]] = []

    def clock(self) -> float:
        return 12.0

    def append(self, kind: str, data: Any) -> None:
        self.kept.append((kind, json.loads(json.dumps(data))))

    def events(self) -> list[tuple[str, Any]]:
        return list(self.kept)


class Bench:
    """A workbench whose trials take no time: what a plan saves and loses follows its pruning."""

    def __init__(self, folder: Path, *, left: float = 1e6) -> None:
        self.state = RunState(
            baseline=make_evaluation(),
            machine=make_machine(),
            trials=list(controls_of()),
        )
        self.left, self.time_s = left, 0.0
        self.progress = SilentProgress()
        self.store = SimpleNamespace(
            folder=folder,
            data=folder / "data",
            transcripts=folder / "transcripts",
            journal=Lines(),
        )
        self.workload = SimpleNamespace(
            record=make_workload(), splits={"test": SimpleNamespace(labels=None)}
        )
        self.runner = SimpleNamespace(
            builder=SimpleNamespace(close=lambda: None),
            baseline=SimpleNamespace(open=_nobody),
        )
        self.carried_out: list[Plan] = []

    def reserve(self, num_artefacts: int = 3) -> float:
        return 1.0

    def usual_trial_s(self) -> float:
        return 1.0

    def call_s(self) -> float:
        return 0.004

    def time_again(self, *, at_last: bool = False) -> None:
        pass

    def try_plan(self, trial_id: str, plan: Plan, author: str, **known: Any) -> Trial:
        self.carried_out.append(plan)
        cut = sum(line.ratio for line in plan.pruning)
        trial = tried(1, plan, max(0.05, 0.5 - 0.2 * cut), 0.3 * cut)
        trial = trial.model_copy(update={"trial_id": trial_id, "author": author})
        self.state.keep(trial)
        return trial


def _nobody() -> None:
    raise TrialError("no original here")


def compared(bench: Bench, settings: Any) -> AblationRecord:
    return Comparison(bench, settings).walk(profile_of())  # type: ignore[arg-type]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Scripted]]:
    """Advised planners ask a list of replies, one list for each of them."""

    def use(**steps: Sequence[Step]) -> dict[str, Scripted]:
        providers = {name: Scripted(each) for name, each in steps.items()}

        def find(
            name: str, llm: LlmSettings | None = None, transcript: object = None, **how: bool
        ) -> Planner:
            if llm is None:
                return find_planner(name)
            return AdvisedPlanner(name, client_of(providers.get(name) or Scripted([])), llm, **how)

        monkeypatch.setattr(arms, "find_planner", find)
        return providers

    return use


def arm_of(record: AblationRecord, planner: str, seed: int = 0) -> Arm:
    return next(arm for arm in record.arms if arm.planner == planner and arm.seed == seed)


# ---- the arms -----------------------------------------------------------------------------------


def test_every_arm_has_as_many_trials_and_its_own_history(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    record = compared(bench, settings_of(("random", "greedy", "solver"), num_seeds=2))
    assert [(arm.planner, arm.seed) for arm in record.arms] == [
        ("random", 0), ("greedy", 0), ("solver", 0), ("random", 1), ("greedy", 1), ("solver", 1)
    ]  # fmt: skip
    for arm in record.arms:
        assert len(arm.attempts) == 4 or arm.ended
        assert len(arm.gains) == len(arm.attempts) + 1
        assert [attempt.trial.trial_id for attempt in arm.attempts if attempt.trial] == [
            f"t{attempt.number}" for attempt in arm.attempts
        ]
        known = [gain for gain in arm.gains if gain is not None]
        assert known == sorted(known)  # the best so far never gets worse


def test_plans_of_one_effect_are_carried_out_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    record = compared(bench, settings_of(("solver", "greedy"), num_seeds=3))
    effects = [effect(plan, profile_of()) for plan in bench.carried_out]
    assert len(effects) == len(set(effects)) == record.num_measured
    first, second = arm_of(record, "solver", 0), arm_of(record, "solver", 1)
    assert [a.measured_as for a in first.attempts] == [a.measured_as for a in second.attempts]
    assert not any(attempt.is_cached for attempt in first.attempts)
    assert all(attempt.is_cached for attempt in second.attempts)
    assert first.gains == second.gains


def test_a_second_walk_measures_nothing_and_says_the_same(tmp_path: Path) -> None:
    bench, settings = Bench(tmp_path), settings_of(("random", "uniform", "solver"))
    first = compared(bench, settings)
    carried_out = len(bench.carried_out)
    second = compared(bench, settings)
    assert len(bench.carried_out) == carried_out
    assert second.arms == first.arms


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_a_stopped_comparison_asks_and_measures_nothing_twice(
    num_steps: int, tmp_path: Path, scripted: Any
) -> None:
    """Stopped in the middle, then started anew: what it says is what it would have said."""
    answers = ["prose", GOOD, "prose", said(("mlp:a.fc1", 0.25))]
    settings = settings_of(("solver", "llm"), models=(LLM,))
    scripted(llm=answers)
    whole = compared(Bench(tmp_path), settings)
    provider = scripted(llm=answers)["llm"]
    bench = Bench(tmp_path)
    try_plan = bench.try_plan

    def stops(*given: Any, **known: Any) -> Trial:
        if len(bench.carried_out) == num_steps:
            raise KeyboardInterrupt
        return try_plan(*given, **known)

    bench.try_plan = stops
    with contextlib.suppress(KeyboardInterrupt):
        compared(bench, settings)
    bench.try_plan = try_plan
    asked = len(provider.asked)
    slots = [len(data["slots"]) for kind, data in bench.store.journal.events() if kind == "arm"]
    record = compared(bench, settings)
    assert [(a.planner, a.gains) for a in record.arms if a.planner == "solver"] == [
        (a.planner, a.gains) for a in whole.arms if a.planner == "solver"
    ]
    effects = [effect(plan, profile_of()) for plan in bench.carried_out]
    assert len(effects) == len(set(effects))
    assert slots and len(provider.asked) >= asked
    assert len(arm_of(record, "llm").attempts) == 4


@pytest.mark.parametrize("planner", ["llm", "hybrid"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_continued_arm_asks_no_more_than_its_trials_allow(
    planner: str, count: int, tmp_path: Path, scripted: Any
) -> None:
    """Rejected answers are attempts of the model alone; behind the other stands the solver."""
    answers = ["prose", GOOD, *[f"prose {number}" for number in range(20)]]
    settings = settings_of((planner,), models=(LLM,))
    provider = scripted(**{planner: answers})[planner]
    whole = compared(Bench(tmp_path), settings)
    asked = len(provider.asked)
    provider = scripted(**{planner: answers})[planner]
    bench = Bench(tmp_path)
    append = bench.store.journal.append

    def stops(kind: str, data: Any) -> None:
        append(kind, data)
        if kind == "arm" and len(bench.store.journal.kept) == count:
            raise KeyboardInterrupt

    bench.store.journal.append = stops
    with contextlib.suppress(KeyboardInterrupt):
        compared(bench, settings)
    record = compared(bench, settings)
    assert len(provider.asked) == asked
    assert arm_of(record, planner).guards == arm_of(whole, planner).guards


def test_answers_without_token_counts_are_answers(tmp_path: Path, scripted: Any) -> None:
    """A file of two answers and four trials: what was tried counts, then the arm is at its end."""
    scripted(llm=["prose", GOOD, lost()])
    record = compared(Bench(tmp_path), settings_of(("llm", "solver"), models=(LLM,), num_seeds=2))
    arm = arm_of(record, "llm")
    assert len(arm.attempts) == 2 and arm.attempts[1].trial is not None
    assert arm.ended == "no answer: Nobody is there."
    assert arm.usage is not None and arm.usage.answered == 2
    assert len(arm_of(record, "solver", 1).attempts) == 4


def test_done_is_for_good(tmp_path: Path, scripted: Any) -> None:
    provider = scripted(llm=["prose", said(done=True), GOOD])["llm"]
    arm = compared(Bench(tmp_path), settings_of(("llm",), models=(LLM,))).arms[0]
    assert len(arm.attempts) == 1 and len(provider.asked) == 2
    assert arm.ended == "the planner has nothing left to propose"
    provider = scripted(hybrid=[said(done=True), GOOD])["hybrid"]
    arm = compared(Bench(tmp_path), settings_of(("hybrid",), models=(LLM,))).arms[0]
    assert len(arm.attempts) == 4 and len(provider.asked) == 1
    assert {attempt.trial.author for attempt in arm.attempts if attempt.trial} == {"solver"}


def test_the_time_to_wait_is_shared_by_those_who_ask(tmp_path: Path, scripted: Any) -> None:
    seen: list[float] = []

    def find(name: str, llm: LlmSettings | None = None, *rest: Any, **how: Any) -> Planner:
        if llm is not None and rest:
            seen.append(llm.limits.max_seconds)
        return find_planner("solver")

    settings = settings_of(("llm", "hybrid"), models=(LLM,), num_seeds=2, time_s=400.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "find_planner", find)
        compared(Bench(tmp_path), settings)
    assert seen == [50.0] * 4  # half of the time, four arms


def test_a_race_that_fails_leaves_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Comparison, name: str, reference: str) -> None:
        raise TrialError("no race here")

    score = make_accuracy("test")
    monkeypatch.setattr(Comparison, "_raced", fails)
    monkeypatch.setattr(Comparison, "_on_test", lambda self, name: score)
    comparison = Comparison(Bench(tmp_path), settings_of(("solver",)))  # type: ignore[arg-type]
    assert comparison.judged("c1", "c2") == (score, None, "no race here")
    assert comparison.judged("c1", None) == (score, None, "")
    monkeypatch.setattr(Comparison, "_on_test", fails)
    assert comparison.judged("c1", None) == (score, None, "")  # from the journal


def test_the_models_arm_stands_alone(tmp_path: Path, scripted: Any) -> None:
    """Prose costs a trial; nothing steps in for it; the reason goes back to the model."""
    provider = scripted(llm=["I would prune a little.", GOOD, "More!"])["llm"]
    record = compared(Bench(tmp_path), settings_of(("solver", "llm"), models=(LLM,)))
    arm = arm_of(record, "llm")
    assert [attempt.trial is not None for attempt in arm.attempts] == [False, True, False, False]
    assert "not JSON" in arm.attempts[0].reason
    assert arm.attempts[1].trial is not None and arm.attempts[1].trial.author == "llm"
    assert not arm.ended and {guard.action for guard in arm.guards} == {"rejected"}
    assert all("ask_solver" not in str(each.tools) for each in provider.asked)
    assert "not JSON" in provider.asked[1].turns[-1].text
    assert len(provider.asked) == 4  # as many answers as trials


def test_the_models_arm_is_not_held_back_by_the_trust_region(tmp_path: Path, scripted: Any) -> None:
    wild = [said((".*", 0.9)), said((".*", 0.85)), said((".*", 0.8))]
    scripted(llm=wild)
    record = compared(Bench(tmp_path), settings_of(("llm",), models=(LLM,), max_trials=3))
    ratios = [a.trial.plan.pruning[0].ratio for a in record.arms[0].attempts if a.trial]
    assert ratios == [0.9, 0.85, 0.8]


def test_hybrid_falls_back_and_has_its_reserve(tmp_path: Path, scripted: Any) -> None:
    scripted(hybrid=["no plan"])
    record = compared(Bench(tmp_path), settings_of(("solver", "hybrid"), models=(LLM,)))
    solver, hybrid = arm_of(record, "solver"), arm_of(record, "hybrid")
    assert [a.measured_as for a in hybrid.attempts] == [a.measured_as for a in solver.attempts]
    assert {a.trial.author for a in hybrid.attempts if a.trial} == {"solver"}
    assert hybrid.same_as_reference
    assert any(guard.action == "fallback" for guard in hybrid.guards)


def test_the_papers_way_ends_at_a_bad_answer(tmp_path: Path, scripted: Any) -> None:
    scripted(paper=["no plan", GOOD])
    record = compared(Bench(tmp_path), settings_of(("paper",), models=(LLM,)))
    arm = record.arms[0]
    assert len(arm.attempts) == 1 and arm.attempts[0].trial is None
    assert "ends the paper's way" in arm.ended


@pytest.mark.parametrize("planner", ["llm", "hybrid", "paper"])
def test_a_model_that_can_not_be_reached_leaves_its_cells_empty(
    planner: str, tmp_path: Path, scripted: Any
) -> None:
    """Its arms would otherwise show what the solver can."""
    provider = scripted(**{planner: [lost()]})[planner]
    bench = Bench(tmp_path)
    record = compared(bench, settings_of((planner,), models=(LLM,), num_seeds=2))
    assert all(not arm.attempts and "Nobody is there" in arm.ended for arm in record.arms)
    assert len(provider.asked) == 1  # not once more for the other seed
    assert all(cell == ("–", "") for cell in rows_of(record)[0].cells)
    assert rows_of(record)[0].note.startswith("not run: ")
    assert bench.carried_out == []
    again = compared(bench, settings_of((planner,), models=(LLM,), num_seeds=2))
    assert all(not arm.gains and "Nobody is there" in arm.ended for arm in again.arms)
    assert len(provider.asked) == 2  # it might have been there by now


def test_what_is_compared_when_nobody_says() -> None:
    plain = settings_of(None).planners
    assert plain == ("random", "uniform", "greedy", "tpe", "solver")
    assert settings_of(None, models=(LLM,)).planners == (*plain, "llm", "hybrid", "paper")
    without_torch = settings_of(None, models=(LLM, LLM), runtimes=("openvino",))
    assert without_torch.planners == (*plain, "llm", "hybrid")  # the paper's way runs in torch
    assert len(without_torch.models) == 1


def test_one_arm_finds_out_for_all_that_a_model_is_away(tmp_path: Path, scripted: Any) -> None:
    providers = scripted(llm=[lost()], hybrid=[lost()], paper=[lost()])
    planners = ("llm", "hybrid", "paper", "solver")
    record = compared(Bench(tmp_path), settings_of(planners, models=(LLM,)))
    assert sum(len(provider.asked) for provider in providers.values()) == 1
    assert [bool(arm.attempts) for arm in record.arms] == [False, False, False, True]


def test_without_a_profile_the_arms_say_so(tmp_path: Path) -> None:
    bench, settings = Bench(tmp_path), settings_of(("solver", "random"))
    record = Comparison(bench, settings).walk(None)  # type: ignore[arg-type]
    assert all("no profile" in arm.ended and not arm.gains for arm in record.arms)
    assert render_ablation_html(record)


def test_without_a_model_or_a_key_the_arm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    record = compared(Bench(tmp_path), settings_of(("llm",)))
    assert record.arms[0].ended == "no language model was named"
    pytest.importorskip("pydantic_ai")
    keyless = settings_of(("hybrid",), models=(LlmSettings(model="openai:gpt-4o"),))
    record = compared(Bench(tmp_path), keyless)
    assert "OPENAI_API_KEY" in record.arms[0].ended and not record.arms[0].attempts


def test_when_time_is_up_the_arms_say_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path, left=1.0)
    record = compared(bench, settings_of(("random", "solver")))
    assert bench.carried_out == []
    assert all(arm.ended == "the time budget ended" for arm in record.arms)
    assert not any(arm.gains or arm.best_id for arm in record.arms)  # not the controls' either


def test_a_planner_with_nothing_left_ends_its_arm(tmp_path: Path) -> None:
    record = compared(Bench(tmp_path), settings_of(("uniform",), max_trials=40))
    assert record.arms[0].ended == "the planner has nothing left to propose"
    assert 0 < len(record.arms[0].attempts) < 40


def test_what_can_not_be_judged_at_the_end_says_why(tmp_path: Path) -> None:
    arm = compared(Bench(tmp_path), settings_of(("solver",))).arms[0]
    assert arm.best_id is not None and arm.test is None
    assert arm.not_compared == "no original here"


# ---- hypervolume --------------------------------------------------------------------------------


def test_the_hypervolume_is_the_dominated_share() -> None:
    """Half the time at no loss: half of the square. A second point adds what it alone dominates."""
    baseline, plan = make_evaluation(), Plan(runtime=FP32.runtime)
    budget = Budget(max_drop=1.0)
    half = tried(1, plan, 0.5, 0.0)
    assert hypervolume([half], baseline, budget) == pytest.approx(0.5)
    quarter = tried(2, plan, 0.25, 1.0)  # half of the reference's drop of two points
    assert hypervolume([half, quarter], baseline, budget) == pytest.approx(0.5 + 0.25 * 0.5)
    beaten, useless = tried(3, plan, 0.6, 1.5), tried(4, plan, 0.1, 2.5)
    slower = tried(5, plan, 1.5, -1.0)
    more = [half, quarter, beaten, useless, slower]
    assert hypervolume(more, baseline, budget) == pytest.approx(0.625)
    gained = tried(6, plan, 0.5, -0.7)
    assert hypervolume([gained], baseline, budget) == pytest.approx(0.5)
    assert hypervolume([], baseline, budget) == 0.0


def test_the_gain_is_over_the_original_in_every_objective() -> None:
    baseline, trial = make_evaluation(), tried(1, Plan(runtime=INT8.runtime), 0.25, 0.0)
    assert gain(trial, baseline, Budget(max_drop=1.0)) == pytest.approx(4.0)
    assert trial.evaluation is not None and baseline.size_bytes is not None
    smaller = trial.evaluation.model_copy(update={"size_bytes": baseline.size_bytes // 2})
    small = trial.model_copy(update={"evaluation": smaller})
    assert gain(small, baseline, Budget(max_drop=1.0, objective="size")) == pytest.approx(2.0)
    unknown = trial.evaluation.model_copy(update={"memory_bytes": None})
    blank = trial.model_copy(update={"evaluation": unknown})
    assert gain(blank, baseline, Budget(max_drop=1.0, objective="memory")) is None


# ---- table and plot -----------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_planner_and_wording(tmp_path: Path, scripted: Any) -> None:
    scripted(llm=["nonsense"], hybrid=["nonsense"])
    models = tuple(
        LlmSettings(model="test:scripted", prompt=prompt) for prompt in ("default", "terse")
    )
    record = compared(
        Bench(tmp_path), settings_of(("solver", "llm", "hybrid"), models=models, num_seeds=2)
    )
    rows = rows_of(record)
    assert [row.name for row in rows] == ["solver", "llm", "llm", "hybrid", "hybrid"]
    assert ["terse" in row.under for row in rows] == [False, False, True, False, True]
    assert all(len(row.cells) == len(titles_of(record)) for row in rows)
    rejected = titles_of(record).index("rejected")
    assert rows[1].cells[rejected][0] == "8"  # two seeds of four trials
    page = render_ablation_html(record)
    assert page.count("<svg") == 1 and "stands alone" in page
    assert "nonsense" not in page.split("<h2>All trials")[0]


def test_the_plot_draws_what_was_found_and_nothing_else(tmp_path: Path, scripted: Any) -> None:
    scripted(llm=[lost()])
    record = compared(Bench(tmp_path), settings_of(("solver", "random", "llm"), models=(LLM,)))
    curves = curves_of(record)
    assert [curve.name for curve in curves] == ["solver", "random"]
    solver = arm_of(record, "solver")
    ended = solver.gains + (solver.gains[-1],) * (5 - len(solver.gains))
    assert curves[0].gains == ended
    assert gains_chart(record).count("<polyline") == 2
    empty = record.model_copy(update={"arms": ()})
    assert gains_chart(empty) == ""


def test_names_from_outside_are_shown_and_not_obeyed(tmp_path: Path, scripted: Any) -> None:
    scripted(llm=["<script>alert(1)</script>"])
    evil = LlmSettings(model="test:<b>bold</b>\x1b[2J")
    page = render_ablation_html(compared(Bench(tmp_path), settings_of(("llm",), models=(evil,))))
    assert "<script>" not in page and "<b>" not in page and "\x1b" not in page


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--planners", "oracle"], "There is no planner 'oracle' to compare"),
        (["--planners", ","], "--planners names nothing"),
        (["--llm-prompts", "shouting", "--llm", "replay:x"], "shouting"),
        (["--time-budget", "soon"], "not a duration"),
        (["--llm-timeout", "soon"], "--llm-timeout 'soon' is not a duration"),
        (["--llm", "@http://localhost:1/v1"], "--model"),
    ],
)
def test_bad_flags_are_answered_in_words(arguments: list[str], words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["ablate", "demo:vit", "--out", str(out), *arguments])
    text = done.stderr if done.exception is None else f"{done.stderr}{done.exception}"
    assert words in text or isinstance(done.exception, BudgetError)
    assert done.exit_code != 0 and not (out / "ablation.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    "PROFILING_AGENT_LONG" not in os.environ, reason="three minutes; set PROFILING_AGENT_LONG"
)
@pytest.mark.timeout(500)
def test_a_comparison_from_end_to_end(tmp_path: Path) -> None:
    """Controls, five planners, a model that is a file of answers; then again, from the folder."""
    project, out = write_project(tmp_path / "project"), tmp_path / "out"
    answers = tmp_path / "answers.jsonl"
    plan = {"why": "a start", "done": False, "runtime": "onnxruntime", "scheme": "fp32",
            "prune": [{"match": ".*", "ratio": 0.25, "why": ""}], "keep_float": []}  # fmt: skip
    lines = [{"answer": "no plan"}, {"answer": json.dumps(plan)}]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = [
        sys.executable, "-m", "profiling_agent.cli", "ablate", f"{project / 'model.py'}:model",
        "--weights", str(project / "weights.safetensors"),
        "--data", f"{project / 'data.py'}:val", "--max-drop", "2.0", "--threads", "1",
        "--runtime", "onnxruntime", "--trials", "2", "--seeds", "1", "--time-budget", "240s",
        "--planners", "random,uniform,solver,llm", "--llm", f"replay:{answers}",
        "--out", str(out), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr
    record = AblationRecord.model_validate_json(done.stdout)
    assert AblationRecord.read(out / "ablation.json") == record
    assert (out / "ablation.html").read_text(encoding="utf-8") == render_ablation_html(record)
    llm, solver = arm_of(record, "llm"), arm_of(record, "solver")
    assert llm.attempts[0].trial is None and llm.attempts[1].trial is not None
    assert llm.attempts[1].trial.plan.why == "a start"
    assert llm.usage is not None and "written by a person" in llm.usage.model
    assert solver.best_id is not None and solver.same_as_reference
    assert solver.test is not None and solver.test.split == "test" and not solver.not_compared
    others = [arm for arm in record.arms if arm.best_id not in (None, solver.best_id)]
    assert all(arm.over_reference is not None for arm in others)
    again = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0 and "started" not in again.stderr, again.stderr
    second = AblationRecord.model_validate_json(again.stdout)
    assert [arm.attempts for arm in second.arms] == [arm.attempts for arm in record.arms]
