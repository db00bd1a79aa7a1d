"""From a run's record to the rows that the terminal and the page both show.

Pure functions. Nothing is computed here that was not measured: a cell without a measurement stays
``None`` and its reason becomes a footnote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from profiling_agent.records.common import Interval, Timing
from profiling_agent.records.evaluation import Accuracy, Evaluation
from profiling_agent.records.llm import GuardAction
from profiling_agent.records.trial import RunRecord, Trial, Verdict
from profiling_agent.records.workload import Task, WorkloadRecord
from profiling_agent.report.wording import (
    as_range,
    as_ratio,
    describe_answers,
    describe_plan,
    describe_preprocessing,
    describe_reading,
    drop_range,
    in_drop,
    of_metric,
    printable,
    significant,
    with_unit,
)

BASELINE: Final = "baseline"

# What the guards did to a language model's answers, before a count.
_GUARDS: Final[dict[GuardAction, str]] = {
    "rejected": "answers rejected",
    "unanswered": "questions without an answer",
    "rewritten": "plans rewritten",
    "fallback": "solver instead",
    "handover": "hand-overs",
    "rollback": "rollbacks",
}

Role = Literal["original", "control", "ours"]

# A cell, and the words by which the reason for its absence is recognised among those recorded.
_CELLS: Final[dict[str, tuple[str, ...]]] = {
    "latency": ("latency", "timing"),
    "speed-up": ("speed", "latency", "timing"),
    "metric": ("accuracy", "metric", "label"),
    "drop": ("drop", "accuracy", "metric", "label"),
    "size": ("size", "file", "bytes"),
    "memory": ("memory", "resident"),
}


@dataclass(frozen=True, kw_only=True)
class HeadlineRow:
    """One artefact in the headline table; ``None`` is not measured, never zero."""

    role: Role
    name: str
    how: str
    trial_id: str | None
    is_best_control: bool = False
    is_handed_over: bool = False
    failure: str = ""
    timing: Timing | None
    speedup: Interval | None
    accuracy: Accuracy | None
    size_bytes: int | None
    size_ratio: float | None
    memory_bytes: int | None
    memory_ratio: float | None
    footnotes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial in the table of all trials; the metric on the search split when it was measured."""

    trial_id: str
    author: str
    status: str
    plan: str
    predicted_ms: float | None
    measured_ms: float | None
    speedup: Interval | None
    accuracy: Accuracy | None
    size_bytes: int | None
    is_pareto: bool
    is_handed_over: bool
    reason: str
    why: str


def headline(record: RunRecord) -> tuple[HeadlineRow, ...]:
    """The original, every control, and the artefact handed over when it is none of these."""
    handed_over = record.verdict.trial_id if record.verdict else None
    rows = [_original_row(record)]
    rows += [_trial_row(record, trial) for trial in record.trials if trial.is_control]
    rows += [
        _trial_row(record, trial)
        for trial in record.trials
        if trial.trial_id == handed_over and not trial.is_control
    ]
    return tuple(rows)


def trial_rows(record: RunRecord) -> tuple[TrialRow, ...]:
    """All trials in the order they were carried out."""
    handed_over = record.verdict.trial_id if record.verdict else None
    return tuple(_listed_row(record, trial, handed_over) for trial in record.trials)


def common_split(rows: tuple[HeadlineRow, ...]) -> str | None:
    """``test, 5000 samples`` when every measured row saw the same samples; else ``None``."""
    seen = {(row.accuracy.split, row.accuracy.num_samples) for row in rows if row.accuracy}
    if len(seen) != 1:
        return None
    split, num_samples = seen.pop()
    return f"{split}, {num_samples} samples"


def advice_in_words(record: RunRecord) -> tuple[str, ...]:
    """What a language model was asked, what the guards did, and who wrote the plan handed over.

    Empty when none was asked.
    """
    if record.settings.llm is None:
        return ()
    model = (record.llm.model if record.llm else "") or record.settings.llm.model
    lines = [f"{model} was asked {_asked(record)}"]
    counts = Counter(guard.action for guard in record.guards)
    done = [f"{words}: {counts[action]}" for action, words in _GUARDS.items() if counts[action]]
    lines.append(f"guards: {', '.join(done) or 'had nothing to do'}")
    handed = record.verdict.trial_id if record.verdict else None
    author = next((t.author for t in record.trials if t.trial_id == handed), None)
    if author is not None:
        lines.append(f"the plan handed over was written by: {author}")
    return tuple(lines)


def _asked(record: RunRecord) -> str:
    usage = record.llm
    if usage is None:
        return "nothing"
    cost = "cost not known" if usage.cost_usd is None else f"${usage.cost_usd:.4f}"
    tokens = f"{usage.input_tokens:,} tokens in, {usage.output_tokens:,} out"
    return f"{usage.requests} times: {tokens}, {cost}, {usage.seconds:.1f} s"


def gain_in_words(verdict: Verdict) -> str:
    """The gain over the original and over the best control, each with its interval."""
    parts: list[str] = []
    for ratio, over in (
        (verdict.speedup, "the original"),
        (verdict.speedup_over_control, "the best off-the-shelf control"),
    ):
        if ratio is not None:
            parts.append(f"{as_ratio(ratio.estimate)} {as_range(ratio)} the speed of {over}")
    return ", ".join(parts)


def loss_in_words(verdict: Verdict, task: Task) -> str:
    """The drop with its interval and its one-sided bound; empty when there is none."""
    drop, unit = verdict.drop, task.unit
    if drop is None:
        return ""
    amount = with_unit(f"{in_drop(drop.estimate, unit)} {drop_range(drop, unit)}", unit)
    words = f"drop {amount} ({of_metric(task)})"
    if verdict.drop_upper_bound is not None:
        words += f", one-sided 95 % bound {in_drop(verdict.drop_upper_bound, unit)}"
    return words


def evidence_in_words(verdict: Verdict) -> str:
    """What kind of evidence there is and what would make it proof."""
    if verdict.evidence == "proven":
        return "proven: the one-sided 95 % bound of the drop is within the budget"
    if verdict.evidence == "measured":
        words = "measured: the estimated drop is within the budget, its bound does not prove it"
        if verdict.samples_to_prove is not None:
            words += f"; about {verdict.samples_to_prove} test samples would prove it"
        return words
    return ""


def facts_of_data(workload: WorkloadRecord) -> list[tuple[str, str]]:
    """How samples became the model's input and its outputs answers, as names and words."""
    pairs = [
        ("preprocessing", describe_preprocessing(workload.preprocessing)),
        ("predictions", describe_answers(workload.task)),
    ]
    if workload.reading is not None:
        pairs.append(("reading", describe_reading(workload.reading)))
    return pairs + [("note", printable(note, 400)) for note in workload.notes]


def bottleneck_in_words(record: RunRecord) -> str:
    """Said when reading the data would hold up the fastest of the final stage; else empty."""
    rates = [e.throughput_per_s for e in record.final if e.throughput_per_s is not None]
    reading = record.workload.reading
    if reading is None or not rates or reading.samples_per_s >= 2 * max(rates):
        return ""
    return (
        "the data are the bottleneck: reading and decoding reaches "
        f"{significant(reading.samples_per_s)} samples/s, less than twice the "
        f"{significant(max(rates))} of the model"
    )


def not_measured(record: RunRecord) -> tuple[str, ...]:
    """Every gap of the run with its reason, in the order of the trials."""
    gaps = list(_gaps("original", _baseline(record)))
    for trial in record.trials:
        evaluation = _evaluation(record, trial)
        if evaluation is not None:
            gaps += _gaps(trial.trial_id, evaluation)
    return tuple(dict.fromkeys(gaps))


def _original_row(record: RunRecord) -> HeadlineRow:
    evaluation = _baseline(record)
    final = _final(record, BASELINE)
    timing = (final.timing if final else None) or record.baseline_timing or evaluation.timing
    row = HeadlineRow(
        role="original",
        name="original",
        how=_original_how(evaluation),
        trial_id=None,
        is_handed_over=record.verdict is not None and record.verdict.trial_id is None,
        timing=timing,
        speedup=None,
        accuracy=_shown_accuracy(evaluation),
        size_bytes=evaluation.size_bytes,
        size_ratio=None,
        memory_bytes=evaluation.memory_bytes,
        memory_ratio=None,
    )
    expected = ("latency", "metric", "size", "memory")
    return _with_footnotes(row, evaluation, expected, record.workload.task.metric)


def _trial_row(record: RunRecord, trial: Trial) -> HeadlineRow:
    verdict = record.verdict
    evaluation = _evaluation(record, trial)
    baseline = _baseline(record)
    handed_over = verdict is not None and verdict.trial_id == trial.trial_id
    trial_id = printable(trial.trial_id)
    row = HeadlineRow(
        role="control" if trial.is_control else "ours",
        name=printable(trial.label) if trial.is_control else "ours",
        how=f"control, {trial_id}" if trial.is_control else f"{printable(trial.label)}, {trial_id}",
        trial_id=trial.trial_id,
        is_best_control=verdict is not None and verdict.best_control_id == trial.trial_id,
        is_handed_over=handed_over,
        failure="" if trial.status == "done" else f"{trial.status}: {printable(trial.reason, 400)}",
        timing=evaluation.timing if evaluation else None,
        speedup=_speedup(evaluation, verdict if handed_over else None),
        accuracy=_shown_accuracy(evaluation),
        size_bytes=evaluation.size_bytes if evaluation else None,
        size_ratio=_ratio(evaluation.size_bytes, baseline.size_bytes) if evaluation else None,
        memory_bytes=evaluation.memory_bytes if evaluation else None,
        memory_ratio=_ratio(evaluation.memory_bytes, baseline.memory_bytes) if evaluation else None,
    )
    return _with_footnotes(row, evaluation, tuple(_CELLS), record.workload.task.metric)


def _original_how(evaluation: Evaluation) -> str:
    """The untouched module runs eagerly in torch; any other runtime executes a file."""
    scheme = printable(evaluation.scheme)
    eager = " eager" if evaluation.runtime == "torch" and "eager" not in scheme else ""
    return f"{printable(evaluation.runtime)}{eager} {scheme}"


def _listed_row(record: RunRecord, trial: Trial, handed_over: str | None) -> TrialRow:
    evaluation = trial.evaluation
    return TrialRow(
        trial_id=printable(trial.trial_id),
        author=printable(trial.author),
        status=trial.status,
        plan=describe_plan(trial.plan),
        predicted_ms=trial.predicted_ms,
        measured_ms=evaluation.timing.median_ms if evaluation and evaluation.timing else None,
        speedup=_speedup(evaluation, None),
        accuracy=searched_accuracy(evaluation),
        size_bytes=evaluation.size_bytes if evaluation else None,
        is_pareto=trial.trial_id in record.pareto,
        is_handed_over=trial.trial_id == handed_over,
        reason=printable(trial.reason, 400),
        why=printable(trial.plan.why, 400),
    )


def searched_accuracy(evaluation: Evaluation | None) -> Accuracy | None:
    """On the search split, which the loop decides by; on test when that is all there is."""
    return (evaluation.on("search") or evaluation.on("test")) if evaluation else None


def _shown_accuracy(evaluation: Evaluation | None) -> Accuracy | None:
    return (evaluation.on("test") or evaluation.on("search")) if evaluation else None


def _speedup(evaluation: Evaluation | None, verdict: Verdict | None) -> Interval | None:
    """Over the original, from interleaved blocks; the final stage's where there is one."""
    if verdict is not None and verdict.speedup is not None:
        return verdict.speedup
    if evaluation is None or evaluation.speedup is None or evaluation.speedup.over != BASELINE:
        return None
    return evaluation.speedup.ratio


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def _baseline(record: RunRecord) -> Evaluation:
    return _merged(_final(record, BASELINE), record.baseline) or record.baseline


def _evaluation(record: RunRecord, trial: Trial) -> Evaluation | None:
    return _merged(_final(record, trial.trial_id), trial.evaluation)


def _final(record: RunRecord, artefact: str) -> Evaluation | None:
    return next((e for e in reversed(record.final) if e.artefact == artefact), None)


def _merged(final: Evaluation | None, first: Evaluation | None) -> Evaluation | None:
    """The final stage's measurements; what it did not take again comes from the search."""
    if final is None or first is None:
        return final or first
    splits = {accuracy.split for accuracy in final.accuracy}
    again = {
        "accuracy": final.accuracy + tuple(a for a in first.accuracy if a.split not in splits),
        "timing": final.timing or first.timing,
        "speedup": final.speedup or first.speedup,
        "throughput_per_s": final.throughput_per_s or first.throughput_per_s,
        "size_bytes": first.size_bytes if final.size_bytes is None else final.size_bytes,
        "weight_bytes": first.weight_bytes if final.weight_bytes is None else final.weight_bytes,
        "memory_bytes": first.memory_bytes if final.memory_bytes is None else final.memory_bytes,
        "not_measured": tuple(dict.fromkeys(final.not_measured + first.not_measured)),
    }
    return final.model_copy(update=again)


def _with_footnotes(
    row: HeadlineRow, evaluation: Evaluation | None, expected: tuple[str, ...], metric: str
) -> HeadlineRow:
    if row.failure:
        notes = [row.failure]
    else:
        notes = [
            _reason(cell, evaluation, metric) for cell in _empty_cells(row) if cell in expected
        ]
    return replace(row, footnotes=tuple(dict.fromkeys(notes)))


def _empty_cells(row: HeadlineRow) -> Iterator[str]:
    values: dict[str, object] = {
        "latency": row.timing,
        "speed-up": row.speedup,
        "metric": row.accuracy,
        "drop": row.accuracy.drop if row.accuracy else None,
        "size": row.size_bytes,
        "memory": row.memory_bytes,
    }
    return (cell for cell, value in values.items() if value is None)


def _reason(cell: str, evaluation: Evaluation | None, metric: str) -> str:
    for gap in evaluation.not_measured if evaluation else ():
        if any(word in gap.what.lower() for word in _CELLS[cell]):
            return f"{printable(gap.what)}: {printable(gap.reason, 400)}"
    name = printable(metric, 40) if cell == "metric" else cell
    return f"{name}: not measured, and no reason was recorded"


def _gaps(name: str, evaluation: Evaluation) -> Iterator[str]:
    for gap in evaluation.not_measured:
        yield f"{printable(name)}, {printable(gap.what)}: {printable(gap.reason, 400)}"
