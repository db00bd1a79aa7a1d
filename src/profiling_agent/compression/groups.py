"""Which units of a model can be removed, and what has to go with them.

A *group* (DepGraph, Fang et al. 2023, section 3) is a set of layers whose widths are coupled: to
remove a channel from one is to remove it from all. Here the coupling is read off the positions that
one forward ties together (``tracing.py``), and units that are tied to the same places form a group.
The trace is only believed after a proof: see ``prove``.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.group import Group, Kept, Member, Norm, StatedSize
from profiling_agent.compression.slots import HEADS, Axis
from profiling_agent.compression.surgery import BATCH_NORMS, LAYERS, masked, pruned
from profiling_agent.compression.tracing import Source, Trace, trace
from profiling_agent.records.profile import FrozenGroup, GroupKind

RELATIVE_TOLERANCE = 2e-4
NOISE = 1e-5
"""Of the largest output: differences below it are rounding."""
TOGETHER = 16
"""Groups proven by one comparison, if it holds."""
SINGLE = "has a single unit"
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers that may lose units with others, but whose own outputs are not cut for their sake."""


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """The groups that may be pruned, in the order of the forward, and those that may not."""

    groups: tuple[Group, ...]
    frozen: tuple[FrozenGroup, ...]


def find_groups(model: nn.Module, example: Mapping[str, Tensor]) -> Discovery:
    """All groups of a model, each proven; never raises for a model whose forward works.

    ``example`` holds the model's inputs by name, batch axis first, at least two samples.
    """
    try:
        found = trace(model, example)
    except Exception as error:  # whatever a forward raises when it is watched
        reason = f"the forward can't be followed: {_one_line(error)}"
        return Discovery(groups=(), frozen=(FrozenGroup(id="channels:*", reason=reason),))
    candidates, frozen = _Assembly(model, found).groups()
    reasons = prove(model, candidates, example)
    proven = [group for group in candidates if reasons[group.id] is None]
    frozen += [FrozenGroup(id=id_, reason=reason) for id_, reason in reasons.items() if reason]
    return Discovery(groups=tuple(proven), frozen=tuple(frozen))


# ---- from tied positions to groups


@dataclass(frozen=True)
class _Spot:
    """One axis of one tensor of the model, as a member sees it."""

    module: str
    axis: str
    tensor: str | None
    dim: int


_Signature = tuple[tuple[_Spot, int], ...]
"""Where a unit sits, and how many indices it owns there."""


class _Assembly:
    def __init__(self, model: nn.Module, found: Trace) -> None:
        self._model, self._trace, self._slots = model, found, found.slots
        self._modules = dict(model.named_modules())

    def groups(self) -> tuple[list[Group], list[FrozenGroup]]:
        """Candidates in the order of the forward, and producers that can't lose a unit."""
        owned = self._owned()
        families: dict[_Signature, list[dict[_Spot, list[int]]]] = {}
        roots_of: dict[_Signature, list[int]] = {}
        for root, spots in owned.items():
            signature = tuple(
                sorted(((spot, len(at)) for spot, at in spots.items()), key=lambda s: _key(s[0]))
            )
            families.setdefault(signature, []).append(spots)
            roots_of.setdefault(signature, []).append(root)
        groups: list[Group] = []
        frozen: list[FrozenGroup] = []
        taken: dict[str, int] = {}
        producing = [s for s in families if self._producers(s)]
        for signature in sorted(producing, key=lambda s: self._position(self._root(s))):
            group = self._group(signature, families[signature], roots_of[signature], taken)
            if not group.consumers and group.root not in self._trace.order:
                continue
            if group.width > 1:
                groups.append(group)
            else:
                frozen.append(FrozenGroup(id=group.id, reason=SINGLE))
        return groups, frozen + self._frozen_producers(groups)

    def _owned(self) -> dict[int, dict[_Spot, list[int]]]:
        """For every unit that may go: the indices it owns, by spot."""
        owned: dict[int, dict[_Spot, list[int]]] = defaultdict(dict)
        for source in self._trace.sources:
            for spot, axis in self._spots(source):
                free = np.flatnonzero(~self._slots.is_frozen(axis))
                roots = self._slots.find(axis)
                for index in free.tolist():
                    at = owned[int(roots[index])].setdefault(spot, [])
                    if not at or at[-1] != index:
                        at.append(index)
        return owned

    def _spots(self, source: Source) -> Iterator[tuple[_Spot, Axis]]:
        module = self._modules[source.module]
        if isinstance(module, LAYERS):
            if source.tensor == "weight":
                yield _Spot(source.module, "out", None, 0), source.axes[0]
                if not _has_groups(module) or source.axes[1].size > 1:
                    yield _Spot(source.module, "in", None, 0), source.axes[1]
                return
            if source.tensor == "bias":
                return
        elif isinstance(module, BATCH_NORMS):
            if source.tensor == "weight" or (
                module.weight is None and source.tensor == "running_mean"
            ):
                yield _Spot(source.module, "out", None, 0), source.axes[0]
            return
        for dim, axis in enumerate(source.axes):
            yield _Spot(source.module, "out", source.tensor, dim), axis

    def _producers(self, signature: _Signature) -> list[str]:
        return [
            spot.module
            for spot, _ in signature
            if spot.axis == "out" and spot.tensor is None
            and isinstance(self._modules[spot.module], LAYERS)
        ]  # fmt: skip

    def _root(self, signature: _Signature) -> str:
        return min(self._producers(signature), key=self._position)

    def _position(self, name: str) -> int:
        return self._trace.order.get(name, len(self._trace.order))

    def _group(
        self,
        signature: _Signature,
        units: list[dict[_Spot, list[int]]],
        roots: list[int],
        taken: dict[str, int],
    ) -> Group:
        root = self._root(signature)
        first = next(s for s, _ in signature if s.module == root and s.axis == "out")
        by_index = sorted(range(len(units)), key=lambda n: units[n][first][0])
        units, roots = [units[n] for n in by_index], [roots[n] for n in by_index]
        members = tuple(
            Member(
                module=spot.module,
                axis="in" if spot.axis == "in" else "out",
                units=np.array([unit[spot] for unit in units]),
                tensor=spot.tensor,
                dim=spot.dim,
            )
            for spot, _ in sorted(
                signature, key=lambda s: (self._position(s[0].module), _key(s[0]))
            )
        )
        kind = self._kind(signature, roots)
        id_ = f"{kind}:{root}"
        taken[id_] = taken.get(id_, 0) + 1
        number = {r: n for n, r in enumerate(roots)}
        return Group(
            id=id_ if taken[id_] == 1 else f"{id_}/{taken[id_]}",
            kind=kind,
            root=root,
            width=len(units),
            members=members,
            sizes=self._sizes(number, members),
            norms=self._norms(number),
        )

    def _kind(self, signature: _Signature, roots: list[int]) -> GroupKind:
        if self._slots.has_mark(np.array(roots[:1]), HEADS):
            return "heads"
        neurons = all(
            spot.tensor is None and isinstance(self._modules[spot.module], nn.Linear)
            for spot, _ in signature
        )
        return "mlp" if neurons else "channels"

    def _sizes(
        self, number: Mapping[int, int], members: Sequence[Member]
    ) -> tuple[StatedSize, ...]:
        """Sizes that shrink with the units; and others stated beside the members, which must not,
        though they may be derived from one that does (``x.shape[-1] // self.num_heads``)."""
        around = {m.module for m in members}
        around |= {name.rpartition(".")[0] for name in around}
        found: dict[tuple[str, int, tuple[int, ...]], StatedSize] = {}
        shrinking: set[tuple[str, int]] = set()
        for site in self._trace.sites:
            key = (site.module, site.call, site.place)
            if key in found:  # a module that is called again says the same
                continue
            owners = [number.get(root, -1) for root in self._slots.find(site.axis).tolist()]
            found[key] = StatedSize(
                module=site.module,
                call=site.call,
                place=site.place,
                size=len(site.axis),
                owned=np.bincount([o for o in owners if o >= 0], minlength=len(number)),
                has_batch=site.has_batch,
            )
            if found[key].owned.any():
                shrinking.add((site.module, site.call))
        return tuple(
            stated
            for stated in found.values()
            if (stated.module in around or (stated.module, stated.call) in shrinking)
            and (not stated.has_batch or stated.owned.any())
        )

    def _norms(self, number: Mapping[int, int]) -> tuple[Norm, ...]:
        found: dict[str, Norm] = {}
        for reduced in self._trace.reduced:
            roots = self._slots.find(reduced.axis).tolist()
            owners = np.array([number.get(root, -1) for root in roots])
            if (owners >= 0).any() and reduced.dims is not None:
                units = [np.flatnonzero(owners == unit) for unit in range(len(number))]
                if len({len(u) for u in units}) == 1:
                    found[reduced.module] = Norm(
                        module=reduced.module,
                        dims=reduced.dims,
                        size=len(owners),
                        units=np.stack(units),
                    )
        return tuple(found.values())

    def _frozen_producers(self, groups: Sequence[Group]) -> list[FrozenGroup]:
        roots = {group.root for group in groups}
        cut = {(m.module, m.dim) for group in groups for m in group.members if m.tensor}
        frozen: list[FrozenGroup] = []
        for source in self._trace.sources:
            module = self._modules[source.module]
            if source.tensor != "weight" or source.module not in self._trace.order:
                continue
            if isinstance(module, TRANSPOSED) and (source.module, 1) not in cut:
                reason = self._slots.reason(source.axes[1]) or "of a transposed convolution alone"
                frozen.append(FrozenGroup(id=f"channels:{source.module}", reason=reason))
            if not isinstance(module, LAYERS) or source.module in roots:
                continue
            if self._slots.is_frozen(source.axes[0]).all():
                kind = "mlp" if isinstance(module, nn.Linear) else "channels"
                reason = self._slots.reason(source.axes[0]) or "not known"
                frozen.append(FrozenGroup(id=f"{kind}:{source.module}", reason=reason))
        return frozen


def _key(spot: _Spot) -> tuple[str, str, str, int]:
    return (spot.module, spot.axis, spot.tensor or "", spot.dim)


def _has_groups(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1


# ---- the proof


@torch.inference_mode()
def prove(
    model: nn.Module, groups: Sequence[Group], example: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """For each group's id ``None`` when removing units equals silencing them, else why it doesn't.

    The reference is the whole model with the removed units' columns zeroed in every consumer, and
    with norms over them taken from the survivors; the pruned model must give the same output. A
    missed or misaligned coupling shows here. Sixteen groups are tried at once; those that don't
    hold together are tried in halves. Scales that a training starts at nothing (batch norms, layer
    scales) are raised in a copy first, or silencing would change nothing to compare.
    """
    reasons = {group.id: _refusal(model, group) for group in groups}
    doubtful = [group for group in groups if reasons[group.id] is None]
    if not doubtful:
        return reasons
    model = audible(model)
    original = compute_logits(model, example)
    num_chunks = -(-len(doubtful) // TOGETHER)
    for start in range(num_chunks):  # far apart, so that none stands behind all the others
        _prove_together(model, doubtful[start::num_chunks], example, original, reasons)
    return reasons


def _prove_together(
    model: nn.Module,
    groups: Sequence[Group],
    example: Mapping[str, Tensor],
    original: Tensor,
    reasons: dict[str, str | None],
) -> None:
    """Note the reasons of those that fail; the set is halved until they are found."""
    reason = _compare(model, groups, example, original)
    if reason is None:
        return
    if len(groups) == 1:
        reasons[groups[0].id] = reason
        return
    for half in (groups[::2], groups[1::2]):
        _prove_together(model, half, example, original, reasons)


FAINT = 1e-2
ZERO_MATRIX_STD = 0.02


def audible(model: nn.Module) -> nn.Module:
    """A copy in which nothing is silenced by parameters that start at zero.

    Scales that are all (nearly) zero are near one instead, and matrices and tables are random.
    """
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in twin.named_parameters():
        values = parameter.detach()
        if not values.numel() or float(values.abs().max()) >= FAINT:
            continue
        if values.dim() > 1:
            parameter.data = ZERO_MATRIX_STD * torch.randn(values.shape, generator=generator)
        elif not name.endswith("bias"):
            parameter.data = 0.75 + 0.5 * torch.rand(values.shape, generator=generator)
    return twin


def _refusal(model: nn.Module, group: Group) -> str | None:
    if group.width < 2:
        return SINGLE
    for member in group.members:
        layer = model.get_submodule(member.module)
        if (
            member.tensor is None
            and isinstance(layer, LAYERS)
            and "weight" not in layer._parameters
        ):
            return f"the weight of {member.module!r} is computed from others (weight norm, say)"
    return None


def _keep_sets(groups: Sequence[Group]) -> Iterator[Kept]:
    """Every second unit; and about two thirds without a pattern, since a regular choice can hide
    a permutation of the units (two halves swapped, say)."""
    yield {group.id: np.arange(group.width)[1::2] for group in groups}
    kept: dict[str, np.ndarray] = {}
    for group in groups:
        num_kept = max(1, 2 * group.width // 3)
        shuffled = np.random.default_rng(0).permutation(group.width)
        kept[group.id] = np.sort(shuffled[:num_kept])
    yield kept


def _compare(
    model: nn.Module,
    groups: Sequence[Group],
    example: Mapping[str, Tensor],
    original: Tensor,
) -> str | None:
    """Why pruned and silenced don't agree, on two samples and, with other units, on one.

    Silencing several groups must also change the ``original`` output by more than the tolerance,
    or agreement would say nothing. Where a single group changes it by less, the two must agree to
    a quarter of this change; only a change that is lost in rounding is let pass.
    """
    alone = {name: x[:1] for name, x in example.items()}
    for kept, inputs in zip(_keep_sets(groups), (example, alone), strict=True):
        try:
            with masked(model, groups, kept):
                reference = compute_logits(model, inputs)
            with pruned(model, groups, kept):
                result = compute_logits(model, inputs)
        except Exception as error:  # whatever a user's forward raises at another width
            sizes = ", ".join(f"{len(kept[g.id])} of its {g.width} units" for g in groups[:1])
            return f"the forward fails with {sizes}: {_one_line(error)}"
        if result.shape != reference.shape:
            return "the output would change its shape"
        gap, scale = float((result - reference).abs().max()), float(reference.abs().max())
        change = float((original[: len(reference)] - reference).abs().max())
        tolerance = min(RELATIVE_TOLERANCE * scale, max(change / 4, NOISE * scale))
        if not gap <= tolerance:
            return f"removing units is not the same as silencing them (difference {gap:.2g})"
        if len(groups) > 1 and change <= 10 * RELATIVE_TOLERANCE * scale:
            return "silencing the units changes nothing that could be compared"
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."
