"""Races that ran while the machine was busy: run again, doubted, believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from profiling_agent.evaluation.measure import Race
from profiling_agent.evaluation.watch import MOST_RACES, REMEMBERED, Slowed, Watch


def race_of(**milliseconds: float) -> Race:
    return Race(blocks={name: [[ms] * 5] * 6 for name, ms in milliseconds.items()})


def in_turn(*races: Race) -> tuple[Callable[[], Race], Iterator[Race]]:
    left = iter(races)
    return lambda: next(left), left


def test_a_usual_race_is_run_once() -> None:
    first = race_of(baseline=4.4, t1=1.0)
    run, left = in_turn(first, race_of(baseline=99.0, t1=1.0))
    times, slowed = Watch({"baseline": 4.0}).undisturbed(run)
    assert times is first and slowed == Slowed(factor=pytest.approx(1.1)) and str(slowed) == ""
    assert len(list(left)) == 1


def test_a_disturbed_race_is_run_again_until_one_is_quiet() -> None:
    quiet = race_of(baseline=4.0, t1=1.0)
    run, left = in_turn(race_of(baseline=80.0), race_of(baseline=50.0), quiet)
    times, slowed = Watch({"baseline": 4.0}).undisturbed(run)
    assert times is quiet and not slowed.is_doubtful and not list(left)


def test_of_disturbed_races_the_quietest_counts_and_is_doubted() -> None:
    best = race_of(baseline=8.0)
    run, left = in_turn(race_of(baseline=9.0), best, *[race_of(baseline=80.0)] * MOST_RACES)
    times, slowed = Watch({"baseline": 4.0}).undisturbed(run)
    assert times is best and slowed.is_doubtful
    assert str(slowed) == "the machine was busy: the original took 2.0 times as long as usual"
    assert len(list(left)) == 2  # three were run


def test_there_is_no_second_race_without_time() -> None:
    run, left = in_turn(race_of(baseline=8.0), race_of(baseline=4.0))
    _, slowed = Watch({"baseline": 4.0}).undisturbed(run, lambda: False)
    assert slowed.is_doubtful and len(list(left)) == 1


def test_what_the_original_does_not_feel_a_control_tells() -> None:
    """Small int8 artefacts took 1.5 times as long for a minute, the original 1.0."""
    busy, quiet = race_of(baseline=2.0, c1=0.65, t1=0.46), race_of(baseline=2.0, c1=0.43, t1=0.27)
    run, _ = in_turn(busy, quiet)
    times, _ = Watch({"baseline": 2.0, "c1": 0.43}).undisturbed(run)
    assert times is quiet
    run, _ = in_turn(*[busy] * MOST_RACES)
    _, slowed = Watch({"baseline": 2.0, "c1": 0.43}).undisturbed(run)
    assert "c1 took 1.5 times" in str(slowed)


def test_racers_that_are_not_watched_may_take_what_they_like() -> None:
    watch = Watch({"baseline": 4.0})
    for ms in (1.0, 9.0):
        run, left = in_turn(race_of(baseline=4.0, t1=ms), race_of(baseline=4.0, t1=ms))
        assert not watch.undisturbed(run)[1].is_doubtful and len(list(left)) == 1


def test_the_first_race_of_all_is_believed_and_remembered() -> None:
    watch = Watch()
    run, _ = in_turn(race_of(baseline=80.0))
    assert watch.undisturbed(run)[1] == Slowed()
    run, _ = in_turn(race_of(baseline=40.0))
    assert not watch.undisturbed(run)[1].is_doubtful
    run, _ = in_turn(*[race_of(baseline=80.0)] * MOST_RACES)
    assert watch.undisturbed(run)[1].factor == pytest.approx(2.0)


def test_a_machine_that_stays_slower_is_as_usual_again() -> None:
    """A laptop that has become hot would else run every race three times, for hours."""
    watch, slower = Watch({"baseline": 4.0, "c1": 1.0}), race_of(baseline=4.0, c1=1.4)
    for _ in range(REMEMBERED // MOST_RACES):
        assert watch.undisturbed(lambda: slower)[1].is_doubtful
    run, left = in_turn(slower, slower)
    assert not watch.undisturbed(run)[1].is_doubtful and len(list(left)) == 1


def test_what_a_control_took_long_ago_says_nothing_of_now() -> None:
    watch = Watch({"baseline": 4.0, "c1": 1.0, "c2": 1.0})
    for _ in range(REMEMBERED):
        watch.undisturbed(lambda: race_of(baseline=4.0, c1=1.0))
    run, _ = in_turn(race_of(baseline=4.0, c2=1.4))
    assert not watch.undisturbed(run)[1].is_doubtful
    run, _ = in_turn(*[race_of(baseline=4.0, c2=1.4, c1=1.4)] * MOST_RACES)
    assert watch.undisturbed(run)[1].name == "c1" and watch.last.is_doubtful
