"""The stages one by one: each reads records and writes records, so a person can stand between.

profile -> profile.json;  plan -> plan.json;  apply -> an artefact;  evaluate -> evaluation.json
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload
from profiling_agent.building import LocalBuilder
from profiling_agent.deployment.opened import check_artefact, read_manifest
from profiling_agent.deployment.runtimes import require_runtime
from profiling_agent.errors import ArtefactError, DataError, PlanError
from profiling_agent.evaluation.judge import find_judge
from profiling_agent.evaluation.measure import FINAL, race
from profiling_agent.evaluation.predictor import LivePredictor, Predictor, ProbeProcess
from profiling_agent.machine.processor import describe_machine
from profiling_agent.planning.check import check_budget, check_plan, demand_plan
from profiling_agent.planning.fits import check_fits
from profiling_agent.planning.planner import Proposal, find_planner
from profiling_agent.profiling.whole import profile_workload
from profiling_agent.questions import Ask, suggester
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.evaluation import BuiltArtefact, Evaluation
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore
from profiling_agent.records.trial import RunRecord, Trial
from profiling_agent.run_state import draw_record, read_state
from profiling_agent.trial import evaluation_of


@contextlib.contextmanager
def workload_of(
    request: Request, seed: int = 0, ask: Ask | None = None
) -> Iterator[tuple[Workload, Path]]:
    """A workload for the length of a block, its arrays in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="profiling-agent-") as name:
        folder = Path(name) / "data"
        yield acquire(request, folder=folder, seed=seed, suggest=suggester(ask)), folder


def profile(
    request: Request,
    *,
    deployment: Deployment | None = None,
    seconds: float = 120.0,
    seed: int = 0,
    ask: Ask | None = None,
) -> Profile:
    """Measure a model: costs by module and group, latency against width, sensitivity.

    Without data the inputs are random and sensitivity means nothing, so it is left out. Where no
    shape that is probed works, a language model that ``ask`` reaches may name others.
    """
    deployment = deployment or Deployment()
    with workload_of(request, seed, ask) as (workload, _folder):
        has_data = workload.record.source.data is not None or request.data is not None
        return profile_workload(
            workload, describe_machine(), deployment, seconds=seconds, with_sensitivity=has_data
        )


def propose(
    known: Profile,
    *,
    planner: str = "solver",
    budget: Budget,
    deployment: Deployment,
    history: tuple[Trial, ...] = (),
    seed: int = 0,
) -> Proposal:
    """The planner's next plan; ``PlanError`` when the profile doesn't fit or it has none.

    Without a history there are no controls to start from; then the plan is a first guess for the
    torch runtime, from what the profile measured in eager mode.
    """
    check_budget(budget)
    check_fits(known, describe_machine(), deployment)
    proposal = find_planner(planner).propose(known, history, budget, seed)
    if proposal is None:
        raise PlanError(
            f"The planner {planner!r} has no plan left: it knows no feasible start or has tried "
            "everything. Pass --run with a run folder, or another --planner."
        )
    tried = {trial.plan.plan_id for trial in history}
    reason = check_plan(proposal.plan, known, tried)
    if reason is not None:
        raise PlanError(f"The planner {planner!r} proposed a plan that can't be used: {reason}")
    return proposal


def apply(
    request: Request,
    plan: Plan,
    out: Path,
    *,
    deployment: Deployment | None = None,
    seed: int = 0,
) -> BuiltArtefact:
    """Carry a plan out and leave the artefact in ``out``.

    Raises ``PlanError`` with the reason when the plan doesn't fit the model, and ``DataError`` when
    it needs data and there are none, before anything is touched; ``TrialError`` when it can't be
    carried out.
    """
    deployment = deployment or Deployment()
    require_runtime(plan.runtime)
    with workload_of(request, seed) as (workload, _folder):
        if "search" not in workload.splits:
            _demand_no_data(plan)
        known = profile_workload(
            workload, describe_machine(), deployment, with_sensitivity=False, with_widths=False
        )
        demand_plan(plan, known)
        return LocalBuilder(workload).build(plan, out, deployment)


def _demand_no_data(plan: Plan) -> None:
    """``DataError`` for what random inputs would steer into nonsense."""
    if plan.pruning:
        raise DataError(
            "Pruning chooses and repairs units on calibration data; pass --data (labels are "
            "not looked at)."
        )
    if plan.quantization.is_static:
        raise DataError(
            f"The scheme {plan.quantization.scheme!r} takes the ranges of activations from "
            "calibration data; pass --data (labels are not looked at)."
        )


def evaluate(
    artefact: Path,
    request: Request,
    *,
    deployment: Deployment | None = None,
    seed: int = 0,
) -> Evaluation:
    """Measure an artefact beside the original on the test split; same protocol as the loop's."""
    built = check_artefact(artefact)
    deployment = deployment or Deployment()
    metric = load_metric(request.metric)
    with workload_of(request, seed) as (workload, folder):
        if "test" not in workload.splits:
            raise DataError("Evaluating needs labelled data; pass --data with images and labels.")
        _check_same_inputs(artefact, workload)
        judge = find_judge(workload.record.task, metric)
        with contextlib.ExitStack() as stack:
            original = _open_original(stack, request, workload, folder, deployment)
            mine = stack.enter_context(
                contextlib.closing(ProbeProcess.artefact(artefact, built.runtime, deployment))
            )
            before = judge.answers(original.logits(folder / "test"))
            original.pause()
            after = judge.answers(mine.logits(folder / "test"))
            accuracy = judge.score("test", after, workload.splits["test"].labels, before)
            times = race({"baseline": original, "artefact": mine}, folder / "calibration", FINAL)
            return evaluation_of("artefact", built, deployment, (accuracy,), times, mine)


def _open_original(
    stack: contextlib.ExitStack,
    request: Request,
    workload: Workload,
    folder: Path,
    deployment: Deployment,
) -> Predictor:
    predictor: Predictor = (
        LivePredictor(workload, deployment)
        if request.is_live
        else ProbeProcess.eager(folder, deployment)
    )
    stack.callback(predictor.close)
    return predictor


def _check_same_inputs(artefact: Path, workload: Workload) -> None:
    theirs = [(entry["name"], tuple(entry["shape"])) for entry in read_manifest(artefact)["inputs"]]
    ours = [(spec.name, spec.shape) for spec in workload.record.inputs]
    if theirs != ours:
        raise ArtefactError(
            f"The artefact takes inputs {theirs!r} and these data give {ours!r}. Pass the data it "
            "was made with."
        )


def read_run(folder: Path) -> RunRecord:
    """The record of a run, from its folder alone; ``PlanError`` when there is none."""
    store = RunStore(folder)
    state = read_state(store)
    if state.baseline is None or state.machine is None:
        raise PlanError(
            f"{str(folder)!r} holds no run that got as far as its baseline. Pass the folder that "
            "'profiling-agent optimize --out' named."
        )
    return draw_record(store, state)
