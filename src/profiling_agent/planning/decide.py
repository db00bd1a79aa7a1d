"""Which trials go to the test split, and what is concluded from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from profiling_agent.planning.drops import expected_drops
from profiling_agent.planning.history import (
    feasible,
    pareto,
    search_drop,
    trial_value,
)
from profiling_agent.records.common import Budget, Evidence, Interval
from profiling_agent.records.evaluation import Evaluation
from profiling_agent.records.trial import Candidate, Trial, Verdict

SHARES = (1.0, 2 / 3, 1 / 3)
"""Of the budget, that the candidates are expected to lose at most, one after the other."""
MAX_CANDIDATES = len(SHARES)
AGAIN = 1.1
"""Of the budget, what a plan that an earlier run nominated may be expected to lose to be nominated
again: what two runs expect of it differs by a tenth, and the test split decides."""
ROUNDING = 1 + 1e-9


def best_control(trials: Sequence[Trial], budget: Budget) -> Trial | None:
    """The off-the-shelf artefact to beat: the best one within the budget on the search split."""
    return next(iter(ranked_controls(trials, budget)), None)


def ranked_controls(trials: Sequence[Trial], budget: Budget) -> list[Trial]:
    return [trial for trial in feasible(trials, budget) if trial.is_control]


def contenders(trials: Sequence[Trial], budget: Budget, num_test: int) -> list[Trial]:
    """The plans that could be handed over: expected to be within the budget, or an earlier run's
    and nearly so, and better than the best control, best objective first."""
    control = best_control(trials, budget)
    bar = trial_value(control, budget) if control else None
    ours = [
        trial
        for trial in feasible(trials, budget, earlier=AGAIN)
        if not trial.is_control and (bar is None or (trial_value(trial, budget) or 0.0) < bar)
    ]
    if budget.evidence == "proven":
        drops = expected_drops(trials, budget)
        ours = [
            trial
            for trial in ours
            if drops[trial.trial_id] + _expected_width(trial, num_test) <= budget.max_drop
        ]
    return ours


def nominate(trials: Sequence[Trial], budget: Budget, num_test: int) -> list[Candidate]:
    """At most three trials for the test split, best objective first.

    The best one expected to be within the budget; and, since what the search samples say of all is
    not sure, the best with a third and with two thirds of it to spare. Before these an earlier
    run's plan that is better and nearly within the budget, in place of the last. Places that are
    left go to others that beat the control, first those that no other beats in both objective and
    drop, then those expected to lose least. With evidence ``proven`` only trials whose bound on the
    test split would be within the budget.
    """
    ours = contenders(trials, budget, num_test)
    drops = expected_drops(trials, budget)
    chosen: dict[str, Trial] = {}
    if ours and drops[ours[0].trial_id] > budget.max_drop * ROUNDING:
        chosen[ours[0].trial_id] = ours[0]
    for share in SHARES:
        limit = share * budget.max_drop * ROUNDING
        first = next((t for t in ours if drops[t.trial_id] <= limit), None)
        if first is not None and len(chosen) < MAX_CANDIDATES:
            chosen.setdefault(first.trial_id, first)
    spare = sorted(ours, key=lambda trial: drops[trial.trial_id])
    for trial in (*pareto(ours, budget), *spare):
        if len(chosen) < MAX_CANDIDATES:
            chosen.setdefault(trial.trial_id, trial)
    picked = sorted(chosen.values(), key=lambda trial: trial_value(trial, budget) or 0.0)
    return [
        Candidate(
            trial_id=trial.trial_id,
            predicted_drop=drops[trial.trial_id],
            objective_value=trial_value(trial, budget) or 0.0,
        )
        for trial in picked[:MAX_CANDIDATES]
    ]


def _expected_width(trial: Trial, num_test: int) -> float:
    """How far above the drop its one-sided bound would lie on the test split, by the search split's
    rates."""
    accuracy = trial.on_search
    if accuracy is None or accuracy.drop is None:
        return math.inf
    normal = NormalDist()
    width = (accuracy.drop.high - accuracy.drop.low) / 2 / normal.inv_cdf(0.975)
    level = proof_level(MAX_CANDIDATES)
    return normal.inv_cdf(level) * width * math.sqrt(accuracy.num_samples / num_test)


def proof_level(num_candidates: int) -> float:
    """Level of the one-sided bound: 95 %, Bonferroni-corrected for the candidates tried."""
    return 1.0 - 0.05 / max(1, num_candidates)


@dataclass(frozen=True, kw_only=True)
class Final:
    """One artefact's evaluation on the test split and its race against baseline and control."""

    trial: Trial
    evaluation: Evaluation
    over_control: Interval | None
    samples_to_prove: int | None

    @property
    def drop(self) -> Interval | None:
        accuracy = self.evaluation.on("test")
        return accuracy.drop if accuracy else None

    @property
    def bound(self) -> float | None:
        accuracy = self.evaluation.on("test")
        return accuracy.upper_bound if accuracy else None


def evidence_of(final: Final, budget: Budget) -> Evidence | None:
    """``proven``, ``measured``, or ``None`` when the test drop is over the budget."""
    if final.drop is None or final.drop.estimate > budget.max_drop * ROUNDING:
        return None
    if final.bound is not None and final.bound <= budget.max_drop:
        return "proven"
    return "measured"


def within_budget(final: Final, budget: Budget) -> bool:
    evidence = evidence_of(final, budget)
    return evidence == "proven" or (evidence == "measured" and budget.evidence == "measured")


def beats_baseline(final: Final, budget: Budget, baseline: Evaluation) -> bool:
    """Whether the objective is better than the original's, beyond the measurement's interval."""
    return _beats(final.evaluation, baseline, _speedup(final.evaluation), budget)


def beats_control(final: Final, control: Final | None, budget: Budget) -> bool:
    """Whether it is better than the best control, beyond the measurement's interval."""
    if control is None:
        return True
    return _beats(final.evaluation, control.evaluation, final.over_control, budget)


def _speedup(evaluation: Evaluation) -> Interval | None:
    return evaluation.speedup.ratio if evaluation.speedup else None


MEMORY_NOISE = 0.03


def _beats(mine: Evaluation, other: Evaluation, ratio: Interval | None, budget: Budget) -> bool:
    match budget.objective:
        case "latency" | "throughput":
            return ratio is not None and ratio.low > 1.0
        case "size":
            return _below(mine.size_bytes, other.size_bytes, 0.0)
        case "memory":
            return _below(mine.memory_bytes, other.memory_bytes, MEMORY_NOISE)


def _below(mine: int | None, other: int | None, noise: float) -> bool:
    return mine is not None and other is not None and mine < other * (1.0 - noise)


def conclude(
    tested: Sequence[Final],
    control: Final | None,
    baseline: Evaluation,
    budget: Budget,
    trials: Sequence[Trial],
) -> Verdict:
    """The verdict: the first tested candidate that holds, else the control, else the original."""
    for final in tested:
        if (
            within_budget(final, budget)
            and beats_baseline(final, budget, baseline)
            and beats_control(final, control, budget)
        ):
            return _accept(final, control, baseline, budget, len(tested))
    if control is not None and beats_baseline(control, budget, baseline):
        return _no_gain(control, baseline, budget, tested, trials)
    return _infeasible(tested, control, budget, trials)


def _accept(
    final: Final, control: Final | None, baseline: Evaluation, budget: Budget, num_tested: int
) -> Verdict:
    evidence = evidence_of(final, budget)
    assert final.drop is not None
    reason = (
        f"{final.trial.trial_id} {_loss_words(final.drop, budget)} on "
        f"{final.drop.num_samples:,} test samples (budget {budget.max_drop:g})"
        f"{_gain_words(final, control, budget)}."
    )
    if evidence == "proven":
        step = "Ship the artefact folder; its serve.py needs only the runtime."
    else:
        more = final.samples_to_prove
        step = "Ship it, or prove the drop with " + (
            f"about {more:,} test samples." if more else "more test samples."
        )
    return _verdict("ACCEPT", evidence, reason, step, final, control, baseline, num_tested)


def _loss_words(drop: Interval, budget: Budget) -> str:
    if drop.estimate > 0:
        return f"loses {_amount(drop.estimate, budget)}"
    gain = f" (gains {_amount(-drop.estimate, budget)})" if drop.estimate < 0 else ""
    return f"loses nothing{gain}"


def _amount(value: float, budget: Budget) -> str:
    if budget.unit == "points":
        return f"{value:.2f} points"
    return f"{value:.3g} {budget.unit}".rstrip()


def _gain_words(final: Final, control: Final | None, budget: Budget) -> str:
    speed = _speedup(final.evaluation)
    parts = [f"{speed.estimate:.2f}x faster than the original"] if speed else []
    if final.over_control is not None and control is not None:
        parts.append(f"{final.over_control.estimate:.2f}x than {control.trial.label} off the shelf")
    if budget.objective == "size" and final.evaluation.size_bytes is not None:
        parts.insert(0, f"{final.evaluation.size_bytes / 1e6:.2f} MB")
    return (", " + ", ".join(parts)) if parts else ""


def _no_gain(
    control: Final,
    baseline: Evaluation,
    budget: Budget,
    tested: Sequence[Final],
    trials: Sequence[Trial],
) -> Verdict:
    reason = (
        f"Nothing within the budget beats {control.trial.label} off the shelf beyond the "
        f"measurement's interval{_closest(tested, trials, budget)}; that control is handed over."
    )
    return _verdict(
        "NO_GAIN",
        evidence_of(control, budget),
        reason,
        "Allow a larger --max-drop or --time-budget, or ship the control as it is.",
        control,
        control,
        baseline,
        len(tested),
    )


def _closest(tested: Sequence[Final], trials: Sequence[Trial], budget: Budget) -> str:
    for final in tested:
        if final.drop is not None and final.drop.estimate > budget.max_drop:
            better = {"size": "smaller", "memory": "smaller in memory"}
            return (
                f" ({final.trial.trial_id} was {better.get(budget.objective, 'faster')} on search "
                f"but lost {_amount(final.drop.estimate, budget)} on the test split)"
            )
        if final.over_control is not None and budget.objective in ("latency", "throughput"):
            low, high = final.over_control.low, final.over_control.high
            return f" ({final.trial.trial_id} is {low:.2f} to {high:.2f} times as fast)"
    tried = [trial for trial in trials if not trial.is_control]
    return f" ({len(tried)} plans tried)" if tried else ""


def _infeasible(
    tested: Sequence[Final], control: Final | None, budget: Budget, trials: Sequence[Trial]
) -> Verdict:
    losses = [drop for trial in trials if (drop := search_drop(trial)) is not None]
    failed = sum(1 for trial in trials if trial.status == "failed")
    if not losses and failed:
        reason = f"All {failed} trials failed; the first reason: " + next(
            (trial.reason for trial in trials if trial.reason), "none was given"
        )
    elif not losses:
        reason = "No trial was made: the time budget is too short, or no runtime can be used."
    else:
        reason = (
            "No artefact is better than the original within a drop of "
            f"{_amount(budget.max_drop, budget)} ({len(trials)} tried, {failed} failed). "
            "The original stays."
        )
    return Verdict(
        kind="INFEASIBLE",
        evidence=None,
        reason=reason,
        next_step=(
            "Allow a larger --max-drop, another --runtime, or more --time-budget; "
            "the report lists what each trial lost."
        ),
        trial_id=None,
        best_control_id=control.trial.trial_id if control else None,
        drop=None,
        drop_upper_bound=None,
        samples_to_prove=None,
        speedup=None,
        speedup_over_control=None,
        size_ratio=None,
        memory_ratio=None,
        candidates_tested=len(tested),
    )


def _verdict(
    kind: str,
    evidence: Evidence | None,
    reason: str,
    next_step: str,
    final: Final,
    control: Final | None,
    baseline: Evaluation,
    num_tested: int,
) -> Verdict:
    mine = final.evaluation
    return Verdict(
        kind=kind,  # pyright: ignore[reportArgumentType]
        evidence=evidence,
        reason=reason,
        next_step=next_step,
        trial_id=final.trial.trial_id,
        best_control_id=control.trial.trial_id if control else None,
        drop=final.drop,
        drop_upper_bound=final.bound,
        samples_to_prove=final.samples_to_prove,
        speedup=_speedup(mine),
        speedup_over_control=final.over_control,
        size_ratio=_ratio(mine.size_bytes, baseline.size_bytes),
        memory_ratio=_ratio(mine.memory_bytes, baseline.memory_bytes),
        candidates_tested=num_tested,
    )


def _ratio(mine: int | None, other: int | None) -> float | None:
    return None if mine is None or not other else mine / other
