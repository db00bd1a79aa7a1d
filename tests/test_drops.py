"""Expected drops, and the allowances and plans that follow where trials recorded divergences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from profiling_agent.planning.allowance import AIM, next_allowance
from profiling_agent.planning.decide import contenders, nominate
from profiling_agent.planning.drops import KL_PER_POINT, expected_drops, fitted_slope
from profiling_agent.planning.estimate import predict_kl, predict_saved_share
from profiling_agent.planning.history import Pair, feasible
from profiling_agent.planning.solver import Solver
from profiling_agent.records.common import Budget
from profiling_agent.records.evaluation import Speedup
from profiling_agent.records.patterns import assign
from profiling_agent.records.plan import Plan, PruningLine, Quantization
from profiling_agent.records.profile import (
    LayerQuantization,
    Profile,
    RuntimeSchemes,
    SensitivityPoint,
    WidthPoint,
)
from profiling_agent.records.trial import Trial
from record_factory import (
    make_accuracy,
    make_control,
    make_evaluation,
    make_group,
    make_interval,
    make_profile,
    make_trial,
)

FP32 = Pair(runtime="onnxruntime", scheme="fp32")
OTHER = Pair(runtime="openvino", scheme="fp32")
BUDGET = Budget(max_drop=0.5)
NOISE = 0.2
"""The standard error of a drop, of a budget of 0.5 points."""


def judged(trial_id: str, plan: Plan, relative: float, drop: float, apart: float | None) -> Trial:
    accuracy = make_accuracy("search", 92.0 - drop, drop, divergence=apart)
    accuracy = accuracy.model_copy(update={"drop": make_interval(drop, 1.96 * NOISE)})
    evaluation = make_evaluation(
        trial_id,
        runtime=plan.runtime,
        scheme=plan.quantization.scheme,
        accuracy=(accuracy,),
        speedup=Speedup(over="baseline", ratio=make_interval(1 / relative, 0.02)),
    )
    return make_trial(trial_id, plan=plan, evaluation=evaluation)


def control(pair: Pair, relative: float, drop: float = 0.0, apart: float | None = 0.0) -> Trial:
    plan = Plan(runtime=pair.runtime, quantization=Quantization(scheme=pair.scheme))  # pyright: ignore[reportArgumentType]
    trial = judged(f"c-{pair.runtime}-{pair.scheme}", plan, relative, drop, apart)
    made = make_control(trial.trial_id, pair.runtime, pair.scheme, evaluation=trial.evaluation)
    assert made.is_control
    return made


def pruning(ratio: float, pair: Pair = FP32) -> Plan:
    return Plan(
        runtime=pair.runtime,  # pyright: ignore[reportArgumentType]
        pruning=(PruningLine(match="mlp:g0", ratio=ratio),),
        quantization=Quantization(scheme=pair.scheme),
    )


def fine_profile(num_groups: int = 20) -> Profile:
    """Groups that differ in what a cut costs and saves, at six ratios each."""
    draw = np.random.default_rng(0)
    groups = []
    for index in range(num_groups):
        cost, worth = draw.uniform(0.5, 2.0), draw.uniform(0.5, 2.0)
        groups.append(
            make_group(
                f"mlp:g{index}",
                64,
                widths=tuple(
                    WidthPoint(width=64 - 8 * r, saved_ms=ms, low_ms=ms, high_ms=ms)
                    for r in range(1, 7)
                    for ms in (worth * 0.02 * r,)
                ),
                sensitivity=tuple(
                    SensitivityPoint(
                        ratio=r / 8,
                        kl=cost * 1e-4 * r * r,
                        kl_error=0.0,
                        disagreement=0.0,
                        num_images=64,
                    )
                    for r in range(1, 7)
                ),
            )
        )
    runtimes = tuple(
        RuntimeSchemes(runtime=runtime, version="1", schemes=("fp32",))
        for runtime in ("onnxruntime", "openvino")
    )
    return make_profile(groups=tuple(groups), layers=(), runtimes=runtimes)


def int8_plan(pair: Pair) -> Plan:
    return Plan(runtime=pair.runtime, quantization=Quantization(scheme=pair.scheme))  # pyright: ignore[reportArgumentType]


def int8_profile() -> Profile:
    """Ten layers, of which two cost most of what int8 costs."""
    layers = tuple(
        LayerQuantization(
            name=f"l{i}", kl=0.01 if i < 2 else 0.0003, kl_error=0.0, float_ms=1.0, int8_ms=0.5
        )
        for i in range(10)
    )
    runtimes = (RuntimeSchemes(runtime="onnxruntime", version="1", schemes=("fp32",)),)
    update = {"layers": layers, "runtimes": runtimes}
    return fine_profile().model_copy(update=update)


class TestExpectedDrop:
    def test_it_is_nearer_to_the_truth_than_the_measured_one(self) -> None:
        """Plans whose true drops lie about a line by a fifth; samples tell them to 0.2 points."""
        draw = np.random.default_rng(1)
        own, expected = [], []
        for _ in range(40):
            apart = draw.uniform(0.002, 0.03, size=8)
            truth = 30.0 * apart * draw.normal(1.0, 0.2, size=8)
            drops = truth + draw.normal(0.0, NOISE, size=8)
            trials = [
                judged(f"t{i}", pruning(0.5), 0.5, float(drops[i]), float(apart[i]))
                for i in range(8)
            ]
            found = expected_drops(trials, BUDGET)
            own += list(drops - truth)
            expected += [found[f"t{i}"] - truth[i] for i in range(8)]
        before, after = (float(np.sqrt(np.mean(np.square(e)))) for e in (own, expected))
        assert before == pytest.approx(NOISE, rel=0.15)
        assert after < 0.65 * before

    def test_without_a_divergence_it_is_the_measured_one(self) -> None:
        trials = [judged("t1", pruning(0.5), 0.5, 0.45, None), make_trial("t2", status="failed")]
        assert fitted_slope(trials, BUDGET) is None
        assert expected_drops(trials, BUDGET) == {"t1": 0.45}

    def test_the_slope_starts_at_the_prior_and_follows_the_trials(self) -> None:
        first = fitted_slope([control(FP32, 0.8)], BUDGET)
        assert first is not None and first.value == pytest.approx(1 / KL_PER_POINT, rel=0.01)
        trials = [judged(f"t{i}", pruning(0.5), 0.5, 0.2 * i, 0.01 * i) for i in range(1, 9)]
        slopes = [fitted_slope(trials[:count], BUDGET) for count in (1, 3, 8)]
        values = [slope.value for slope in slopes if slope]
        assert first.value > values[0] > 20.0
        assert values[1:] == pytest.approx([20.0, 20.0], rel=0.1)
        unsure = [slope.deviation for slope in slopes if slope]
        assert unsure[0] > unsure[1] > unsure[2]

    def test_in_another_unit_it_goes_by_what_a_control_reaches(self) -> None:
        """0.004 of a control's 0.8 are half a percent."""
        budget = Budget(max_drop=0.004, unit="F1")
        plain = control(FP32, 0.8)
        assert plain.evaluation is not None
        accuracy = make_accuracy("search", 0.8, 0.0, divergence=0.0)
        evaluation = plain.evaluation.model_copy(update={"accuracy": (accuracy,)})
        slope = fitted_slope([plain.model_copy(update={"evaluation": evaluation})], budget)
        assert slope is not None and slope.value == pytest.approx(
            0.004 / 0.5 / KL_PER_POINT, rel=0.01
        )

    def test_where_every_changed_answer_is_a_loss_the_drop_is_known_as_it_is(self) -> None:
        """Agreement with the original: 2 % change at 0.004 nats, 4 % at four times that."""
        trials = []
        for number, (share, apart) in enumerate([(0.02, 0.004), (0.04, 0.016), (0.005, 0.03)]):
            trial = judged(f"t{number}", pruning(0.5), 0.5, 100 * share, apart)
            assert trial.evaluation is not None
            (accuracy,) = trial.evaluation.accuracy
            agreed = accuracy.model_copy(
                update={"value": 100.0 * (1 - share), "agreement": 1 - share}
            )
            evaluation = trial.evaluation.model_copy(update={"accuracy": (agreed,)})
            trials.append(trial.model_copy(update={"evaluation": evaluation}))
        assert expected_drops(trials, BUDGET) == {"t0": 2.0, "t1": 4.0, "t2": 0.5}
        slope = fitted_slope(trials[:2], BUDGET)
        assert slope is not None
        assert slope.value == pytest.approx(2.0 / 0.004**0.5, rel=0.1)
        assert slope.divergence_at(1.0) == pytest.approx(0.001, rel=0.2)

    @pytest.mark.parametrize("power", [0.5, 1.0])
    def test_where_every_changed_answer_is_a_loss_the_trials_choose_the_law(
        self, power: float
    ) -> None:
        """Of an original that is right on all search samples: 33 points a nat were seen."""
        trials = []
        for number, apart in enumerate((0.0003, 0.02, 0.12, 0.27)):
            drop = 33.0 * apart**power
            trial = judged(f"t{number}", pruning(0.5), 0.5, drop, apart)
            assert trial.evaluation is not None
            (accuracy,) = trial.evaluation.accuracy
            right = accuracy.model_copy(update={"value": 100.0 - drop})
            evaluation = trial.evaluation.model_copy(update={"accuracy": (right,)})
            trials.append(trial.model_copy(update={"evaluation": evaluation}))
        slope = fitted_slope(trials, BUDGET)
        assert slope is not None and slope.power == power
        assert slope.value == pytest.approx(33.0, rel=0.1)

    @pytest.mark.parametrize("apart", [0.0, 1e-12])
    def test_where_nothing_tells_the_laws_apart_the_careful_one_is_taken(
        self, apart: float
    ) -> None:
        """A float control that answers as the original does says nothing of either."""
        same = control(FP32, 0.8, 0.0, apart)
        assert same.evaluation is not None
        (accuracy,) = same.evaluation.accuracy
        right = accuracy.model_copy(update={"value": 100.0})
        evaluation = same.evaluation.model_copy(update={"accuracy": (right,)})
        slope = fitted_slope([same.model_copy(update={"evaluation": evaluation})], BUDGET)
        assert slope is not None and slope.power == 0.5

    def test_the_unit_of_the_metric_changes_nothing(self) -> None:
        """Errors of a millionth weigh as points do."""
        values: list[float] = []
        for unit in (1.0, 1e-6):
            budget = Budget(max_drop=0.2 * unit, unit="")
            trials = []
            for trial_id, drop, apart in (("c1", 0.0, 0.0), ("t1", 0.05, 0.03)):
                evaluation = judged(trial_id, pruning(0.5), 0.5, drop, apart).evaluation
                assert evaluation is not None
                lost = make_interval(drop * unit, 0.001 * unit)
                parts = {"value": 20.0 * unit, "drop": lost}
                accuracy = evaluation.accuracy[0].model_copy(update=parts)
                evaluation = evaluation.model_copy(update={"accuracy": (accuracy,)})
                trials.append(make_trial(trial_id, evaluation=evaluation))
                trials[-1] = trials[-1].model_copy(update={"is_control": trial_id == "c1"})
            slope = fitted_slope(trials, budget)
            assert slope is not None
            values.append(slope.value / unit)
        assert values[1] == pytest.approx(values[0], rel=1e-3)

    def test_many_trials_tell_little_more_than_two_since_all_are_judged_on_the_same_samples(
        self,
    ) -> None:
        def deviation(num_trials: int) -> float:
            trials = [
                judged(f"t{i}", pruning(0.5), 0.5, 0.2, 0.01) for i in range(1, num_trials + 1)
            ]
            slope = fitted_slope([control(FP32, 0.8), *trials], BUDGET)
            assert slope is not None and slope.value == pytest.approx(20.0, rel=0.5)
            return slope.deviation

        assert deviation(2) < 0.95 * deviation(1)
        assert 0.7 * deviation(2) < deviation(50) < deviation(2)

    @pytest.mark.parametrize("noise", [0.004, 0.04])
    def test_the_first_guess_is_what_noise_on_the_logits_costs(self, noise: float) -> None:
        history = [costing_noise(control(FP32, 0.8), noise)]
        slope = fitted_slope(history, BUDGET)
        assert slope is not None and slope.value == pytest.approx(0.5 / noise, rel=0.02)
        clear = costing_noise(judged("t1", pruning(0.9), 0.3, 9.0, 0.1), noise)
        slope = fitted_slope([*history, clear], BUDGET)
        assert slope is not None and 70.0 < slope.value < 100.0  # and a trial corrects it

    def test_where_every_change_is_a_loss_the_law_that_affords_less_is_followed(self) -> None:
        """Controls that change nothing fit any law; a root then seems to afford everything."""
        loses_nothing = [
            costing_noise(agreeing(f"c{i}", 0.0, apart), 0.03)
            for i, apart in enumerate((0.0, 3e-6, 3e-4, 3e-4), start=1)
        ]
        slope = fitted_slope(loses_nothing, BUDGET)
        assert slope is not None and slope.is_loss
        assert slope.divergence_at(0.5) < 0.04


def agreeing(trial_id: str, drop: float, apart: float) -> Trial:
    """Of agreement with the original, of which all lose from 100 percent."""
    trial = judged(trial_id, pruning(0.5), 0.5, drop, apart)
    return with_accuracy(trial, value=100.0 - drop, drop=make_interval(drop, 0.09))


def costing_noise(trial: Trial, noise: float) -> Trial:
    return with_accuracy(trial, noise_divergence=noise)


def with_accuracy(trial: Trial, **fields: object) -> Trial:
    evaluation = trial.evaluation
    assert evaluation is not None
    (accuracy,) = evaluation.accuracy
    accuracy = accuracy.model_copy(update=fields)
    evaluation = evaluation.model_copy(update={"accuracy": (accuracy,)})
    return trial.model_copy(update={"evaluation": evaluation})


class TestWhatIsNominated:
    def history(self) -> list[Trial]:
        """A line of 20 points a nat; t8 came out badly on its samples, t9 well."""
        known = [judged(f"t{i}", pruning(0.1 * i), 0.7, 0.2 * i, 0.01 * i) for i in range(1, 8)]
        unlucky = judged("t8", pruning(0.85), 0.4, 0.55, 0.01)
        lucky = judged("t9", pruning(0.9), 0.3, 0.45, 0.05)
        return [control(FP32, 0.8), *known, unlucky, lucky]

    def test_what_came_out_badly_by_chance_may_be_within_the_budget(self) -> None:
        history = self.history()
        assert feasible(history, BUDGET)[0].trial_id == "t8"
        names = [trial.trial_id for trial in contenders(history, BUDGET, 1000)]
        assert "t8" in names and "t9" not in names
        first = nominate(history, BUDGET, 1000)[0]
        assert first.trial_id == "t8" and 0.2 < first.predicted_drop < 0.5

    def test_proof_is_expected_of_the_expected_drop(self) -> None:
        budget = Budget(max_drop=0.5, evidence="proven")
        assert "t8" not in {t.trial_id for t in contenders(self.history(), budget, 1000)}
        assert "t8" in {t.trial_id for t in contenders(self.history(), budget, 100_000)}


def carried_out(
    number: int, plan: Plan, profile: Profile, draw: np.random.Generator, beyond: float
) -> tuple[Trial, float]:
    """A trial in a world where plans diverge ``beyond`` what was predicted and lose 20 points a
    nat; with its true drop."""
    apart = beyond * predict_kl(profile, plan) * float(draw.normal(1.0, 0.05))
    drop = 20.0 * apart
    saved = predict_saved_share(profile, plan) * float(draw.normal(1.0, 0.03))
    base = 0.8 if plan.runtime == "onnxruntime" else 0.7
    relative = base * (1.0 - saved)
    measured = drop + float(draw.normal(0.0, NOISE))
    return judged(f"t{number}", plan, relative, measured, apart), drop


def searched(
    profile: Profile, beyond: float, seed: int, limit: int = 6
) -> tuple[list[Trial], list[float]]:
    draw, planner = np.random.default_rng(seed), Solver()
    history, drops = [control(FP32, 0.8), control(OTHER, 0.7)], []
    for number in range(1, limit + 1):
        proposal = planner.propose(profile, tuple(history), BUDGET, 0)
        assert proposal is not None
        trial, drop = carried_out(number, proposal.plan, profile, draw, beyond)
        history.append(trial)
        drops.append(drop)
    return history, drops


def test_what_a_cut_diverges_is_told_by_the_units_that_it_removes() -> None:
    profile = fine_profile()  # 64 units, measured at eighths
    eighth, quarter = (predict_kl(profile, pruning(ratio)) for ratio in (1 / 8, 1 / 4))
    assert predict_kl(profile, pruning(0.015)) == 0.0 < eighth
    assert predict_kl(profile, pruning(0.139)) == eighth, "eight units too"
    between = predict_kl(profile, pruning(12 / 64))
    assert between == pytest.approx((eighth + quarter) / 2)


class TestWhereTheNextPlanIs:
    @pytest.mark.parametrize("beyond", [0.5, 1.0, 3.0, 8.0])
    def test_the_search_soon_comes_to_where_the_budget_lies(self, beyond: float) -> None:
        profile = fine_profile()
        misses = []
        for seed in range(3):
            _, drops = searched(profile, beyond, seed)
            misses += [abs(drop / (AIM * 0.5) - 1.0) for drop in drops[3:]]
        assert float(np.median(misses)) < 0.3

    def test_no_plan_comes_twice_and_those_at_one_allowance_differ(self) -> None:
        profile = fine_profile()
        history, _ = searched(profile, 2.0, seed=3, limit=12)
        plans = [trial.plan for trial in history if not trial.is_control]
        assert len({plan.plan_id for plan in plans}) == len(plans)
        ids = [group.id for group in profile.groups]
        num_near = 0
        for first, second in itertools.combinations(plans[-8:], 2):
            ours, theirs = (
                {name: line.ratio for name, line in assign(plan, ids).items()}
                for plan in (first, second)
            )
            apart = abs(predict_kl(profile, first) / predict_kl(profile, second) - 1.0)
            if first.runtime == second.runtime and apart < 0.02:
                num_near += 1
                assert sum(ours.get(i) != theirs.get(i) for i in ids) >= 2
        assert num_near > 0

    def test_a_distant_failure_does_not_hold_the_allowance_up(self) -> None:
        """What failed far above what the line says is no floor for what is tried next."""
        profile, far = fine_profile(), pruning(0.75)
        failed = judged("t1", far, 0.5, 30.0, 90 * predict_kl(profile, far))
        history = [control(FP32, 0.8), failed]
        allowance, high = next_allowance(profile, history, BUDGET, FP32)
        slope = fitted_slope(history, BUDGET)
        assert slope is not None and high is not None and allowance is not None
        assert allowance == pytest.approx(slope.divergence_at(AIM * 0.5) / 90)
        assert allowance < high / 50

    def test_sums_that_say_ever_less_are_followed_back_by_the_square(self) -> None:
        """Until a plan holds: plans of ResNet-56 diverged 9, 16 and 68 times their sums."""
        profile = fine_profile()
        far, near = pruning(0.75), pruning(0.5)
        least = predict_kl(profile, near)

        def placed(*ratios: float, more: Sequence[Trial] = ()) -> tuple[float, float]:
            """Where the next plan is, and where the plain ratio of the last would have it."""
            plans = ((far, 9.0), (near, 3.0))
            history = [control(FP32, 0.8)] + [
                judged(f"t{n}", plan, 0.6, drop, ratio * predict_kl(profile, plan))
                for n, ((plan, drop), ratio) in enumerate(zip(plans, ratios, strict=True), start=1)
            ]
            history += more
            slope = fitted_slope(history, BUDGET)
            allowance, _ = next_allowance(profile, history, BUDGET, FP32)
            assert slope is not None and allowance is not None
            return allowance, slope.divergence_at(AIM * 0.5) / ratios[-1]

        allowance, plain = placed(10.0, 16.0)
        assert allowance == pytest.approx(plain * max(plain / least, 1 / 4))
        mild = pruning(0.375)
        held = judged("t3", mild, 0.7, 0.1, 5 * predict_kl(profile, mild))
        assert placed(10.0, 16.0, more=[held])[0] > 2 * allowance
        falling, plain = placed(20.0, 16.0)
        assert falling > 0.8 * plain, "the smaller sum said more"
        close, plain = placed(2.0, 3.0)
        assert close > 0.8 * plain, "sums that are nearly right"

    def test_another_runtime_starts_where_the_first_has_led(self) -> None:
        """Plans diverge four times their sums in one; the other's first is placed by that."""
        profile = fine_profile()
        first = pruning(0.5)
        history = [control(FP32, 0.8), control(OTHER, 0.7)]
        before, _ = next_allowance(profile, history, BUDGET, OTHER)
        tried = judged("t1", first, 0.6, 0.8, 4 * predict_kl(profile, first))
        after, _ = next_allowance(profile, [*history, tried], BUDGET, OTHER)
        assert before is not None and after is not None
        slope = fitted_slope([*history, tried], BUDGET)
        assert slope is not None
        assert after == pytest.approx(AIM * 0.5 / slope.value / 4)
        assert before == pytest.approx(AIM * 0.5 * KL_PER_POINT, rel=0.01)

    def test_int8_is_rescued_by_what_whole_plans_diverged(self) -> None:
        """Int8 diverges four times the sum of its layers and is over; once a plan with layers kept
        float holds, the next keep layers float too and are about within the budget."""
        pair, profile = Pair(runtime="onnxruntime", scheme="int8-dynamic"), int8_profile()
        solver, plain = Solver(), 4 * predict_kl(profile, int8_plan(pair))
        history = [control(FP32, 0.8, drop=3.0), control(pair, 0.3, 20 * plain, plain)]
        drops: list[float] = []
        for number in range(1, 7):
            proposal = solver.propose(profile, tuple(history), BUDGET, 0)
            assert proposal is not None and proposal.plan.quantization.scheme == pair.scheme
            assert proposal.plan.quantization.keep_float
            assert drops or not proposal.plan.pruning
            apart = 4 * predict_kl(profile, proposal.plan)
            drops.append(20 * apart)
            relative = 0.4 - 0.01 * len(proposal.plan.pruning)
            history.append(judged(f"t{number}", proposal.plan, relative, drops[-1], apart))
        assert drops[0] < 1.0 and sum(drop <= 0.5 for drop in drops) >= 3
        assert any(trial.plan.pruning for trial in history)

    @pytest.mark.parametrize("max_drop", [0.0, 0.5])
    def test_where_no_layer_can_be_chosen_nothing_is_rescued(self, max_drop: float) -> None:
        weights = Pair(runtime="openvino", scheme="int8-weights")
        budget, profile = Budget(max_drop=max_drop), fine_profile()
        over = control(weights, 0.4, drop=0.7, apart=0.02)
        failed = judged("t1", pruning(0.5, weights), 0.3, 1.5, 0.05)
        assert Solver().propose(profile, [over, failed], budget, 0) is None

    def test_cuts_that_clearly_lost_too_much_elsewhere_are_not_repeated(self) -> None:
        """A plan of the other runtime lost four points at its sum; this one stays far below it,
        though its own mild plan diverged no more than predicted."""
        profile = fine_profile()
        predicted = predict_kl(profile, pruning(0.5))
        mild = judged("t1", pruning(0.125), 0.7, 0.01, predict_kl(profile, pruning(0.125)))
        over = judged("t2", pruning(0.5, OTHER), 0.5, 4.0, 14 * predicted)
        history = [control(FP32, 0.8), control(OTHER, 0.7), mild]
        free, _ = next_allowance(profile, history, BUDGET, FP32)
        bound, _ = next_allowance(profile, [*history, over], BUDGET, FP32)
        assert free is not None and bound is not None
        assert bound < predicted < free

    def test_what_collapsed_bounds_what_is_tried_next(self) -> None:
        profile = fine_profile()
        plan = pruning(0.5)
        collapsed = make_trial("t1", plan=plan, status="screened", reason="collapsed")
        history = [control(FP32, 0.8), collapsed]
        allowance, high = next_allowance(profile, history, BUDGET, FP32)
        assert high == pytest.approx(predict_kl(profile, plan))
        assert allowance == pytest.approx(high / 8)
        mild = judged("t2", pruning(0.125), 0.7, 0.01, predict_kl(profile, pruning(0.125)))
        allowance, high = next_allowance(profile, [*history, mild], BUDGET, FP32)
        assert allowance is not None and high is not None
        assert predict_kl(profile, mild.plan) < allowance < 0.6 * high

    def test_a_bad_sum_elsewhere_counts_until_two_plans_here_hold(self) -> None:
        """Elsewhere a plan diverged 90 times its sum; here plans diverge twice theirs."""
        profile = fine_profile()
        mild, more = pruning(0.125), pruning(0.25)
        far = judged("t1", pruning(0.75, OTHER), 0.5, 0.6, 90 * predict_kl(profile, pruning(0.75)))
        here = [
            judged(f"t{number}", plan, 0.7, 0.02, 2 * predict_kl(profile, plan))
            for number, plan in enumerate((mild, more), 2)
        ]
        history = [control(FP32, 0.8), control(OTHER, 0.7), far]
        bound, _ = next_allowance(profile, [*history, here[0]], BUDGET, FP32)
        free, _ = next_allowance(profile, [*history, *here], BUDGET, FP32)
        assert bound is not None and free is not None
        assert free > 1.9 * bound

    def test_quantizing_that_uses_the_budget_up_leaves_a_little_room(self) -> None:
        """The control is expected to lose what is aimed at; plans are milder, not none."""
        profile = fine_profile()
        plain: Sequence[Trial] = [control(FP32, 0.8, 0.45, 0.012)]
        allowance, _ = next_allowance(profile, plain, BUDGET, FP32)
        free, _ = next_allowance(profile, [control(FP32, 0.8)], BUDGET, FP32)
        assert allowance is not None and free is not None and 0 < allowance < 0.5 * free
