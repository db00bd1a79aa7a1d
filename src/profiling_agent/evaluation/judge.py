"""What outputs are worth: the metric on one split, paired with the original's on the same samples.

Three kinds. ``accuracy`` and ``agreement`` (with the original's own answers, where there are no
labels) are right or wrong sample by sample, in percent. A function of the user's gives a score for
each sample, or one number for all of them, which is bootstrapped over the samples. Drops are
positive when something is lost, whichever direction is better, in the metric's own unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from profiling_agent.errors import BudgetError, DataError, TrialError
from profiling_agent.evaluation.noise import noise_divergence
from profiling_agent.evaluation.statistics import (
    Drop,
    accuracy_interval,
    bootstrap_drop,
    mean_interval,
    paired_drop,
)
from profiling_agent.records.common import Interval
from profiling_agent.records.evaluation import Accuracy
from profiling_agent.records.workload import SplitName, Task

NUM_SHUFFLES = 20
NUM_RESAMPLES = 300
CONSTANT_SHARE = 0.9
"""Of the answers: agreement with a model that always says the same says little."""
SEED = 0


class Judge(ABC):
    """Knows the task; ``answers`` of an artefact go in, records come out.

    >>> judge = find_judge(workload.record.task, load_metric("accuracy"))
    >>> answers = judge.answers(logits)
    >>> judge.score("search", answers, labels, original).value
    91.3
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def answers(self, outputs: np.ndarray) -> np.ndarray:
        """What is kept of the outputs (samples, ...): predicted classes (samples,), or all of them.

        ``TrialError`` when they have not the task's shape or are not finite.
        """
        if not np.isfinite(outputs).all():
            raise TrialError("The artefact gives numbers that are not finite.")
        if self.task.num_classes is None or self._keeps_outputs:
            return outputs
        return classes(outputs, self.task)

    def score(
        self,
        split: SplitName,
        ours: np.ndarray,
        labels: np.ndarray | None,
        original: np.ndarray | None,
        *,
        level: float = 0.95,
    ) -> Accuracy:
        """The metric of answers, and what was lost against the original's when that is given."""
        drop = None if original is None else self.drop(ours, labels, original, level=level)
        return self.accuracy(split, ours, labels, original, drop)

    def accuracy(
        self,
        split: SplitName,
        ours: np.ndarray,
        labels: np.ndarray | None,
        original: np.ndarray | None,
        drop: Drop | None,
    ) -> Accuracy:
        """The record of a drop that was worked out already."""
        return Accuracy(
            split=split,
            num_samples=len(ours),
            value=self.value(ours, labels, ours if original is None else original),
            drop=drop.interval if drop else None,
            upper_bound=drop.upper_bound if drop else None,
            agreement=self._agreement(ours, original),
        )

    @abstractmethod
    def value(self, ours: np.ndarray, labels: np.ndarray | None, original: np.ndarray) -> float:
        """The metric, in its unit."""

    @abstractmethod
    def drop(
        self,
        ours: np.ndarray,
        labels: np.ndarray | None,
        original: np.ndarray,
        *,
        level: float = 0.95,
        confidence: float = 0.95,
    ) -> Drop:
        """What was lost on the same samples, with its interval and its one-sided bound."""

    @abstractmethod
    def refuse_broken(self, original: np.ndarray, labels: np.ndarray | None) -> None:
        """``DataError`` when the untouched model is no better than chance on these samples."""

    @abstractmethod
    def interval(self, ours: np.ndarray, labels: np.ndarray | None) -> Interval:
        """The metric of one artefact by itself, with its interval."""

    def doubt(self, original: np.ndarray) -> str | None:
        """What makes the metric say little on these answers; None mostly."""
        return None

    def noise_divergence(
        self, outputs: np.ndarray, labels: np.ndarray | None, drop: float
    ) -> float | None:
        """Nats at which random noise on the original's logits (samples, classes) loses the drop;
        None for metrics of which that isn't known."""
        return None

    _keeps_outputs = False

    def _agreement(self, ours: np.ndarray, original: np.ndarray | None) -> float | None:
        if original is None or ours.ndim != 1:
            return None
        return float((ours == original).mean())


class RightOrWrong(Judge):
    """Accuracy against labels, or agreement with the original's answers."""

    def value(self, ours: np.ndarray, labels: np.ndarray | None, original: np.ndarray) -> float:
        return 100.0 * float((ours == self._truth(labels, original)).mean())

    def drop(
        self,
        ours: np.ndarray,
        labels: np.ndarray | None,
        original: np.ndarray,
        *,
        level: float = 0.95,
        confidence: float = 0.95,
    ) -> Drop:
        truth = self._truth(labels, original)
        before = 100.0 * (original == truth)
        return paired_drop(
            before, 100.0 * (ours == truth), span=100.0, level=level, confidence=confidence
        )

    def refuse_broken(self, original: np.ndarray, labels: np.ndarray | None) -> None:
        if self.task.metric == "agreement":
            if len(np.unique(original)) == 1:
                raise DataError(
                    f"The untouched model answers class {int(original[0])} for all "
                    f"{len(original):,} samples, so any artefact would agree. Give samples of "
                    "other kinds, or check the weights and the preprocessing."
                )
            return
        assert labels is not None
        right = accuracy_interval(original == labels, confidence=0.99)
        chance = 100.0 * np.bincount(labels).max() / len(labels)
        if right.low <= chance:
            shown = ", ".join(
                f"{int(p)} for {int(y)}" for p, y in zip(original[:8], labels[:8], strict=True)
            )
            raise DataError(
                f"The untouched model is right on {right.estimate:.1f} % of {len(labels):,} "
                f"samples, no better than always answering the commonest class ({chance:.1f} %). "
                "Check the weights, the preprocessing and the labels' numbering "
                f"(first answers: {shown}), with 'profiling-agent check'."
            )

    def doubt(self, original: np.ndarray) -> str | None:
        """What makes the metric say little here, though not nothing."""
        if self.task.metric != "agreement":
            return None
        values, counts = np.unique(original, return_counts=True)
        share = counts.max() / len(original)
        if share < CONSTANT_SHARE:
            return None
        return (
            f"The original answers class {int(values[counts.argmax()])} for {share:.1%} of the "
            "samples: agreement with it says little."
        )

    def noise_divergence(
        self, outputs: np.ndarray, labels: np.ndarray | None, drop: float
    ) -> float | None:
        truth = self._truth(labels, self.answers(outputs))
        return noise_divergence(outputs, truth, drop, answers=self.task.answers or None)

    def interval(self, ours: np.ndarray, labels: np.ndarray | None) -> Interval:
        return accuracy_interval(ours == self._truth(labels, ours))

    def _truth(self, labels: np.ndarray | None, original: np.ndarray) -> np.ndarray:
        if self.task.metric == "agreement":
            return original
        assert labels is not None
        return labels


class Custom(Judge):
    """A function ``(outputs, targets)`` of the user's: a score for each sample, or one for all.

    ``outputs`` are float32 (samples, ...), ``targets`` (samples, ...) as the data have them, or
    None.
    """

    _keeps_outputs = True

    def __init__(self, task: Task, function: Callable[..., Any]) -> None:
        super().__init__(task)
        self._function = function
        self._sign = 1.0 if task.higher_is_better else -1.0

    def value(self, ours: np.ndarray, labels: np.ndarray | None, original: np.ndarray) -> float:
        return float(np.mean(self._scores(ours, labels)))

    def drop(
        self,
        ours: np.ndarray,
        labels: np.ndarray | None,
        original: np.ndarray,
        *,
        level: float = 0.95,
        confidence: float = 0.95,
    ) -> Drop:
        before = self._sign * self._scores(original, labels)
        after = self._sign * self._scores(ours, labels)
        if before.ndim == 1 and after.ndim == 1:
            span = self._span(before, after)
            return paired_drop(before, after, span=span, level=level, confidence=confidence)
        if before.ndim or after.ndim:
            raise BudgetError(
                f"The metric {self.task.metric!r} gave a score for each sample once and one for "
                "all another time; return either, always."
            )

        def lost(rows: np.ndarray) -> float:
            targets = None if labels is None else labels[rows]
            first, second = (self._or_nan(each[rows], targets) for each in (original, ours))
            return self._sign * (first - second)

        return self._bootstrap(
            float(before - after), lost, len(ours), level=level, confidence=confidence
        )

    def _span(self, before: np.ndarray, after: np.ndarray) -> float:
        """How far scores can lie apart: as the function states, 1 for yes or no, else as seen."""
        stated = getattr(self._function, "range", None)
        if stated is not None:
            return float(stated[1]) - float(stated[0])
        both = np.abs(np.concatenate([before, after]))
        if np.isin(both, (0.0, 1.0)).all():
            return 1.0
        return float(max(before.max(), after.max()) - min(before.min(), after.min()))

    def _bootstrap(
        self, estimate: float, statistic: Callable[[np.ndarray], float], count: int, **how: float
    ) -> Drop:
        try:
            return bootstrap_drop(
                estimate, statistic, count, num_resamples=NUM_RESAMPLES, seed=SEED, **how
            )
        except ValueError as error:
            raise BudgetError(
                f"The metric {self.task.metric!r} is {error} of {count} samples, so it has no "
                "interval; give more samples, or a score for each."
            ) from None

    def _or_nan(self, outputs: np.ndarray, targets: np.ndarray | None) -> float:
        try:
            return float(self._scores(outputs, targets))
        except BudgetError:  # no positive sample in this resample, say
            return float("nan")

    def refuse_broken(self, original: np.ndarray, labels: np.ndarray | None) -> None:
        if labels is None:
            return
        rng = np.random.default_rng(SEED)
        mine = self._sign * float(np.mean(self._scores(original, labels)))
        orders = (rng.permutation(len(labels)) for _ in range(NUM_SHUFFLES))
        shuffled = [
            self._sign * float(np.mean(self._scores(original, labels[order]))) for order in orders
        ]
        if mine <= max(shuffled):
            raise DataError(
                f"The untouched model's {self.task.metric!r} is {self._sign * mine:.4g} on "
                f"{len(labels):,} samples, and as good with the targets shuffled. Check the "
                "weights, the preprocessing, the order of the targets, and --higher-is-better or "
                "--lower-is-better."
            )

    def interval(self, ours: np.ndarray, labels: np.ndarray | None) -> Interval:
        scores = self._scores(ours, labels)
        if scores.ndim == 1:
            return mean_interval(scores)

        def value(rows: np.ndarray) -> float:
            return self._or_nan(ours[rows], None if labels is None else labels[rows])

        return self._bootstrap(float(scores), value, len(ours)).interval

    def _scores(self, outputs: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
        """Float64 (samples,) or (); ``BudgetError`` for anything else."""
        try:
            scores = np.asarray(self._function(outputs, targets), dtype=np.float64)
        except Exception as error:  # the user's code may raise anything
            raise BudgetError(
                f"The metric {self.task.metric!r} raised {type(error).__name__}: {error} (outputs "
                f"{outputs.shape}, targets {None if targets is None else targets.shape})."
            ) from error
        if scores.shape not in ((), (len(outputs),)):
            raise BudgetError(
                f"The metric {self.task.metric!r} returned the shape {scores.shape} for "
                f"{len(outputs)} samples; return one score for each, or one number."
            )
        if not np.isfinite(scores).all():
            where = "" if scores.ndim == 0 else f" for sample {int(np.argmin(np.isfinite(scores)))}"
            raise BudgetError(
                f"The metric {self.task.metric!r} returned a value that is not finite{where}; say "
                "in the function what such a sample is worth."
            )
        return scores


def classes(outputs: np.ndarray, task: Task) -> np.ndarray:
    """Predicted classes (samples,) among the task's answers; ``TrialError`` for a wrong shape."""
    if outputs.ndim != 2 or outputs.shape[1] != task.num_classes:
        raise TrialError(
            f"The artefact returns shape {outputs.shape}, not (n, {task.num_classes})."
        )
    if not task.answers:
        return outputs.argmax(axis=1)
    answers = np.asarray(task.answers)
    return answers[outputs[:, answers].argmax(axis=1)]


def find_judge(task: Task, function: Callable[..., Any] | None) -> Judge:
    """The judge of a task; ``function`` is what ``load_metric`` gave."""
    return RightOrWrong(task) if function is None else Custom(task, function)
