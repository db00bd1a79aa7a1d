"""In which order the units of a group should go: the least needed first.

``magnitude``   squared weights over all layers of the group (Li et al. 2017, DepGraph's L2 form).
``variance``    variance of the unit's activation times its outgoing weights (VBP, 2507.12988).
``obs``         growth of the consumers' squared error when the unit goes and the rest is refitted:
                for unit j with columns J, ``tr(W_J (C^-1)_JJ^-1 W_J^T)`` (Optimal Brain Surgeon,
                block form; Optimal Brain Compensation, 2608.17657). Weights and inverse are
                updated as units go, in rounds, so later choices know of earlier ones.

One order serves every ratio: the kept sets are nested.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.compression.group import Group, Member
from profiling_agent.compression.repair import RIDGE
from profiling_agent.compression.statistics import Moments
from profiling_agent.records.plan import Importance

NUM_ROUNDS = 16


def removal_order(
    model: nn.Module, group: Group, importance: Importance, moments: Mapping[str, Moments]
) -> np.ndarray:
    """All units of the group, least important first.

    ``variance`` and ``obs`` need moments of the group's consumers; where none are known (a kind of
    consumer that can't be described) magnitude takes their place.
    """
    known = [member for member in group.consumers if member.module in moments]
    if importance == "magnitude" or not known:
        return np.argsort(_magnitude(model, group), kind="stable")
    if importance == "variance":
        scores = sum(_variance(model, member, moments[member.module]) for member in known)
        return np.argsort(np.asarray(scores), kind="stable")
    return _surgeon_order(model, group, known, moments)


def _magnitude(model: nn.Module, group: Group) -> np.ndarray:
    scores = np.zeros(group.width)
    for member in group.members:
        layer = model.get_submodule(member.module)
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv1d):
            continue
        axis = 0 if member.axis == "out" else 1
        squares = layer.weight.detach().double().square()
        per_index = squares.sum(dim=[d for d in range(squares.ndim) if d != axis]).numpy()
        scores += per_index[member.units].sum(axis=1)
    return scores


def _columns(layer: nn.Module, member: Member) -> Tensor:
    """(units, k) columns of the consumer's flattened weight that each unit feeds."""
    assert isinstance(layer.weight, Tensor)
    patch = layer.weight[0, 0].numel()
    columns = member.units[:, :, None] * patch + np.arange(patch)
    return torch.from_numpy(columns.reshape(len(member.units), -1))


def _variance(model: nn.Module, member: Member, moments: Moments) -> np.ndarray:
    layer = model.get_submodule(member.module)
    assert isinstance(layer.weight, Tensor)
    outgoing = layer.weight.detach().double().flatten(1).square().sum(0)
    per_column = moments.covariance.diagonal().clamp_min(0) * outgoing
    return per_column[_columns(layer, member)].sum(1).numpy()


class _Consumer:
    """Weights and inverse covariance of one consumer, shrinking as units go."""

    def __init__(self, layer: nn.Module, member: Member, moments: Moments) -> None:
        assert isinstance(layer.weight, Tensor)
        gram = moments.second if layer.bias is None else moments.covariance
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        self.inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        self.weight = layer.weight.detach().double().flatten(1).clone()
        self.columns = _columns(layer, member)
        # in units of the layer's own output energy, so that consumers can be added up
        energy = torch.einsum("oi,ij,oj->", self.weight, gram, self.weight)
        self.scale = 1.0 / float(energy.clamp_min(1e-12))

    def scores(self, alive: Tensor) -> Tensor:
        columns = self.columns[alive]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        outgoing = self.weight[:, columns].permute(1, 2, 0)  # (units, k, outputs)
        return (torch.linalg.solve(blocks, outgoing) * outgoing).sum((1, 2)) * self.scale

    def remove(self, units: Tensor) -> None:
        gone = self.columns[units].reshape(-1)
        block = self.inverse[gone][:, gone]
        towards = torch.linalg.solve(block, self.inverse[gone])  # (gone, all)
        self.weight -= self.weight[:, gone] @ towards
        self.inverse -= self.inverse[:, gone] @ towards


def _surgeon_order(
    model: nn.Module, group: Group, known: list[Member], moments: Mapping[str, Moments]
) -> np.ndarray:
    consumers = [_Consumer(model.get_submodule(m.module), m, moments[m.module]) for m in known]
    alive = torch.arange(group.width)
    order: list[Tensor] = []
    step = max(1, group.width // NUM_ROUNDS)
    while len(alive):
        total = torch.stack([consumer.scores(alive) for consumer in consumers]).sum(0)
        lowest = torch.argsort(total, stable=True)[:step]
        order.append(alive[lowest])
        for consumer in consumers:
            consumer.remove(alive[lowest])
        mask = torch.ones(len(alive), dtype=torch.bool)
        mask[lowest] = False
        alive = alive[mask]
    return torch.cat(order).numpy()
