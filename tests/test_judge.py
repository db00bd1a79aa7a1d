"""What answers are worth: accuracy, agreement, and metrics of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from profiling_agent.acquisition.metrics import load_metric, name_of, unit_of
from profiling_agent.errors import BudgetError, DataError, TrialError
from profiling_agent.evaluation.judge import Judge, find_judge
from profiling_agent.evaluation.screening import collapsed
from profiling_agent.records.workload import Task

ACCURACY = find_judge(Task(num_classes=3), None)
AGREEMENT = find_judge(Task(num_classes=3, metric="agreement"), None)


def closeness(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return 1.0 - np.abs(outputs[:, 0] - targets)


def error(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.abs(outputs[:, 0] - targets)


def correlation(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.corrcoef(outputs[:, 0], targets)[0, 1])


def judge_of(function: Callable[..., object], *, higher: bool = True) -> Judge:
    task = Task(num_classes=None, metric="mine", unit="", higher_is_better=higher)
    return find_judge(task, function)


def regression(num: int = 400, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (num, 1) float32 near targets (num,)."""
    rng = np.random.default_rng(0)
    targets = rng.uniform(size=num)
    return (targets + noise * rng.standard_normal(num)).astype(np.float32)[:, None], targets


class TestAccuracy:
    def test_scores_are_paired(self) -> None:
        labels = np.array([0, 1, 2, 2])
        original, mine = np.array([0, 1, 2, 0]), np.array([0, 1, 1, 0])
        accuracy = ACCURACY.score("search", mine, labels, original)
        assert (accuracy.value, accuracy.agreement) == (50.0, 0.75)
        assert accuracy.drop is not None and accuracy.drop.estimate == 25.0
        assert ACCURACY.score("search", mine, labels, None).drop is None

    def test_answers_are_the_largest_logit_and_outputs_are_checked(self) -> None:
        logits = np.array([[0.1, 0.9, 0.0], [2.0, 1.0, 0.0]])
        assert list(ACCURACY.answers(logits)) == [1, 0]
        with pytest.raises(TrialError, match="not finite"):
            ACCURACY.answers(logits * np.nan)
        with pytest.raises(TrialError, match="shape"):
            ACCURACY.answers(logits[:, :2])

    def test_answers_can_be_limited_to_classes_present(self) -> None:
        judge = find_judge(Task(num_classes=4, answers=(1, 3)), None)
        assert list(judge.answers(np.array([[9.0, 1, 8, 2], [9.0, 3, 8, 2]]))) == [3, 1]

    def test_a_model_at_chance_is_refused(self) -> None:
        labels = np.arange(600) % 3
        with pytest.raises(DataError, match=r"no better than always .* \(33\.3 %\)"):
            ACCURACY.refuse_broken(np.random.default_rng(0).permutation(labels), labels)
        ACCURACY.refuse_broken(labels, labels)


class TestAgreement:
    def test_the_original_agrees_with_itself(self) -> None:
        original = np.array([0, 1, 2, 0, 1])
        whole = AGREEMENT.score("test", original, None, None)
        assert whole.value == 100.0
        mine = AGREEMENT.score("test", np.array([0, 1, 2, 0, 2]), None, original)
        assert mine.value == pytest.approx(80.0)
        assert mine.drop is not None and mine.drop.estimate == pytest.approx(20.0)
        AGREEMENT.refuse_broken(original, None)

    def test_a_model_that_always_says_the_same_is_no_measure(self) -> None:
        with pytest.raises(DataError, match="class 2 for all 50 samples"):
            AGREEMENT.refuse_broken(np.full(50, 2), None)
        doubt = AGREEMENT.doubt(np.array([1] * 19 + [0]))
        assert doubt is not None and "95.0%" in doubt
        assert AGREEMENT.doubt(np.arange(20) % 3) is None


class TestScoresOfEachSample:
    def test_drop_is_positive_for_a_loss_in_either_direction(self) -> None:
        original, targets = regression(noise=0.05)
        worse, _ = regression(noise=0.2)
        for judge in (judge_of(closeness), judge_of(error, higher=False)):
            accuracy = judge.score("test", worse, targets, original)
            assert accuracy.drop is not None
            assert 0.0 < accuracy.drop.low < accuracy.drop.estimate < accuracy.drop.high
            assert accuracy.upper_bound is not None
            assert accuracy.drop.estimate < accuracy.upper_bound < accuracy.drop.high
            assert accuracy.agreement is None

    def test_the_interval_covers_the_truth_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        judge, covered = judge_of(closeness), 0
        for _ in range(400):
            targets = rng.uniform(size=100)
            original = (targets + 0.2)[:, None]
            mine = (targets + 0.2 + 0.05 * rng.standard_normal(100))[:, None]
            drop = judge.drop(mine, targets, original).interval
            covered += drop.low <= 0.0 <= drop.high
        assert 376 <= covered <= 399  # 94 % at least, and not by being boundless

    def test_equal_scores_are_no_proof_without_samples(self) -> None:
        original, targets = regression(num=20)
        drop = judge_of(closeness).drop(original, targets, original)
        assert drop.interval.estimate == 0.0
        assert drop.upper_bound > 0.0

    def test_scores_that_never_differ_prove_nothing(self) -> None:
        same = judge_of(lambda outputs, targets: np.full(len(outputs), 0.7))
        original, targets = regression(num=20)
        assert same.drop(original, targets, original).upper_bound is None
        right = judge_of(lambda outputs, targets: np.ones(len(outputs), dtype=bool))
        bound = right.drop(original, targets, original).upper_bound
        assert bound is not None and bound > 0.05  # 20 samples all right are no proof of 5 %

    def test_the_range_of_scores_can_be_stated(self) -> None:
        def wide(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
            return closeness(outputs, targets)

        original, targets = regression(num=50)
        narrow = judge_of(wide).drop(original, targets, original).upper_bound
        vars(wide)["range"] = (-10.0, 10.0)
        stated = judge_of(wide).drop(original, targets, original).upper_bound
        assert narrow is not None and stated is not None and stated > narrow

    def test_shuffled_targets_tell_a_broken_model(self) -> None:
        outputs, targets = regression()
        judge_of(closeness).refuse_broken(outputs, targets)
        judge_of(error, higher=False).refuse_broken(outputs, targets)
        with pytest.raises(DataError, match="shuffled"):
            judge_of(closeness).refuse_broken(outputs[::-1], targets)
        with pytest.raises(DataError, match="lower-is-better"):
            judge_of(error).refuse_broken(outputs, targets)

    def test_collapse_is_screened_in_the_metric_s_own_unit(self) -> None:
        original, targets = regression(noise=0.02)
        judge = judge_of(closeness)
        assert collapsed(judge, original[::-1], targets, original, 0.01) is not None
        assert collapsed(judge, original + 0.005, targets, original, 0.01) is None


class TestOneScoreForAll:
    def test_is_bootstrapped_over_the_samples(self) -> None:
        original, targets = regression(noise=0.1)
        worse, _ = regression(noise=0.3)
        judge = judge_of(correlation)
        drop = judge.drop(worse, targets, original)
        assert 0.0 < drop.interval.low < drop.interval.estimate < drop.interval.high
        assert drop.upper_bound is not None
        assert drop.interval.estimate < drop.upper_bound < drop.interval.high
        assert judge.drop(worse, targets, original) == drop
        assert judge.interval(original, targets).low < correlation(original, targets)

    def test_resamples_without_a_value_are_left_out(self) -> None:
        original, _ = regression(200)
        rare = np.where(np.arange(200) == 0, 1.0, 0.0)

        def only_with_the_rare(outputs: np.ndarray, targets: np.ndarray) -> float:
            return float(outputs.mean()) if targets.max() else float("nan")

        drop = judge_of(only_with_the_rare).drop(original - 0.1, rare, original)
        assert drop.interval.estimate == pytest.approx(0.1, abs=1e-6)

        def only_all(outputs: np.ndarray, targets: np.ndarray) -> float:
            return 1.0 if len(np.unique(targets)) == 200 else float("nan")

        with pytest.raises(BudgetError, match="undefined in 300 of 300 resamples"):
            judge_of(only_all).drop(original, np.arange(200), original)

    def test_resamples_all_alike_prove_nothing(self) -> None:
        original, targets = regression()
        drop = judge_of(lambda outputs, targets: 1.0).drop(original, targets, original)
        assert drop.interval.estimate == 0.0
        assert drop.upper_bound is None and drop.samples_to_prove(0.1) is None

    def test_more_samples_narrow_it(self) -> None:
        judge, widths = judge_of(correlation), []
        for num in (100, 1600):
            original, targets = regression(num, noise=0.1)
            worse, _ = regression(num, noise=0.15)
            interval = judge.drop(worse, targets, original).interval
            widths.append(interval.high - interval.low)
        assert widths[1] < widths[0] / 2


class TestTheFunction:
    def test_is_found_in_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "data.py"
        file.write_text("def top(outputs, targets):\n    return (outputs.argmax(1) == targets)\n")
        function = load_metric(f"{file}:top")
        assert function is not None
        judge = judge_of(function)
        assert judge.value(np.eye(2, dtype=np.float32), np.array([0, 0]), np.eye(2)) == 0.5

    def test_is_named_when_it_is_missing_or_no_function(self, tmp_path: Path) -> None:
        file = tmp_path / "data.py"
        file.write_text("top = 3\ndef best(outputs, targets): ...\n")
        with pytest.raises(BudgetError, match="no metric 'f1'"):
            load_metric("f1")
        with pytest.raises(BudgetError, match="Did you mean 'best'"):
            load_metric(f"{file}:beast")
        with pytest.raises(BudgetError, match="no function"):
            load_metric(f"{file}:top")
        assert load_metric("accuracy") is None

    def test_may_state_a_unit(self, tmp_path: Path) -> None:
        file = tmp_path / "data.py"
        file.write_text("def far(outputs, targets): ...\nfar.unit = 'px'\n")
        assert (unit_of(f"{file}:far"), name_of(f"{file}:far")) == ("px", "far")
        assert (unit_of(closeness), name_of(closeness)) == ("", "closeness")
        assert (unit_of("agreement"), name_of("agreement")) == ("points", "agreement")

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (lambda o, t: 1 / 0, "raised ZeroDivisionError"),
            (lambda o, t: np.zeros((3, 3)), r"returned the shape \(3, 3\)"),
            (lambda o, t: np.full(len(o), np.nan), "not finite"),
        ],
    )
    def test_faults_are_said(self, function: Callable[..., object], words: str) -> None:
        outputs, targets = regression(10)
        with pytest.raises(BudgetError, match=words):
            judge_of(function).score("test", outputs, targets, None)


def outcomes_of(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, ...]:
    """Answers of the artefact, labels (all 1), answers of the original."""
    counts = (both, lost, won, neither)
    return (
        np.repeat([1, 0, 1, 0], counts),
        np.ones(sum(counts), dtype=int),
        np.repeat([1, 1, 0, 0], counts),
    )


def test_screening_stops_a_collapse_and_spares_what_may_be_good() -> None:
    reason = collapsed(ACCURACY, *outcomes_of(150, 80, 2, 24), 0.5)
    assert reason is not None and "30.5 points lost on the first 256 samples" in reason
    assert collapsed(ACCURACY, *outcomes_of(230, 2, 2, 22), 0.5) is None
    assert collapsed(ACCURACY, *outcomes_of(150, 80, 2, 24), 20.0) is None


def test_a_plan_at_twice_the_budget_is_almost_never_screened() -> None:
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(2000):
        cells = rng.multinomial(256, [0.87, 0.03, 0.01, 0.09])
        stopped += collapsed(ACCURACY, *outcomes_of(*map(int, cells)), 1.0) is not None
    assert stopped <= 2
