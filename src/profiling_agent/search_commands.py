"""The commands that search: ``optimize`` for one model, ``ablate`` to compare planners on it.

Both take a budget, language models to ask and the runtimes to search among, show what goes on, and
can be interrupted and continued. ``cli.py`` registers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from profiling_agent.flags import (
    AnswerTime,
    BatchSize,
    EvidenceLevel,
    Json,
    Objective,
    Seed,
    Threads,
    TimeBudget,
    advisor,
    deployment_of,
    listed,
    model_and_url,
    parse_duration,
    planner_of_recipe,
    record_of,
    runtimes_of,
    show,
    takes_request,
)

if TYPE_CHECKING:
    from profiling_agent.acquisition.request import Request
    from profiling_agent.report.live import Progress


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
    llm_timeout: AnswerTime = "60s",
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
        timeout=llm_timeout,
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
            deployment=deployment_of(batch_size, threads),
            planner=planner_name(planner_of_recipe(recipe, planner), asked),
            llm=asked,
            runtimes=runtimes_of(runtime),
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
    show(record.to_json() if json else None, lambda: render_run(record, folder=out))
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
    llm_timeout: AnswerTime = "60s",
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
            timeout=llm_timeout,
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
            deployment=deployment_of(batch_size, threads),
            runtimes=runtimes_of(runtime),
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
    show(record.to_json() if json else None, lambda: render_ablation(record))
    if not json:
        typer.echo(f"report: {out / 'ablation.html'}")
