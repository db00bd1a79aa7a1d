"""Measured time of each module and of the whole, side by side.

Passes alternate: one without any hook gives the whole, one with hooks on every module gives the
parts. So both see the same machine, the whole is free of the hooks' cost, and the difference
between the whole and the sum of the parts shows what the hooks cost. A hook does nothing but
append the clock's reading to a list; what is left falls to the caller's self time, about a
microsecond or two for each child.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.machine.clock import without_collector
from profiling_agent.machine.torch_state import threads as torch_threads
from profiling_agent.profiling.calls import Hook, watch
from profiling_agent.records.common import NotMeasured
from profiling_agent.records.profile import Spread

Event = tuple[str, bool, int]


@dataclass(frozen=True, kw_only=True)
class ModuleTime:
    """Time of one module in a forward, summed over its calls."""

    total: Spread
    self_time: Spread


@dataclass(frozen=True, kw_only=True)
class DynamicCosts:
    """``total`` without hooks; the parts, their sum and ``hooked_total`` from the hooked passes."""

    total: Spread
    hooked_total: Spread
    sum_of_parts_ms: float
    modules: dict[str, ModuleTime]
    not_measured: tuple[NotMeasured, ...]


def measure_modules(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    passes: int = 10,
    warmup: int = 2,
    threads: int = 1,
) -> DynamicCosts:
    """Time ``model`` on ``inputs`` in ``2 * (warmup + passes)`` forwards, under inference mode.

    Modules whose forward isn't called have no time and are listed with the reason. What the
    forward raises passes through, with hooks removed and torch's threads restored.
    """
    plain: list[float] = []
    hooked: list[dict[str, tuple[float, float]]] = []
    with torch.inference_mode(), torch_threads(threads), without_collector():
        for number in range(warmup + passes):
            whole = _plain_pass(model, inputs)
            parts = _hooked_pass(model, inputs)
            if number >= warmup:
                plain.append(whole)
                hooked.append(parts)
    called = [name for name, _ in model.named_modules() if any(name in parts for parts in hooked)]
    return DynamicCosts(
        total=_spread(plain),
        hooked_total=_spread([parts[""][0] for parts in hooked]),
        sum_of_parts_ms=float(np.median([sum(own for _, own in p.values()) for p in hooked])),
        modules={
            name: ModuleTime(
                total=_spread([parts.get(name, (0.0, 0.0))[0] for parts in hooked]),
                self_time=_spread([parts.get(name, (0.0, 0.0))[1] for parts in hooked]),
            )
            for name in called
        },
        not_measured=_uncalled(model, set(called)),
    )


def _plain_pass(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    start = perf_counter_ns()
    compute_logits(model, inputs)
    return (perf_counter_ns() - start) / 1e6


def _hooked_pass(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    events: list[Event] = []
    append, clock = events.append, perf_counter_ns

    def on_enter(name: str) -> Hook:
        return lambda *_: append((name, True, clock()))

    def on_leave(name: str) -> Hook:
        return lambda *_: append((name, False, clock()))

    with watch(model, on_enter, on_leave):
        compute_logits(model, inputs)
    return split_times(events)


def split_times(events: list[Event]) -> dict[str, tuple[float, float]]:
    """Total and self milliseconds by name from (name, entered, nanoseconds) in order.

    A module that calls itself counts its outermost call once in the total. One left by an
    exception ends when its caller does.
    """
    totals: dict[str, float] = {}
    selves: dict[str, float] = {}
    open_calls: list[tuple[str, int, int]] = []  # name, start, time of children so far
    for name, entered, time in events:
        if entered:
            open_calls.append((name, time, 0))
            continue
        while open_calls:
            inner, start, children = open_calls.pop()
            elapsed = time - start
            selves[inner] = selves.get(inner, 0.0) + (elapsed - children) / 1e6
            if all(inner != outer for outer, _, _ in open_calls):
                totals[inner] = totals.get(inner, 0.0) + elapsed / 1e6
            if open_calls:
                outer, outer_start, outer_children = open_calls[-1]
                open_calls[-1] = outer, outer_start, outer_children + elapsed
            if inner == name:
                break
    return {name: (totals[name], selves[name]) for name in totals}


def _spread(values: list[float]) -> Spread:
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(
        median_ms=float(median), low_ms=float(low), high_ms=float(high), num_passes=len(values)
    )


def _uncalled(model: nn.Module, called: set[str]) -> tuple[NotMeasured, ...]:
    return tuple(
        NotMeasured(what=f"time and peak memory of module {name!r}", reason=_why(module))
        for name, module in model.named_modules()
        if name not in called
    )


def _why(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        return f"a {kind} has no forward of its own; see the modules inside it"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript, which takes no hooks; its parent's time includes it"
    return "its forward is not called; its weights are used by its parent, or it is not reached"
