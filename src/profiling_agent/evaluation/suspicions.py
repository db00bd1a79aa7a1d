"""What looks wrong with a model and its data, judged from outcomes alone: arrays in, findings out.

Alternatives are chosen on some samples and judged on others, by a paired bound, so that trying many
of them raises no false alarm; what the samples can't decide is said to be undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from profiling_agent.acquisition.assemble import MAX_UNREADABLE
from profiling_agent.evaluation.statistics import accuracy_interval, paired_drop, provable_drop
from profiling_agent.records.check import Finding
from profiling_agent.records.common import NotMeasured

LEVEL = 0.99
"""Confidence of every alarm."""
MIN_GAIN = 1.0
"""Points an alternative must surely win; less is a matter of taste, not a mistake."""
MIN_PER_CLASS = 4
"""Samples of the usual class below which an order of classes can't be judged."""
MIN_JUDGES = 10
MAX_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A finding that would be cured by reading labels or images otherwise.

    ``value`` is the percentage right then: wrong labels can make a wrong preprocessing look better
    and the other way round, and the remedy that explains more is the one to believe.
    """

    finding: Finding
    value: float


def sure_gain(stated: np.ndarray, other: np.ndarray, level: float = LEVEL) -> float:
    """Points by which ``other`` is right more often than ``stated``, at least, with this level.

    Both boolean (samples,), of the same samples.
    """
    bound = paired_drop(100.0 * stated, 100.0 * other, span=100.0, level=level).upper_bound
    assert bound is not None  # only a bootstrap has none
    return -bound


def percent(right: np.ndarray) -> float:
    return 100.0 * float(right.mean())


def commonest_share(labels: np.ndarray) -> float:
    """Percent right of always answering the commonest class of labels (samples,)."""
    return 100.0 * float(np.unique(labels, return_counts=True)[1].max()) / len(labels)


# --- labels ---


def find_chance(right: np.ndarray, labels: np.ndarray) -> Finding | None:
    """An accuracy that can't be told from always answering the commonest class."""
    interval, chance = accuracy_interval(right, confidence=LEVEL), commonest_share(labels)
    if interval.low > chance:
        return None
    return Finding(
        kind="chance",
        level="problem",
        text=(
            f"The model is right on {interval.estimate:.1f} % of {len(right):,} samples, no better "
            f"than always answering their commonest class ({chance:.1f} %)."
        ),
        next_step=(
            "Check --weights first, then the classes (--classes) and the preprocessing; optimize "
            "refuses this model."
        ),
    )


def find_shift(answers: np.ndarray, labels: np.ndarray, num_classes: int) -> Remedy | None:
    """Labels that are one too low or too high; ``answers`` (samples,) may be any class.

    With two classes a shift is a swap, which ``find_order`` judges.
    """
    if num_classes < 3:
        return None
    stated = answers == labels
    shifted = {by: answers == (labels + by) % num_classes for by in (1, -1)}
    by = max(shifted, key=lambda each: float(shifted[each].mean()))
    if sure_gain(stated, shifted[by], 1 - (1 - LEVEL) / 2) <= MIN_GAIN:
        return None
    is_low = by == 1
    finding = Finding(
        kind="shifted labels",
        level="problem",
        text=(
            f"The labels look one too {'low' if is_low else 'high'}: the model's answer is the "
            f"label {'plus' if is_low else 'minus'} one for {percent(shifted[by]):.1f} % of "
            f"{len(labels):,} samples, and the label itself for {percent(stated):.1f} %."
        ),
        next_step=(
            f"{'Add 1 to' if is_low else 'Subtract 1 from'} the labels where the data are made, or "
            "give folders their classes by --classes FILE."
        ),
    )
    return Remedy(finding=finding, value=percent(shifted[by]))


def find_order(
    answers: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    class_names: Sequence[str] = (),
    seed: int = 0,
) -> Remedy | NotMeasured | None:
    """Labels numbered in another order than the model's classes.

    The assignment of labels to answers that fits one half of the samples best is judged on the
    other half. ``NotMeasured`` when there are too few samples a class.
    """
    usual = float(np.median(np.unique(labels, return_counts=True)[1]))
    if usual < MIN_PER_CLASS:
        return NotMeasured(
            what="order of the classes",
            reason=(
                f"the usual class has {usual:.0f} of {len(labels):,} samples; from {MIN_PER_CLASS} "
                "on it can be judged"
            ),
        )
    fitted, judged = _halves(len(labels), seed)
    order = fit_order(answers[fitted], labels[fitted], num_classes)
    stated = answers[judged] == labels[judged]
    mapped = answers[judged] == order[labels[judged]]
    if sure_gain(stated, mapped) <= MIN_GAIN:
        return None
    finding = Finding(
        kind="class order",
        level="problem",
        text=(
            f"The labels are numbered in another order than the model's classes "
            f"({_moved(order, answers, labels, class_names)}): renumbered on one half of the "
            f"samples, {percent(mapped):.1f} % of the other {len(mapped):,} are right in place of "
            f"{percent(stated):.1f} %."
        ),
        next_step=(
            "Pass --classes FILE with the model's classes in its own order, one a line, named as "
            "the folders are; for data of your own renumber the labels where they are made."
        ),
    )
    return Remedy(finding=finding, value=percent(mapped))


def fit_order(answers: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The class (num_classes,) that each label most likely means, each class used once.

    Without evidence a label means itself.
    """
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (labels, answers), 1.0)
    counts[np.diag_indices(num_classes)] += 0.5
    return linear_sum_assignment(counts, maximize=True)[1]


def _moved(order: np.ndarray, answers: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """The clearest moves in words: label 3 is the model's 7."""
    gains = {
        int(label): int(
            np.sum((labels == label) & (answers == order[label]))
            - np.sum((labels == label) & (answers == label))
        )
        for label in np.unique(labels)
        if order[label] != label
    }
    clear = sorted((label for label in gains if gains[label] > 0), key=lambda each: -gains[each])
    shown = [
        f"{_name(each, names)} is its {_name(order[each], names)}"
        for each in sorted(clear[:MAX_NAMED])
    ]
    more = f", and {len(clear) - MAX_NAMED} more" if len(clear) > MAX_NAMED else ""
    return f"{', '.join(shown)}{more}"


def find_refused(reason: str) -> Finding:
    """What would end ``optimize`` at its beginning, in its own words."""
    text, _, step = reason.partition(". ")
    return Finding(kind="chance", level="problem", text=f"{text}.", next_step=step or text)


def find_doubtful(doubt: str) -> Finding:
    """What makes the metric say little on these samples."""
    return Finding(
        kind="constant answer",
        level="hint",
        text=doubt,
        next_step="Give samples of other kinds, or labels and --metric accuracy.",
    )


def find_constant(
    answers: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str] = ()
) -> Finding | None:
    """One class that the model answers far more often than the labels have it."""
    values, counts = np.unique(answers, return_counts=True)
    top = values[counts.argmax()]
    answered = accuracy_interval(answers == top, confidence=LEVEL)
    if labels is None:
        is_odd = len(answers) >= MIN_JUDGES and answered.estimate > 95.0
        told = ""
    else:
        held = accuracy_interval(labels == top, confidence=LEVEL)
        is_odd = answered.low > 50.0 and answered.low > held.high + 20.0
        told = f", which only {held.estimate:.1f} % of them are"
    if not is_odd:
        return None
    return Finding(
        kind="constant answer",
        level="hint" if labels is None else "problem",
        text=(
            f"The model answers {_name(top, class_names)} to {answered.estimate:.1f} % of "
            f"{len(answers):,} samples{told}."
        ),
        next_step=(
            "Check --weights (is the head trained?) and the preprocessing (--mean, --std, --scale)."
        ),
    )


def find_subset(labels: np.ndarray, num_classes: int, num_answers: int) -> Finding | None:
    """Labels of far fewer classes than a prediction may be (``num_answers``).

    Judged against the number of classes that so many samples would show if all were as common.
    """
    seen = len(np.unique(labels))
    expected = num_answers * (1 - (1 - 1 / num_answers) ** len(labels))
    if seen >= 0.5 * expected:
        return None
    return Finding(
        kind="some classes",
        level="hint",
        text=(
            f"{len(labels):,} samples show {seen:,} of the model's {num_classes:,} classes, and a "
            f"prediction may be any of {num_answers:,}."
        ),
        next_step=(
            "If only the classes present can occur where the model is used, pass --answers "
            "present; else leave it as it is."
        ),
    )


# --- preprocessing ---


def find_preprocessing(
    name: str, stated: np.ndarray, other: np.ndarray, next_step: str
) -> Remedy | None:
    """Another preprocessing under which more is right; on samples that did not choose it."""
    if len(stated) < MIN_JUDGES or sure_gain(stated, other) <= MIN_GAIN:
        return None
    finding = Finding(
        kind="preprocessing",
        level="problem",
        text=(
            f"With {name} the model is right on {percent(other):.1f} % of {len(other):,} samples, "
            f"as they are preprocessed now on {percent(stated):.1f} % (a gain of at least "
            f"{sure_gain(stated, other):.1f} points, {LEVEL:.0%} sure)."
        ),
        next_step=next_step,
    )
    return Remedy(finding=finding, value=percent(other))


def find_floats(low: float, high: float, stated: str) -> Finding | None:
    """Floats that nobody seems to have normalised, for a model that states a normalisation.

    ``low`` and ``high`` of the values given; normalised ones reach well below zero.
    """
    if low < -0.05:
        return None
    return Finding(
        kind="floats",
        level="hint",
        text=(
            f"The images are floats from {low:.3g} to {high:.3g} that are passed on as they are, "
            f"but the model states {stated}."
        ),
        next_step=(
            "Normalise them where the data are made, or give bytes (0 to 255), to which --mean, "
            "--std and --scale apply."
        ),
    )


# --- the model ---


def find_training(note: str) -> Finding:
    """A model with layers that act otherwise in training came in training mode."""
    return Finding(
        kind="training mode",
        level="hint",
        text=f"{note[:1].upper()}{note[1:]}; all numbers are of eval mode.",
        next_step="Return model.eval() from the factory, and compare with the accuracy you know.",
    )


def find_random(first: np.ndarray, again: np.ndarray) -> Finding | None:
    """Outputs (samples, ...) that change when the same samples are given again."""
    if differ(first, again) <= 1e-3:
        return None
    return Finding(
        kind="random answers",
        level="problem",
        text=(
            "The same samples gave other outputs the second time, in eval mode; by "
            f"{100 * differ(first, again):.2g} % of the largest."
        ),
        next_step=(
            "Look for functional dropout without training=self.training, or noise in forward; "
            "nothing can be compared with random answers."
        ),
    )


def find_mixed(alone: np.ndarray, together: np.ndarray) -> Finding | None:
    """Outputs that depend on which other samples are in the batch."""
    if differ(alone, together) <= 0.02:
        return None
    return Finding(
        kind="mixed samples",
        level="problem",
        text=(
            "A sample's output depends on the others of its batch, in eval mode; alone it differs "
            f"by {100 * differ(alone, together):.2g} % of the largest."
        ),
        next_step=(
            "Look for batch norms without running statistics or with training=True in forward."
        ),
    )


def find_not_finite(outputs: np.ndarray) -> Finding | None:
    """Outputs (samples, ...) with NaN or infinity."""
    bad = int((~np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)).sum())
    if bad == 0:
        return None
    return Finding(
        kind="not finite",
        level="problem",
        text=f"The model's output is NaN or infinite for {bad:,} of {len(outputs):,} samples.",
        next_step="Check the weights, and the preprocessing for values far from those of training.",
    )


def differ(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference over the largest value; infinite when one has what is not finite."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return 0.0  # judged by ``find_not_finite``
    return float(np.abs(one - other).max()) / max(float(np.abs(one).max()), 1e-12)


# --- the data ---


def find_unreadable(num_unreadable: int, num_read: int) -> Finding | None:
    """Samples that could not be decoded, of all that were tried."""
    if num_unreadable == 0:
        return None
    total = num_unreadable + num_read
    is_refused = num_unreadable > MAX_UNREADABLE * total
    consequence = (
        f"optimize refuses more than {MAX_UNREADABLE:.0%}" if is_refused else "they are left out"
    )
    return Finding(
        kind="unreadable",
        level="problem" if is_refused else "hint",
        text=(
            f"{num_unreadable:,} of {total:,} samples can't be decoded "
            f"({100 * num_unreadable / total:.1f} %); {consequence}."
        ),
        next_step="Fetch or export these files again, or take them out of --data.",
    )


def find_few(num_test: int, max_drop: float) -> Finding | None:
    """Test samples that can't carry the budget ``max_drop`` (points)."""
    weight = 100.0 / num_test
    if weight > max_drop:
        return Finding(
            kind="few samples",
            level="problem",
            text=(
                f"One of the {num_test:,} test samples weighs {weight:.2g} points, more than the "
                f"drop of {max_drop:g} that is allowed by default; optimize refuses that."
            ),
            next_step=(
                f"Give at least {int(np.ceil(100 / max_drop)):,} test samples (--test-data), or "
                f"allow more: --max-drop {_round_up(weight):g}."
            ),
        )
    provable = provable_drop(num_test)
    if provable <= max_drop:
        return None
    return Finding(
        kind="few samples",
        level="hint",
        text=(
            f"{num_test:,} test samples can prove drops down to about {provable:.2f} points (if "
            f"2 % of the predictions change), not the {max_drop:g} that are allowed by default."
        ),
        next_step=(
            f"For proof give about {samples_for(max_drop):,} test samples (--test-data), or allow "
            f"--max-drop {_round_up(provable):g}; the estimate itself is unbiased with fewer."
        ),
    )


def find_slow_data(reading_per_s: float, model_per_s: float) -> Finding | None:
    """Reading and decoding below twice the rate of the model's forward (samples a second)."""
    if reading_per_s >= 2 * model_per_s:
        return None
    return Finding(
        kind="slow data",
        level="hint",
        text=(
            f"The data are the bottleneck: they are read at {reading_per_s:,.0f} samples a second, "
            f"and the model takes {model_per_s:,.0f}. Measurements don't wait for them, since they "
            "are read once before anything is timed."
        ),
        next_step=(
            "Where the model is used the data will limit it; smaller images or the transform "
            "(--resize) decide. Arrays (.npz) are read fastest."
        ),
    )


def samples_for(drop: float) -> int:
    """The fewest test samples that can prove ``drop`` points, to two digits."""
    low, high = 1, 100_000_000
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if provable_drop(middle) <= drop else (middle + 1, high)
    size = 10 ** max(0, len(str(low)) - 2)
    return -(-low // size) * size


def _round_up(points: float) -> float:
    return float(np.ceil(10 * points) / 10)


def _halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // 2], order[count // 2 :]


def _name(index: int, names: Sequence[str]) -> str:
    return repr(names[int(index)]) if names else str(int(index))
