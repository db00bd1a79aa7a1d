"""Removing units from layers, for good or for a moment.

Layers are changed by giving them new parameters; the old tensors are never written to, so undoing
is putting them back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.compression.group import (
    Axis,
    Group,
    Kept,
    Norm,
    dropped_units,
    removed_indices,
)
from profiling_agent.compression.sizes import SCALE, Place, correct_sizes, forget_caches

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv1d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WIDTHS = (
    "num_features",
    "num_channels",
    "num_groups",  # where each channel is a group
    "normalized_shape",
    "out_channels",
    "in_channels",
)
"""Attributes of a module with parameters of its own, or of a norm, that say how wide it is."""


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
    repaired = repaired or {}
    for name, new in repaired.items():
        layer = model.get_submodule(name)
        _set(layer, "weight", new.weight)
        if new.bias is not None:
            _set(layer, "bias", new.bias)
    for (name, axis, tensor, dim), indices in removed_indices(groups, kept).items():
        layer = model.get_submodule(name)
        if tensor is not None:
            _narrow_tensor(layer, tensor, dim, indices)
        else:
            _narrow(layer, axis, indices, weight_done=axis == "in" and name in repaired)
    for name, norms in _norms(groups, kept).items():
        _narrow_norm(model.get_submodule(name), norms)
    forget_caches(model)
    for name, corrections in _corrections(groups, kept).items():
        correct_sizes(model.get_submodule(name), corrections)


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
    """The whole model with the removed units silenced: their columns zero in every consumer.

    Units that no layer consumes, since they are multiplied with each other, are silenced where they
    are produced. Norms over units take their averages from those that stay.
    """
    with restoring(model, groups):
        gone = removed_indices(groups, kept)
        for (name, axis, _, _), indices in gone.items():
            if axis == "in":
                layer = model.get_submodule(name)
                weight = _tensor(layer, "weight").clone()
                weight[:, torch.from_numpy(indices)] = 0.0
                _set(layer, "weight", weight)
        for group in groups:
            if group.id in kept and not group.consumers:
                _silence_producer(model.get_submodule(group.root), group, kept)
        for name, norms in _norms(groups, kept).items():
            tensors = {(t, dim): i for (m, _, t, dim), i in gone.items() if m == name and t}
            _silence_norm(model.get_submodule(name), norms, tensors)
        yield


def _silence_producer(layer: nn.Module, group: Group, kept: Kept) -> None:
    root = next(m for m in group.members if m.module == group.root and m.tensor is None)
    rows = torch.from_numpy(root.units[dropped_units(group, kept)].reshape(-1))
    for name in ("weight", "bias"):
        if isinstance(getattr(layer, name), Tensor):
            _set(layer, name, _tensor(layer, name).index_fill(0, rows, 0.0))


def _norms(groups: Sequence[Group], kept: Kept) -> dict[str, list[tuple[Norm, np.ndarray]]]:
    """Norms over removed units by module, each with the positions that go."""
    found: dict[str, list[tuple[Norm, np.ndarray]]] = {}
    for group in groups:
        for norm in group.norms if group.id in kept else ():
            positions = norm.units[dropped_units(group, kept)].reshape(-1)
            found.setdefault(norm.module, []).append((norm, positions))
    return found


@contextmanager
def restoring(model: nn.Module, groups: Sequence[Group]) -> Iterator[None]:
    """Put parameters, buffers and attributes of the groups' modules back afterwards."""
    names = {name for group in groups for name in group.modules}
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
    for name in sorted(names):
        module = model.get_submodule(name)
        plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | tuple | list)}
        plain |= {k: v for k, v in vars(module).items() if k == "forward"}
        before.append((module, dict(module._parameters), dict(module._buffers), plain))
    try:
        yield
    finally:
        for module, parameters, buffers, plain in before:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            vars(module).pop("forward", None)
            vars(module).update(plain)
        forget_caches(model)


def _corrections(groups: Sequence[Group], kept: Kept) -> dict[str, dict[int, dict[Place, int]]]:
    """New sizes by module, stating call and place; several groups may share one."""
    sizes: dict[tuple[str, int, Place], int] = {}
    for group in groups:
        if group.id not in kept:
            continue
        dropped = dropped_units(group, kept)
        for stated in group.sizes:
            key = (stated.module, stated.call, stated.place)
            gone = 0 if stated.place == SCALE else int(stated.owned[dropped].sum())
            sizes[key] = -1 if stated.has_batch else sizes.get(key, stated.size) - gone
    found: dict[str, dict[int, dict[Place, int]]] = {}
    for (module, call, place), size in sizes.items():
        found.setdefault(module, {}).setdefault(call, {})[place] = size
    return found


def _silence_norm(
    module: nn.Module,
    norms: Sequence[tuple[Norm, np.ndarray]],
    tensors: Mapping[tuple[str, int], np.ndarray],
) -> None:
    """Let a norm see the surviving units alone; the others come out as zeros.

    ``tensors`` are the indices that its own parameters lose, by name and dim.
    """
    (before, after), size = norms[0][0].dims, norms[0][0].size
    gone = np.concatenate([positions for _, positions in norms])
    stay = torch.from_numpy(np.setdiff1d(np.arange(size), gone))
    small = copy.deepcopy(module)
    for (name, dim), indices in tensors.items():
        _narrow_tensor(small, name, dim, indices)
    _narrow_norm(small, norms)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = small(x.index_select(before, stay), *args, **kwargs)
        shape = list(result.shape)
        shape[after] = size
        return torch.zeros(shape, dtype=result.dtype).index_copy(after, stay, result)

    vars(module)["forward"] = forward


def _narrow(layer: nn.Module, axis: Axis, gone: np.ndarray, *, weight_done: bool) -> None:
    """A linear layer, a convolution or a batch norm without some indices of one of its axes."""
    if axis == "in":
        size = _tensor(layer, "weight").shape[1]
        stay = torch.from_numpy(np.setdiff1d(np.arange(size), gone))
        if not weight_done:
            _set(layer, "weight", _tensor(layer, "weight")[:, stay])
        inputs = len(stay) * int(getattr(layer, "groups", 1))
        vars(layer)["in_features" if isinstance(layer, nn.Linear) else "in_channels"] = inputs
        return
    tensors = {**layer._parameters, **layer._buffers}
    size = next(t for t in tensors.values() if t is not None and t.ndim > 0).shape[0]
    stay = torch.from_numpy(np.setdiff1d(np.arange(size), gone))
    for name, tensor in tensors.items():
        if tensor is not None and tensor.ndim > 0:
            _set(layer, name, tensor.detach()[stay])
    if isinstance(layer, nn.Linear):
        layer.out_features = len(stay)
    elif isinstance(layer, _CONVOLUTIONS):
        _set_outputs(layer, gone, size)
    else:
        vars(layer)["num_features"] = len(stay)


def _set_outputs(layer: Any, gone: np.ndarray, size: int) -> None:
    """The sizes of a convolution without some outputs: whole groups of it, or parts of each."""
    layer.out_channels = size - len(gone)
    if layer.groups == 1:
        return
    lost = np.isin(np.arange(size), gone).reshape(layer.groups, -1)
    if (lost.all(1) == lost.any(1)).all():
        layer.groups = int((~lost.any(1)).sum())
        layer.in_channels = layer.weight.shape[1] * layer.groups


def _narrow_tensor(module: nn.Module, name: str, dim: int, gone: np.ndarray) -> None:
    """One axis of one tensor, and the attribute of its module that says how wide it is."""
    tensor = _tensor(module, name)
    size = tensor.shape[dim]
    stay = torch.from_numpy(np.setdiff1d(np.arange(size), gone))
    _set(module, name, tensor.index_select(dim, stay))
    _set_widths(module, size, len(stay))


def _narrow_norm(module: nn.Module, norms: Sequence[tuple[Norm, np.ndarray]]) -> None:
    """A norm's stated width; one without weights (``elementwise_affine=False``) is no member."""
    size = norms[0][0].size
    _set_widths(module, size, size - sum(len(positions) for _, positions in norms))


def _set_widths(module: nn.Module, size: int, left: int) -> None:
    for attribute in _WIDTHS:
        value = vars(module).get(attribute)
        if value == size:
            vars(module)[attribute] = left
        elif isinstance(value, tuple) and value and value[-1] == size:
            vars(module)[attribute] = (*value[:-1], left)


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
