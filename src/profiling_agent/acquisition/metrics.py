"""The metric that the user asks for: one that is built in, or a function of their own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

from profiling_agent.acquisition.factories import import_object, split_reference
from profiling_agent.errors import BudgetError

BUILT_IN_METRICS = ("accuracy", "agreement")


def wants_classes(metric: str) -> bool:
    """Whether the metric compares classes, so that outputs must be a value for each of them."""
    return metric in BUILT_IN_METRICS


def load_metric(metric: str | Callable[..., Any]) -> Callable[..., Any] | None:
    """The user's function behind ``path/file.py:function``; None for a metric that is built in.

    ``BudgetError`` when there is none, before any time is spent.
    """
    if not isinstance(metric, str):
        function: Any = metric
    elif metric in BUILT_IN_METRICS:
        return None
    else:
        place = split_reference(metric)
        if place is None:
            raise BudgetError(
                f"There is no metric {metric!r}; pass accuracy, agreement, or a function of your "
                "own as 'path/file.py:function'."
            )
        function = import_object(*place, BudgetError)
    if not callable(function):
        raise BudgetError(f"The metric {metric!r} is no function of (outputs, targets).")
    return function


def digest_of(metric: str | Callable[..., Any]) -> str | None:
    """SHA-256 of the file, or of the source of a live function, so that a changed one is noticed.

    None for a metric that is built in, and for a live one without source.
    """
    if isinstance(metric, str):
        place = split_reference(metric)
        return None if place is None else hashlib.sha256(place[0].read_bytes()).hexdigest()
    try:
        return hashlib.sha256(inspect.getsource(metric).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def unit_of(metric: str | Callable[..., Any]) -> str:
    """The unit of a drop: points, or the ``unit`` that the user's function states, or nothing."""
    function = load_metric(metric)
    return "points" if function is None else str(getattr(function, "unit", ""))


def name_of(metric: str | Callable[..., Any]) -> str:
    """What a report calls the metric."""
    if not isinstance(metric, str):
        return str(getattr(metric, "__name__", type(metric).__name__))
    return metric.rpartition(":")[2]
