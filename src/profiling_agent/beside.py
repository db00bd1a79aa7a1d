"""Artefacts timed beside each other: ranked by one race, not by one of their own each.

A race of an artefact alone with the original has the original's noise in its ratio, and the first
of many is partly the luckiest. Controls are timed beside each other before plans are made, and the
fastest plans before the search gives up and, in several races, before candidates are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from profiling_agent.errors import TrialError
from profiling_agent.evaluation.measure import TRIAL, Protocol
from profiling_agent.machine.clock import now
from profiling_agent.planning.decide import best_control, contenders
from profiling_agent.planning.history import relative_latency
from profiling_agent.records.common import Budget
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import Trial
from profiling_agent.report.live import Progress, quiet
from profiling_agent.trial import TrialRunner

FEWEST, MOST, SHARE = 3, 8, 0.07
"""How many artefacts a race has: as many as take at most this share of the time budget."""
OPENING_S = 8.0
"""For starting the processes of a race."""
CLOSE, RACES = 4, 3
"""After the race of the leaders the fastest so many plans are raced again, with new processes, up
to so many races in all: with every start a process has another luck, of 2 % and more."""


def _most(call_s: float, time_budget_s: float) -> int:
    numbers = range(MOST, FEWEST - 1, -1)
    return next((n for n in numbers if _seconds(call_s, n) <= SHARE * time_budget_s), 0)


def _seconds(call_s: float, num_artefacts: int) -> float:
    racers = num_artefacts + 2  # the original and the best control
    return _protocol(call_s).seconds(call_s, racers) + OPENING_S


def _protocol(call_s: float) -> Protocol:
    """It is to rank them, not to carry a headline."""
    return TRIAL.suited_to(call_s)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Races of one run; ``call_s`` is what a call of the original takes."""

    runner: TrialRunner
    store: RunStore
    budget: Budget
    call_s: float
    progress: Progress
    warn: Callable[[str], None]

    @property
    def most(self) -> int:
        """How many artefacts, 0 where time is not the objective or the budget affords no race."""
        is_time = self.budget.objective in ("latency", "throughput")
        return _most(self.call_s, self.budget.time_s) if is_time else 0

    @property
    def most_seconds(self) -> float:
        """What the largest race takes, and one more of the fastest where the budget affords both; 0
        where there is none."""
        if not self.most:
            return 0.0
        first, again = _seconds(self.call_s, self.most), _seconds(self.call_s, CLOSE)
        return first + again if first + again <= SHARE * self.budget.time_s else first

    def seconds(self, num_artefacts: int) -> float:
        """What a race of so many is expected to take at most: a busy machine has it run again."""
        return 2 * _seconds(self.call_s, num_artefacts)

    def leaders(self, trials: Sequence[Trial], num_test: int) -> list[Trial]:
        """The fastest plans that could be handed over, as many as a race has."""
        return contenders(trials, self.budget, num_test)[: self.most]

    def ranked(
        self, trials: Sequence[Trial], num_test: int, has_time: Callable[[float], bool]
    ) -> list[Trial]:
        """All trials: the leaders and the best control by their own races and one of all of them,
        the fastest by further ones too, as long as there is time for so many seconds."""
        known = {trial.trial_id: trial for trial in trials}
        races = [self.race_plans(self.leaders(trials, num_test), trials)]
        while races[-1] and len(races) < RACES and has_time(_seconds(self.call_s, CLOSE)):
            close = self.leaders(pooled(trials, races), num_test)[:CLOSE]
            plans = [known[trial.trial_id] for trial in close]
            races.append(self.race_plans(plans, trials, is_only_one=False))
        return pooled(trials, races)

    def race_plans(
        self, plans: Sequence[Trial], trials: Sequence[Trial], *, is_only_one: bool = True
    ) -> list[Trial]:
        """Two plans or more and the best control of the trials, as ``race``."""
        if len(plans) < 2:
            return []
        control = best_control(trials, self.budget)
        racers = plans if control is None else [control, *plans]
        return self.race(racers, f"the {len(plans)} fastest plans", is_only_one=is_only_one)

    def race(self, racers: Sequence[Trial], what: str, *, is_only_one: bool = True) -> list[Trial]:
        """The trials with times from one race; none, with a warning, if it fails. While the machine
        is busy it is run again, unless it is one of several."""
        self.progress.stage("timing", f"{what} beside each other")
        race_s, ends = _seconds(self.call_s, len(racers)), now() + self.seconds(len(racers))

        def has_time() -> bool:
            """For another, and the final race within the time budget."""
            left = self.budget.time_s - self.store.journal.clock()
            return is_only_one and now() + race_s < ends and 2 * race_s < left

        try:
            with quiet(self.progress):
                return self.runner.time_together(
                    racers, self.store.trial, _protocol(self.call_s), has_time
                )
        except TrialError as error:
            self.warn(f"{what[0].upper()}{what[1:]} could not be timed beside each other: {error}")
            return []


def pooled(trials: Sequence[Trial], races: Sequence[Sequence[Trial]]) -> list[Trial]:
    """All trials, with the median of an artefact's times in its own race and in these: of an even
    number, the geometric mean of the two in the middle.

    A race may be slower or faster for all, or the original was: what counts is the place in it. The
    first race is of most; the others are put on its scale by those who ran in both.
    """
    places: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for again in races:
        ratios = _ratios(trials, again)
        both = [trial_id for trial_id in ratios if trial_id in first]
        usual = median(first[trial_id] for trial_id in both) if both else 1.0
        scale = median(ratios[trial_id] for trial_id in both or ratios) if ratios else 1.0
        for trial_id, ratio in ratios.items():
            places.setdefault(trial_id, [1.0]).append(usual * ratio / scale)
        first = first or {trial_id: ratio / scale for trial_id, ratio in ratios.items()}
    factors = {
        trial_id: math.exp(median(math.log(place) for place in found))
        for trial_id, found in places.items()
    }
    return [_scaled(trial, factors.get(trial.trial_id, 1.0)) for trial in trials]


def _ratios(trials: Sequence[Trial], again: Sequence[Trial]) -> dict[str, float]:
    """How many times faster each was in the race than in its own."""
    before = {trial.trial_id: relative_latency(trial) for trial in trials}
    return {
        trial.trial_id: own / other
        for trial in again
        if (own := before.get(trial.trial_id)) is not None
        and (other := relative_latency(trial)) is not None
    }


def _scaled(trial: Trial, factor: float) -> Trial:
    """As if it were so many times faster."""
    evaluation = trial.evaluation
    if evaluation is None or evaluation.speedup is None:
        return trial
    ratio = evaluation.speedup.ratio
    parts = {name: factor * getattr(ratio, name) for name in ("estimate", "low", "high")}
    speedup = evaluation.speedup.model_copy(update={"ratio": ratio.model_copy(update=parts)})
    relative = evaluation.relative and evaluation.relative / factor
    scaled = evaluation.model_copy(update={"speedup": speedup, "relative": relative})
    return trial.model_copy(update={"evaluation": scaled})
