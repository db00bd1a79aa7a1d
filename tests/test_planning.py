"""Planners against their contract, the solver against brute force, and what is concluded."""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from profiling_agent.errors import BudgetError, PlanError
from profiling_agent.planning.allowance import (
    KL_PER_POINT,
    allowance_bracket,
    needs_rescue,
    next_allowance,
)
from profiling_agent.planning.check import check_plan, demand_plan
from profiling_agent.planning.decide import (
    Final,
    beats_control,
    conclude,
    evidence_of,
    nominate,
    proof_level,
    ranked_controls,
)
from profiling_agent.planning.estimate import (
    UNTIMED,
    group_options,
    layer_gains,
    likely_to_serve,
    predict_kl,
    predict_saved_share,
    saved_share,
    saving_scale,
    worth_trying,
)
from profiling_agent.planning.history import Pair, feasible, pair_of, pareto
from profiling_agent.planning.planner import Planner, Proposal, find_planner
from profiling_agent.planning.solver import TIED, Solver, solve
from profiling_agent.records.common import Budget, Interval, NotMeasured
from profiling_agent.records.evaluation import Speedup
from profiling_agent.records.patterns import assign, exactly, matches, units_kept
from profiling_agent.records.plan import MAX_PATTERN_LENGTH, Plan, PruningLine, Quantization
from profiling_agent.records.profile import (
    DeployedWidths,
    GroupCost,
    LayerQuantization,
    Profile,
    RuntimeSchemes,
    SensitivityPoint,
    SharePoint,
    WidthPoint,
)
from profiling_agent.records.trial import Trial
from record_factory import (
    make_accuracy,
    make_control,
    make_evaluation,
    make_group,
    make_interval,
    make_module,
    make_profile,
    make_trial,
)

PLANNERS = ("solver", "uniform", "random", "greedy", "tpe")
FP32 = Pair(runtime="onnxruntime", scheme="fp32")
INT8 = Pair(runtime="onnxruntime", scheme="int8-dynamic")
TORCH = Pair(runtime="torch", scheme="fp32")
BUDGET = Budget(max_drop=0.5)

# ---- made-up measurements -----------------------------------------------------------------------


def measured(
    artefact: str, relative: float, drop: float, *, pair: Pair = FP32, **fields: Any
) -> Any:
    """An evaluation that is ``relative`` of the baseline's latency and loses ``drop`` points."""
    ratio = 1.0 / relative
    return make_evaluation(
        artefact,
        runtime=pair.runtime,
        scheme=pair.scheme,
        accuracy=(make_accuracy("search", 92.0 - drop, drop),),
        speedup=Speedup(over="baseline", ratio=make_interval(ratio, 0.02 * ratio)),
        **fields,
    )


def control(trial_id: str, pair: Pair, relative: float, drop: float, **fields: Any) -> Trial:
    evaluation = measured(trial_id, relative, drop, pair=pair, **fields)
    return make_control(trial_id, pair.runtime, pair.scheme, evaluation=evaluation)


def controls_of(*, int8: float = 0.5) -> list[Trial]:
    return [
        control("c1", TORCH, 0.9, 0.0),
        control("c2", FP32, 0.8, 0.0),
        control("c3", INT8, int8, 0.1),
    ]


def tried(number: int, plan: Plan, relative: float, drop: float, **fields: Any) -> Trial:
    pair = Pair(runtime=plan.runtime, scheme=plan.quantization.scheme)
    evaluation = measured(f"t{number}", relative, drop, pair=pair, **fields)
    return make_trial(f"t{number}", plan=plan, evaluation=evaluation)


def group_of(
    group_id: str,
    width: int,
    levels: Sequence[tuple[float, float, float]],
    **fields: Any,
) -> GroupCost:
    """Levels are (ratio, milliseconds saved, divergence)."""
    return make_group(
        group_id,
        width,
        widths=tuple(
            WidthPoint(width=units_kept(width, r), saved_ms=ms, low_ms=ms, high_ms=ms)
            for r, ms, _ in levels
        ),
        sensitivity=tuple(
            SensitivityPoint(ratio=r, kl=kl, kl_error=0.0, disagreement=0.0, num_images=64)
            for r, _, kl in levels
        ),
        **fields,
    )


GROUPS = (
    group_of("mlp:a.fc1", 64, [(0.25, 0.2, 0.002), (0.5, 0.4, 0.006), (0.75, 0.6, 0.03)]),
    group_of("mlp:b.fc1", 64, [(0.25, 0.3, 0.004), (0.5, 0.5, 0.011), (0.75, 0.7, 0.02)]),
    group_of("heads:a.qkv", 4, [(0.25, 0.1, 0.001), (0.5, 0.22, 0.009)]),
)
LAYERS = tuple(
    LayerQuantization(name=name, kl=kl, kl_error=0.0, float_ms=ms, int8_ms=ms / 2)
    for name, kl, ms in (("a.fc1", 0.001, 1.0), ("b.fc1", 0.02, 0.4), ("head", 0.006, 0.05))
)


def profile_of(**fields: Any) -> Profile:
    values: dict[str, Any] = {
        "groups": GROUPS,
        "layers": LAYERS,
        "modules": tuple(make_module(name) for name in ("", "a.fc1", "b.fc1", "head")),
        "runtimes": tuple(
            RuntimeSchemes(runtime=runtime, version="1", schemes=("fp32", "int8-dynamic"))
            for runtime in ("torch", "onnxruntime")
        ),
    }
    return make_profile(**values | fields)


def only_heads() -> Profile:
    """So few units that small ratios remove nothing."""
    levels = [(0.25, 0.2, 0.004), (0.5, 0.4, 0.02)]
    return profile_of(groups=(group_of("heads:a.qkv", 4, levels),))


# ---- the contract of planners -------------------------------------------------------------------


def respond(world: str, number: int, plan: Plan, profile: Profile) -> Trial:
    """What carrying out a plan gives in one of several worlds."""
    kl, saved = predict_kl(profile, plan), predict_saved_share(profile, plan)
    match world:
        case "as predicted":
            drop = 30.0 * kl
        case "all good":
            drop = 0.0
        case "all bad":
            drop = 5.0
        case "screened" | "failed":
            return make_trial(f"t{number}", plan=plan, status=world, reason="so it is")
        case _:  # noise
            drop = (number * 7919) % 13 / 10.0
    return tried(number, plan, 0.8 * max(0.05, 1.0 - 0.8 * saved), drop)


WORLDS = ("as predicted", "all good", "all bad", "screened", "failed", "noise")


def walk(
    planner: Planner, profile: Profile, world: str, limit: int = 40
) -> tuple[list[Proposal], bool]:
    """Proposals until there are none left (True) or ``limit`` is reached (False)."""
    history, proposals = controls_of(), []
    for number in range(limit):
        proposal = planner.propose(profile, tuple(history), BUDGET, 0)
        if proposal is None:
            return proposals, True
        reason = check_plan(proposal.plan, profile, {t.plan.plan_id for t in history})
        assert reason is None, reason
        proposals.append(proposal)
        trial = respond(world, number, proposal.plan, profile)
        history.append(trial.model_copy(update={"author": planner.name}))
    return proposals, False


@pytest.mark.parametrize("name", PLANNERS)
class TestEveryPlanner:
    @pytest.mark.parametrize("world", WORLDS)
    @pytest.mark.parametrize("make", [profile_of, only_heads])
    def test_proposes_only_what_can_be_done_and_was_not(
        self, name: str, world: str, make: Any
    ) -> None:
        profile = make()
        proposals, ended = walk(find_planner(name), profile, world)
        assert ended or name in ("random", "tpe")  # which may draw for long
        if make is profile_of:
            assert proposals
        for proposal in proposals:
            assert proposal.relative_latency is not None
            assert 0 < proposal.relative_latency < 1.2
            assert proposal.kl == pytest.approx(predict_kl(profile, proposal.plan))

    def test_is_a_pure_function_of_the_records(self, name: str) -> None:
        profile, history = profile_of(), controls_of()
        planner = find_planner(name)
        first = planner.propose(profile, history, BUDGET, 3)
        assert first is not None
        planner.propose(profile, [*history, tried(1, first.plan, 0.6, 0.1)], BUDGET, 3)
        copies = (
            Profile.from_json(profile.to_json()),
            tuple(Trial.from_json(trial.to_json()) for trial in history),
        )
        assert planner.propose(*copies, BUDGET, 3) == first
        assert find_planner(name).propose(profile, history, BUDGET, 3) == first
        assert first.plan.seed == 3

    def test_has_nothing_to_say_without_groups_and_layers_or_controls(self, name: str) -> None:
        bare = profile_of(groups=(), layers=())
        assert find_planner(name).propose(bare, controls_of(), BUDGET, 0) is None
        if name != "solver":  # which has a first guess from the profile alone
            assert find_planner(name).propose(profile_of(), [], BUDGET, 0) is None
            failed = make_trial("c1", status="failed", reason="no", is_control=True)
            assert find_planner(name).propose(profile_of(), [failed], BUDGET, 0) is None

    def test_learns_nothing_from_a_pair_it_was_not_tried_on(self, name: str) -> None:
        profile = profile_of()
        planner = find_planner(name)
        first = planner.propose(profile, controls_of(), BUDGET, 0)
        assert first is not None
        assert first.plan.runtime == "onnxruntime"
        assert first.plan.quantization.scheme == "int8-dynamic"


PROGRAM = """
import sys
from profiling_agent.planning.planner import find_planner
from test_planning import BUDGET, controls_of, profile_of, tried
for name in sys.argv[1:]:
    profile, history = profile_of(), controls_of()
    for number in range(3):
        proposal = find_planner(name).propose(profile, history, BUDGET, 5)
        if proposal is None:
            break
        print(name, proposal)
        trial = tried(number, proposal.plan, 0.5, 0.1 * number)
        history.append(trial.model_copy(update={"author": name}))
"""


def test_proposals_are_the_same_in_every_process() -> None:
    here = Path(__file__).parent
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *PLANNERS],
            env={"PYTHONPATH": f"{here.parent / 'src'}:{here}", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert all(f"{name} Proposal(" in next(iter(outputs)) for name in PLANNERS)


def test_an_unknown_planner_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"'oracle'.*solver, uniform, random, greedy, tpe"):
        find_planner("oracle")


def test_a_seed_changes_the_random_draw() -> None:
    random = find_planner("random")
    plans = {
        proposal.plan.pruning
        for seed in range(4)
        if (proposal := random.propose(profile_of(), controls_of(), BUDGET, seed))
    }
    assert len(plans) == 4


def test_uniform_halves_between_what_held_and_what_did_not() -> None:
    planner, profile, history = find_planner("uniform"), profile_of(), controls_of()
    ratios = []
    for number in range(20):
        proposal = planner.propose(profile, history, BUDGET, 0)
        if proposal is None:
            break
        assert len({line.ratio for line in proposal.plan.pruning}) == 1
        ratios.append(proposal.plan.pruning[0].ratio)
        drop = 0.1 if ratios[-1] < 0.4 else 2.0
        history.append(tried(number, proposal.plan, 0.5, drop))
    assert ratios[0] == 0.25
    assert abs(max(r for r in ratios if r < 0.4) - 0.4) < 0.02
    assert len(ratios) < 9


def test_greedy_takes_smaller_steps_after_a_failure() -> None:
    planner, profile, history = find_planner("greedy"), profile_of(), controls_of()
    first = planner.propose(profile, history, BUDGET, 0)
    assert first is not None and predict_kl(profile, first.plan) > 0
    history.append(tried(1, first.plan, 0.45, 0.1))
    second = planner.propose(profile, history, BUDGET, 0)
    assert second is not None
    assert predict_saved_share(profile, second.plan) > predict_saved_share(profile, first.plan)


def test_what_two_groups_cut_in_the_same_layer_is_saved_once() -> None:
    """Of one shape, they were timed together; of two, what they share is taken off."""
    stream = make_group("channels:stem", 512, members=("stem", "blocks.0.mlp.fc1"))
    hidden = make_group("mlp:blocks.0.mlp.fc1", 512, members=("blocks.0.mlp.fc1", "head"))
    profile = profile_of(groups=(stream, hidden), modules=(make_module("blocks.0.mlp.fc1"),))

    def saved(*names: str) -> float:
        lines = tuple(PruningLine(match=name, ratio=0.5) for name in names)
        return predict_saved_share(profile, Plan(runtime="torch", pruning=lines))

    alone = saved("channels:stem")
    assert alone > 0
    assert saved("mlp:blocks.0.mlp.fc1") == pytest.approx(alone)
    assert saved("channels:stem", "mlp:.*") == pytest.approx(0.75 * 2 * alone)
    alike = stream.model_copy(update={"shape_class": hidden.shape_class})
    profile = profile.model_copy(update={"groups": (alike, hidden)})
    assert saved("channels:stem", "mlp:.*") == pytest.approx(2 * alone)


# ---- the solver ---------------------------------------------------------------------------------


def brute_force(
    profile: Profile, history: Sequence[Trial], pair: Pair, allowance: float, scale: float
) -> float:
    """The most that any choice of widths and int8 layers saves within the allowance."""
    choices = [[(0.0, 0.0)] for _ in profile.groups]
    for index, group in enumerate(profile.groups):
        choices[index] += [(scale * o.saved, o.kl) for o in group_options(profile, group)]
    gains = layer_gains(profile, history, pair)
    choices += [[(0.0, 0.0), (gain.saved, gain.kl)] for gain in gains]
    best = -math.inf
    for chosen in itertools.product(*choices):
        if sum(kl for _, kl in chosen) <= allowance * (1 + 1e-9):
            if gains and all(part == (0.0, 0.0) for part in chosen[len(profile.groups) :]):
                continue
            best = max(best, sum(saved for saved, _ in chosen))
    return best


def worth(
    proposal: Proposal, profile: Profile, history: Sequence[Trial], pair: Pair, scale: float
) -> float:
    ratios = {
        i: line.ratio for i, line in assign(proposal.plan, [g.id for g in profile.groups]).items()
    }
    saved = sum(
        option.saved
        for group in profile.groups
        for option in group_options(profile, group)
        if option.ratio == ratios.get(group.id)
    )
    names = [layer.name for layer in profile.layers]
    floats = {n for p in proposal.plan.quantization.keep_float for n in matches(p, names)}
    gains = layer_gains(profile, history, pair)
    return scale * saved + sum(gain.saved for gain in gains if gain.name not in floats)


@pytest.mark.parametrize("pair", [FP32, INT8], ids=["float", "int8"])
@pytest.mark.parametrize("allowance", [0.002, 0.005, 0.0085, 0.013, 0.02, 0.03, 0.05, 0.2])
def test_the_solver_is_as_good_as_brute_force(pair: Pair, allowance: float) -> None:
    profile, history = profile_of(), controls_of()
    scale = 0.8 if pair == FP32 else 0.5  # the control's latency
    proposal = solve(pair, profile, history, BUDGET, 0, allowance)
    best = brute_force(profile, history, pair, allowance, scale)
    assert proposal is not None
    assert predict_kl(profile, proposal.plan) <= allowance * (1 + 1e-6)
    assert worth(proposal, profile, history, pair, scale) == pytest.approx(best, abs=2e-5)
    base = 0.8 if pair == FP32 else 0.5
    lost = sum(g.saved for g in layer_gains(profile, history, pair)) - (
        worth(proposal, profile, history, pair, 0.0)
    )
    expected = base * (1 - predict_saved_share(profile, proposal.plan)) + lost
    assert proposal.relative_latency == pytest.approx(expected)


def test_layers_that_cost_much_and_bring_little_stay_float() -> None:
    profile, history = profile_of(groups=()), controls_of()
    loose = solve(INT8, profile, history, BUDGET, 0, 1.0)
    assert loose is None or loose.plan.quantization.keep_float == ()
    tight = solve(INT8, profile, history, BUDGET, 0, 0.008)
    assert tight is not None
    assert tight.plan.quantization.keep_float == (r"b\.fc1",)
    assert tight.plan.pruning == ()
    tighter = solve(INT8, profile, history, BUDGET, 0, 0.003)
    assert tighter is not None
    assert tighter.plan.quantization.keep_float == (r"b\.fc1", "head")
    assert solve(INT8, profile, history, BUDGET, 0, 1e-6) is None  # nothing would be quantized


def test_the_float_layers_cost_latency_in_the_prediction() -> None:
    profile, history = profile_of(groups=()), controls_of(int8=0.5)
    tight = solve(INT8, profile, history, BUDGET, 0, 0.008)
    assert tight is not None and tight.relative_latency is not None
    share = 0.2 / (0.5 + 0.2 + 0.025)  # of the gain from 0.8 to 0.5
    assert tight.relative_latency == pytest.approx(0.5 + 0.3 * share)


def bracket(history: Sequence[Trial]) -> tuple[float | None, float | None]:
    return allowance_bracket(profile_of(), history, BUDGET, FP32)


def pruned_plan(ratio: float, group: str = "mlp:a.fc1", pair: Pair = FP32) -> Plan:
    return Plan(
        runtime=pair.runtime,  # pyright: ignore[reportArgumentType]
        pruning=(PruningLine(match=group, ratio=ratio),),
        quantization=Quantization(scheme=pair.scheme),
    )


def test_the_bracket_stands_between_what_held_and_what_did_not() -> None:
    history = [control("c2", FP32, 0.8, 0.0)]
    assert bracket([]) == (None, None)
    assert bracket(history) == (0.0, None)
    history.append(tried(1, pruned_plan(0.25), 0.7, 0.1))
    assert bracket(history) == (pytest.approx(0.002), None)
    history.append(tried(2, pruned_plan(0.75), 0.5, 3.0))
    assert bracket(history) == (pytest.approx(0.002), pytest.approx(0.03))
    collapsed = make_trial("t3", plan=pruned_plan(0.5), status="screened", reason="collapsed")
    assert bracket([*history, collapsed])[1] == pytest.approx(0.006)
    crashed = make_trial("t4", plan=pruned_plan(0.5), status="failed", reason="crashed")
    assert bracket([*history, crashed]) == bracket(history)
    other = tried(5, pruned_plan(0.5, pair=TORCH), 0.7, 3.0)
    assert bracket([*history, other]) == bracket(history)


def test_a_control_that_may_be_over_by_chance_does_not_shut_its_pair() -> None:
    """Drops are known to 0.2 points here: 0.6 of 0.5 may be within, 0.8 is not."""
    doubtful, over = control("c3", INT8, 0.4, 0.6), control("c3", INT8, 0.4, 0.8)
    assert not needs_rescue(INT8, [doubtful], BUDGET) and needs_rescue(INT8, [over], BUDGET)
    found = find_planner("solver").propose(profile_of(), [doubtful], BUDGET, 0)
    assert found is not None and found.plan.pruning
    failed = tried(1, found.plan, 0.3, 1.5)
    assert needs_rescue(INT8, [doubtful, failed], BUDGET)  # once
    assert not needs_rescue(INT8, [doubtful, tried(1, found.plan, 0.3, 0.4)], BUDGET)
    bf16 = Pair(runtime="openvino", scheme="bf16")
    for drop, offered in ((0.6, [bf16]), (0.8, [])):
        assert worth_trying(profile_of(), [control("c1", bf16, 0.4, drop)], BUDGET) == offered


def allowed(pair: Pair, *trials: Trial, of: Sequence[Trial] | None = None) -> float | None:
    history = [*(controls_of() if of is None else of), *trials]
    return next_allowance(profile_of(), history, BUDGET, pair)[0]


def test_cuts_that_clearly_lost_too_much_elsewhere_are_not_repeated() -> None:
    cuts, int8 = pruned_plan(0.5, pair=TORCH), predict_kl(profile_of(), controls_of()[2].plan)
    clear = tried(1, cuts, 0.6, 3.0)  # a divergence of 0.006
    collapsed = make_trial("t1", plan=cuts, status="screened", reason="collapsed")
    over = 0.8 * 0.5 / 3.0
    assert allowed(FP32, clear) == pytest.approx(0.006 * over)
    assert allowed(FP32, collapsed) == pytest.approx(0.006 / 8)
    assert int8 > 0.02 and allowed(INT8, clear) == pytest.approx(int8 + 0.006 * over)
    free = allowed(FP32)
    assert free == pytest.approx(KL_PER_POINT * 0.5)
    assert allowed(FP32, tried(1, cuts, 0.6, 0.55)) == free  # within the noise
    at_fault = [control("c1", TORCH, 0.9, 2.0), *controls_of()[1:]]
    assert allowed(FP32, clear, of=at_fault) == free  # torch loses too much as it is
    unpruned = Plan(runtime="torch", quantization=Quantization(scheme="fp32"))
    assert allowed(FP32, tried(1, unpruned, 0.6, 3.0)) == free


def test_what_holds_in_a_pair_counts_more_than_what_failed_elsewhere() -> None:
    clear = tried(1, pruned_plan(0.5, pair=TORCH), 0.6, 3.0)
    below = tried(2, pruned_plan(0.25), 0.7, 0.1)
    assert allowed(FP32, clear, below) == pytest.approx(math.sqrt(0.002 * 0.006))
    above = tried(3, pruned_plan(0.75), 0.5, 0.1)
    assert allowed(FP32, clear, below, above) == allowed(FP32, above) == pytest.approx(0.06)


def test_when_trials_contradict_each_other_the_good_one_counts() -> None:
    good, bad = tried(1, pruned_plan(0.75), 0.5, 0.1), tried(2, pruned_plan(0.25), 0.7, 2.0)
    low, high = bracket([control("c2", FP32, 0.8, 0.0), good, bad])
    assert low == pytest.approx(0.03)
    assert high is not None and high > 0.03


def test_an_int8_control_that_holds_does_not_end_the_search_for_milder_plans() -> None:
    """All of int8 is predicted to cost 0.027 and holds; a plan at 0.002 was just over."""
    profile, solver = profile_of(), find_planner("solver")
    over = Plan(
        runtime="onnxruntime",
        pruning=(PruningLine(match="heads:a.qkv", ratio=0.25),),
        quantization=Quantization(scheme="int8-dynamic", keep_float=("b.fc1", "head")),
    )
    history = [
        control("c2", FP32, 0.8, 3.0),
        control("c3", INT8, 0.4, 0.4),
        tried(0, over, 0.3, 0.6),
    ]
    milder = solver.propose(profile, history, BUDGET, 0)
    assert milder is not None
    assert predict_kl(profile, milder.plan) < predict_kl(profile, over)


def test_the_next_allowance_is_where_the_drops_say_the_budget_lies() -> None:
    """Between 0.1 and 0.55 points the line meets 0.4, four fifths of the budget, at two thirds."""
    profile, history = fine_profile(), [control("c2", FP32, 0.8, 0.0)]
    first = kl_of(history, profile)
    plan = find_planner("solver").propose(profile, history, BUDGET, 0)
    assert plan is not None
    history.append(tried(1, plan.plan, 0.6, 0.1))
    second = find_planner("solver").propose(profile, history, BUDGET, 0)
    assert second is not None and second.kl is not None
    near = kl_of([*history, tried(2, second.plan, 0.5, 0.55)], profile)
    far = kl_of([*history, tried(2, second.plan, 0.5, 20.0)], profile)
    assert first < far < near < second.kl
    assert far == pytest.approx(math.sqrt(first * second.kl), rel=0.1)
    assert near == pytest.approx(first + (second.kl - first) * 0.3 / 0.45, rel=0.1)


def kl_of(history: Sequence[Trial], profile: Profile) -> float:
    proposal = find_planner("solver").propose(profile, history, BUDGET, 0)
    assert proposal is not None and proposal.kl is not None
    return proposal.kl


def fine_profile() -> Profile:
    """Many small groups, so that any allowance can be used up nearly whole."""
    levels = [(r / 8, 0.02 * r, 0.0001 * r * r) for r in range(1, 7)]
    groups = tuple(group_of(f"mlp:g{i}", 64, levels) for i in range(30))
    return profile_of(groups=groups, layers=())


def test_the_allowance_starts_at_the_budget_doubles_and_halves() -> None:
    profile, history = fine_profile(), [control("c2", FP32, 0.8, 0.0)]
    first = kl_of(history, profile)
    assert 0.9 < first / (KL_PER_POINT * BUDGET.max_drop) <= 1.0
    plan = find_planner("solver").propose(profile, history, BUDGET, 0)
    assert plan is not None
    history.append(tried(1, plan.plan, 0.6, 0.1))
    second = kl_of(history, profile)
    assert 1.8 < second / first <= 2.0
    plan = find_planner("solver").propose(profile, history, BUDGET, 0)
    assert plan is not None
    third = kl_of([*history, tried(2, plan.plan, 0.5, 2.0)], profile)
    assert 0.9 < third / math.sqrt(first * second) <= 1.0


def test_the_search_ends_when_the_bracket_is_closed() -> None:
    proposals, ended = walk(find_planner("solver"), fine_profile(), "as predicted", limit=40)
    assert ended and 3 < len(proposals) < 40
    drops = [30.0 * (proposal.kl or 0.0) for proposal in proposals]
    assert max(drop for drop in drops if drop <= 0.5) > 0.4


def test_measured_savings_correct_the_prediction() -> None:
    profile, history = profile_of(), [control("c2", FP32, 0.8, 0.0)]
    plan = pruned_plan(0.75)
    share = predict_saved_share(profile, plan)
    assert share == pytest.approx(0.6 / 4.0)
    assert saving_scale(profile, history, FP32) == 1.0
    half = [*history, tried(1, plan, 0.8 * (1 - share / 2), 0.1)]
    assert saving_scale(profile, half, FP32) == pytest.approx(0.5)
    assert saving_scale(profile, half, TORCH) == 1.0
    slower = [*history, tried(1, plan, 0.9, 0.1)]
    assert saving_scale(profile, slower, FP32) == 0.2
    much = [*history, tried(1, plan, 0.2, 0.1)]
    assert saving_scale(profile, much, FP32) == 1.5
    before = solve(FP32, profile, history, BUDGET, 0, 0.03)
    after = solve(FP32, profile, half, BUDGET, 0, 0.03)
    assert before is not None and after is not None and before.plan.pruning == after.plan.pruning
    saved = predict_saved_share(profile, after.plan)
    assert after.relative_latency == pytest.approx(0.8 - 0.8 * 0.5 * saved)


STATIC = Pair(runtime="openvino", scheme="int8-static")
STATIC_BF16 = Pair(runtime="openvino", scheme="int8-static-bf16")


def test_a_scheme_that_quantizes_alike_is_heard_as_one_trial() -> None:
    profile = profile_of()
    history = [control("c1", STATIC, 0.5, 0.0), control("c2", STATIC_BF16, 0.5, 0.0)]
    history.append(control("c3", Pair(runtime="openvino", scheme="fp32"), 0.8, 0.0))
    share = predict_saved_share(profile, pruned_plan(0.75, pair=STATIC))

    def ran(number: int, pair: Pair, scale: float) -> Trial:
        return tried(number, pruned_plan(0.75, pair=pair), 0.5 * (1 - scale * share), 0.1)

    history += [ran(1, STATIC, 0.4), ran(2, STATIC, 0.8)]
    assert saving_scale(profile, history, STATIC) == pytest.approx(0.6)
    assert saving_scale(profile, history, STATIC_BF16) == pytest.approx(0.6)
    assert saving_scale(profile, history, pair_of(history[2])) == 1.0
    table = table_of(STATIC, GROUPS[0].shape_class, (32, 0.2), (48, 0.04))
    guessed = profile_of(deployed_widths=(table,))
    assert saving_scale(guessed, history, STATIC_BF16) == UNTIMED, "eager mode's widths are others"
    own = [*history, ran(3, STATIC_BF16, 1.0), ran(4, STATIC_BF16, 1.2)]
    assert saving_scale(profile, own, STATIC_BF16) == pytest.approx((1.0 + 1.2 + 0.6) / 3)


def test_of_plans_as_fast_by_estimate_the_one_in_the_faster_scheme_is_tried() -> None:
    """Whichever is ahead by a hair: one trial's noise is enough for that."""
    profile = profile_of()
    for first, other in ((STATIC, STATIC_BF16), (STATIC_BF16, STATIC)):
        history = [control("c1", first, 0.5, 0.0), control("c2", other, 0.504, 0.0)]
        for number, (pair, base, scale) in enumerate(
            [(first, 0.5, 0.93), (first, 0.5, 0.93), (other, 0.504, 1.0), (other, 0.504, 1.0)]
        ):
            cut = pruned_plan(0.25, pair=pair)
            time = base * (1 - scale * predict_saved_share(profile, cut))
            history.append(tried(number, cut, time, 0.05))
        found = [solve(pair, profile, history, BUDGET, 0, 0.03) for pair in (first, other)]
        times = [each.relative_latency or 0.0 for each in found if each]
        assert 1.0 < times[0] / times[1] < TIED
        plan = find_planner("solver").propose(profile, history, BUDGET, 0)
        assert plan is not None and pair_of(make_trial("t9", plan=plan.plan)) == first


def table_of(pair: Pair, shape_class: str, *points: tuple[int, float]) -> DeployedWidths:
    return DeployedWidths(
        runtime=pair.runtime,
        scheme=pair.scheme,
        shape_class=shape_class,
        points=tuple(SharePoint(width=w, saved=s, low=s, high=s) for w, s in points),
    )


def test_widths_of_the_runtime_that_serves_come_before_those_of_eager_mode() -> None:
    table = table_of(INT8, GROUPS[0].shape_class, (32, 0.2), (48, 0.04))
    profile = profile_of(deployed_widths=(table,))
    group = profile.groups[0]
    assert saved_share(profile, group, 0.5, INT8) == pytest.approx(0.2)
    assert saved_share(profile, group, 0.125, INT8) == pytest.approx(0.02)  # 56 units, between
    assert saved_share(profile, group, 0.75, INT8) == pytest.approx(0.36)  # 16, as the slope goes
    assert saved_share(profile, group, 0.5, FP32) == pytest.approx(0.4 / 4)
    assert [round(o.saved, 3) for o in group_options(profile, group, INT8)] == [0.04, 0.2, 0.36]


def test_a_shape_that_its_runtime_does_not_speed_up_is_left_whole() -> None:
    tables = tuple(
        table_of(INT8, shape, (32, -0.01), (48, -0.02))
        for shape in {group.shape_class for group in GROUPS if group.width == 64}
    )
    profile = profile_of(deployed_widths=tables)
    proposal = solve(INT8, profile, controls_of(), BUDGET, 0, 1.0)
    assert proposal is not None
    assert set(assign(proposal.plan, [g.id for g in GROUPS])) == {"heads:a.qkv"}


def test_tables_are_worth_it_for_what_a_plan_could_start_from() -> None:
    trials = [
        control("c1", TORCH, 0.9, 0.0),
        control("c2", FP32, 0.4, 9.0),  # float and over the budget: nothing saves it
        control("c3", INT8, 0.5, 9.0),  # int8: layers may stay float
        control("c4", Pair(runtime="openvino", scheme="fp32"), 0.6, 0.0),
    ]
    assert [trial.trial_id for trial in likely_to_serve(trials, BUDGET)] == ["c3", "c4"]


def test_savings_are_interpolated_levelled_and_extrapolated() -> None:
    profile = profile_of()
    group = profile.group("mlp:a.fc1")
    assert saved_share(profile, group, 0.0) == 0.0
    assert saved_share(profile, group, 0.375) == pytest.approx(0.3 / 4)
    assert saved_share(profile, group, 0.875) == pytest.approx(0.7 / 4)

    noisy = group_of("mlp:n", 64, [(0.25, 0.3, 0.01), (0.5, 0.2, 0.004), (0.75, -0.1, 0.02)])
    options = group_options(profile, noisy)
    assert [(o.saved, o.kl) for o in options] == [
        (pytest.approx(0.075), 0.01),
        (pytest.approx(0.075), 0.01),
        (pytest.approx(0.075), 0.02),
    ]
    useless = group_of("mlp:u", 64, [(0.5, 0.0, 0.001)])
    assert group_options(profile, useless) == []
    unmeasured = make_group("mlp:m", 64, widths=(), macs_per_unit=250_000)
    assert saved_share(profile, unmeasured, 0.5) == pytest.approx(32 * 250_000 / 80_000_000)


def test_size_counts_parameters_and_not_time() -> None:
    """A group that saves no time but many bytes is what ``--objective size`` is about."""
    levels = [(0.5, 0.0, 0.001)]
    heavy = group_of("mlp:heavy", 64, levels, parameters_per_unit=10_000)
    light = group_of("mlp:light", 64, [(0.5, 1.0, 0.001)], parameters_per_unit=10)
    profile = profile_of(groups=(heavy, light), layers=())
    history = [control("c2", FP32, 0.8, 0.0)]
    for objective, expected in (("latency", "mlp:light"), ("size", "mlp:heavy")):
        budget = Budget(max_drop=0.5, objective=objective)  # pyright: ignore[reportArgumentType]
        proposal = solve(FP32, profile, history, budget, 0, 0.0015)
        assert proposal is not None
        assert [line.match for line in proposal.plan.pruning] == [expected]
        saved = predict_saved_share(profile, proposal.plan)
        assert proposal.relative_latency == pytest.approx(0.8 * (1 - saved))


def test_size_quantizes_the_heavy_layer_even_if_that_saves_no_time() -> None:
    layers = (
        LayerQuantization(name="a.fc1", kl=0.004, kl_error=0.0, float_ms=0.5, int8_ms=0.5),
        LayerQuantization(name="b.fc1", kl=0.004, kl_error=0.0, float_ms=1.0, int8_ms=0.2),
    )
    modules = (make_module("a.fc1", num_parameters=900_000), make_module("b.fc1"))
    profile = profile_of(groups=(), layers=layers, modules=modules)
    kept = {}
    for objective in ("latency", "size"):
        budget = Budget(max_drop=0.5, objective=objective)  # pyright: ignore[reportArgumentType]
        proposal = solve(INT8, profile, controls_of(), budget, 0, 0.005)
        assert proposal is not None
        kept[objective] = proposal.plan.quantization.keep_float
    assert kept == {"latency": (r"a\.fc1",), "size": (r"b\.fc1",)}


def test_before_there_are_controls_the_profile_gives_a_first_guess() -> None:
    profile = profile_of()
    proposal = find_planner("solver").propose(profile, [], BUDGET, 0)
    assert proposal is not None
    assert proposal.plan.runtime == "torch"  # what the profile was measured in
    assert check_plan(proposal.plan, profile) is None
    assert proposal.kl is not None and proposal.kl <= KL_PER_POINT * BUDGET.max_drop
    saved = predict_saved_share(profile, proposal.plan)
    names = [layer.name for layer in profile.layers]
    kept = {n for p in proposal.plan.quantization.keep_float for n in matches(p, names)}
    int8 = [(layer.float_ms or 0.0) / 2 / 4.0 for layer in LAYERS if layer.name not in kept]
    whole = sum((layer.float_ms or 0.0) / 2 / 4.0 for layer in LAYERS)
    expected = (1 - whole) * (1 - saved) + whole - sum(int8)
    assert proposal.relative_latency == pytest.approx(expected)


def test_a_float_control_over_the_budget_is_given_up_and_an_int8_one_is_not() -> None:
    profile = profile_of()
    bad_float = [control("c2", FP32, 0.8, 3.0)]
    assert find_planner("solver").propose(profile, bad_float, BUDGET, 0) is None
    bad_int8 = [control("c2", FP32, 0.8, 0.0), control("c3", INT8, 0.4, 3.0)]
    proposal = find_planner("solver").propose(profile, bad_int8, BUDGET, 0)
    assert proposal is not None
    assert proposal.plan.quantization.scheme == "int8-dynamic"
    assert proposal.plan.quantization.keep_float


def test_int8_over_the_budget_is_rescued_before_anything_is_pruned() -> None:
    profile, solver = profile_of(), find_planner("solver")
    history = [control("c2", FP32, 0.8, 3.0), control("c3", INT8, 0.2, 1.0)]
    for number, drop in enumerate((1.0, 0.3)):
        proposal = solver.propose(profile, history, BUDGET, 0)
        assert proposal is not None
        assert proposal.plan.quantization.scheme == "int8-dynamic"
        assert proposal.plan.quantization.keep_float and not proposal.plan.pruning
        history.append(tried(number, proposal.plan, 0.3, drop))
    proposal = solver.propose(profile, history, BUDGET, 0)
    assert proposal is not None
    assert proposal.plan.pruning and proposal.plan.quantization.keep_float


# ---- checking -----------------------------------------------------------------------------------


def plan(**fields: Any) -> Plan:
    return Plan(**{"runtime": "onnxruntime"} | fields)


def lines(*pairs: tuple[str, float]) -> tuple[PruningLine, ...]:
    return tuple(PruningLine(match=match, ratio=ratio) for match, ratio in pairs)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"runtime": "openvino"}, "runtime 'openvino' can't be used here; choose one of torch"),
        ({"quantization": Quantization(scheme="int4")}, "no scheme 'int4'.*fp32, int8-dynamic"),
        ({"pruning": lines(("mlp:x", 0.5))}, "'mlp:x' matches no prunable group.*'mlp:a.fc1'"),
        ({"pruning": lines(("mlp:a", 0.5))}, "must match a whole name"),
        ({"pruning": lines(("channels:head", 0.5))}, "'channels:head' can't be pruned: it is"),
        ({"pruning": lines(("mlp:(", 0.5))}, "not a regular expression"),
        ({"pruning": lines((r"mlp:.*", 0.97))}, "ratio 0.97 of .* is above 0.95"),
        ({"pruning": lines((r"heads:.*", 0.2))}, "remove nothing"),
        ({"pruning": lines((".*", 0.0), (r"mlp:.*", 0.5))}, "remove nothing"),
        ({"quantization": Quantization(keep_float=("tail",))}, "keep_float pattern 'tail' matches"),
        ({"quantization": Quantization(keep_float=("[",))}, "not a regular expression"),
        ({"quantization": Quantization(keep_float=("a" * 201,))}, "201 characters"),
    ],
)
def test_each_fault_of_a_plan_has_its_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        demand_plan(plan(**fields), profile_of())


def test_a_good_plan_passes_once() -> None:
    good = plan(
        pruning=lines((r"mlp:.*", 0.5), ("heads:a.qkv", 0.25)),
        quantization=Quantization(scheme="int8-dynamic", keep_float=("head",)),
    )
    assert check_plan(good, profile_of()) is None
    demand_plan(good, profile_of())
    reason = check_plan(good, profile_of(), {good.plan_id})
    assert reason is not None and "tried before" in reason
    assert check_plan(plan(), profile_of()) is None


def test_a_runtime_that_is_missing_says_why() -> None:
    runtimes = (RuntimeSchemes(runtime="torch", version=None, schemes=(), reason="not installed"),)
    profile = profile_of(runtimes=runtimes)
    assert check_plan(plan(runtime="torch"), profile) == (
        "The runtime 'torch' can't be used here (not installed); none that is known can be."
    )


def test_a_scheme_that_this_processor_is_no_good_for_says_why() -> None:
    offer = RuntimeSchemes(
        runtime="torch",
        version="2.13.0",
        schemes=("fp32", "int8-dynamic"),
        refused=(NotMeasured(what="bf16", reason="this processor has no bfloat16 products"),),
    )
    profile = profile_of(runtimes=(offer,))
    wanted = plan(runtime="torch", quantization=Quantization(scheme="bf16"))
    assert check_plan(wanted, profile) == (
        "The runtime 'torch' does not offer 'bf16' here: this processor has no bfloat16 products; "
        "choose one of fp32, int8-dynamic."
    )
    unknown = plan(runtime="torch", quantization=Quantization(scheme="int4"))
    assert "no scheme 'int4'; choose one of fp32, int8-dynamic" in str(check_plan(unknown, profile))


# ---- patterns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+$", "(a|a?)+$", "(?:(a{1,99}){1,99}){1,99}b"]
)
def test_a_catastrophic_pattern_ends_in_time(pattern: str) -> None:
    start = time.monotonic()
    with contextlib.suppress(PlanError):  # the engine knows shortcuts for some
        assert matches(pattern, ["a" * 5000 + "!"]) == []
    assert time.monotonic() - start < 5.0


def test_what_takes_too_long_is_refused() -> None:
    with pytest.raises(PlanError, match=r"takes too long.*without nested repeats"):
        matches("(a|aa)+$", ["a" * 60 + "!"])


@pytest.mark.parametrize("pattern", ["(", "[", "*", "a{2,1}", "(?P<x", "\\"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(PlanError, match="not a regular expression"):
        matches(pattern, ["a"])


def test_a_pattern_matches_in_full_and_is_not_too_long() -> None:
    names = ["mlp:blocks.1.fc1", "mlp:blocks.11.fc1"]
    assert matches(r"mlp:blocks\.1\.fc1", names) == names[:1]
    assert matches(r"blocks\.1", names) == []
    assert matches("a" * 200, []) == []
    with pytest.raises(PlanError, match=r"201 characters.*at most 200"):
        matches("a" * 201, names)


def test_the_first_matching_line_wins() -> None:
    chosen = assign(plan(pruning=lines(("mlp:a.*", 0.1), (".*", 0.5))), ["mlp:a", "mlp:b"])
    assert {key: line.ratio for key, line in chosen.items()} == {"mlp:a": 0.1, "mlp:b": 0.5}


@pytest.mark.parametrize(
    ("width", "ratio", "kept"),
    [
        (8, 0.0, 8),
        (8, 0.124, 8),
        (8, 0.125, 7),
        (100, 0.29, 71),  # 0.29 * 100 is 28.999999999999996
        (3, 1 / 3, 2),
        (3, 2 / 3, 1),
        (8, 0.999, 1),
        (1, 0.9, 1),
        (2, 0.95, 1),
        (3072, 0.7, 922),
    ],
)
def test_units_kept(width: int, ratio: float, kept: int) -> None:
    assert units_kept(width, ratio) == kept


def test_units_kept_of_exact_shares_is_exact() -> None:
    for width in (7, 12, 49, 96, 768, 4096):
        for removed in range(0, width, max(1, width // 50)):
            assert units_kept(width, removed / width) == width - removed


# ---- nominating ---------------------------------------------------------------------------------


def trial_at(name: str, relative: float, drop: float, width: float = 0.2, **fields: Any) -> Trial:
    accuracy = make_accuracy("search", 92.0, drop)
    interval = make_interval(drop, width, num_samples=1000)
    accuracy = accuracy.model_copy(update={"drop": interval})
    evaluation = measured(name, relative, drop, pair=INT8, **fields)
    return make_trial(name, evaluation=evaluation.model_copy(update={"accuracy": (accuracy,)}))


def ids(trials: Sequence[Trial], budget: Budget = BUDGET, num_test: int = 1000) -> list[str]:
    return [candidate.trial_id for candidate in nominate(trials, budget, num_test)]


def test_a_plan_that_an_earlier_run_nominated_may_be_a_tenth_over() -> None:
    """It was within the budget by other trials on the same samples; the test split decides."""
    trials = [
        control("c3", INT8, 0.5, 0.1),
        trial_at("t1", 0.2, 0.52),
        trial_at("t2", 0.25, 0.54).model_copy(update={"author": "solver, in an earlier run"}),
        trial_at("t3", 0.24, 0.56).model_copy(update={"author": "solver, in an earlier run"}),
        trial_at("t4", 0.4, 0.3),
    ]
    assert [each.trial_id for each in nominate(trials, BUDGET, 5000)] == ["t2", "t4"]
    believed = [trial.trial_id for trial in feasible(trials, BUDGET)]
    assert believed == ["t4", "c3"], "the search goes by what it believes itself"
    more = [*trials, trial_at("t5", 0.3, 0.48), trial_at("t6", 0.45, 0.1)]
    assert [each.trial_id for each in nominate(more, BUDGET, 5000)] == ["t2", "t5", "t4"]
    slower = [*more, trial_at("t7", 0.22, 0.45)]
    named = [each.trial_id for each in nominate(slower, BUDGET, 5000)]
    assert named == ["t7", "t4", "t6"], "one that holds and is faster needs no such risk"


def test_the_fastest_and_two_with_room_to_spare_are_nominated() -> None:
    trials = [
        *controls_of(),
        trial_at("safe", 0.45, -0.1),
        trial_at("fast", 0.30, 0.45),
        trial_at("over", 0.10, 0.6),
        trial_at("some", 0.38, 0.3),
        trial_at("half", 0.40, 0.2),
        trial_at("slow", 0.60, -0.5),  # slower than the best control
        trial_at("also", 0.35, 0.44),
        make_trial("dead", status="failed", reason="crashed"),
    ]
    assert ids(trials) == ["fast", "some", "safe"]
    candidates = nominate(trials, BUDGET, 1000)
    assert candidates[0].predicted_drop == 0.45
    assert candidates[0].objective_value == pytest.approx(0.30)
    assert ids(controls_of()) == []
    # should the first not hold on the test split, one that is worse in all may
    assert ids([trial_at("fast", 0.3, 0.4), trial_at("worse", 0.35, 0.45)]) == ["fast", "worse"]
    assert ids([trial_at("a", 0.3, 0.4), trial_at("b", 0.35, 0.35)]) == ["a", "b"]


def test_without_a_feasible_control_everything_feasible_may_be_nominated() -> None:
    trials = [control("c3", INT8, 0.2, 5.0), trial_at("ours", 0.6, 0.1)]
    assert ids(trials) == ["ours"]
    assert ranked_controls(trials, BUDGET) == []


def test_proof_is_expected_before_the_test_split_is_opened() -> None:
    trials = [*controls_of(), trial_at("fast", 0.3, 0.4), trial_at("sure", 0.4, 0.0)]
    proven = Budget(max_drop=0.5, evidence="proven")
    assert ids(trials, proven) == ["sure"]
    assert ids(trials, proven, num_test=100_000) == ["fast", "sure"]
    assert ids(trials, proven, num_test=50) == []


def test_the_objective_decides_the_order() -> None:
    trials = [
        control("c2", FP32, 0.8, 0.0, size_bytes=1000, memory_bytes=1000),
        trial_at("small", 0.9, 0.1, size_bytes=100, memory_bytes=2000),
        trial_at("lean", 0.7, 0.3, size_bytes=2000, memory_bytes=100),
    ]
    by_size = Budget(max_drop=0.5, objective="size")
    by_memory = Budget(max_drop=0.5, objective="memory")
    assert ids(trials, by_size) == ["small"]
    assert ids(trials, by_memory) == ["lean"]
    assert ids(trials) == ["lean"]
    assert [t.trial_id for t in pareto(trials, by_size)] == ["small", "c2"]
    unknown = trial_at("unknown", 0.9, 0.1, memory_bytes=None)
    assert ids([*trials, unknown], by_memory) == ["lean"]


def test_bonferroni() -> None:
    assert proof_level(0) == proof_level(1) == pytest.approx(0.95)
    assert proof_level(3) == pytest.approx(1 - 0.05 / 3)


# ---- concluding ---------------------------------------------------------------------------------


def final_of(
    name: str,
    drop: float | None,
    bound: float,
    *,
    speed: float = 2.0,
    over_control: float | None = 1.3,
    is_control: bool = False,
    **fields: Any,
) -> Final:
    accuracy = make_accuracy("test", 91.0, drop, upper_bound=bound)
    speedup = Speedup(over="baseline", ratio=make_interval(speed, 0.05))
    evaluation = make_evaluation(name, accuracy=(accuracy,), speedup=speedup, **fields)
    trial = make_control(name, "onnxruntime", "int8-dynamic") if is_control else make_trial(name)
    return Final(
        trial=trial,
        evaluation=evaluation,
        over_control=None if over_control is None else make_interval(over_control, 0.05),
        samples_to_prove=9000,
    )


CONTROL = final_of("c3", 0.1, 0.3, over_control=None, is_control=True)
BASELINE = make_evaluation()


def test_evidence() -> None:
    assert evidence_of(final_of("t", 0.2, 0.5), BUDGET) == "proven"
    assert evidence_of(final_of("t", 0.5, 0.51), BUDGET) == "measured"
    assert evidence_of(final_of("t", 0.51, 0.9), BUDGET) is None
    assert evidence_of(final_of("t", None, 0.0), BUDGET) is None


def test_the_first_candidate_that_holds_is_accepted() -> None:
    tested = [final_of("t1", 0.9, 1.5), final_of("t2", 0.3, 0.7), final_of("t3", 0.0, 0.2)]
    verdict = conclude(tested, CONTROL, BASELINE, BUDGET, [])
    assert (verdict.kind, verdict.trial_id, verdict.evidence) == ("ACCEPT", "t2", "measured")
    assert verdict.best_control_id == "c3"
    assert "0.30 points on 1,000 test samples (budget 0.5)" in verdict.reason
    assert "about 9,000 test samples" in verdict.next_step
    assert verdict.speedup_over_control == make_interval(1.3, 0.05)
    assert verdict.size_ratio == pytest.approx(1.7 / 6.4)
    assert verdict.candidates_tested == 3
    assert verdict.drop_upper_bound == 0.7


def test_when_proof_is_demanded_only_a_proven_one_is_accepted() -> None:
    proven = Budget(max_drop=0.5, evidence="proven")
    tested = [final_of("t1", 0.3, 0.7), final_of("t2", 0.1, 0.4)]
    verdict = conclude(tested, CONTROL, BASELINE, proven, [])
    assert (verdict.kind, verdict.trial_id, verdict.evidence) == ("ACCEPT", "t2", "proven")
    assert conclude(tested[:1], CONTROL, BASELINE, proven, []).kind == "NO_GAIN"


@pytest.mark.parametrize(
    "final",
    [
        final_of("t1", 0.9, 1.5),
        final_of("t1", 0.1, 0.3, over_control=1.02),  # the interval holds 1
        final_of("t1", 0.1, 0.3, over_control=None),
        final_of("t1", 0.1, 0.3, speed=0.9),
        final_of("t1", None, 0.3),
    ],
    ids=["lost too much", "not beyond the interval", "not raced", "slower", "not measured"],
)
def test_no_gain_hands_the_control_over(final: Final) -> None:
    verdict = conclude([final], CONTROL, BASELINE, BUDGET, [make_trial("t1")])
    assert (verdict.kind, verdict.trial_id) == ("NO_GAIN", "c3")
    assert "control is handed over" in verdict.reason
    assert verdict.evidence == "proven"


def test_without_a_control_the_baseline_is_to_be_beaten() -> None:
    lonely = final_of("t1", 0.1, 0.3, over_control=None)
    assert beats_control(lonely, None, BUDGET)
    assert conclude([lonely], None, BASELINE, BUDGET, []).kind == "ACCEPT"
    slow = final_of("t1", 0.1, 0.3, speed=1.04, over_control=None)
    verdict = conclude([slow], None, BASELINE, BUDGET, [make_trial("t1")])
    assert (verdict.kind, verdict.trial_id, verdict.evidence) == ("INFEASIBLE", None, None)
    assert "The original stays" in verdict.reason


def test_infeasible_counts_and_quotes() -> None:
    slow = final_of("c3", 0.1, 0.3, speed=0.8, over_control=None, is_control=True)
    trials = [make_trial("t1"), make_trial("t2", status="failed", reason="no")]
    verdict = conclude([], slow, BASELINE, BUDGET, trials)
    assert verdict.kind == "INFEASIBLE"
    assert "2 tried, 1 failed" in verdict.reason
    dead = [make_trial("t1", status="failed", reason="the disk is full")]
    assert "the disk is full" in conclude([], None, BASELINE, BUDGET, dead).reason


@pytest.mark.parametrize(
    ("objective", "mine", "kind"),
    [
        ("size", {"size_bytes": 900_000}, "ACCEPT"),
        ("size", {"size_bytes": 1_700_000}, "NO_GAIN"),  # the control's
        ("size", {"size_bytes": None}, "NO_GAIN"),
        ("memory", {"memory_bytes": 20_000_000}, "ACCEPT"),
        ("memory", {"memory_bytes": 29_500_000}, "NO_GAIN"),  # within the noise
        ("memory", {"memory_bytes": None}, "NO_GAIN"),
    ],
)
def test_size_and_memory_have_their_own_bar(
    objective: Any, mine: dict[str, Any], kind: str
) -> None:
    budget = Budget(max_drop=0.5, objective=objective)
    slow = final_of("t1", 0.1, 0.3, speed=0.5, over_control=0.4, **mine)
    verdict = conclude([slow], CONTROL, BASELINE, budget, [])
    assert verdict.kind == kind


def test_a_speedup_must_lie_above_one_with_its_whole_interval() -> None:
    touching = Interval(estimate=1.2, low=1.0, high=1.4, num_samples=10)
    evaluation = make_evaluation(
        "t1",
        accuracy=(make_accuracy("test", 91.0, 0.1, upper_bound=0.3),),
        speedup=Speedup(over="baseline", ratio=touching),
    )
    final = Final(
        trial=make_trial("t1"), evaluation=evaluation, over_control=None, samples_to_prove=None
    )
    assert conclude([final], None, BASELINE, BUDGET, []).kind == "INFEASIBLE"


@pytest.mark.parametrize("name", ["a.b", "mlp:" + "deep.er." * 60 + "fc1", "(" * 300, "é\\" * 150])
def test_every_name_has_a_pattern(name: str) -> None:
    pattern = exactly(name)
    assert len(pattern) <= MAX_PATTERN_LENGTH
    assert matches(pattern, [name, f"{name}2", f"x{name}", "a_b"]) == [name]


def test_groups_with_endless_names_are_planned_for() -> None:
    long = "channels:" + "inner." * 60 + "conv"
    profile = profile_of(groups=(group_of(long, 64, [(0.25, 0.2, 0.002), (0.5, 0.4, 0.006)]),))
    proposal = Solver().propose(profile, controls_of(), BUDGET, 0)
    assert proposal is not None and proposal.plan.pruning
    assert assign(proposal.plan, [long])
