"""What the user asks to have acquired: references that any process can follow, or live objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from profiling_agent.acquisition.demo import DEMO_REFERENCE, is_demo
from profiling_agent.acquisition.factories import split_reference
from profiling_agent.acquisition.hubs.found import RANDOM_WEIGHTS, is_hub, local_folder
from profiling_agent.acquisition.metrics import digest_of, load_metric, name_of, unit_of
from profiling_agent.errors import DataError, ModelError
from profiling_agent.records.workload import Overrides, WorkloadSource

LIVE_METRIC = "a live function"
NO_OVERRIDES = Overrides()


@dataclass(frozen=True, kw_only=True)
class Request:
    """Model and data as the user gave them, and how they are to be read.

    ``model``: ``demo:vit``, ``hf:``, ``timm:`` or ``torchvision:`` and a name, a path
    ``file.py:factory``, or a live module. ``data``: a file, a folder, ``file.py:factory`` or live
    data; None for the demo's own, or for none. ``metric``: ``accuracy``, ``agreement``,
    ``file.py:function``, or the function itself.

    >>> Request(model="timm:resnet18", data="photos/", classes="classes.txt")
    """

    model: str | nn.Module
    data: object | None = None
    test_data: object | None = None
    weights: str | None = None
    classes: str | None = None
    answers: Literal["all", "present"] = "all"
    metric: str | Callable[..., Any] = "accuracy"
    higher_is_better: bool = True
    overrides: Overrides = NO_OVERRIDES
    max_length: int | None = None
    trust_remote_code: bool = False

    @property
    def is_live(self) -> bool:
        """Whether the model is an object that no other process can build."""
        return not isinstance(self.model, str)

    @property
    def unit(self) -> str:
        """The unit of what may be lost: points, or that of the user's own metric, if it has one."""
        return unit_of(self.metric)

    def source(self) -> WorkloadSource:
        """References with absolute paths, so that a process elsewhere finds the same.

        Raises ``ModelError``, ``DataError`` or ``BudgetError`` for what makes no sense in itself.
        """
        if not isinstance(self.model, str | nn.Module):
            raise ModelError(
                f"A {type(self.model).__name__!r} is not a model; pass an nn.Module, 'timm:NAME', "
                "'hf:NAME', 'torchvision:NAME', 'demo:vit' or 'path/file.py:factory'."
            )
        data = self.data
        if data is None and isinstance(self.model, str) and is_demo(self.model):
            data = DEMO_REFERENCE
        described = WorkloadSource(
            model=_absolute(self.model) if isinstance(self.model, str) else None,
            weights=self.weights if self.weights == RANDOM_WEIGHTS else _path(self.weights),
            data=_absolute(data),
            test_data=_absolute(self.test_data),
            classes=_path(self.classes),
            answers=self.answers,
            metric=_metric(self.metric),
            metric_name=name_of(self.metric),
            metric_sha256=digest_of(self.metric),
            unit=unit_of(self.metric),
            higher_is_better=self.higher_is_better,
            overrides=self.overrides,
            max_length=self.max_length,
            trust_remote_code=self.trust_remote_code,
        )
        is_same = described.data is not None and described.test_data == described.data
        if self.test_data is not None and (self.test_data is data or is_same):
            raise DataError("The test data are the data themselves; test samples must be others.")
        return described


def is_live_data(given: object | None) -> bool:
    """Whether data were given as an object, which a later run can't be compared with."""
    return given is not None and _absolute(given) is None


def _metric(metric: str | Callable[..., Any]) -> str:
    load_metric(metric)
    if not isinstance(metric, str):
        return LIVE_METRIC
    place = split_reference(metric)
    return metric if place is None else f"{place[0]}:{place[1]}"


def _path(given: str | None) -> str | None:
    return None if given is None else str(Path(given).expanduser().resolve())


def _absolute(reference: object) -> str | None:
    """A reference with its path made absolute; None for a live object."""
    if isinstance(reference, Path):
        reference = str(reference)
    if not isinstance(reference, str):
        return None
    if reference == DEMO_REFERENCE or is_demo(reference):
        return reference
    if is_hub(reference):
        folder = local_folder(reference)
        return reference if folder is None else f"hf:{folder}"
    place = split_reference(reference)
    if place is not None:
        return f"{place[0]}:{place[1]}"
    name, colon, path = reference.partition(":")
    if colon and name in ("cifar10", "cifar100"):
        return f"{name}:{_path(path)}"
    return _path(reference)
