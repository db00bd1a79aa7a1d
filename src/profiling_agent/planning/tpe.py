"""A search control: optuna's TPE over the choices that the solver has too.

Runtime and scheme, one of its measured ratios (or none) for every group, and how many layers of an
int8 scheme stay float, the most sensitive first. TPE (tree-structured Parzen estimator, Bergstra et
al. 2011; several variables at once, Falkner et al. 2018; constraints as in optuna) knows nothing of
what the profile predicts: it sees which choices the measured trials made, how fast those were, and
by how much they were over the budget. With very many groups that is one raw variable for each, far
more than a run has trials; it is what TPE has, and is left so.

The study is built anew from the history for every proposal, so a plan depends on nothing else.
"""

from __future__ import annotations

import importlib
import math
import random
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from profiling_agent.errors import MissingDependency
from profiling_agent.planning.check import check_plan
from profiling_agent.planning.controls import best_pair
from profiling_agent.planning.drops import Slope, expected_drop, fitted_slope
from profiling_agent.planning.estimate import (
    base_latency,
    layer_gains,
    layers_of,
    saving_scale,
    worth_trying,
)
from profiling_agent.planning.history import Pair, trial_value
from profiling_agent.planning.planner import Proposal
from profiling_agent.planning.solver import expected, make_plan
from profiling_agent.records.common import Budget
from profiling_agent.records.patterns import exactly, units_kept
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import GroupCost, Profile
from profiling_agent.records.trial import Trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

NUM_STARTUP = 10
"""Trials drawn at random before TPE begins, optuna's default; controls count among them."""
MAX_ASKS = 50
"""How often TPE is asked again when what it gives was tried or can't be done."""
DROP = "drop"
"""Name of the constraint: the drop on the search split less what the budget allows."""

Params = dict[str, str | int]
"""A point of the space: the pair by its label, ratios and numbers of float layers as indices."""


class Tpe:
    """TPE planner; see the module's text. Raises ``MissingDependency`` without optuna.

    The first proposal starts from the best control's runtime and scheme, as the other controls do;
    from then on that is a variable too.
    """

    name = "tpe"

    def __init__(self) -> None:
        try:
            importlib.import_module("optuna")
        except ImportError as error:
            raise MissingDependency(
                f"The planner 'tpe' needs optuna ({error}); run "
                "pip install 'profiling-agent[search]'."
            ) from error

    def propose(
        self, profile: Profile, history: Sequence[Trial], budget: Budget, seed: int
    ) -> Proposal | None:
        """The first of up to 50 draws that was not tried and can be done, or ``None``."""
        space = space_of(profile, history, budget)
        if not space.pairs:
            return None
        past = past_trials(space, history, budget, author=self.name)
        tried = {trial.plan.plan_id for trial in history}
        is_first = not any(trial.author == self.name for trial in history)
        start = best_pair(history, budget) if is_first else None
        for attempt in range(MAX_ASKS):
            draw = random.Random(f"{seed}:{len(history)}:{attempt}").getrandbits(32)
            pair, ratios, floats = space.decode(_ask(space, past, draw, start))
            why = f"TPE on {len(past)} trials: {len(ratios)} groups pruned, "
            why += f"{len(floats)} layers kept float"
            plan = make_plan(pair, ratios, floats, seed, why)
            does_something = bool(ratios or floats)  # else it is the control
            if does_something and check_plan(plan, profile, tried) is None:
                return _with_estimates(plan, pair, floats, profile, history)
        return None


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be chosen, and how a choice is written as variables.

    ``levels`` are each group's ratios, 0 first. ``layers`` are those of a pair's scheme that may
    stay float, the most sensitive first, under the name of the variable that counts them; pairs
    whose int8 is of one kind share it, since they share the layers and their divergences.
    """

    pairs: tuple[Pair, ...]
    levels: Mapping[str, tuple[float, ...]]
    layers: Mapping[Pair, tuple[str, tuple[str, ...]]]

    def sizes(self, pair: Pair) -> dict[str, int]:
        """How many values each whole-numbered variable has where this pair was chosen."""
        sizes = {_ratio_name(group_id): len(levels) for group_id, levels in self.levels.items()}
        if pair in self.layers:
            name, layers = self.layers[pair]
            sizes[name] = len(layers)  # from none to all but one
        return sizes

    def pair(self, label: str) -> Pair:
        return next(pair for pair in self.pairs if _label(pair) == label)

    def decode(self, params: Mapping[str, str | int]) -> tuple[Pair, dict[str, float], set[str]]:
        """Pair, ratios by group (without those that are 0) and layers kept float."""
        pair = self.pair(str(params[PAIR]))
        chosen = {
            group_id: levels[int(params[_ratio_name(group_id)])]
            for group_id, levels in self.levels.items()
        }
        floats: set[str] = set()
        if pair in self.layers:
            name, layers = self.layers[pair]
            floats = set(layers[: int(params[name])])
        return pair, {group_id: ratio for group_id, ratio in chosen.items() if ratio > 0.0}, floats

    def encode(self, plan: Plan) -> Params | None:
        """The variables that give this plan, or ``None`` where it lies outside."""
        pair = Pair(runtime=plan.runtime, scheme=plan.quantization.scheme)
        if pair not in self.pairs:
            return None
        ratios = {line.match: line.ratio for line in plan.pruning}
        params: Params = {PAIR: _label(pair)}
        for group_id, levels in self.levels.items():
            ratio = ratios.pop(exactly(group_id), 0.0)
            if ratio not in levels:
                return None
            params[_ratio_name(group_id)] = levels.index(ratio)
        floats = set(plan.quantization.keep_float)
        if pair in self.layers:
            name, layers = self.layers[pair]
            params[name] = len(floats)
            floats -= {exactly(layer) for layer in layers[: min(len(floats), len(layers) - 1)]}
        return None if ratios or floats else params


PAIR = "runtime and scheme"


def _label(pair: Pair) -> str:
    return f"{pair.runtime} {pair.scheme}"


def _ratio_name(group_id: str) -> str:
    return f"ratio of {group_id}"


def space_of(profile: Profile, history: Sequence[Trial], budget: Budget) -> Space:
    """The solver's choices; without pairs when no control was measured or nothing can be chosen."""
    levels = {group.id: _levels(group) for group in profile.groups}
    levels = {group_id: ratios for group_id, ratios in levels.items() if len(ratios) > 1}
    pairs = worth_trying(profile, history, budget) if history else []
    layers: dict[Pair, tuple[str, tuple[str, ...]]] = {}
    for pair in pairs:
        gains = layer_gains(profile, history, pair)
        if len(gains) > 1:  # one stays int8, or it would be the float scheme
            kind = layers_of(profile, pair.scheme)[0].scheme
            ranked = sorted(gains, key=lambda gain: (-gain.kl, gain.name))
            layers[pair] = (f"float layers of {kind}", tuple(gain.name for gain in ranked))
    pairs = [pair for pair in pairs if levels or pair in layers]
    return Space(pairs=tuple(pairs), levels=levels, layers=layers)


def _levels(group: GroupCost) -> tuple[float, ...]:
    """0 and the measured ratios, rising; of several that leave as many units, the smallest."""
    ratios = {group.width: 0.0}
    for point in sorted(group.sensitivity, key=lambda p: p.ratio):
        ratios.setdefault(units_kept(group.width, point.ratio), point.ratio)
    return tuple(ratios.values())


def past_trials(
    space: Space, history: Sequence[Trial], budget: Budget, *, author: str
) -> list[FrozenTrial]:
    """The author's trials and the controls that lie in the space, as a study knows them."""
    points = [
        (trial, params)
        for trial in history
        if (trial.is_control or trial.author == author)
        and (params := space.encode(trial.plan)) is not None
    ]
    slope = fitted_slope(history, budget)
    return [_frozen(space, trial, params, budget, slope) for trial, params in points]


def _frozen(
    space: Space, trial: Trial, params: Params, budget: Budget, slope: Slope | None
) -> FrozenTrial:
    """Nothing is made up: what was not measured is left out.

    A failed trial, or one without a measured drop, says nothing (FAIL: TPE leaves it out). One that
    collapsed on a few samples is over the budget by more than any that was measured, and one whose
    objective was not measured has no value; both are PRUNED.
    """
    from optuna.trial import TrialState, create_trial

    drop, value = expected_drop(trial, slope), trial_value(trial, budget)
    state, constraints = TrialState.FAIL, None
    if trial.status == "screened":
        state, constraints = TrialState.PRUNED, {DROP: math.inf}
    elif trial.status == "done" and drop is not None:
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        constraints = {DROP: drop - budget.max_drop * (1 + 1e-9)}  # as within
    return create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params=params,
        distributions=_distributions(space, space.pair(str(params[PAIR]))),
        constraints=constraints,
    )


def _distributions(space: Space, pair: Pair) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    labels = tuple(_label(each) for each in space.pairs)
    distributions: dict[str, BaseDistribution] = {PAIR: CategoricalDistribution(labels)}
    for name, size in space.sizes(pair).items():
        distributions[name] = IntDistribution(0, size - 1)
    return distributions


def _ask(space: Space, past: Sequence[FrozenTrial], seed: int, start: Pair | None) -> Params:
    """One draw of a sampler of this seed, from ``start`` if that is in the space."""
    import optuna

    with _silence():
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=NUM_STARTUP, seed=seed, multivariate=True, group=True
        )
        study = optuna.create_study(sampler=sampler, direction="minimize")
        study.add_trials(past)
        if start is not None and start in space.pairs:
            study.enqueue_trial({PAIR: _label(start)})
        trial = study.ask()
        label = trial.suggest_categorical(PAIR, [_label(pair) for pair in space.pairs])
        params: Params = {PAIR: label}
        for name, size in space.sizes(space.pair(label)).items():
            params[name] = trial.suggest_int(name, 0, size - 1)
    return params


@contextmanager
def _silence() -> Generator[None]:
    """Without optuna's log lines and its warnings that something is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _with_estimates(
    plan: Plan, pair: Pair, floats: set[str], profile: Profile, history: Sequence[Trial]
) -> Proposal:
    base = base_latency(profile, history, pair)
    scale = saving_scale(profile, history, pair) * base
    gains = layer_gains(profile, history, pair)
    lost = sum(gain.saved for gain in gains if gain.name in floats)
    return expected(plan, profile, base=base, scale=scale, lost=lost)
