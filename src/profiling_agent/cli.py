"""The command line: one subcommand per stage, and no logic.

Exit codes: ACCEPT 0, NO_GAIN 10, INFEASIBLE 11; what was given can't be used 2, a missing extra 3,
a folder that can't be written 4, a plan that can't be carried out 5, an interrupted run 130.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from profiling_agent.errors import BudgetError, ProfilingAgentError
from profiling_agent.records.base import describe_faults

if TYPE_CHECKING:
    from profiling_agent.records.common import Deployment

app = typer.Typer(
    name="profiling-agent",
    help="The fastest deployable form of a trained PyTorch model within an accuracy budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=(
        "Exit codes: ACCEPT 0, NO_GAIN 10, INFEASIBLE 11; unusable input 2, missing extra 3, "
        "folder not writable 4, plan can't be carried out 5, interrupted 130."
    ),
)


class Objective(StrEnum):
    latency = "latency"
    throughput = "throughput"
    size = "size"
    memory = "memory"


class EvidenceLevel(StrEnum):
    measured = "measured"
    proven = "proven"


Model = Annotated[
    str, typer.Argument(help="path/file.py:factory, demo:vit or demo:resnet", metavar="MODEL")
]
Weights = Annotated[str | None, typer.Option(help="weights: .safetensors, or .pt of plain tensors")]
Data = Annotated[
    str | None, typer.Option(help="path/file.py:factory or file.npz (demo models bring theirs)")
]
TestData = Annotated[
    str | None, typer.Option(help="test data of their own; else half of --data is kept for it")
]
BatchSize = Annotated[int, typer.Option(min=1, help="batch size of the deployment")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="threads of the deployment [what the cgroup grants]")
]
Seed = Annotated[int, typer.Option(min=0, help="seed of splits and search")]
Json = Annotated[bool, typer.Option("--json", help="print the record as JSON on stdout")]
MaxDrop = Annotated[float, typer.Option(help="points of accuracy that may be lost")]
TimeBudget = Annotated[str, typer.Option(help="such as 90s, 15m, 2h")]


@app.command()
def optimize(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    test_data: TestData = None,
    max_drop: MaxDrop = 0.5,
    time_budget: TimeBudget = "15m",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("result"),
    objective: Annotated[Objective, typer.Option(help="what to improve")] = Objective.latency,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    planner: Annotated[str, typer.Option(help="solver, uniform, random or greedy")] = "solver",
    runtime: Annotated[
        str, typer.Option(help="torch, onnxruntime or all, comma separated")
    ] = "all",
    evidence: Annotated[
        EvidenceLevel, typer.Option(help="measured, or demand proven")
    ] = EvidenceLevel.measured,
    max_trials: Annotated[int, typer.Option(min=0, help="plans to try at most")] = 12,
    seed: Seed = 0,
    restart: Annotated[bool, typer.Option(help="throw away the run in --out")] = False,
    json: Json = False,
) -> None:
    """Find, prove and hand over the best artefact within the budget."""
    from profiling_agent.loop import check_settings, optimize_workload
    from profiling_agent.planning.planner import find_planner
    from profiling_agent.records.common import Budget
    from profiling_agent.records.store import RunStore
    from profiling_agent.records.trial import EXIT_CODES, RunSettings
    from profiling_agent.report.live import open_progress
    from profiling_agent.report.terminal import render_run

    seconds = parse_duration(time_budget)
    settings = _record(
        lambda: RunSettings(
            budget=Budget(
                max_drop=max_drop,
                objective=objective.value,
                time_s=seconds,
                max_trials=max_trials,
                evidence=evidence.value,
            ),
            deployment=_deployment(batch_size, threads),
            planner=planner,
            runtimes=_runtimes(runtime),
            seed=seed,
        )
    )
    find_planner(planner)
    check_settings(settings)
    if restart:
        RunStore(out).clear()
    progress = open_progress(seconds)
    try:
        record = optimize_workload(
            model,
            data,
            settings,
            out=out,
            weights=weights,
            test_data=test_data,
            progress=progress,
        )
    except KeyboardInterrupt:
        typer.echo("interrupted; start the same command again to continue", err=True)
        raise typer.Exit(130) from None
    finally:
        progress.close()
    _show(record.to_json() if json else None, lambda: render_run(record, folder=out))
    if not json:
        typer.echo(f"report: {out / 'report.html'}")
    assert record.verdict is not None
    raise typer.Exit(EXIT_CODES[record.verdict.kind])


@app.command()
def profile(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="file for the profile record")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    time_budget: TimeBudget = "2m",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure costs, prunable groups and sensitivity; without data, costs only."""
    from profiling_agent import stages
    from profiling_agent.records.store import write_text
    from profiling_agent.report.profile_view import render_profile

    record = stages.profile(
        model,
        data,
        weights=weights,
        deployment=_deployment(batch_size, threads),
        seconds=parse_duration(time_budget),
        seed=seed,
    )
    if out is not None:
        write_text(out, record.to_json())
    _show(record.to_json() if json else None, lambda: render_profile(record))


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="a profile record", metavar="PROFILE")],
    out: Annotated[Path | None, typer.Option(help="file for the plan")] = None,
    run: Annotated[
        Path | None, typer.Option(help="a run folder, whose trials the planner learns from")
    ] = None,
    planner: Annotated[str, typer.Option(help="solver, uniform, random or greedy")] = "solver",
    max_drop: MaxDrop = 0.5,
    objective: Annotated[Objective, typer.Option(help="what to improve")] = Objective.latency,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    seed: Seed = 0,
) -> None:
    """Propose the next plan from a profile (and the trials of a run), and print it."""
    from profiling_agent import stages
    from profiling_agent.records.common import Budget
    from profiling_agent.records.profile import Profile
    from profiling_agent.records.store import write_text

    proposal = stages.propose(
        Profile.read(profile),
        planner=planner,
        budget=_record(lambda: Budget(max_drop=max_drop, objective=objective.value)),
        deployment=_deployment(batch_size, threads),
        history=stages.read_run(run).trials if run is not None else (),
        seed=seed,
    )
    if out is not None:
        write_text(out, proposal.plan.to_json())
    typer.echo(proposal.plan.to_json())


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Option(help="a plan file, see docs/plan-format.md")],
    out: Annotated[Path, typer.Option(help="folder for the artefact")],
    weights: Weights = None,
    data: Data = None,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Carry out a plan file and leave the artefact in --out."""
    from profiling_agent import stages
    from profiling_agent.records.plan import Plan
    from profiling_agent.report.stage_view import render_built

    built = stages.apply(
        model,
        data,
        Plan.read(plan),
        out,
        weights=weights,
        deployment=_deployment(batch_size, threads),
        seed=seed,
    )
    _show(built.to_json() if json else None, lambda: render_built(built, str(out)))


@app.command()
def evaluate(
    artefact: Annotated[Path, typer.Argument(help="an artefact folder", metavar="ARTEFACT")],
    model: Model,
    weights: Weights = None,
    data: Data = None,
    test_data: TestData = None,
    out: Annotated[Path | None, typer.Option(help="file for the evaluation record")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure an artefact beside the original: accuracy on the test split, latency, memory."""
    from profiling_agent import stages
    from profiling_agent.records.store import write_text
    from profiling_agent.report.stage_view import render_evaluation

    record = stages.evaluate(
        artefact,
        model,
        data,
        weights=weights,
        test_data=test_data,
        deployment=_deployment(batch_size, threads),
        seed=seed,
    )
    if out is not None:
        write_text(out, record.to_json())
    _show(record.to_json() if json else None, lambda: render_evaluation(record))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="the folder of a run", metavar="RUN")],
    json: Json = False,
) -> None:
    """Draw a run's report again, from its folder alone."""
    from profiling_agent import stages
    from profiling_agent.records.store import RunStore
    from profiling_agent.report.terminal import render_run
    from profiling_agent.run_state import save_record

    record = stages.read_run(run)
    save_record(RunStore(run), record)
    _show(record.to_json() if json else None, lambda: render_run(record, folder=run))


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``15m`` or ``2h``; ``BudgetError`` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 1.0 <= seconds <= 30 * 86400:
        raise BudgetError(f"The time budget {text!r} is not a duration; write 90s, 15m or 2h.")
    return seconds


def _deployment(batch_size: int, threads: int | None) -> Deployment:
    from profiling_agent.machine.threads import default_threads
    from profiling_agent.records.common import Deployment

    return _record(lambda: Deployment(batch_size=batch_size, threads=threads or default_threads()))


def _runtimes(text: str) -> tuple[str, ...]:
    from profiling_agent.deployment.runtimes import RUNTIMES, require_runtime

    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if names == ("all",):
        return tuple(RUNTIMES)
    for name in names:
        require_runtime(name)
    return names


def _record(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValidationError as error:
        words = re.sub(
            r"field '(?:\w+\.)*(\w+)'",
            lambda found: "--" + found[1].replace("_", "-"),
            describe_faults(error),
        )
        raise BudgetError(f"These settings can't be used: {words}.") from None


def _show(json: str | None, render: Callable[[], Any]) -> None:
    if json is not None:
        typer.echo(json)
        return
    from rich.console import Console

    Console().print(render())


def main() -> None:
    """Run the command line; errors of ours are one sentence on stderr and their exit code."""
    try:
        app()
    except ProfilingAgentError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
