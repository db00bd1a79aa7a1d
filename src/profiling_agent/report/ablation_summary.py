"""A comparison of planners as rows: the seeds of one planner together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from profiling_agent.records.ablation import AblationRecord, Arm
from profiling_agent.records.common import Interval
from profiling_agent.report.wording import (
    DASH,
    as_range,
    as_ratio,
    drop_range,
    in_drop,
    in_seconds,
    printable,
    significant,
    with_unit,
)

TITLES: Final = (
    "best found",
    "hypervolume",
    "speed over {reference}",
    "test drop",
    "feasible",
    "rejected",
    "tokens",
    "cost",
    "waited",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: the value and smaller words under it for each of ``TITLES``."""

    name: str
    under: str
    cells: tuple[tuple[str, str], ...]
    note: str


def arms_together(record: AblationRecord) -> tuple[tuple[Arm, ...], ...]:
    """The arms of each planner and language model, seeds together, in the record's order."""
    together: dict[object, list[Arm]] = {}
    for arm in record.arms:
        together.setdefault((arm.planner, arm.llm), []).append(arm)
    return tuple(tuple(arms) for arms in together.values())


def name_of(arm: Arm) -> tuple[str, str]:
    """The planner, and the language model with its wording."""
    if arm.llm is None:
        return arm.planner, ""
    asked = (arm.usage.model if arm.usage else "") or arm.llm.model
    return arm.planner, f"{printable(asked, 60)}, {printable(arm.llm.prompt, 40)} prompt"


def rows_of(record: AblationRecord) -> tuple[Row, ...]:
    return tuple(_row(record, arms) for arms in arms_together(record))


def titles_of(record: AblationRecord) -> tuple[str, ...]:
    return tuple(title.format(reference=record.reference) for title in TITLES)


def median_gains(record: AblationRecord, arms: Iterable[Arm]) -> tuple[float | None, ...]:
    """Of the seeds, after each number of trials; an arm that ended early stays where it was."""
    length = record.settings.search.budget.max_trials + 1
    curves = [_padded(arm.gains, length) for arm in arms if arm.gains]
    return tuple(_median([curve[i] for curve in curves]) for i in range(length if curves else 0))


def _median(values: Sequence[float | None]) -> float | None:
    """``None``, nothing feasible, is less than anything."""
    ordered = sorted(values, key=lambda value: -math.inf if value is None else value)
    below, above = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return None if below is None or above is None else (below + above) / 2


def _padded(gains: tuple[float | None, ...], length: int) -> tuple[float | None, ...]:
    return gains + (gains[-1],) * (length - len(gains))


def _row(record: AblationRecord, arms: tuple[Arm, ...]) -> Row:
    name, under = name_of(next((arm for arm in arms if arm.usage), arms[0]))
    ran = [arm for arm in arms if arm.gains]
    if not ran:
        empty = tuple((DASH, "") for _ in TITLES)
        return Row(name=name, under=under, cells=empty, note=f"not run: {arms[0].ended}")
    finals = [arm.gains[-1] for arm in ran]
    volumes = [arm.hypervolume for arm in ran if arm.hypervolume is not None]
    attempts = [attempt for arm in ran for attempt in arm.attempts]
    good = sum(attempt.holds for attempt in attempts)
    usages = [arm.usage for arm in ran if arm.usage is not None]
    rejected = sum(guard.action == "rejected" for arm in ran for guard in arm.guards)
    tokens = sum(u.input_tokens + u.output_tokens for u in usages)
    costs = [u.cost_usd for u in usages]
    cells = (
        _spread(finals, as_ratio),
        _spread(volumes, significant),
        _over(ran),
        _worst_drop(record, ran),
        (f"{good} of {len(attempts)}", ""),
        (str(rejected) if usages else "", ""),
        (f"{tokens:,}" if usages else "", ""),
        (_cost(costs, usages[0].no_cost) if usages else ("", "")),
        (in_seconds(sum(u.seconds for u in usages)) if usages else "", ""),
    )
    notes = dict.fromkeys(
        f"seed {arm.seed}: {len(arm.attempts)} trials, then {arm.ended}"
        for arm in arms
        if arm.ended
    )
    return Row(name=name, under=under, cells=cells, note="; ".join(notes))


def _spread(values: Sequence[float | None], show: Callable[[float], str]) -> tuple[str, str]:
    """The median over seeds, and from the least to the most below it where they differ."""
    known = [value for value in values if value is not None]
    if not known:
        return DASH, ""
    low, high = show(min(known)), show(max(known))
    middle = _median(values)
    spread = f"{low} to {high}" if low != high else ""
    if len(known) < len(values):
        spread = f"{low} in" if low == high else f"{spread}, in"
        spread += f" {len(known)} of {len(values)} seeds"
    return DASH if middle is None else show(middle), spread


def _over(arms: list[Arm]) -> tuple[str, str]:
    """The race of the seed that did worst against the reference's best artefact.

    Where some seeds have no race, how many had.
    """
    raced = [arm.over_reference for arm in arms if arm.over_reference is not None]
    num_same = sum(arm.same_as_reference for arm in arms)
    num_known = len(raced) + num_same
    some = f"{num_known} of {len(arms)} seeds" if num_known < len(arms) else ""
    worst: Interval | None = min(raced, key=lambda interval: interval.estimate, default=None)
    if worst is None or (num_same and worst.estimate > 1.0):
        return ("same artefact", some) if num_same else (DASH, "")
    return as_ratio(worst.estimate), " ".join(part for part in (as_range(worst), some) if part)


def _worst_drop(record: AblationRecord, arms: list[Arm]) -> tuple[str, str]:
    drops = [arm.test.drop for arm in arms if arm.test is not None and arm.test.drop is not None]
    if not drops:
        return DASH, ""
    unit = record.workload.task.unit
    worst = max(drops, key=lambda drop: drop.estimate)
    return with_unit(in_drop(worst.estimate, unit), unit), drop_range(worst, unit)


def _cost(costs: list[float | None], why: str) -> tuple[str, str]:
    known = [cost for cost in costs if cost is not None]
    if len(known) < len(costs):
        return DASH, printable(why, 60)
    return f"${sum(known):.4f}", ""


def findings(record: AblationRecord) -> tuple[str, ...]:
    """What stands below the table: how to read it."""
    budget = record.settings.search.budget
    unit = record.workload.task.unit
    drop = with_unit(in_drop(record.reference_drop, unit), unit)
    return (
        f"{budget.max_trials} trials each, {record.settings.num_seeds} seeds; medians over seeds, "
        "the range below. The controls are every arm's start and no trials of it.",
        f"Best found: times better than the original in {budget.objective} by the best artefact "
        "within the budget on the search split.",
        f"Hypervolume: the share that the artefacts dominate of {budget.objective} up to the "
        f"original's and a drop up to {drop}; of the controls alone "
        f"{significant(record.controls_hypervolume)}.",
        f"Speed over {record.reference}: latency of its best artefact over the arm's, raced side "
        "by side, of the seed that did worst; above 1 the arm's is faster. Test drop: likewise "
        "the worst.",
        f"{record.num_measured} plans were carried out; a plan that does what another did was "
        "measured once.",
        *(
            ("The arm llm stands alone: nothing behind it, and a rejected answer is one trial.",)
            if any(arm.planner == "llm" for arm in record.arms)
            else ()
        ),
        *dict.fromkeys(
            f"{arm.planner}, seed {arm.seed}: {arm.not_compared}"
            for arm in record.arms
            if arm.not_compared
        ),
    )
