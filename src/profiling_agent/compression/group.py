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

    Batch norms and depthwise convolutions, whose two axes are one, count as ``out``. A member with
    a ``tensor`` is one axis ``dim`` of a single parameter or buffer instead (a relative position
    table, the weight of a layer norm), and always ``out``.
    """

    module: str
    axis: Axis
    units: np.ndarray
    tensor: str | None = None
    dim: int = 0


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A module that averages over an axis with units: where it stands in its input and output.

    ``units[u]`` are the positions on it, of ``size``, that unit ``u`` owns.
    """

    module: str
    dims: tuple[int, int]
    size: int
    units: np.ndarray


@dataclass(frozen=True, kw_only=True)
class StatedSize:
    """A number in a module's forward that counts positions of units of this group.

    ``call`` and ``place`` say where (``sizes.py``), ``size`` what it is in the whole model;
    ``owned[u]`` is how many of the counted positions belong to unit ``u``; ``has_batch`` when the
    number of samples is a factor of it, so that it must be left to follow from the rest.
    """

    module: str
    call: int
    place: tuple[int, ...]
    size: int
    owned: np.ndarray
    has_batch: bool = False


@dataclass(frozen=True, kw_only=True)
class Group:
    """Coupled layers; ``id`` is kind and root, such as ``mlp:blocks.0.mlp.fc1``."""

    id: str
    kind: GroupKind
    root: str
    width: int
    members: tuple[Member, ...]
    sizes: tuple[StatedSize, ...] = ()
    norms: tuple[Norm, ...] = ()

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members that read the units."""
        return tuple(member for member in self.members if member.axis == "in")

    @property
    def modules(self) -> frozenset[str]:
        """Everything that is changed when units go."""
        parts = (*self.members, *self.sizes, *self.norms)
        return frozenset(part.module for part in parts)


Kept = Mapping[str, np.ndarray]
"""Group id to the sorted indices of the units that stay; a group not named stays whole."""

Place = tuple[str, Axis, str | None, int]
"""Module, axis, tensor and dim of a member."""


def removed_indices(groups: Sequence[Group], kept: Kept) -> dict[Place, np.ndarray]:
    """For each axis that shrinks, the sorted indices that go, over all groups."""
    gone: dict[Place, list[np.ndarray]] = {}
    for group in groups:
        if group.id not in kept:
            continue
        dropped = dropped_units(group, kept)
        if dropped.size == 0:
            continue
        for member in group.members:
            key = (member.module, member.axis, member.tensor, member.dim)
            gone.setdefault(key, []).append(member.units[dropped].reshape(-1))
    return {key: np.unique(np.concatenate(parts)) for key, parts in gone.items()}


def dropped_units(group: Group, kept: Kept) -> np.ndarray:
    """Sorted indices of the units that a group loses."""
    return np.setdiff1d(np.arange(group.width), kept[group.id])
