"""The command line: one subcommand per stage, and no logic.

Exit codes: ACCEPT 0, NO_GAIN 10, INFEASIBLE 11, problems found by check or measure 12; what was
given can't be used 2, a missing extra 3, a folder that can't be written 4, a plan that can't be
carried out 5, an interrupted run 130.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from profiling_agent.errors import ProfilingAgentError
from profiling_agent.flags import (
    Advisor,
    AdvisorUrl,
    BatchSize,
    Config,
    EvidenceLevel,
    Json,
    Objective,
    Seed,
    Threads,
    TimeBudget,
    advisor,
    listed,
    model_and_url,
    parse_duration,
    planner_of_recipe,
    record_of,
    takes_request,
)

if TYPE_CHECKING:
    from profiling_agent.acquisition.request import Request
    from profiling_agent.records.common import Deployment
    from profiling_agent.report.live import Progress

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


@app.command()
@takes_request
def optimize(
    request: Request,
    max_drop: Annotated[
        float | None,
        typer.Option(help="what may be lost, in the metric's unit [0.5 points]"),
    ] = None,
    time_budget: TimeBudget = "15m",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("result"),
    objective: Annotated[Objective, typer.Option(help="what to improve")] = Objective.latency,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    planner: Annotated[
        str,
        typer.Option(
            help="auto (hybrid with --llm, else solver), solver, llm, hybrid, tpe, uniform, random "
            "or greedy"
        ),
    ] = "auto",
    llm: Annotated[
        str | None,
        typer.Option(
            help="language model that proposes plans: openai:NAME, anthropic:NAME, google:NAME, "
            "ollama:NAME, replay:TRANSCRIPT; keys from the environment"
        ),
    ] = None,
    llm_base_url: Annotated[
        str | None, typer.Option(help="any endpoint that speaks OpenAI's chat completions")
    ] = None,
    llm_tools: Annotated[bool, typer.Option(help="let the model call tools, where it can")] = True,
    llm_prompt: Annotated[
        str, typer.Option(help="wording of its instructions: default, terse or stepwise")
    ] = "default",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="plans asked of it; 1 is the paper's single shot")
    ] = None,
    max_llm_requests: Annotated[int, typer.Option(min=1, help="requests to it at most")] = 60,
    max_llm_tokens: Annotated[int, typer.Option(min=1, help="tokens, in and out")] = 400_000,
    max_llm_answer: Annotated[int, typer.Option(min=50, help="tokens of one answer")] = 8000,
    max_llm_cost: Annotated[
        float | None, typer.Option(help="dollars, for models with a known price [no limit]")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="paper: ProfilingAgent's own way, to compare (2509.05584); needs --llm"),
    ] = None,
    runtime: Annotated[
        str,
        typer.Option(
            help="auto (every one that is installed), or some of openvino, onnxruntime and torch, "
            "comma separated"
        ),
    ] = "auto",
    evidence: Annotated[
        EvidenceLevel, typer.Option(help="measured, or demand proven")
    ] = EvidenceLevel.measured,
    max_trials: Annotated[int, typer.Option(min=0, help="plans to try at most")] = 12,
    seed: Seed = 0,
    restart: Annotated[bool, typer.Option(help="throw away the run in --out")] = False,
    json: Json = False,
) -> None:
    """Find, prove and hand over the best artefact within the budget."""
    from profiling_agent.loop import optimize_workload
    from profiling_agent.planning.planner import find_planner, planner_name
    from profiling_agent.preconditions import check_settings, default_drop
    from profiling_agent.records.common import Budget
    from profiling_agent.records.store import RunStore
    from profiling_agent.records.trial import EXIT_CODES, RunSettings
    from profiling_agent.report.terminal import render_run
    from profiling_agent.run_state import is_finished

    seconds = parse_duration(time_budget)
    asked = advisor(
        llm,
        llm_base_url,
        use_tools=llm_tools,
        prompt=llm_prompt,
        rounds=rounds,
        max_requests=max_llm_requests,
        max_tokens=max_llm_tokens,
        max_answer_tokens=max_llm_answer,
        max_cost_usd=max_llm_cost,
    )
    settings = record_of(
        lambda: RunSettings(
            budget=Budget(
                max_drop=default_drop(max_drop, request.unit),
                unit=request.unit,
                objective=objective.value,
                time_s=seconds,
                max_trials=max_trials,
                evidence=evidence.value,
            ),
            deployment=_deployment(batch_size, threads),
            planner=planner_name(planner_of_recipe(recipe, planner), asked),
            llm=asked,
            runtimes=_runtimes(runtime),
            seed=seed,
        )
    )
    if restart or not is_finished(RunStore(out)):
        find_planner(settings.planner, settings.llm, RunStore(out).transcript)
    check_settings(settings)
    if restart:
        RunStore(out).clear()
    with _watched(seconds, request.unit) as progress:
        record = optimize_workload(request, settings, out=out, progress=progress)
    _show(record.to_json() if json else None, lambda: render_run(record, folder=out))
    if not json:
        typer.echo(f"report: {out / 'report.html'}")
    assert record.verdict is not None
    raise typer.Exit(EXIT_CODES[record.verdict.kind])


@contextmanager
def _watched(seconds: float, unit: str) -> Iterator[Progress]:
    """A display of what goes on; an interrupt ends with the word that it can be continued."""
    from profiling_agent.report.live import open_progress

    progress = open_progress(seconds, unit=unit)
    try:
        yield progress
    except KeyboardInterrupt:
        typer.echo("interrupted; start the same command again to continue", err=True)
        raise typer.Exit(130) from None
    finally:
        progress.close()


@app.command()
@takes_request
def ablate(
    request: Request,
    max_drop: Annotated[
        float | None,
        typer.Option(help="what may be lost, in the metric's unit [0.5 points]"),
    ] = None,
    planners: Annotated[
        str,
        typer.Option(
            help="comma separated [random,uniform,greedy,tpe,solver, and llm,hybrid,paper with "
            "--llm]"
        ),
    ] = "auto",
    trials: Annotated[int, typer.Option(min=1, help="plans of each planner and seed")] = 8,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="times each planner searches")] = 2,
    time_budget: Annotated[str, typer.Option(help="of the whole comparison")] = "1h",
    out: Annotated[Path, typer.Option(help="folder of the comparison")] = Path("ablation"),
    llm: Annotated[
        str | None,
        typer.Option(
            help="language models, comma separated; MODEL@URL for an endpoint that speaks "
            "OpenAI's chat completions"
        ),
    ] = None,
    llm_prompts: Annotated[
        str, typer.Option(help="wordings, comma separated, one arm each: default,terse,stepwise")
    ] = "default",
    max_llm_requests: Annotated[int, typer.Option(min=1, help="requests of each arm")] = 60,
    max_llm_tokens: Annotated[int, typer.Option(min=1, help="of each arm, in and out")] = 400_000,
    max_llm_answer: Annotated[int, typer.Option(min=50, help="tokens of one answer")] = 8000,
    max_llm_cost: Annotated[
        float | None, typer.Option(help="dollars of each arm, where the price is known [no limit]")
    ] = None,
    objective: Annotated[Objective, typer.Option(help="what to improve")] = Objective.latency,
    batch_size: BatchSize = 1,
    threads: Threads = None,
    runtime: Annotated[
        str, typer.Option(help="auto, or some of openvino, onnxruntime and torch")
    ] = "auto",
    seed: Seed = 0,
    restart: Annotated[bool, typer.Option(help="throw away the comparison in --out")] = False,
    json: Json = False,
) -> None:
    """Compare planners on one model: same plans to choose from, as many trials for each."""
    from profiling_agent.ablation import ablation_settings, check_ablation, compare_planners
    from profiling_agent.preconditions import default_drop
    from profiling_agent.records.common import Budget
    from profiling_agent.records.store import RunStore
    from profiling_agent.report.ablation_view import render_ablation

    models = [
        advisor(
            *model_and_url(each),
            prompt=wording,
            max_requests=max_llm_requests,
            max_tokens=max_llm_tokens,
            max_answer_tokens=max_llm_answer,
            max_cost_usd=max_llm_cost,
        )
        for each in (listed("--llm", llm) if llm is not None else ())
        for wording in listed("--llm-prompts", llm_prompts)
    ]
    seconds = parse_duration(time_budget)
    settings = record_of(
        lambda: ablation_settings(
            Budget(
                max_drop=default_drop(max_drop, request.unit),
                unit=request.unit,
                objective=objective.value,
                max_trials=trials,
            ),
            deployment=_deployment(batch_size, threads),
            runtimes=_runtimes(runtime),
            planners=None if planners == "auto" else listed("--planners", planners),
            models=models,
            num_seeds=seeds,
            seed=seed,
            time_s=seconds,
        )
    )
    check_ablation(settings)
    if restart:
        RunStore(out).clear()
    with _watched(seconds, request.unit) as progress:
        record = compare_planners(request, settings, out=out, progress=progress)
    _show(record.to_json() if json else None, lambda: render_ablation(record))
    if not json:
        typer.echo(f"report: {out / 'ablation.html'}")


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
        deployment=_deployment(batch_size, threads),
        seconds=parse_duration(time_budget),
        seed=seed,
        ask=asker(advisor(llm, llm_base_url)),
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
        deployment=_deployment(batch_size, threads),
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
        deployment=_deployment(batch_size, threads),
        seed=seed,
    )
    _show(built.to_json() if json else None, lambda: render_built(built, str(out)))


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
        deployment=_deployment(batch_size, threads),
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
    _show(record.to_json() if json else None, lambda: render_evaluation(record, task))


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
    _show(record.to_json() if json else None, lambda: render_measurement(record))
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
    _show(record.to_json() if json else None, lambda: render_run(record, folder=run))


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
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Look at samples, the baseline and what may be wrong, within a minute."""
    from profiling_agent import checkup
    from profiling_agent.questions import asker
    from profiling_agent.report.check_view import render_check

    record = checkup.check(
        request,
        deployment=_deployment(batch_size, threads),
        out=out,
        seed=seed,
        ask=asker(advisor(llm, llm_base_url)),
    )
    _show(record.to_json() if json else None, lambda: render_check(record, folder=out))
    raise typer.Exit(12 if record.has_problems else 0)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="where to write", metavar="FOLDER")] = Path(),
) -> None:
    """Write a commented model.py, data.py and profiling-agent.toml to start from."""
    from profiling_agent.scaffold import write_project

    for path in write_project(folder):
        typer.echo(f"wrote {path}")


def _deployment(batch_size: int, threads: int | None) -> Deployment:
    from profiling_agent.machine.threads import default_threads
    from profiling_agent.records.common import Deployment

    return record_of(
        lambda: Deployment(batch_size=batch_size, threads=threads or default_threads())
    )


def _runtimes(text: str) -> tuple[str, ...]:
    from profiling_agent.deployment.runtimes import RUNTIMES, require_runtime

    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if names in (("auto",), ("all",)):
        return tuple(RUNTIMES)
    for name in names:
        require_runtime(name)
    return names


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
