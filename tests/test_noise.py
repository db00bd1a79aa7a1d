"""What random noise on the logits costs: told without a plan, and close to what plans cost."""

from __future__ import annotations

import numpy as np
import pytest

from profiling_agent.compression.divergence import mean_divergence
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.evaluation.noise import LEAST_LOST, noise_divergence
from profiling_agent.records.workload import Task
from record_factory import make_workload

NUM_CLASSES = 12


def logits_of(num_samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Of a classifier that is right on some nine in ten, and its labels."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, NUM_CLASSES, num_samples)
    logits = draw.normal(0.0, 1.0, (num_samples, NUM_CLASSES))
    logits[np.arange(num_samples), labels] += 3.5
    return logits.astype(np.float32), labels


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100.0 * float((logits.argmax(1) == labels).mean())


@pytest.mark.parametrize("drop", [0.5, 2.0])
def test_other_noise_of_that_divergence_loses_what_was_asked(drop: float) -> None:
    logits, labels = logits_of(20_000)
    found = noise_divergence(logits, labels, drop)
    assert found is not None
    fresh, labels = logits_of(50_000, seed=1)
    draw = np.random.default_rng(2)
    for scale in np.linspace(0.05, 3.0, 60):
        noisy = fresh + scale * draw.standard_normal(fresh.shape)
        if mean_divergence(fresh, noisy, has_classes=True) >= found:
            lost = accuracy(fresh, labels) - accuracy(noisy, labels)
            assert lost == pytest.approx(drop, rel=0.35)
            return
    raise AssertionError("no noise diverges so far")


def test_a_loss_that_few_samples_could_tell_is_a_part_of_a_larger_one() -> None:
    logits, labels = logits_of(1000)
    least = 100.0 * LEAST_LOST / 1000
    whole = noise_divergence(logits, labels, least)
    assert whole is not None
    assert noise_divergence(logits, labels, least / 10) == pytest.approx(whole / 10)
    assert noise_divergence(logits, labels, least) == whole  # and it repeats
    # flips go as the root of the divergence where nothing cancels
    of_all = noise_divergence(logits, logits.argmax(1), least)
    assert of_all is not None
    assert noise_divergence(logits, logits.argmax(1), least / 2) == pytest.approx(of_all / 4)


def test_noise_that_never_loses_so_much_tells_nothing() -> None:
    logits, labels = logits_of(500)
    assert noise_divergence(logits, labels, 99.0) is None
    assert noise_divergence(logits, labels, 0.0) is None
    assert noise_divergence(np.zeros((50, 3), np.float32), np.zeros(50, int), 1.0) is None
    assert noise_divergence(-logits, labels, 1.0) is None  # wrong on all: there is nothing to lose
    equal = np.sign(logits)  # whose first of equals is the answer: the least noise loses much
    assert noise_divergence(equal, equal.argmax(1), 1.0) is None


def task_of(**fields: object) -> Task:
    return make_workload().task.model_copy(update={"num_classes": NUM_CLASSES, **fields})


def test_only_classes_that_are_answers_count() -> None:
    logits, labels = logits_of(4000)
    kept = (2, 3, 5, 7)
    rows = np.isin(labels, kept)
    logits, labels = logits[rows], labels[rows]
    judge = find_judge(task_of(answers=kept), None)
    found = judge.noise_divergence(logits, labels, 2.0)
    of_all = find_judge(task_of(), None).noise_divergence(logits, labels, 2.0)
    assert found is not None and of_all is not None
    assert found > 1.3 * of_all  # there are fewer to be mistaken for
    # nats are those of all logits, as trials record them
    places = np.array([kept.index(label) for label in labels])
    alone = noise_divergence(logits[:, list(kept)], places, 2.0)
    assert alone is not None and alone != pytest.approx(found, rel=0.05)


def test_without_labels_the_original_is_right_and_a_users_metric_has_no_noise() -> None:
    logits, _ = logits_of(4000)
    agreement = find_judge(task_of(metric="agreement"), None)
    expected = noise_divergence(logits, logits.argmax(1), 2.0)
    assert agreement.noise_divergence(logits, None, 2.0) == expected is not None
    custom = find_judge(task_of(metric="mine"), lambda outputs, targets: 1.0)
    assert custom.noise_divergence(logits, None, 2.0) is None
