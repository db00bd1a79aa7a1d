"""Milliseconds against width, measured on the whole model.

An isolated layer misses fusion and caches, so each width is timed by pruning every group of one
shape at once in the live model and sharing the saving out among them. The whole model is timed in
alternation, since the machine's speed drifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.group import Group
from profiling_agent.compression.surgery import pruned
from profiling_agent.machine.clock import now
from profiling_agent.profiling.group_costs import levels
from profiling_agent.records.patterns import units_kept
from profiling_agent.records.profile import GroupCost, WidthPoint

NUM_ROUNDS = 7
MIN_BLOCK_S = 0.02


def measure_widths(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    groups: Sequence[Group],
    costs: Sequence[GroupCost],
    *,
    deadline: float,
) -> dict[str, tuple[WidthPoint, ...]]:
    """By shape class, the milliseconds one group saves at each measured width (eager fp32).

    The most costly classes come first; those not reached by ``deadline`` are left out. Threads are
    the caller's to set.
    """
    by_id = {group.id: group for group in groups}
    classes: dict[str, list[GroupCost]] = {}
    for cost in costs:
        classes.setdefault(cost.shape_class, []).append(cost)
    ranked = sorted(classes, key=lambda c: -sum(m.macs_per_unit * m.width for m in classes[c]))
    tables: dict[str, tuple[WidthPoint, ...]] = {}
    with torch.inference_mode():
        for name in ranked:
            if now() > deadline:
                break
            members = [by_id[cost.id] for cost in classes[name]]
            tables[name] = tuple(
                _measure_width(model, inputs, members, units_kept(members[0].width, ratio))
                for ratio in levels(classes[name][0])
            )
    return tables


def _measure_width(
    model: nn.Module, inputs: Mapping[str, Tensor], members: Sequence[Group], width: int
) -> WidthPoint:
    kept = {group.id: np.arange(width) for group in members}
    saved: list[float] = []
    for _ in range(NUM_ROUNDS):
        whole = _block(model, inputs)
        with pruned(model, members, kept):
            saved.append((whole - _block(model, inputs)) / len(members))
    low, high = np.percentile(saved, [25, 75])
    return WidthPoint(
        width=width, saved_ms=float(np.median(saved)), low_ms=float(low), high_ms=float(high)
    )


def _block(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Median milliseconds of a short block of forwards, the first one dropped."""
    compute_logits(model, inputs)
    times: list[float] = []
    deadline = now() + MIN_BLOCK_S
    while len(times) < 3 or now() < deadline:
        start = now()
        compute_logits(model, inputs)
        times.append((now() - start) * 1e3)
    return float(np.median(times))
