"""Latency of artefacts, by one protocol for before and after.

Short alternating blocks (A B A B ...), each in its own process with the other processes stopped,
the first calls of a block dropped. A comparison is the median of the ratios of neighbouring blocks,
with a bootstrap interval over blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from profiling_agent.errors import TrialError
from profiling_agent.evaluation.predictor import Predictor
from profiling_agent.machine.clock import now, ratio_interval, summarise
from profiling_agent.records.common import Interval, Timing


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How long and how often: ``num_blocks`` blocks of each, ``block_s`` seconds, a warm-up."""

    num_blocks: int = 8
    block_s: float = 0.1
    min_calls: int = 3
    warmup: int = 3

    def suited_to(self, call_s: float) -> Protocol:
        """The same for a model whose calls take long: fewer calls in a block, down to one and a
        warm-up one."""
        calls = max(1, min(self.min_calls, round(self.block_s / call_s)))
        return replace(self, min_calls=calls, warmup=min(self.warmup, max(1, calls)))

    def seconds(self, call_s: float, num_racers: int) -> float:
        """About how long a race takes if every racer's calls take ``call_s``."""
        block = max(self.block_s, self.min_calls * call_s) + self.warmup * call_s + 0.02
        return self.num_blocks * num_racers * block


MIN_BLOCKS = 5
TRIAL = Protocol()
FINAL = Protocol(num_blocks=24, block_s=0.2)


@dataclass(frozen=True, kw_only=True)
class Race:
    """Timings of several artefacts from one interleaved measurement, by name."""

    blocks: Mapping[str, Sequence[Sequence[float]]]

    def timing(self, name: str) -> Timing:
        return summarise(self.blocks[name])

    def speedup(self, name: str, over: str) -> Interval:
        """Latency of ``over`` divided by that of ``name``: above 1, ``name`` is faster."""
        return ratio_interval(self.blocks[over], self.blocks[name])


def race(
    predictors: Mapping[str, Predictor],
    split: Path,
    protocol: Protocol = TRIAL,
    deadline: float | None = None,
) -> Race:
    """Time all predictors in turn on the same samples; each is paused while another runs.

    ``deadline`` (on ``now``'s clock) ends it early, with at least five rounds: fewer can't carry a
    95 % interval. ``TrialError`` names the one that failed.
    """
    blocks: dict[str, list[list[float]]] = {name: [] for name in predictors}
    for name, predictor in predictors.items():
        with _named(name):
            predictor.resume()
            predictor.prepare(split)
            predictor.time_block(0.0, 1, protocol.warmup)  # first calls compile and allocate
            predictor.pause()
    for done in range(protocol.num_blocks):
        if deadline is not None and done >= MIN_BLOCKS and now() > deadline:
            break
        for name, predictor in predictors.items():
            with _named(name):
                predictor.resume()
                calls = predictor.time_block(protocol.block_s, protocol.min_calls, protocol.warmup)
                blocks[name].append(calls)
                predictor.pause()
    return Race(blocks=blocks)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except TrialError as error:
        raise TrialError(f"{name} failed while it was timed: {error}") from None
