"""Search controls: what a plain search does with the same number of trials.

They start from the fastest control within the budget, as the solver may, and know nothing of
sensitivity (``greedy`` knows it one group at a time).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from profiling_agent.planning.drops import fitted_slope
from profiling_agent.planning.estimate import (
    group_options,
    predict_kl,
    predict_saved_share,
    saving_scale,
)
from profiling_agent.planning.history import (
    Pair,
    controls,
    feasible,
    holds,
    pair_of,
    relative_latency,
)
from profiling_agent.planning.planner import Proposal
from profiling_agent.records.common import Budget
from profiling_agent.records.patterns import assign, exactly, units_kept
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import Trial

UNIFORM_FIRST = 0.25
UNIFORM_STEP = 0.02


def best_pair(history: Sequence[Trial], budget: Budget) -> Pair | None:
    """Runtime and scheme of the best feasible control, else of the fastest measured one."""
    measured = [t for t in history if t.is_control and relative_latency(t) is not None]
    good = [trial for trial in feasible(history, budget) if trial.is_control]
    if good:
        return pair_of(good[0])
    return pair_of(min(measured, key=lambda t: relative_latency(t) or 0.0)) if measured else None


def _proposal(
    pair: Pair,
    ratios: dict[str, float],
    why: str,
    profile: Profile,
    history: Sequence[Trial],
    seed: int,
) -> Proposal:
    widths = {group.id: group.width for group in profile.groups}
    lines = tuple(
        PruningLine(match=exactly(group_id), ratio=ratio)
        for group_id, ratio in sorted(ratios.items())
        if units_kept(widths[group_id], ratio) < widths[group_id]
    )
    plan = Plan(
        seed=seed,
        runtime=pair.runtime,  # pyright: ignore[reportArgumentType]
        pruning=lines,
        quantization=Quantization(scheme=pair.scheme),
        why=why,
    )
    base = relative_latency(controls(history)[pair])
    share = predict_saved_share(profile, plan) * saving_scale(profile, history, pair)
    return Proposal(
        plan=plan,
        relative_latency=None if base is None else base * (1.0 - share),
        kl=predict_kl(profile, plan),
    )


class Uniform:
    """One ratio for every group, found by bisection."""

    name = "uniform"

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        pair = best_pair(history, budget)
        if pair is None or not profile.groups:
            return None
        slope = fitted_slope(history, budget)
        low, high = 0.0, 0.9
        mine = [t for t in history if t.plan.pruning and pair_of(t) == pair]
        for trial in mine:
            ratio = trial.plan.pruning[0].ratio
            if holds(trial, slope, budget):
                low = max(low, ratio)
            else:  # a failed one too, or it would be proposed for ever
                high = min(high, ratio)
        ratio = UNIFORM_FIRST if not mine else round((low + high) / 2, 4)
        if mine and high - low < UNIFORM_STEP:
            return None
        ratios = {group.id: ratio for group in profile.groups}
        proposal = _proposal(pair, ratios, f"{ratio:.0%} everywhere", profile, history, seed)
        return proposal if proposal.plan.pruning else None  # too little to remove a single unit


class Random:
    """Every group's ratio drawn at random; the scale of the draw is drawn too."""

    name = "random"

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        pair = best_pair(history, budget)
        if pair is None or not profile.groups:
            return None
        tried = {trial.plan.plan_id for trial in history}
        for attempt in range(20):
            draw = random.Random(f"{seed}:{len(history)}:{attempt}")
            top = draw.uniform(0.05, 0.6)
            ratios = {group.id: round(draw.uniform(0.0, top), 3) for group in profile.groups}
            proposal = _proposal(pair, ratios, "drawn at random", profile, history, seed)
            if proposal.plan.pruning and proposal.plan.plan_id not in tried:
                return proposal
        return None


class Greedy:
    """From the best feasible plan, the next step of the group that saves most per divergence.

    Each proposal takes several such steps at once: as many as bring a few percent; after an
    infeasible trial half as many.
    """

    name = "greedy"

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        pair = best_pair(history, budget)
        if pair is None:
            return None
        tried = {trial.plan.plan_id for trial in history}
        mine = [t for t in history if pair_of(t) == pair and t.plan.repair == "least-squares"]
        good = [t for t in feasible(history, budget) if t in mine and t.plan.pruning]
        ids = [group.id for group in profile.groups]
        ratios = (
            {group_id: line.ratio for group_id, line in assign(good[0].plan, ids).items()}
            if good
            else {}
        )
        slope = fitted_slope(history, budget)
        bad = sum(1 for t in mine if t.plan.pruning and not holds(t, slope, budget))
        num_steps = max(1, (1 + len(ids) // 4) >> bad)
        for _ in range(num_steps + 10):
            step = _best_step(profile, ratios)
            if step is None:
                return None
            ratios = {**ratios, step[0]: step[1]}
            num_steps -= 1
            if num_steps <= 0:
                proposal = _proposal(pair, ratios, "greedy steps", profile, history, seed)
                if proposal.plan.plan_id not in tried:
                    return proposal
        return None


def _best_step(profile: Profile, ratios: dict[str, float]) -> tuple[str, float] | None:
    best: tuple[float, str, float] | None = None
    for group in profile.groups:
        options = group_options(profile, group)
        now = next((o for o in options if o.ratio == ratios.get(group.id)), None)
        following = next((o for o in options if o.ratio > ratios.get(group.id, 0.0)), None)
        if following is None:
            continue
        saved = following.saved - (now.saved if now else 0.0)
        cost = following.kl - (now.kl if now else 0.0)
        worth = saved / max(cost, 1e-9)
        if best is None or worth > best[0]:
            best = (worth, group.id, following.ratio)
    return (best[1], best[2]) if best else None
