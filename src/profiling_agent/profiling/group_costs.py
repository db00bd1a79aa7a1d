"""Prunable groups as the profile tells them: what one unit costs, and which share a shape."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from profiling_agent.compression.group import Group
from profiling_agent.records.patterns import units_kept
from profiling_agent.records.profile import GroupCost, ModuleCost

RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
MAX_HEAD_RATIO = 0.75
MAX_LEVELS = 6


def describe_group(model: nn.Module, group: Group, modules: Mapping[str, ModuleCost]) -> GroupCost:
    """Costs of a group from those of its layers, spread evenly over its units."""
    macs = parameters = 0.0
    times: list[float] = []
    for member in group.members:
        layer, cost = model.get_submodule(member.module), modules[member.module]
        if member.tensor is not None:
            tensor = getattr(layer, member.tensor)
            share = member.units.shape[1] / tensor.shape[member.dim]
            parameters += tensor.numel() * share if isinstance(tensor, nn.Parameter) else 0
            continue
        share = member.units.shape[1] / _axis_size(layer, member.axis)
        macs += cost.macs * share
        parameters += _owned_parameters(layer, member.axis) * share
        if cost.self_time is not None:
            times.append(cost.self_time.median_ms)
    if group.kind == "heads":  # the products between activations belong to no layer
        inside = {stated.module for stated in group.sizes if stated.owned.any()}
        macs += sum(modules[name].self_macs / group.width for name in inside if name in modules)
    return GroupCost(
        id=group.id,
        kind=group.kind,
        root=group.root,
        width=group.width,
        members=tuple(dict.fromkeys(member.module for member in group.members)),
        macs_per_unit=round(macs),
        parameters_per_unit=round(parameters),
        self_ms=sum(times) if times else None,
        shape_class=f"{group.kind}:{group.width}:{round(macs)}:{round(parameters)}",
    )


def _axis_size(layer: nn.Module, axis: str) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0 if axis == "out" or weight.ndim == 1 else 1]


def _owned_parameters(layer: nn.Module, axis: str) -> int:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, torch.Tensor)
    extra = bias.numel() if axis == "out" and isinstance(bias, torch.Tensor) else 0
    return weight.numel() + extra


def levels(group: GroupCost) -> tuple[float, ...]:
    """The ratios worth measuring: whole heads, else about eighths that leave aligned widths.

    Wide layers keep multiples of 8 (a vector of 32-bit floats in AVX2), middling ones of 4.
    """
    if group.kind == "heads" or group.width <= 8:
        removable = range(1, int(group.width * MAX_HEAD_RATIO) + 1)
        step = -(-len(removable) // MAX_LEVELS) if removable else 1
        return tuple(count / group.width for count in removable[::step])
    multiple = 8 if group.width >= 64 else 4 if group.width >= 24 else 1
    widths: dict[int, None] = {}
    for ratio in RATIOS:
        kept = max(multiple, round(units_kept(group.width, ratio) / multiple) * multiple)
        if kept < group.width:
            widths[kept] = None
    return tuple((group.width - kept) / group.width for kept in widths)
