"""The controls' latencies over the original's, as an earlier run timed them in quiet.

Plans start from them, and which of two controls a few per cent apart comes first sends a search
another way. Eager mode's time varies by more than that from race to race, so runs that start from
one profile start from one race of the controls too.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from profiling_agent.evaluation.watch import DOUBTED, DOUBTED_ORIGINAL
from profiling_agent.planning.history import Pair, controls, relative_latency
from profiling_agent.profiling.profile_cache import ControlLatency
from profiling_agent.records.trial import Trial


def latencies_of(trials: Sequence[Trial]) -> tuple[ControlLatency, ...]:
    """For later runs; none where the machine was busy."""
    measured = controls(trials)
    if any(trial.reason for trial in measured.values()):
        return ()
    return tuple(
        ControlLatency(runtime=pair.runtime, scheme=pair.scheme, relative=relative)
        for pair, trial in measured.items()
        if (relative := relative_latency(trial)) is not None
    )


def anchored(trials: Sequence[Trial], known: Sequence[ControlLatency], since: str) -> list[Trial]:
    """The controls with the known latencies, and others on the same scale; none where a control's
    place among the rest is clearly another now, or the original's among all."""
    before = {Pair(runtime=each.runtime, scheme=each.scheme): each.relative for each in known}
    now = {
        pair: (trial, relative)
        for pair, trial in controls(trials).items()
        if (relative := relative_latency(trial)) is not None
    }
    ratios = {pair: now[pair][1] / before[pair] for pair in now if pair in before}
    if not ratios:
        return []
    usual = median(ratios.values())
    apart = [max(ratio / usual, usual / ratio) for ratio in ratios.values()]
    if max(apart) > DOUBTED or max(usual, 1 / usual) > DOUBTED_ORIGINAL:
        return []
    return [
        with_latency(trial, before.get(pair, relative / usual), since if pair in before else None)
        for pair, (trial, relative) in now.items()
    ]


def with_latency(trial: Trial, relative: float | None, since: str | None) -> Trial:
    """A trial that was measured, with this latency over the original's."""
    assert trial.evaluation is not None
    update = {"relative": relative, "relative_since": since}
    return trial.model_copy(update={"evaluation": trial.evaluation.model_copy(update=update)})
