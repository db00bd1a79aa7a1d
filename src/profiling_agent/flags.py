"""Flags that several commands share, how their texts become values, and what ``--json`` prints."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from pydantic import ValidationError

from profiling_agent.errors import BudgetError
from profiling_agent.records.base import describe_faults

if TYPE_CHECKING:
    from profiling_agent.acquisition.request import Request
    from profiling_agent.records.common import Deployment
    from profiling_agent.records.llm import LlmSettings


class Objective(StrEnum):
    latency = "latency"
    throughput = "throughput"
    size = "size"
    memory = "memory"


class EvidenceLevel(StrEnum):
    measured = "measured"
    proven = "proven"


class Answers(StrEnum):
    all = "all"
    present = "present"


class Mode(StrEnum):
    RGB = "RGB"
    BGR = "BGR"
    L = "L"


class Interpolation(StrEnum):
    nearest = "nearest"
    bilinear = "bilinear"
    bicubic = "bicubic"
    lanczos = "lanczos"
    box = "box"
    hamming = "hamming"


BatchSize = Annotated[int, typer.Option(min=1, help="batch size of the deployment")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="threads of the deployment [what the cgroup grants]")
]
Seed = Annotated[int, typer.Option(min=0, help="seed of splits and search")]
Json = Annotated[bool, typer.Option("--json", help="print the record as JSON on stdout")]
Advisor = Annotated[
    str | None,
    typer.Option(help="language model asked where rules don't settle it; see optimize --help"),
]
AdvisorUrl = Annotated[
    str | None, typer.Option(help="any endpoint that speaks OpenAI's chat completions")
]
TimeBudget = Annotated[str, typer.Option(help="such as 90s, 15m, 2h")]


def _check_answer_time(text: str) -> str:
    """Also where nobody is asked: a duration that is none is never passed over."""
    parse_duration(text, "--llm-timeout")
    return text


AnswerTime = Annotated[
    str,
    typer.Option(callback=_check_answer_time, help="that one of its answers may take: 60s, 5m"),
]


def _use_config(context: typer.Context, given: Path | None) -> Path | None:
    from profiling_agent.config import use_config

    return use_config(context, given)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_use_config,
        help="settings of all commands [profiling-agent.toml, where there is one]",
    ),
]


def request_flags(
    model: Annotated[
        str,
        typer.Argument(
            help="hf:NAME or hf:FOLDER, timm:NAME, torchvision:NAME, path/file.py:factory, "
            "demo:vit or demo:resnet",
            metavar="MODEL",
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(help=".safetensors, or .pt of plain tensors, or random [pretrained]"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="a folder of images, cifar10:PATH, cifar100:PATH, an .npz, .parquet, .csv, .tsv "
            "or .jsonl file, a saved Hugging Face dataset, or path/file.py:factory (demo models "
            "bring theirs)"
        ),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option(help="test data of their own; else half of --data is kept for it")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="file with one class a line, by the model's numbering")
    ] = None,
    answers: Annotated[
        Answers, typer.Option(help="may a prediction be any class, or only one present in the data")
    ] = Answers.all,
    metric: Annotated[
        str, typer.Option(help="accuracy, agreement (needs no labels), or path/file.py:function")
    ] = "accuracy",
    higher_is_better: Annotated[
        bool,
        typer.Option("--higher-is-better/--lower-is-better", help="of a metric of your own"),
    ] = True,
    mean: Annotated[
        str | None, typer.Option(help="of the pixels after scaling, such as 0.5,0.5,0.5")
    ] = None,
    std: Annotated[str | None, typer.Option(help="likewise")] = None,
    scale: Annotated[
        float | None, typer.Option(help="factor on the bytes before mean and std, such as 0.00392")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="shorter side of images, or HEIGHTxWIDTH")
    ] = None,
    crop: Annotated[
        str | None, typer.Option(help="side of the middle that is cut out, or HEIGHTxWIDTH")
    ] = None,
    interpolation: Annotated[
        Interpolation | None, typer.Option(help="how images are resized")
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="channels of decoded images")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens of a text at most [the model's, up to 512]")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="let an hf: model run code of its own")
    ] = False,
    config: Config = None,
) -> Request:
    """What model and data are meant, and how they are to be read."""
    from profiling_agent.acquisition.request import Request
    from profiling_agent.records.workload import Overrides

    overrides = record_of(
        lambda: Overrides(
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
            scale=scale,
            resize=_size("--resize", resize),
            crop=_pair(_size("--crop", crop)),
            interpolation=interpolation.value if interpolation else None,
            mode=mode.value if mode else None,
        )
    )
    return Request(
        model=model,
        data=data,
        test_data=test_data,
        weights=weights,
        classes=classes,
        answers=answers.value,
        metric=metric,
        higher_is_better=higher_is_better,
        overrides=overrides,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that has a parameter ``request`` the flags that make one."""
    flags = _parameters(request_flags)
    own = _parameters(command)
    place = next(index for index, each in enumerate(own) if each.name == "request")

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        request = request_flags(**{each.name: given.pop(each.name) for each in flags})
        command(request=request, **given)

    # Parameters without a default come first: MODEL, then what the command itself demands.
    every = [*own[:place], *flags, *own[place + 1 :]]
    ordered = sorted(every, key=lambda each: each.default is not inspect.Parameter.empty)
    ordered = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in ordered]
    wrapped.__signature__ = inspect.Signature(ordered)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {each.name: each.annotation for each in ordered}
    return wrapped


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    names = {
        **globals(),
        **function.__globals__,
        "Request": Any,
    }  # what is only imported for the type checker
    hints = get_type_hints(function, globalns=names, include_extras=True)
    return [
        each.replace(annotation=hints[each.name])
        for each in inspect.signature(function).parameters.values()
    ]


def parse_duration(text: str, what: str = "The time budget") -> float:
    """Seconds of ``90``, ``90s``, ``15m`` or ``2h``; ``BudgetError`` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 1.0 <= seconds <= 30 * 86400:
        raise BudgetError(f"{what} {text!r} is not a duration; write 90s, 15m or 2h.")
    return seconds


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """``0.5,0.5,0.5`` as numbers; ``BudgetError`` for anything else."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in re.split(r"[\s,]+", text.strip()))
    except ValueError:
        raise BudgetError(f"{flag} {text!r} is not a list of numbers; write 0.5,0.5,0.5.") from None


def _size(flag: str, text: str | None) -> int | tuple[int, int] | None:
    """``256`` as a side, ``240x320`` as (height, width); ``BudgetError`` for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text.strip())
    if found is None:
        raise BudgetError(f"{flag} {text!r} is not a size; write 256 or HEIGHTxWIDTH.")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def record_of(make: Callable[[], Any]) -> Any:
    """The record, or ``BudgetError`` that names each flag at fault."""
    try:
        return make()
    except ValidationError as error:
        words = re.sub(
            r"field '(?:\w+\.)*(\w+)'",
            lambda found: "--" + found[1].replace("_", "-"),
            describe_faults(error),
        )
        raise BudgetError(f"These settings can't be used: {words}.") from None


def listed(flag: str, text: str) -> tuple[str, ...]:
    """Names separated by commas, each once; ``BudgetError`` for none."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise BudgetError(f"{flag} names nothing.")
    return names


def advisor(
    model: str | None,
    base_url: str | None,
    *,
    max_requests: int = 60,
    max_tokens: int = 400_000,
    max_answer_tokens: int = 8000,
    max_cost_usd: float | None = None,
    timeout: str = "60s",
    **asked: Any,
) -> LlmSettings | None:
    """Whom to ask for plans, or nobody; ``BudgetError`` for an endpoint without a model."""
    from profiling_agent.records.llm import LlmLimits, LlmSettings

    if model is None:
        if base_url is not None:
            raise BudgetError("--llm-base-url names an endpoint; name the model there with --llm.")
        return None
    return record_of(
        lambda: LlmSettings(
            model=model,
            base_url=base_url,
            limits=LlmLimits(
                max_requests=max_requests,
                max_tokens=max_tokens,
                max_answer_tokens=max_answer_tokens,
                max_cost_usd=max_cost_usd,
                request_timeout_s=parse_duration(timeout, "--llm-timeout"),
            ),
            **asked,
        )
    )


def model_and_url(text: str) -> tuple[str, str | None]:
    """``MODEL@URL`` in its parts; a model's name may hold other signs of that kind."""
    model, _, rest = text.partition("@http")
    return model, f"http{rest}" if rest else None


def planner_of_recipe(recipe: str | None, planner: str) -> str:
    """The planner that a recipe stands for."""
    if recipe is None:
        return planner
    if recipe != "paper":
        raise BudgetError(f"There is no recipe {recipe!r}; there is 'paper'.")
    if planner not in ("auto", "paper"):
        raise BudgetError(f"--recipe paper brings its own planner; leave out --planner {planner}.")
    return "paper"


def deployment_of(batch_size: int, threads: int | None) -> Deployment:
    """Where the artefact is to run; without a number, with the threads that the cgroup grants."""
    from profiling_agent.machine.threads import default_threads
    from profiling_agent.records.common import Deployment

    return record_of(
        lambda: Deployment(batch_size=batch_size, threads=threads or default_threads())
    )


def runtimes_of(text: str) -> tuple[str, ...]:
    """The runtimes that ``--runtime`` names; an error of ours for one that can't be used."""
    from profiling_agent.deployment.runtimes import RUNTIMES, require_runtime

    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if names in (("auto",), ("all",)):
        return tuple(RUNTIMES)
    for name in names:
        require_runtime(name)
    return names


def show(json: str | None, render: Callable[[], Any]) -> None:
    """Print the JSON that was asked for, else what ``render`` draws for people."""
    if json is not None:
        typer.echo(json)
        return
    from rich.console import Console

    Console().print(render())
