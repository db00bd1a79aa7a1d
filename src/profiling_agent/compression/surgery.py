"""Removing units from layers, for good or for a moment.

Layers are changed by giving them new parameters; the old tensors are never written to, so undoing
is putting them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.compression.group import Axis, Group, Kept, removed_indices

_SIZES: dict[type[nn.Module], dict[Axis, tuple[str, ...]]] = {
    nn.Linear: {"out": ("out_features",), "in": ("in_features",)},
    nn.Conv2d: {"out": ("out_channels",), "in": ("in_channels",)},
    nn.Conv1d: {"out": ("out_channels",), "in": ("in_channels",)},
    nn.BatchNorm1d: {"out": ("num_features",)},
    nn.BatchNorm2d: {"out": ("num_features",)},
}


@dataclass(frozen=True, kw_only=True)
class NewWeights:
    """Repaired parameters of a consumer, over the inputs that stay; bias None: unchanged."""

    weight: Tensor
    bias: Tensor | None


def remove_units(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Kept,
    repaired: Mapping[str, NewWeights] | None = None,
) -> None:
    """Shrink the layers of ``groups`` in place, keeping the units named in ``kept``.

    ``repaired`` holds, for some consumers, weights already narrowed on the input axis.
    """
    gone = removed_indices(groups, kept)
    for name, new in (repaired or {}).items():
        layer = model.get_submodule(name)
        _set(layer, "weight", new.weight)
        if new.bias is not None:
            _set(layer, "bias", new.bias)
    for (name, axis), indices in gone.items():
        layer = model.get_submodule(name)
        narrowed = axis == "in" and name in (repaired or {})
        _narrow(layer, axis, indices, weight_done=narrowed)
    for group in groups:
        for attribute in group.attributes if group.id in kept else ():
            module = model.get_submodule(attribute.module)
            setattr(module, attribute.name, attribute.per_unit * len(kept[group.id]))


@contextmanager
def pruned(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Kept,
    repaired: Mapping[str, NewWeights] | None = None,
) -> Iterator[None]:
    """The model without the removed units, for as long as the block lasts."""
    with restoring(model, groups):
        remove_units(model, groups, kept, repaired)
        yield


@contextmanager
def masked(model: nn.Module, groups: Sequence[Group], kept: Kept) -> Iterator[None]:
    """The whole model with the removed units silenced: their columns zero in every consumer."""
    with restoring(model, groups):
        for (name, axis), indices in removed_indices(groups, kept).items():
            if axis == "in":
                layer = model.get_submodule(name)
                weight = _tensor(layer, "weight").clone()
                weight[:, torch.from_numpy(indices)] = 0.0
                _set(layer, "weight", weight)
        yield


@contextmanager
def restoring(model: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
    """Put parameters, buffers and attributes of the groups' modules back afterwards."""
    names = {m.module for g in groups for m in g.members}
    names |= {a.module for g in groups for a in g.attributes}
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for name in sorted(names):
        module = model.get_submodule(name)
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | tuple)}
        before.append((module, dict(module._parameters), dict(module._buffers), plain))
    try:
        yield
    finally:
        for module, parameters, buffers, plain in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            vars(module).update(plain)


def _narrow(layer: nn.Module, axis: Axis, gone: np.ndarray, *, weight_done: bool) -> None:
    sizes = next(v for kind, v in _SIZES.items() if isinstance(layer, kind))[axis]
    depthwise = isinstance(layer, nn.Conv2d | nn.Conv1d) and layer.groups > 1
    size = int(getattr(layer, sizes[0]))
    stay = torch.from_numpy(np.setdiff1d(np.arange(size), gone))
    if axis == "in":
        if not weight_done:
            _set(layer, "weight", _tensor(layer, "weight")[:, stay])
    else:
        for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if tensor is not None and tensor.ndim > 0:
                _set(layer, name, tensor.detach()[stay])
    for attribute in sizes:
        setattr(layer, attribute, len(stay))
    if depthwise:
        vars(layer).update(groups=len(stay), in_channels=len(stay))


def _tensor(layer: nn.Module, name: str) -> Tensor:
    tensor = getattr(layer, name)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    value = value.detach().contiguous()
    if name in layer._buffers:
        layer._buffers[name] = value
    else:
        old = layer._parameters.get(name)
        layer._parameters[name] = nn.Parameter(
            value, requires_grad=old.requires_grad if old is not None else False
        )
