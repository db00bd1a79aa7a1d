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
"""Races of which the quietest is as usual; a machine that stays slower is soon as usual again."""
MOST_RACES = 3
"""Of the same racers, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Slowed:
    """The watched racer that a race slowed most: ``factor`` over its usual time, 1 is as ever."""

    name: str = ORIGINAL
    factor: float = 1.0

    @property
    def is_doubtful(self) -> bool:
        return self.beyond > 1.0

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
    """What watched racers took in the last races, in milliseconds, by their names.

    Which the original is, and those that were added.
    """

    def __init__(self, usual_ms: Mapping[str, float] | None = None) -> None:
        self._names = {ORIGINAL}
        self._seen: deque[dict[str, float]] = deque(maxlen=REMEMBERED)
        self.last = Slowed()
        """Of the last race."""
        self.add(usual_ms or {})

    def add(self, took_ms: Mapping[str, float]) -> None:
        """Watch these racers from now on, which were seen to take so long."""
        self._names |= set(took_ms)
        if took_ms:
            self._seen.append(dict(took_ms))

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
        self.last = races[-1][1]
        return min(races, key=lambda each: each[1].beyond)

    def slowed(self, medians_ms: Mapping[str, float | None]) -> Slowed:
        """The watched racer that took longest for its usual time, of those whose time is given and
        that were in one of the last races."""
        found = [
            Slowed(name=name, factor=ms / usual)
            for name in self._names
            if (ms := medians_ms.get(name)) and (usual := self._usual(name))
        ]
        return max(found, key=lambda each: each.beyond, default=Slowed())

    def _usual(self, name: str) -> float | None:
        return min((took[name] for took in self._seen if name in took), default=None)

    def _watched(self, times: Race) -> tuple[Race, Slowed]:
        took = {
            name: median([call for block in blocks for call in block])
            for name, blocks in times.blocks.items()
            if name in self._names
        }
        slowed = self.slowed(took)
        self._seen.append(took)
        return times, slowed
