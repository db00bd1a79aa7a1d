"""The offline planner: an exact knapsack over measured saving and measured divergence.

For one runtime and scheme: choose a width for every group and int8 or float for every layer, so
that the predicted time is smallest while the divergences add up to no more than an *allowance*.
That is a multiple-choice knapsack, solved to one part in 10,000 by HiGHS. The allowance is not
known beforehand; the trials find it (``allowance.py``).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from profiling_agent.planning.allowance import is_fitted, needs_rescue, next_allowance
from profiling_agent.planning.effects import floats
from profiling_agent.planning.estimate import (
    LayerGain,
    Option,
    base_latency,
    float_cost,
    group_options,
    layer_gains,
    predict_kl,
    predict_saved_share,
    saving_scale,
    worth_trying,
)
from profiling_agent.planning.history import (
    Pair,
    controls,
    pair_of,
)
from profiling_agent.planning.planner import Proposal
from profiling_agent.records.common import Budget
from profiling_agent.records.patterns import assign, exactly, units_kept
from profiling_agent.records.plan import Plan, PruningLine, Quantization, Repair
from profiling_agent.records.profile import GroupCost, Profile
from profiling_agent.records.trial import Trial

MAX_STEPS = 12
"""How often the allowance is moved on in search of a plan that was not tried."""
NEAR, OTHER = 0.1, 0.2
"""A tried plan is near an allowance if its divergence is so close, and the next is another plan if
it differs in this share of the groups."""
TIED = 1.01
"""Predicted times so near each other are equal: then the scheme goes first whose control is faster.
Which of two is a hair ahead is noise, and would send runs that know the same different ways."""
MAX_FAILED = 2
"""Plans in a row that could not be carried out, after which a runtime and scheme is given up."""


class Solver:
    """Knapsack planner; see the module's text."""

    name = "solver"

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        """The most promising untried plan over all runtimes and schemes, or ``None``; of times that
        can't be told apart, in the scheme whose control is faster."""
        tried = {trial.plan.plan_id for trial in history}
        found: list[tuple[float, float, Proposal]] = []
        for pair in worth_trying(profile, history, budget):
            if _always_fails(pair, history):
                continue
            proposal = _propose_for(pair, profile, history, budget, seed, tried)
            if proposal is None:
                continue
            value = promise(proposal, pair, profile, history, budget)
            found.append((value, base_latency(profile, history, pair), proposal))
        if not found:
            return None
        told = TIED if budget.objective in ("latency", "throughput") else 1.0
        least = told * min(value for value, _, _ in found)
        return min((each for each in found if each[0] <= least), key=lambda each: each[1])[2]


def _always_fails(pair: Pair, history: Sequence[Trial]) -> bool:
    """Whether the last plans there could not be carried out; another would cost as much."""
    ours = [trial for trial in history if pair_of(trial) == pair and not trial.is_control]
    last = ours[-MAX_FAILED:]
    return len(last) == MAX_FAILED and all(trial.status == "failed" for trial in last)


def promise(
    proposal: Proposal, pair: Pair, profile: Profile, history: Sequence[Trial], budget: Budget
) -> float:
    """The predicted objective: time, or the control's size or memory shrunk by what is pruned."""
    if budget.objective in ("latency", "throughput"):
        return proposal.relative_latency or math.inf
    control = controls(history).get(pair)
    evaluation = control.evaluation if control else None
    value = None
    if evaluation is not None:
        value = evaluation.size_bytes if budget.objective == "size" else evaluation.memory_bytes
    if value is None:
        return math.inf
    return value * (
        1.0 - _removed_share(profile, proposal.plan) + _float_share(profile, proposal.plan)
    )


def _float_share(profile: Profile, plan: Plan) -> float:
    """How much larger an int8 artefact is by the layers that stay float: four bytes for one."""
    sizes = {module.name: module.num_parameters for module in profile.modules}
    kept = sum(sizes.get(name, 0) for name in floats(plan, profile))
    return 3.0 * kept / max(1, profile.num_parameters)


def _removed_share(profile: Profile, plan: Plan) -> float:
    groups = {group.id: group for group in profile.groups}
    removed = sum(
        (groups[i].width - units_kept(groups[i].width, line.ratio)) * groups[i].parameters_per_unit
        for i, line in assign(plan, tuple(groups)).items()
    )
    return removed / max(1, profile.num_parameters)


def _propose_for(
    pair: Pair,
    profile: Profile,
    history: Sequence[Trial],
    budget: Budget,
    seed: int,
    tried: set[str],
) -> Proposal | None:
    allowance, high = next_allowance(profile, history, budget, pair)
    prune = not needs_rescue(pair, history, budget)
    if allowance is not None and is_fitted(history, budget, pair):
        if allowance <= 0.0:
            return None
        return solve(
            pair, profile, history, budget, seed, allowance, prune=prune,
            avoid=_tried_choices(pair, profile, history, allowance),
        )  # fmt: skip
    for _ in range(MAX_STEPS):
        if allowance is None:
            return None
        proposal = solve(pair, profile, history, budget, seed, allowance, prune=prune)
        if proposal is not None and proposal.plan.plan_id not in tried:
            return proposal
        allowance *= 1.25
        if high is not None and allowance >= high:
            return None
    return None


def solve(
    pair: Pair,
    profile: Profile,
    history: Sequence[Trial],
    budget: Budget,
    seed: int,
    allowance: float,
    *,
    prune: bool = True,
    leave: Collection[str] = (),
    avoid: Sequence[Choice] = (),
) -> Proposal | None:
    """The fastest plan of a runtime and scheme whose predicted divergence fits the allowance.

    Without ``prune`` only layers are chosen that stay float; groups in ``leave`` stay whole. It
    differs from each choice in ``avoid`` by as much as that demands.
    """
    groups = [group for group in profile.groups if prune and group.id not in leave]
    base = base_latency(profile, history, pair)
    scale = saving_scale(profile, history, pair) * base
    gains = layer_gains(profile, history, pair)
    if budget.objective in ("size", "memory"):
        options = {group.id: _by_parameters(profile, group) for group in groups}
        options = {group_id: choices for group_id, choices in options.items() if choices}
        chosen = _knapsack(options, _gains_by_parameters(profile, gains), 1.0, allowance, avoid)
    else:
        options = {group.id: group_options(profile, group, pair) for group in groups}
        options = {group_id: choices for group_id, choices in options.items() if choices}
        chosen = _knapsack(options, gains, scale, allowance, avoid)
    if chosen is None:
        return None
    ratios, floats = chosen
    if not ratios and not floats:
        return None
    why = (
        f"knapsack at a divergence of at most {allowance:.3g} nats: "
        f"{len(ratios)} groups pruned, {len(floats)} layers kept float"
    )
    plan = make_plan(pair, ratios, floats, seed, why)
    lost = sum(gain.saved for gain in gains if gain.name in floats)
    return expected(plan, profile, base=base, scale=scale, lost=lost)


def estimate(plan: Plan, profile: Profile, history: Sequence[Trial]) -> Proposal:
    """Anyone's plan with the estimates that the solver would give it."""
    pair = Pair(runtime=plan.runtime, scheme=plan.quantization.scheme)
    base = base_latency(profile, history, pair)
    lost = float_cost(plan, layer_gains(profile, history, pair))
    scale = saving_scale(profile, history, pair) * base
    return expected(plan, profile, base=base, scale=scale, lost=lost)


def expected(plan: Plan, profile: Profile, *, base: float, scale: float, lost: float) -> Proposal:
    """The plan with its estimates: what pruning saves of ``base``, and what float layers cost.

    ``base``, ``lost`` and what ``scale`` gives are latencies over the baseline's.
    """
    saved = scale * predict_saved_share(profile, plan)
    return Proposal(
        plan=plan,
        relative_latency=max(0.02, base - saved + lost),
        kl=predict_kl(profile, plan),
    )


def _by_parameters(profile: Profile, group: GroupCost) -> list[Option]:
    """The options of a group by the share of the model's parameters that they remove."""
    options: list[Option] = []
    kl = 0.0
    for point in sorted(group.sensitivity, key=lambda p: p.ratio):
        kl = max(kl, point.kl)
        removed = group.width - units_kept(group.width, point.ratio)
        saved = removed * group.parameters_per_unit / max(1, profile.num_parameters)
        if removed > 0:
            options.append(Option(ratio=point.ratio, saved=saved, kl=kl))
    return options


def _gains_by_parameters(profile: Profile, gains: list[LayerGain]) -> list[LayerGain]:
    """Int8 takes a quarter of the bytes of every layer's parameters."""
    sizes = {module.name: module.num_parameters for module in profile.modules}
    total = max(1, profile.num_parameters)
    return [
        LayerGain(name=g.name, saved=0.75 * sizes.get(g.name, 0) / total, kl=g.kl) for g in gains
    ]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Ratios by group and layers kept float. Another is to differ in one place at least, and over
    the groups in ``distance``: a group at another ratio is two, one that is cut or not is one."""

    ratios: Mapping[str, float]
    floats: Collection[str]
    distance: int


def _tried_choices(
    pair: Pair, profile: Profile, history: Sequence[Trial], allowance: float
) -> list[Choice]:
    """What was tried of a runtime and scheme. Those near the allowance were the fastest there by
    estimate, so the next is to be another plan and not the same but for a unit."""
    ids = tuple(group.id for group in profile.groups)
    choices: list[Choice] = []
    for trial in history:
        if pair_of(trial) != pair or trial.is_control:
            continue
        ratios = {name: line.ratio for name, line in assign(trial.plan, ids).items()}
        is_near = abs(predict_kl(profile, trial.plan) / allowance - 1.0) < NEAR
        another = max(min(3, len(ids) + 1), round(2 * OTHER * len(ratios)))
        distance = another if is_near and ratios else 0
        kept = floats(trial.plan, profile)
        choices.append(Choice(ratios=ratios, floats=kept, distance=distance))
    return choices


def _differing(
    choice: Choice, items: Sequence[tuple[str, Option]], gains: Sequence[LayerGain]
) -> list[LinearConstraint]:
    """So many of the variables differ from the choice's."""
    cut = [abs(choice.ratios.get(group_id, 0.0) - option.ratio) < 1e-9
           for group_id, option in items]  # fmt: skip
    taken = [*cut, *(gain.name not in choice.floats for gain in gains)]
    signs = np.where(taken, -1.0, 1.0)
    constraints = [LinearConstraint(signs[None, :], 1 - sum(taken), np.inf)]
    if items and choice.distance:
        only_groups = np.where(np.arange(len(taken)) < len(items), signs, 0.0)
        least = choice.distance - sum(cut)
        constraints.append(LinearConstraint(only_groups[None, :], least, np.inf))
    return constraints


def _knapsack(
    options: dict[str, list[Option]],
    gains: list[LayerGain],
    scale: float,
    allowance: float,
    avoid: Sequence[Choice] = (),
) -> tuple[dict[str, float], set[str]] | None:
    """Ratios by group and the layers that stay float; ``None`` if nothing fits."""
    items = [(group_id, option) for group_id, choices in options.items() for option in choices]
    saved = np.array([scale * option.saved for _, option in items] + [g.saved for g in gains])
    kl = np.array([option.kl for _, option in items] + [g.kl for g in gains])
    if not len(saved):
        return None
    rows: list[int] = []
    for index, choices in enumerate(options.values()):
        rows += [index] * len(choices)
    at_most_one = csr_array(
        (np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(len(options) or 1, len(saved))
    )
    unit = allowance if allowance > 0 else 1.0
    constraints = [
        LinearConstraint(at_most_one, -np.inf, 1.0),
        LinearConstraint((kl / unit)[None, :], -np.inf, allowance / unit),
        *(each for choice in avoid for each in _differing(choice, items, gains)),
    ]
    # a hair against pruning for nothing; and a hair for int8 where time can't tell
    worth = saved - 1e-7
    worth[len(items) :] += 2e-7
    with _stdout_untouched():
        result = milp(
            -worth,
            constraints=constraints,
            integrality=np.ones(len(saved), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"node_limit": 20_000, "mip_rel_gap": 1e-4},  # not seconds: plans must repeat
        )
    if result.x is None:
        return None
    take = result.x > 0.5
    ratios = {g: option.ratio for (g, option), t in zip(items, take, strict=False) if t}
    floats = {g.name for g, t in zip(gains, take[len(items) :], strict=True) if not t}
    if gains and len(floats) == len(gains):
        return None  # int8 that quantizes nothing is the float scheme's business
    return ratios, floats


@contextmanager
def _stdout_untouched() -> Generator[None]:
    """HiGHS prints a line now and then whatever it is told; a record on stdout must stay whole."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def repair_for(group_ids: Collection[str]) -> Repair:
    """In the order of the forward where most groups are channels: where convolutions follow each
    other that won; in transformers, which have a few in their stem, it lost."""
    channels = [group_id for group_id in group_ids if group_id.startswith("channels:")]
    return "sequential" if 2 * len(channels) > len(group_ids) else "least-squares"


def make_plan(pair: Pair, ratios: dict[str, float], floats: set[str], seed: int, why: str) -> Plan:
    """The plan that prunes these groups, keeps these layers float and repairs as suits them."""
    lines = tuple(
        PruningLine(match=exactly(group_id), ratio=ratio)
        for group_id, ratio in sorted(ratios.items())
    )
    keep = tuple(exactly(name) for name in sorted(floats))
    return Plan(
        seed=seed,
        runtime=pair.runtime,  # pyright: ignore[reportArgumentType]
        pruning=lines,
        quantization=Quantization(scheme=pair.scheme, keep_float=keep),
        repair=repair_for(ratios),
        why=why,
    )
