"""Races that ran while the machine was busy: told by racers whose usual time is known.

A neighbour that takes a core for a minute slows a small int8 artefact by half and the original in
eager mode not at all, so no ratio of the two tells, nor the interval of a race that it lasted all
through. So the original is watched and, in races of plans, the fastest control.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from profiling_agent.evaluation.measure import Race

ORIGINAL = "baseline"
"""The original's name in every race."""
DOUBTED, DOUBTED_ORIGINAL = 1.2, 1.3
"""A racer's time over its usual one above which a race is not believed at once; eager PyTorch's
time varies more."""
REMEMBERED = 12
"""Races whose quietest is the usual; a machine that stays slower is soon as usual again."""
MOST_RACES = 3
"""Of the same racers, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Slowed:
    """The watched racer that a race slowed most: ``factor`` over its usual time, 1 is as ever."""

    name: str = ORIGINAL
    factor: float = 1.0

    @property
    def is_doubtful(self) -> bool:
        return self.factor > limit_of(self.name)

    @property
    def beyond(self) -> float:
        """Above 1 where it is doubtful, and comparable among racers."""
        return self.factor / limit_of(self.name)

    def __str__(self) -> str:
        """Why the race's times may be doubted; empty where they may not."""
        if not self.is_doubtful:
            return ""
        who = "the original" if self.name == ORIGINAL else self.name
        return f"the machine was busy: {who} took {self.factor:.1f} times as long as usual"


def limit_of(name: str) -> float:
    return DOUBTED_ORIGINAL if name == ORIGINAL else DOUBTED


class Watch:
    """What watched racers usually take, in milliseconds, by their names in races."""

    def __init__(self, usual_ms: Mapping[str, float] | None = None) -> None:
        self._seen: dict[str, deque[float]] = {ORIGINAL: deque(maxlen=REMEMBERED)}
        for name, ms in (usual_ms or {}).items():
            self.add(name, ms)

    def add(self, name: str, ms: float | None = None) -> None:
        """Watch a racer from now on, which was seen to take ``ms``."""
        seen = self._seen.setdefault(name, deque(maxlen=REMEMBERED))
        if ms is not None:
            seen.append(ms)

    def undisturbed(
        self, race_once: Callable[[], Race], has_time: Callable[[], bool] = lambda: True
    ) -> tuple[Race, Slowed]:
        """A race, and how much slower than usual a watched racer was in it.

        When that is doubtful, it is run again while there is time, twice at most, and the race that
        was slowed least counts.
        """
        races = [self._watched(race_once())]
        while races[-1][1].is_doubtful and len(races) < MOST_RACES and has_time():
            races.append(self._watched(race_once()))
        return min(races, key=lambda each: each[1].beyond)

    def slowed(self, medians_ms: Mapping[str, float | None]) -> Slowed:
        """The watched racer that took longest for its usual time, of those whose time is given."""
        found = [
            Slowed(name=name, factor=ms / min(seen))
            for name, seen in self._seen.items()
            if seen and (ms := medians_ms.get(name))
        ]
        return max(found, key=lambda each: each.beyond, default=Slowed())

    def _watched(self, times: Race) -> tuple[Race, Slowed]:
        medians = {
            name: median([call for block in times.blocks[name] for call in block])
            for name in self._seen
            if name in times.blocks
        }
        slowed = self.slowed(medians)
        for name, ms in medians.items():
            self._seen[name].append(ms)
        return times, slowed
