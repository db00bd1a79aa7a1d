"""The front door in Python: what the command line does, as three functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import nn

from profiling_agent import loop, stages
from profiling_agent.acquisition.request import Request
from profiling_agent.deployment.artefact import ServedModel, open_artefact
from profiling_agent.deployment.runtimes import RUNTIMES, require_runtime
from profiling_agent.errors import BudgetError
from profiling_agent.machine.threads import default_threads
from profiling_agent.planning.planner import planner_name
from profiling_agent.preconditions import default_drop
from profiling_agent.questions import asker
from profiling_agent.records.base import describe_faults
from profiling_agent.records.common import Budget, Deployment, Evidence, Objective
from profiling_agent.records.llm import LlmLimits, LlmSettings
from profiling_agent.records.profile import Profile
from profiling_agent.records.trial import RunRecord, RunSettings
from profiling_agent.records.workload import Overrides
from profiling_agent.report.live import open_progress


def optimize(
    model: str | nn.Module,
    data: object | None = None,
    max_drop: float | None = None,
    *,
    out: str | Path,
    weights: str | None = None,
    test_data: object | None = None,
    classes: str | None = None,
    answers: Literal["all", "present"] = "all",
    metric: str | Callable[..., Any] = "accuracy",
    higher_is_better: bool = True,
    preprocessing: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    objective: Objective = "latency",
    batch_size: int = 1,
    threads: int | None = None,
    time_budget: float = 900.0,
    max_trials: int = 12,
    planner: str = "auto",
    llm: str | LlmSettings | None = None,
    llm_base_url: str | None = None,
    llm_timeout: float | None = None,
    runtimes: Sequence[str] | None = None,
    evidence: Evidence = "measured",
    seed: int = 0,
    show_progress: bool = True,
) -> RunRecord:
    """Search for the best artefact within ``max_drop`` (None: half a point); see ``out/artefact``.

    ``model`` is a live module or a reference such as ``timm:resnet18``, ``hf:NAME``,
    ``model.py:factory`` or ``demo:vit``; ``data`` a dataset, a loader, a pair of arrays, a
    dictionary of splits, or a reference (a folder of images, a file, ``data.py:factory``).
    ``metric`` is accuracy or agreement, both in points, or a function ``(outputs, targets)`` that
    gives a score for each sample or one for all; ``preprocessing`` overrides what the model states
    (mean, std, scale, mode, resize, crop, interpolation). ``time_budget`` is in seconds;
    ``llm`` names a language model that proposes plans (``openai:gpt-4o``, keys from the environment
    alone; an ``LlmSettings`` has the limits too), of which one answer may take ``llm_timeout``
    seconds (None: 60); ``planner`` auto is then ``hybrid``, else ``solver``.
    ``threads`` None takes what the machine grants, ``runtimes`` None all that are installed. Raises
    the errors of ``profiling_agent.errors``.

        result = optimize(model, data, max_drop=0.5, out="result")
    """
    if runtimes is not None:
        runtimes = (runtimes,) if isinstance(runtimes, str) else tuple(runtimes)
        for name in runtimes:
            require_runtime(name)
    request = _request(
        model,
        data,
        preprocessing,
        test_data=test_data,
        weights=weights,
        classes=classes,
        answers=answers,
        metric=metric,
        higher_is_better=higher_is_better,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    advisor = _advisor(llm, llm_base_url, llm_timeout)
    try:
        settings = RunSettings(
            budget=Budget(
                max_drop=default_drop(max_drop, request.unit),
                unit=request.unit,
                objective=objective,
                time_s=time_budget,
                max_trials=max_trials,
                evidence=evidence,
            ),
            deployment=Deployment(batch_size=batch_size, threads=threads or default_threads()),
            planner=planner_name(planner, advisor),
            llm=advisor,
            runtimes=tuple(RUNTIMES) if runtimes is None else runtimes,
            seed=seed,
        )
    except ValidationError as error:
        raise _unusable(error) from None
    progress = open_progress(
        time_budget, mode="auto" if show_progress else "silent", unit=request.unit
    )
    try:
        return loop.optimize_workload(request, settings, out=Path(out), progress=progress)
    finally:
        progress.close()


def profile(
    model: str | nn.Module,
    data: object | None = None,
    *,
    weights: str | None = None,
    classes: str | None = None,
    metric: str | Callable[..., Any] = "accuracy",
    preprocessing: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
    batch_size: int = 1,
    threads: int | None = None,
    seconds: float = 120.0,
    llm: str | LlmSettings | None = None,
    llm_base_url: str | None = None,
    llm_timeout: float | None = None,
) -> Profile:
    """Costs of every module and group, latency against width, and accuracy sensitivity.

    Arguments as in ``optimize``; ``seconds`` are about what it may take. A language model that
    ``llm`` names is asked for the input's shape alone, and only where none that is probed works;
    what it answers is tried by calling the model.

        record = profile(model, llm="openai:gpt-4o")
    """
    request = _request(
        model,
        data,
        preprocessing,
        weights=weights,
        classes=classes,
        metric=metric,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    ask = asker(_advisor(llm, llm_base_url, llm_timeout))
    try:
        deployment = Deployment(batch_size=batch_size, threads=threads or default_threads())
    except ValidationError as error:
        raise _unusable(error) from None
    return stages.profile(request, deployment=deployment, seconds=seconds, ask=ask)


def _request(
    model: str | nn.Module,
    data: object | None,
    preprocessing: Mapping[str, Any] | None,
    **named: Any,
) -> Request:
    try:
        overrides = Overrides(**dict(preprocessing or {}))
    except ValidationError as error:
        raise _unusable(error) from None
    return Request(model=model, data=data, overrides=overrides, **named)


def _advisor(
    llm: str | LlmSettings | None, base_url: str | None, timeout_s: float | None
) -> LlmSettings | None:
    """Whom to ask, or nobody; ``BudgetError`` for settings that go with no model's name."""
    if llm is None and base_url is not None:
        raise BudgetError("llm_base_url names an endpoint; name the model there with llm.")
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise BudgetError(f"llm_timeout={timeout_s!r} is no number of seconds; pass one like 60.")
    if not isinstance(llm, str):
        if llm is not None and (base_url is not None or timeout_s is not None):
            raise BudgetError(
                "llm_base_url and llm_timeout go with the name of a model; the LlmSettings in llm "
                "have a base_url and limits of their own."
            )
        return llm
    limits = LlmLimits() if timeout_s is None else LlmLimits(request_timeout_s=timeout_s)
    try:
        return LlmSettings(model=llm, base_url=base_url, limits=limits)
    except ValidationError as error:
        raise _unusable(error) from None


def _unusable(error: ValidationError) -> BudgetError:
    return BudgetError(f"These settings can't be used: {describe_faults(error)}.")


def load(artefact: str | Path, threads: int | None = None) -> ServedModel:
    """Open an artefact as its ``serve.py`` does: ``load("result/artefact").predict(images)``."""
    return open_artefact(Path(artefact), threads)
