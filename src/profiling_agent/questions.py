"""What the rules of acquisition can't settle, asked of a language model, as choices to be proven.

A model's answer is never believed: a normalisation is tried on labelled images and a shape by
calling forward, as those that the rules think of. What can't be read is sent back once with the
reason; after that, or without an answer, the rules stand alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from profiling_agent.acquisition.inputs import Suggest, Tried, forward_parameters
from profiling_agent.errors import LlmUnavailable
from profiling_agent.evaluation.alternatives import Alternative, alternative_of, is_another
from profiling_agent.llm.client import Client
from profiling_agent.llm.conversation import Conversation, Reply, Turn
from profiling_agent.llm.provider import open_provider
from profiling_agent.planning.agents.answer import MAX_ANSWER, json_in
from profiling_agent.planning.agents.folding import shown
from profiling_agent.records.base import describe_faults
from profiling_agent.records.llm import LlmSettings
from profiling_agent.records.workload import InputSpec, Preprocessing, WorkloadRecord

Ask = Callable[[Conversation], Reply]
PROMPTS = Path(__file__).parent / "prompts"
MAX_ANSWERS = 2
MAX_MODULES, MAX_CLASSES, MAX_ECHO = 80, 20, 2000
MAX_VALUES = 5_000_000
"""Of one sample of a shape that is tried: what it computes may take many times as much."""

T = TypeVar("T", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Way(_Strict):
    scale: float = Field(gt=0, le=1e6)
    mean: tuple[float, ...] = Field(default=(), max_length=4)
    std: tuple[float, ...] = Field(default=(), max_length=4)
    reversed: bool = False
    why: str = Field(default="", max_length=500)


class _Ways(_Strict):
    ways: tuple[_Way, ...] = Field(max_length=4)


class _Shape(_Strict):
    shape: tuple[int, ...] = Field(min_length=1, max_length=5)
    dtype: Literal["float32", "int64"] = "float32"
    why: str = Field(default="", max_length=500)


class _Shapes(_Strict):
    shapes: tuple[_Shape, ...] = Field(max_length=6)


def ask_preprocessing(
    ask: Ask, record: WorkloadRecord, images: np.ndarray, known: Sequence[Alternative]
) -> tuple[list[Alternative], list[str]]:
    """Normalisations that a model thinks of, other than the stated and the known ones; and what
    became of its answer, in words. ``images`` are raw (samples, ...)."""
    stated = record.preprocessing
    text = _preprocessing_facts(record, images, known)
    found, notes = _asked(ask, "preprocessing", text, _Ways)
    others: list[Alternative] = []
    for way in found.ways if found is not None else ():
        lengths = {len(each) for each in (way.mean, way.std)} - {0, 1}
        channels = _num_channels(stated, images)
        misfits = lengths - {channels} or (way.reversed and channels != 3)
        if misfits or any(value <= 0 for value in way.std):
            notes.append("a normalisation was left out: its numbers don't fit the channels")
            continue
        other = alternative_of(
            stated, "as a language model thinks", way.scale, way.mean, way.std, way.reversed
        )
        top = 255.0 if images.max() > 1.5 else 1.0
        if all(is_another(each, other, top) for each in (_as_stated(stated), *known, *others)):
            others.append(other)
    return others, notes


def ask_shapes(ask: Ask, model: nn.Module, tried: Sequence[Tried]) -> list[InputSpec]:
    """Shapes of the first input that a model thinks of, other than those that failed."""
    found, _notes = _asked(ask, "input_shape", _model_facts(model, tried), _Shapes)
    parameters, _ = forward_parameters(model)
    known = {(each.spec.shape, each.spec.dtype) for each in tried}
    specs: list[InputSpec] = []
    for each in found.shapes if found is not None else ():
        size = 1
        for side in each.shape:
            size *= max(side, 0)
        if 0 < size <= MAX_VALUES and (each.shape, each.dtype) not in known:
            name = parameters[0] if parameters else "x"
            specs.append(
                InputSpec(
                    name=name, shape=each.shape, dtype=each.dtype, found_by="a language model"
                )
            )
    return specs


def suggester(ask: Ask | None) -> Suggest | None:
    """What acquisition calls where the shapes that it thinks of have all failed."""
    return None if ask is None else partial(ask_shapes, ask)


def asker(settings: LlmSettings | None) -> Ask | None:
    """The way to a language model, or to none; raises what ``open_provider`` raises."""
    if settings is None:
        return None
    return Client(open_provider(settings), settings.limits, None).ask


def _asked(ask: Ask, name: str, text: str, kind: type[T]) -> tuple[T | None, list[str]]:
    """The answer as a record, or ``None``; and in words why there is none."""
    conversation = Conversation(
        agent=name,
        instructions=_instructions(name),
        turns=(Turn(role="user", text=text),),
        schema=kind.model_json_schema(),
    )
    reason = ""
    for _ in range(MAX_ANSWERS):
        try:
            reply = ask(conversation)
        except LlmUnavailable as error:
            return None, [f"the language model gave no answer: {error}"]
        value, _changed = json_in(reply.text[:MAX_ANSWER])
        try:
            return kind.model_validate(value), []
        except ValidationError as error:
            faults = describe_faults(error) if value is not None else "it is not JSON"
            reason = f"The answer can't be used: {shown(faults)}."
        except RecursionError:
            reason = "The answer is nested too deeply."
        conversation = conversation.extended(
            Turn(role="assistant", text=reply.text[:MAX_ECHO] or "…"),
            Turn(role="user", text=f"{reason} Answer again, with the whole object."),
        )
    return None, [f"the language model's answers could not be used: {reason}"]


@cache
def _instructions(name: str) -> str:
    return (PROMPTS / f"{name}.md").read_text(encoding="utf-8").strip()


def _preprocessing_facts(
    record: WorkloadRecord, images: np.ndarray, known: Sequence[Alternative]
) -> str:
    axis = {"hw": None, "chw": 1, "hwc": -1}.get(record.preprocessing.layout)
    moved = images[:, None] if axis is None else np.moveaxis(images, axis, 1)
    channels = np.moveaxis(moved, 1, 0).reshape(moved.shape[1], -1).astype(np.float64)
    rows = [
        f"channel {i}: from {each.min():.4g} to {each.max():.4g}, mean {each.mean():.4g}, "
        f"deviation {each.std():.4g}"
        for i, each in enumerate(channels)
    ]
    names = [shown(name) for name in record.task.class_names[:MAX_CLASSES]]
    source = record.source
    return "\n".join(
        [
            "MODEL",
            shown(source.model or "a live object"),
            f"weights: {shown(source.weights or 'not named')}",
            f"{record.num_parameters:,} parameters, input "
            + ", ".join(str(list(spec.shape)) for spec in record.inputs),
            "CLASSES",
            ", ".join(names) or "without names",
            "DATA",
            f"{images.dtype} {record.preprocessing.layout}",
            *rows,
            "STATED",
            _in_numbers(record.preprocessing),
            "KNOWN",
            *(
                f"{_in_numbers(each.preprocessing)}{', reversed' if each.reverses else ''}"
                for each in known
            ),
        ]
    )


def _in_numbers(preprocessing: Preprocessing) -> str:
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    return f"scale {preprocessing.scale:.6g}, mean {mean}, std {std}"


def _model_facts(model: nn.Module, tried: Sequence[Tried]) -> str:
    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    rows = [f"{shown(name or '(the model)')}: {shown(repr(leaf))}" for name, leaf in leaves]
    more = [f"and {len(rows) - MAX_MODULES} more"] if len(rows) > MAX_MODULES else []
    try:
        signature = str(inspect.signature(model.forward))
    except (TypeError, ValueError):
        signature = "not known"
    failed = [f"{list(t.spec.shape)} {t.spec.dtype}: {shown(t.error)}" for t in tried]
    return "\n".join(
        [
            "MODULES", *rows[:MAX_MODULES], *more,
            "FORWARD", shown(signature),
            "TRIED", *(failed or ["nothing"]),
        ]
    )  # fmt: skip


def _num_channels(stated: Preprocessing, images: np.ndarray) -> int:
    return {"hw": 1, "chw": images.shape[1]}.get(stated.layout, int(images.shape[-1]))


def _as_stated(stated: Preprocessing) -> Alternative:
    return Alternative(name="as stated", preprocessing=stated, next_step="")
