"""Alternative preprocessings, tried on samples whose classes are known, in the time there is.

Where that is short, by successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all of them
on few samples, then the better half on twice as many, so that it goes to those that may be best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from profiling_agent.evaluation.alternatives import Alternative
from profiling_agent.evaluation.judge import classes
from profiling_agent.evaluation.suspicions import percent
from profiling_agent.machine.clock import now
from profiling_agent.records.check import PreprocessingTrial
from profiling_agent.sampled_split import BATCH, SampledSplit


def try_alternatives(
    sampled: SampledSplit,
    others: Sequence[Alternative],
    labels: np.ndarray,
    *,
    most: int,
    seconds: float,
) -> dict[Alternative, np.ndarray]:
    """Whether each is right on the first rows, ``most`` of them where time allows.

    Otherwise few at first, and whenever their number doubles, only the better half goes on. Empty
    when the time is too short for the first few.
    """
    start = now()
    is_cheap = len(others) * most * sampled.sample_s < seconds
    tried = {other: np.zeros(0, dtype=bool) for other in others}
    left, size = list(others), most if is_cheap else min(BATCH, most)
    while True:
        done = len(tried[left[0]])
        if now() - start + len(left) * (size - done) * sampled.sample_s > seconds:
            break
        for other in left:
            more = is_right(sampled, other, sampled.rows[done:size], labels[done:size])
            tried[other] = np.concatenate([tried[other], more])
        if size == most or len(left) == 1:
            break
        left = sorted(left, key=lambda other: -tried[other].mean())[: (len(left) + 1) // 2]
        size = min(2 * size, most)
    return tried if len(tried[left[0]]) else {}


def is_right(
    sampled: SampledSplit, other: Alternative, rows: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Whether the model gives each row (rows,) its label when preprocessed like that."""
    outputs = np.concatenate(
        [
            sampled.forward(batch, other.preprocessing, other.reverses)
            for batch in sampled.batches(rows)
        ]
    )
    return classes(np.nan_to_num(outputs), sampled.workload.record.task) == labels


def records_of(
    right: np.ndarray, tried: Mapping[Alternative, np.ndarray]
) -> list[PreprocessingTrial]:
    """What was tried, the stated preprocessing first, which is ``right`` or not on each row."""
    stated = PreprocessingTrial(
        name="as stated", value=percent(right), num_samples=len(right), is_stated=True
    )
    trials = [stated]
    for other, each in tried.items():
        trials.append(
            PreprocessingTrial(name=other.name, value=percent(each), num_samples=len(each))
        )
    return trials
