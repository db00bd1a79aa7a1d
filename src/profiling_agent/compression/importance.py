"""In which order the units of a group should go: the least needed first.

``magnitude``   squared weights over all layers of the group (Li et al. 2017, DepGraph's L2 form).
``variance``    variance of the unit's activation times its outgoing weights (VBP, 2507.12988).
``taylor``      divergence of the model's outputs to second order (``taylor.py``).
``obs``         growth of the consumers' squared error when the unit goes and the rest is refitted:
                for unit j with columns J, ``tr(W_J (C^-1)_JJ^-1 W_J^T)`` (Optimal Brain Surgeon,
                block form; Optimal Brain Compensation, 2608.17657). Weights and inverse are
                updated as units go, so later choices know of earlier ones: of two units that do
                the same, one goes and the other stays.

One order serves every ratio: the kept sets are nested.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.compression.group import Group, Member
from profiling_agent.compression.statistics import Moments
from profiling_agent.records.plan import Importance

NUM_ROUNDS = 16
"""How often all units are scored anew."""
POOL = 2
"""Within a round, units are taken one by one from a pool this many times as large."""


def removal_order(
    model: nn.Module,
    group: Group,
    importance: Importance,
    moments: Mapping[str, Moments],
    changes: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """All units of the group, least important first.

    ``variance`` and ``obs`` need moments of the group's consumers, ``taylor`` the ``changes`` that
    ``gather_changes`` makes of them; where no moments are known (a kind of consumer that can't be
    described) magnitude takes their place.
    """
    known = [member for member in group.consumers if member.module in moments]
    if importance == "magnitude" or not known:
        return np.argsort(_magnitude(model, group), kind="stable")
    if importance == "variance":
        scores = sum(_variance(model, member, moments[member.module]) for member in known)
        return np.argsort(np.asarray(scores), kind="stable")
    if importance == "taylor":
        assert changes is not None
        return np.argsort(_taylor(known, changes), kind="stable")
    return _surgeon_order(model, group, known, moments)


def _taylor(known: list[Member], changes: Mapping[str, Tensor]) -> np.ndarray:
    """Mean square of what a unit changes through all its consumers together."""
    together = sum(
        changes[member.module][:, torch.from_numpy(member.units)].sum(-1) for member in known
    )
    assert isinstance(together, Tensor)
    return together.double().square().mean(0).numpy()


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
        self.weight = layer.weight.detach().double().flatten(1).clone()
        self.columns = _columns(layer, member)
        # in units of the layer's own output energy, so that consumers can be added up
        energy = ((self.weight @ gram) * self.weight).sum()
        self.scale = 1.0 / float(energy.clamp_min(1e-12))
        gram.diagonal().add_(moments.ridge * gram.diagonal().mean().clamp_min(1e-12))
        self.inverse = torch.linalg.inv(gram)

    def scores(self, alive: Tensor) -> Tensor:
        columns = self.columns[alive]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        outgoing = self.weight[:, columns].permute(1, 2, 0)  # (units, k, outputs)
        return (torch.linalg.solve(blocks, outgoing) * outgoing).sum((1, 2)) * self.scale

    def remove(self, units: Tensor) -> None:
        gone = self.columns[units].reshape(-1)
        block = self.inverse[gone][:, gone]
        towards = torch.linalg.solve(block, self.inverse[gone])  # (gone, all)
        self.weight.addmm_(self.weight[:, gone], towards, alpha=-1)
        self.inverse.addmm_(self.inverse[:, gone], towards, alpha=-1)


class _Pool:
    """A consumer as far as some units, renumbered from 0, see each other."""

    def __init__(self, consumer: _Consumer, units: Tensor) -> None:
        columns = consumer.columns[units]
        flat = columns.reshape(-1)
        self.inverse = consumer.inverse[flat][:, flat]
        weight = consumer.weight[:, flat]
        self.energy = weight.T @ weight  # all that the scores need, whatever the outputs
        self.columns = torch.arange(len(flat)).reshape(columns.shape)
        self.scale = consumer.scale

    def scores(self, alive: Tensor) -> Tensor:
        columns = self.columns[alive]
        rows, cols = columns[:, :, None], columns[:, None, :]
        solved = torch.linalg.solve(self.inverse[rows, cols], self.energy[rows, cols])
        return solved.diagonal(dim1=1, dim2=2).sum(1) * self.scale

    def remove(self, unit: int) -> None:
        gone = self.columns[unit]
        towards = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        cross = self.energy[:, gone] @ towards
        self.energy += towards.T @ self.energy[gone][:, gone] @ towards - cross - cross.T
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
        pool = alive[torch.argsort(total, stable=True)[: POOL * step]]
        chosen = _one_by_one([_Pool(consumer, pool) for consumer in consumers], len(pool), step)
        order.append(pool[chosen])
        for consumer in consumers:
            consumer.remove(pool[chosen])
        alive = alive[~torch.isin(alive, pool[chosen])]
    return torch.cat(order).numpy()


def _one_by_one(pools: list[_Pool], num_units: int, count: int) -> Tensor:
    """The ``count`` units that are least missed, each after those before it are gone."""
    alive = torch.arange(num_units)
    chosen: list[int] = []
    for _ in range(min(count, num_units)):
        total = torch.stack([pool.scores(alive) for pool in pools]).sum(0)
        lowest = int(alive[total.argmin()])
        chosen.append(lowest)
        for pool in pools:
            pool.remove(lowest)
        alive = alive[alive != lowest]
    return torch.tensor(chosen)
