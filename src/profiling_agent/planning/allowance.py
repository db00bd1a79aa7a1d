"""How much divergence the accuracy budget affords: what the trials say about it.

The *allowance* stands between divergence, which is predicted as a sum over groups and layers, and
accuracy, which is known of whole trials only. Where trials recorded how far their outputs were from
the original's, it is where the fitted line (``drops.py``) meets 0.8 of the budget, by what whole
plans diverged over what was predicted of them. Where they did not, it is found for each runtime and
scheme: doubled after a feasible trial; between the best feasible and the least infeasible one
halved (in logarithms), or moved to where their drops say the budget lies. Cuts that clearly lost
too much in one runtime and scheme, where quantizing alone did not, are then not repeated in
another: what a cut costs hardly depends on these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from profiling_agent.planning.drops import (
    KL_PER_POINT,
    divergence,
    fitted_slope,
    points,
)
from profiling_agent.planning.estimate import predict_kl
from profiling_agent.planning.history import (
    Pair,
    controls,
    holds,
    is_clearly_over,
    pair_of,
    search_drop,
)
from profiling_agent.records.common import Budget
from profiling_agent.records.plan import Plan, Quantization
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

SEARCH_ENDED = 1.15
"""The bracket around the allowance is closed when its ends are this close."""
AIM = 0.8
"""Of the budget, for plans placed by what was measured: the test split may say a little more."""
HELD, STEP = 0.9, 1.25
"""What held so near to what is aimed at leads the search on, by that factor."""
LEAST_ROOM = 0.1
"""Of the divergence at 0.8 of the budget, for pruning where quantizing alone has used it up."""
OWN = 2
"""Plans of a runtime and scheme that hold, after which the others' say nothing of it."""
COLLAPSED = 1 / 8
"""Of the cuts of a plan that collapsed: what is tried next."""
MOST_BEYOND = 200.0
"""How far the divergence of a whole plan may lie from the sum of its parts, to be believed."""
FAR_BEYOND, FAR_BACK = 4.0, 1 / 4
"""Where plans lost too much, and diverged so many times as much as the sum of their cuts, the more
the smaller that sum, the next goes back by the square of what was too much; beyond what the plain
ratio says no farther than by that factor."""


def next_allowance(
    profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair
) -> tuple[float | None, float | None]:
    """The divergence to try next, or ``None`` when the bracket is closed; and what is too much."""
    low, high = allowance_bracket(profile, history, budget, pair)
    aimed, most = (_fitted_allowance(profile, history, budget, pair, a) for a in (AIM, 1.0))
    if aimed is not None and most is not None:
        held = _held(profile, history, budget, pair)
        first = _first(points(budget, history))
        allowance = _bounded(aimed, most, held, high, first=first)
        collapsed = _below_collapse(profile, history, pair, held)
        allowance = allowance if collapsed is None else min(allowance, collapsed)
        back = _far_back(profile, history, budget, pair)
        allowance = allowance if back is None else min(allowance, back)
        elsewhere = _below_what_failed_elsewhere(profile, history, budget, pair)
        return allowance if elsewhere is None else min(allowance, elsewhere), high
    shrink = _shrink(profile, history, budget, pair, high)
    allowance = _next_allowance(low, high, points(budget, history), shrink)
    if allowance is not None and low is not None and high is not None:
        allowance = max(allowance, _crossing(profile, history, budget, pair, low, high))
    if allowance is not None and high is None:
        elsewhere = _below_what_failed_elsewhere(profile, history, budget, pair)
        allowance = allowance if elsewhere is None else min(allowance, elsewhere)
    return allowance, high


def is_fitted(history: Sequence[Trial], budget: Budget, pair: Pair) -> bool:
    """Whether the allowance of the pair follows from how far trials diverged."""
    control = controls(history).get(pair)
    known = control is not None and divergence(control) is not None
    return known and fitted_slope(history, budget) is not None


def _fitted_allowance(
    profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair, aim: float
) -> float | None:
    """The predicted divergence at which a plan is expected to lose ``aim`` of the budget, going by
    how far whole trials diverged; ``None`` when no trial or no control of the pair recorded that.
    """
    slope, control = fitted_slope(history, budget), controls(history).get(pair)
    apart = divergence(control) if control else None
    if slope is None or control is None or apart is None:
        return None
    wanted = slope.divergence_at(aim * budget.max_drop)
    predicted = predict_kl(profile, control.plan)
    if predicted > 0.0 and (apart >= wanted or needs_rescue(pair, history, budget)):
        return wanted / _over_predicted(profile, history, pair)  # layers have to stay float
    return predicted + _room(wanted, apart) / _beyond_sums(profile, history, budget, pair)


def _room(wanted: float, apart: float) -> float:
    """Of a divergence for cuts, where quantizing alone takes so much."""
    return max(wanted - apart, LEAST_ROOM * wanted)


def _over_predicted(profile: Profile, history: Sequence[Trial], pair: Pair) -> float:
    """What whole trials of the pair diverged over what was predicted: its plans', before there are
    any its control's."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for trial in history:
        predicted, apart = predict_kl(profile, trial.plan), divergence(trial)
        if pair_of(trial) == pair and apart is not None and predicted > 0.0:
            ratios[trial.is_control].append(apart / predicted)
    known = ratios[False] or ratios[True]
    return max(sum(known) / len(known), 1e-6) if known else 1.0


@dataclass(frozen=True, kw_only=True)
class _Beyond:
    """What the cuts of a plan were predicted to diverge one by one, and did together."""

    trial: Trial
    alone: float
    together: float

    @property
    def ratio(self) -> float:
        return self.together / self.alone


def _beyond(profile: Profile, history: Sequence[Trial]) -> Iterator[_Beyond]:
    """Of every plan that prunes and recorded how far it diverged, as its control did."""
    known = controls(history)
    for trial in history:
        control, alone = known.get(pair_of(trial)), _pruning_kl(profile, trial.plan)
        base, apart = divergence(control) if control else None, divergence(trial)
        if trial.is_control or control is None or base is None or apart is None or alone <= 0.0:
            continue
        whole = predict_kl(profile, control.plan)
        if whole > 0.0:  # of its quantization the layers that the plan leaves in int8
            base *= (predict_kl(profile, trial.plan) - alone) / whole
        yield _Beyond(trial=trial, alone=alone, together=max(0.0, apart - base))


def _far_back(
    profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair
) -> float | None:
    """The most that is tried while all plans of the pair lost too much, and their sums said the
    less of what the cuts do together the smaller they were; ``None`` where that is not so."""
    slope, control = fitted_slope(history, budget), controls(history).get(pair)
    apart = divergence(control) if control else None
    own = [each for each in _beyond(profile, history) if pair_of(each.trial) == pair]
    if slope is None or control is None or apart is None or len(own) < 2:
        return None
    least = min(own, key=lambda each: each.alone)
    room = _room(slope.divergence_at(AIM * budget.max_drop), apart)
    if least.ratio < max(FAR_BEYOND, *(each.ratio for each in own)) or least.together <= room:
        return None
    if any(holds(each.trial, slope, budget) for each in own):
        return None
    back = room / least.together
    return predict_kl(profile, control.plan) + least.alone * back * max(back, FAR_BACK)


def _beyond_sums(profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair) -> float:
    """What pruning plans diverged over the sum of their groups; 1 before there are any.

    Of this pair's trials or of all, whichever is more; of this pair's once enough of them hold.
    Cuts made together cost more than one by one.
    """
    slope, known = fitted_slope(history, budget), list(_beyond(profile, history))
    # relative errors are alike, so each trial's ratio counts the same
    own = [each.ratio for each in known if pair_of(each.trial) == pair]
    num_held = sum(
        pair_of(each.trial) == pair and holds(each.trial, slope, budget) for each in known
    )
    everywhere = [each.ratio for each in known]
    asked = (own,) if num_held >= OWN else (own, everywhere)
    means = [sum(each) / len(each) for each in asked if each]
    return min(MOST_BEYOND, max(1 / MOST_BEYOND, max(means, default=1.0)))


def _held(profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair) -> float:
    """The largest predicted divergence of the pair's plans that hold; 0 without one."""
    slope = fitted_slope(history, budget)
    return max(
        (
            predict_kl(profile, trial.plan)
            for trial in history
            if pair_of(trial) == pair and not trial.is_control and holds(trial, slope, budget)
        ),
        default=0.0,
    )


def _bounded(aimed: float, most: float, held: float, high: float | None, *, first: float) -> float:
    """What is aimed at; when that holds a step further, to where all of the budget is used up.

    Below what was too much; without such, not beyond ``first`` or far beyond what held.
    """
    if held >= HELD * aimed:
        aimed = max(held, min(STEP * held, most))
    return min(aimed, max(first, 4 * held) if high is None else high / SEARCH_ENDED)


def _below_collapse(
    profile: Profile, history: Sequence[Trial], pair: Pair, held: float
) -> float | None:
    """What is tried after a plan of the pair that collapsed, which has no divergence to learn from:
    half-way (in logarithms) to what held, or an eighth of its cuts; ``None`` without such."""
    screened = [t for t in history if pair_of(t) == pair and t.status == "screened"]
    if not screened:
        return None
    trial = min(screened, key=lambda trial: predict_kl(profile, trial.plan))
    kl, cuts = predict_kl(profile, trial.plan), _pruning_kl(profile, trial.plan)
    if 0.0 < held < kl:
        return math.sqrt(held * kl)
    return kl - cuts * (1 - COLLAPSED) if 0.0 < cuts <= kl else kl * COLLAPSED


def needs_rescue(pair: Pair, history: Sequence[Trial], budget: Budget) -> bool:
    """Whether all that was tried of an int8 scheme is over the budget, its control too.

    Then the layers to keep float are found before anything is pruned: two faults at once would hide
    each other. A control that may be over by chance is given the benefit of the doubt once.
    """
    tried = [t for t in history if pair_of(t) == pair and t.status != "failed"]
    known = [trial for trial in tried if trial.is_control]
    if not pair.scheme.startswith("int8") or not known:
        return False
    slope = fitted_slope(history, budget)
    if any(holds(trial, slope, budget) for trial in tried):
        return False
    return len(tried) > len(known) or is_clearly_over(known[0], budget)


def allowance_bracket(
    profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair
) -> tuple[float | None, float | None]:
    """Divergence known to be affordable and known to be too much, for one runtime and scheme.

    A screened trial, which collapsed, counts as too much; a failed one says nothing. An int8
    control that holds says little of a plan that prunes and keeps layers float: it counts as long
    as nothing below its divergence was too much. One over the budget counts where layers are to be
    kept float for it.
    """
    rescues, slope = needs_rescue(pair, history, budget), fitted_slope(history, budget)
    kept: list[float] = []
    lost: list[float] = []
    control: float | None = None
    for trial in history:
        if pair_of(trial) != pair or trial.status == "failed":
            continue
        kl = predict_kl(profile, trial.plan)
        if holds(trial, slope, budget):
            if trial.is_control:
                control = kl
            else:
                kept.append(kl)
        elif trial.is_control and not rescues:
            continue
        elif trial.status == "screened" or search_drop(trial) is not None:
            lost.append(kl)
    low, high = max(kept, default=None), min(lost, default=None)
    if control is not None and (high is None or control < high):
        low = control if low is None else max(low, control)
    if low is not None and high is not None and high <= low:
        high = None if low == 0.0 else low * SEARCH_ENDED**2  # noise: trust the feasible one
    return low, high


def _below_what_failed_elsewhere(
    profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair
) -> float | None:
    """The divergence to try next by what pruning lost in other pairs; ``None`` when that says
    nothing: not where the pair's own trials went further and held, and never to end its search."""
    own, slope = controls(history).get(pair), fitted_slope(history, budget)
    held = [
        _pruning_kl(profile, trial.plan)
        for trial in history
        if pair_of(trial) == pair and not trial.is_control and holds(trial, slope, budget)
    ]
    low = max(held, default=0.0)
    beyond = [(kl, t) for kl, t in _lost_elsewhere(profile, history, budget, pair) if kl > low]
    if not beyond:
        return None
    high, trial = min(beyond, key=lambda found: found[0])
    shrink = _shrink_by(search_drop(trial), budget)
    step = _next_allowance(low, high, points(budget, history), shrink)
    base = predict_kl(profile, own.plan) if own else 0.0
    return None if step is None else base + step


def _lost_elsewhere(
    profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair
) -> Iterator[tuple[float, Trial]]:
    """The trials of other pairs that pruning, not their scheme, put over the budget; with the
    divergence of their cuts alone."""
    known, slope = controls(history), fitted_slope(history, budget)
    for trial in history:
        control = known.get(pair_of(trial))
        if trial.is_control or pair_of(trial) == pair or control is None:
            continue
        kl = _pruning_kl(profile, trial.plan)
        if kl > 0 and holds(control, slope, budget) and _is_beyond(trial, control, budget):
            yield kl, trial


def _pruning_kl(profile: Profile, plan: Plan) -> float:
    """What the plan's cuts cost, nothing quantized."""
    bare = plan.model_copy(update={"quantization": Quantization(scheme="fp32")})
    return predict_kl(profile, bare)


def _is_beyond(trial: Trial, control: Trial, budget: Budget) -> bool:
    """Whether it lost more than the budget over its control, with confidence."""
    if trial.status == "screened":
        return True
    accuracy = trial.on_search
    if trial.status != "done" or accuracy is None or accuracy.drop is None:
        return False
    return accuracy.drop.low - max(0.0, search_drop(control) or 0.0) > budget.max_drop


def _shrink(
    profile: Profile, history: Sequence[Trial], budget: Budget, pair: Pair, high: float | None
) -> float:
    """How far below the least infeasible divergence to look while nothing feasible is known.

    As far as its drop was above the budget, between a half and an eighth; an eighth when it
    collapsed: summed divergences say too little of what many small cuts do together.
    """
    for trial in history:
        drop = search_drop(trial)
        if pair_of(trial) == pair and drop and predict_kl(profile, trial.plan) == high:
            return _shrink_by(drop, budget)
    return COLLAPSED


def _shrink_by(drop: float | None, budget: Budget) -> float:
    if drop is None:
        return COLLAPSED
    return min(1 / 2, max(COLLAPSED, AIM * budget.max_drop / drop)) if drop > 0 else 1 / 2


def _crossing(
    profile: Profile,
    history: Sequence[Trial],
    budget: Budget,
    pair: Pair,
    low: float,
    high: float,
) -> float:
    """Where the straight line between the drops at the bracket's ends meets 0.8 of the budget.

    0 when a drop isn't known, and never nearer to the upper end than it is worth trying.
    """
    drops: dict[float, float] = {}
    for trial in history:
        drop = search_drop(trial)
        if pair_of(trial) == pair and drop is not None:
            drops[predict_kl(profile, trial.plan)] = drop
    before, after = drops.get(low), drops.get(high)
    wanted = AIM * budget.max_drop
    if before is None or after is None or not before < wanted < after:
        return 0.0
    share = (wanted - before) / (after - before)
    return min(low + share * (high - low), high / SEARCH_ENDED)


def _first(points: float) -> float:
    return max(points, 0.05) * KL_PER_POINT


def _next_allowance(
    low: float | None, high: float | None, points: float, shrink: float
) -> float | None:
    first = _first(points)
    if high is None:
        return max(first, 2.0 * low) if low is not None else first
    if low is None or low == 0.0:
        return min(first, high * shrink)
    return None if high / low < SEARCH_ENDED else math.sqrt(low * high)
