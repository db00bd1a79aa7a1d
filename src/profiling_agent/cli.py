"""The command line: one subcommand per stage, and no logic.

Those that search are in ``search_commands.py``; this module has the others and the entry point.

Exit codes: ACCEPT 0, NO_GAIN 10, INFEASIBLE 11, problems found by check or measure 12; what was
given can't be used 2, a missing extra 3, a folder that can't be written 4, a plan that can't be
carried out 5, an interrupted run 130.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from profiling_agent.errors import ProfilingAgentError
from profiling_agent.flags import (
    Advisor,
    AdvisorUrl,
    AnswerTime,
    BatchSize,
    Config,
    Json,
    Objective,
    Seed,
    Threads,
    TimeBudget,
    advisor,
    deployment_of,
    parse_duration,
    record_of,
    show,
    takes_request,
)
from profiling_agent.search_commands import ablate, optimize

if TYPE_CHECKING:
    from profiling_agent.acquisition.request import Request

app = typer.Typer(
    name="profiling-agent",
    help="The fastest deployable form of a trained PyTorch model within an accuracy budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=(
        "Exit codes: ACCEPT 0, NO_GAIN 10, INFEASIBLE 11, problems found by check or measure 12; "
        "unusable input 2, missing extra 3, folder not writable 4, plan can't be carried out 5, "
        "interrupted 130."
    ),
)


app.command()(optimize)
app.command()(ablate)


@app.command()
@takes_request
def profile(
    request: Request,
    out: Annotated[Path | None, typer.Option(help="file for the profile record")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    time_budget: TimeBudget = "2m",
    llm: Advisor = None,
    llm_base_url: AdvisorUrl = None,
    llm_timeout: AnswerTime = "60s",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure costs, prunable groups and sensitivity; without data, costs only."""
    from profiling_agent import stages
    from profiling_agent.questions import asker
    from profiling_agent.records.store import write_text
    from profiling_agent.report.profile_view import render_profile

    record = stages.profile(
        request,
        deployment=deployment_of(batch_size, threads),
        seconds=parse_duration(time_budget),
        seed=seed,
        ask=asker(advisor(llm, llm_base_url, timeout=llm_timeout)),
    )
    if out is not None:
        write_text(out, record.to_json())
    show(record.to_json() if json else None, lambda: render_profile(record))


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="a profile record", metavar="PROFILE")],
    out: Annotated[Path | None, typer.Option(help="file for the plan")] = None,
    run: Annotated[
        Path | None, typer.Option(help="a run folder, whose trials the planner learns from")
    ] = None,
    planner: Annotated[str, typer.Option(help="solver, tpe, uniform, random or greedy")] = "solver",
    max_drop: Annotated[
        float | None, typer.Option(help="what may be lost [the run's, else 0.5 points]")
    ] = None,
    objective: Annotated[Objective, typer.Option(help="what to improve")] = Objective.latency,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    seed: Seed = 0,
    config: Config = None,
) -> None:
    """Propose the next plan from a profile (and the trials of a run), and print it."""
    from profiling_agent import stages
    from profiling_agent.records.common import DEFAULT_DROP, Budget
    from profiling_agent.records.profile import Profile
    from profiling_agent.records.store import write_text

    history = stages.read_run(run) if run is not None else None
    asked = history.settings.budget if history is not None else Budget(max_drop=DEFAULT_DROP)
    max_drop = asked.max_drop if max_drop is None else max_drop
    proposal = stages.propose(
        Profile.read(profile),
        planner=planner,
        budget=record_of(
            lambda: Budget(max_drop=max_drop, unit=asked.unit, objective=objective.value)
        ),
        deployment=deployment_of(batch_size, threads),
        history=history.trials if history is not None else (),
        seed=seed,
    )
    if out is not None:
        write_text(out, proposal.plan.to_json())
    typer.echo(proposal.plan.to_json())


@app.command()
@takes_request
def apply(
    request: Request,
    plan: Annotated[Path, typer.Option(help="a plan file, see docs/plan-format.md")],
    out: Annotated[Path, typer.Option(help="folder for the artefact")],
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
        request,
        Plan.read(plan),
        out,
        deployment=deployment_of(batch_size, threads),
        seed=seed,
    )
    show(built.to_json() if json else None, lambda: render_built(built, str(out)))


@app.command()
@takes_request
def evaluate(
    artefact: Annotated[Path, typer.Argument(help="an artefact folder", metavar="ARTEFACT")],
    request: Request,
    out: Annotated[Path | None, typer.Option(help="file for the evaluation record")] = None,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure an artefact beside the original: accuracy on the test split, latency, memory."""
    from profiling_agent import stages
    from profiling_agent.acquisition.metrics import name_of
    from profiling_agent.records.store import write_text
    from profiling_agent.records.workload import Task
    from profiling_agent.report.stage_view import render_evaluation

    record = stages.evaluate(
        artefact,
        request,
        deployment=deployment_of(batch_size, threads),
        seed=seed,
    )
    if out is not None:
        write_text(out, record.to_json())
    task = Task(
        metric=name_of(request.metric),
        unit=request.unit,
        higher_is_better=request.higher_is_better,
        num_classes=None,
    )
    show(record.to_json() if json else None, lambda: render_evaluation(record, task))


@app.command()
def measure(
    artefact: Annotated[Path, typer.Argument(help="an artefact folder", metavar="ARTEFACT")],
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="batch size of the deployment [as it was built for]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of the deployment [as it was built for]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file for the measurement record")] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Measure an artefact on the machine it is to run on; needs neither torch nor data."""
    from profiling_agent.measuring import measure as measure_artefact
    from profiling_agent.records.store import write_text
    from profiling_agent.report.measure_view import render_measurement

    record = measure_artefact(artefact, batch_size=batch_size, threads=threads)
    if out is not None:
        write_text(out, record.to_json())
    show(record.to_json() if json else None, lambda: render_measurement(record))
    raise typer.Exit(0 if record.agrees else 12)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="the folder of a run", metavar="RUN")],
    json: Json = False,
    config: Config = None,
) -> None:
    """Draw a run's report again, from its folder alone."""
    from profiling_agent import stages
    from profiling_agent.records.store import RunStore
    from profiling_agent.report.terminal import render_run
    from profiling_agent.run_state import save_record

    record = stages.read_run(run)
    save_record(RunStore(run), record)
    show(record.to_json() if json else None, lambda: render_run(record, folder=run))


@app.command()
@takes_request
def check(
    request: Request,
    out: Annotated[Path, typer.Option(help="folder for samples.png and check.json")] = Path(
        "check"
    ),
    batch_size: BatchSize = 1,
    threads: Threads = None,
    llm: Advisor = None,
    llm_base_url: AdvisorUrl = None,
    llm_timeout: AnswerTime = "60s",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Look at samples, the baseline and what may be wrong, within a minute."""
    from profiling_agent import checkup
    from profiling_agent.questions import asker
    from profiling_agent.report.check_view import render_check

    record = checkup.check(
        request,
        deployment=deployment_of(batch_size, threads),
        out=out,
        seed=seed,
        ask=asker(advisor(llm, llm_base_url, timeout=llm_timeout)),
    )
    show(record.to_json() if json else None, lambda: render_check(record, folder=out))
    raise typer.Exit(12 if record.has_problems else 0)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where to write", metavar="FOLDER")] = Path(),
) -> None:
    """Write a commented model.py, data.py and profiling-agent.toml to start from."""
    from profiling_agent.scaffold import write_project

    for path in write_project(folder):
        typer.echo(f"wrote {path}")


def main() -> None:
    """Run the command line; errors of ours are one sentence on stderr and their exit code."""
    try:
        app()
    except ProfilingAgentError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
