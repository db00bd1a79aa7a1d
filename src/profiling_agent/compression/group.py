"""The shape of a group: units, and which indices of which layers each unit owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from profiling_agent.records.profile import GroupKind

Axis = Literal["out", "in"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One axis of one layer. ``units[u]`` are the indices on that axis owned by unit ``u``.

    Batch norms and depthwise convolutions, whose two axes are one, count as ``out``.
    """

    module: str
    axis: Axis
    units: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """An integer that the forward reads, such as ``num_heads``: per unit, times units kept."""

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Coupled layers; ``id`` is kind and root, such as ``mlp:blocks.0.mlp.fc1``."""

    id: str
    kind: GroupKind
    root: str
    width: int
    members: tuple[Member, ...]
    attributes: tuple[Attribute, ...] = ()

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read the units."""
        return tuple(member for member in self.members if member.axis == "in")


Kept = Mapping[str, np.ndarray]
"""Group id to the sorted indices of the units that stay; a group not named stays whole."""


def removed_indices(groups: Sequence[Group], kept: Kept) -> dict[tuple[str, Axis], np.ndarray]:
    """For each layer and axis that shrinks, the sorted indices that go, over all groups."""
    gone: dict[tuple[str, Axis], list[np.ndarray]] = {}
    for group in groups:
        if group.id not in kept:
            continue
        dropped = np.setdiff1d(np.arange(group.width), kept[group.id])
        if dropped.size == 0:
            continue
        for member in group.members:
            gone.setdefault((member.module, member.axis), []).append(
                member.units[dropped].reshape(-1)
            )
    return {key: np.unique(np.concatenate(parts)) for key, parts in gone.items()}
