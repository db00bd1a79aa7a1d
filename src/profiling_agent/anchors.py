"""The controls' places among each other, as an earlier run timed them in quiet.

Plans start from them, and which of two controls 2 % apart comes first sends a search another way.
So runs that start from one profile start from one race of the controls too. The scale, what all
took over the original in eager mode, stays this run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from profiling_agent.planning.history import Pair, controls, relative_latency
from profiling_agent.profiling.profile_cache import ControlLatency
from profiling_agent.records.trial import Trial

NEAR = 0.05
"""A control whose place is another by no more than this share has its earlier one."""


def anchored(trials: Sequence[Trial], known: Sequence[ControlLatency]) -> list[Trial]:
    """The controls whose places now are near the known ones, with these."""
    now, before = _raced(trials), _by_pair(known)
    scale = _scale(now, before)
    return [
        with_latency(trial, before[pair] * scale)
        for pair, trial in controls(trials).items()
        if pair in now and pair in before and abs(now[pair] / before[pair] / scale - 1.0) < NEAR
    ]


def merged(known: Sequence[ControlLatency], trials: Sequence[Trial]) -> tuple[ControlLatency, ...]:
    """What is known, and on its scale those that were timed beside each other since, in quiet."""
    now, before = _raced(trials), _by_pair(known)
    if before and not before.keys() & now.keys():
        return tuple(known)  # nothing tells the scale
    scale = _scale(now, before)
    found = before | {pair: now[pair] / scale for pair in now if pair not in before}
    return tuple(
        ControlLatency(runtime=pair.runtime, scheme=pair.scheme, relative=relative)
        for pair, relative in found.items()
    )


def with_latency(trial: Trial, relative: float | None) -> Trial:
    """A trial that was measured, with an earlier latency over the original's."""
    assert trial.evaluation is not None
    update = {"relative": relative, "is_relative_kept": True}
    return trial.model_copy(update={"evaluation": trial.evaluation.model_copy(update=update)})


def _raced(trials: Sequence[Trial]) -> dict[Pair, float]:
    """Latencies of controls from a race with the reference, while the machine was quiet."""
    return {
        pair: relative
        for pair, trial in controls(trials).items()
        if trial.evaluation is not None
        and trial.evaluation.reference is not None
        and not trial.reason
        and (relative := relative_latency(trial)) is not None
    }


def _by_pair(known: Sequence[ControlLatency]) -> dict[Pair, float]:
    return {Pair(runtime=each.runtime, scheme=each.scheme): each.relative for each in known}


def _scale(now: Mapping[Pair, float], before: Mapping[Pair, float]) -> float:
    """What the controls take now over what they took before; 1 where none is known of both."""
    ratios = [now[pair] / before[pair] for pair in now if pair in before]
    return median(ratios) if ratios else 1.0
