"""Which units of a model can be removed, and what has to go with them.

A *group* (DepGraph, Fang et al. 2023, section 3) is a set of layers whose widths are coupled: to
remove a channel from one is to remove it from all. Channels and MLP neurons come from
torch-pruning's ``DependencyGraph``; attention heads from ``attention.py``, since the graph can't
see through a head's reshape. The graph is only believed after a proof: see ``prove``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.attention import find_attention_heads
from profiling_agent.compression.group import Group, Member
from profiling_agent.compression.surgery import masked, pruned
from profiling_agent.records.profile import FrozenGroup

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv1d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
RELATIVE_TOLERANCE = 2e-4
TOGETHER = 8
"""Groups proven by one comparison."""


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """The groups that may be pruned, in the order of the forward, and those that may not."""

    groups: tuple[Group, ...]
    frozen: tuple[FrozenGroup, ...]


def find_groups(model: nn.Module, example: Mapping[str, Tensor]) -> Discovery:
    """All groups of a model, each proven; never raises for a model whose forward works.

    ``example`` holds the model's inputs by name, batch axis first, at least two samples.
    """
    order = _call_order(model, example)
    heads, frozen = find_attention_heads(model)
    candidates = list(heads)
    taken = {member.module for group in heads for member in group.members if member.axis == "out"}
    for item in _coupled(model, example, order):
        if isinstance(item, FrozenGroup):
            if item.id.partition(":")[2] not in taken:  # projections of heads are not channels
                frozen.append(item)
        elif not _touches_output_of(item, taken):
            candidates.append(item)
    reasons = prove(model, candidates, example)
    proven = [group for group in candidates if reasons[group.id] is None]
    frozen += [FrozenGroup(id=id_, reason=reason) for id_, reason in reasons.items() if reason]
    proven.sort(key=lambda group: order.get(group.root, len(order)))
    return Discovery(groups=tuple(proven), frozen=tuple(frozen))


@torch.inference_mode()
def prove(
    model: nn.Module, groups: Sequence[Group], example: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """For each group's id ``None`` when removing units equals silencing them, else why it doesn't.

    The reference is the whole model with the removed units' columns zeroed in every consumer;
    the pruned model must give the same output. A missed or misaligned coupling shows here. Eight
    groups are tried at once; only if those don't hold together is each tried alone.
    """
    reasons = {group.id: _refusal(model, group) for group in groups}
    doubtful = [group for group in groups if reasons[group.id] is None]
    original = compute_logits(model, example) if doubtful else torch.empty(0)
    num_chunks = -(-len(doubtful) // TOGETHER)
    for start in range(num_chunks):
        chunk = doubtful[start::num_chunks]  # far apart, so that none stands behind seven others
        if len(chunk) > 1 and _compare(model, chunk, example, original) is None:
            continue
        for group in chunk:
            reasons[group.id] = _compare(model, [group], example)
    return reasons


def _refusal(model: nn.Module, group: Group) -> str | None:
    if not group.consumers:
        return "no layer consumes these units, so they reach the output"
    if group.width < 2:
        return "has a single unit"
    for member in group.members:
        layer = model.get_submodule(member.module)
        if isinstance(layer, LAYERS) and "weight" not in layer._parameters:
            return f"the weight of {member.module!r} is computed from others (weight norm, say)"
    return None


def _keep_sets(groups: Sequence[Group]) -> Iterator[dict[str, np.ndarray]]:
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
    original: Tensor | None = None,
) -> str | None:
    """Why pruned and silenced don't agree. With ``original``, silencing must also change the output
    by more than the tolerance, or agreement would say nothing."""
    for kept in _keep_sets(groups):
        try:
            with masked(model, groups, kept):
                reference = compute_logits(model, example)
            with pruned(model, groups, kept):
                result = compute_logits(model, example)
        except Exception as error:  # whatever a user's forward raises at another width
            sizes = ", ".join(f"{len(kept[g.id])} of its {g.width} units" for g in groups[:1])
            return f"the forward fails with {sizes}: {_one_line(error)}"
        if result.shape != reference.shape:
            return "the output would change its shape"
        gap = float((result - reference).abs().max())
        tolerance = RELATIVE_TOLERANCE * float(reference.abs().max())
        if not gap <= tolerance:
            return f"removing units is not the same as silencing them (difference {gap:.2g})"
        if original is not None and float((original - reference).abs().max()) <= 10 * tolerance:
            return "silencing the units changes nothing that could be compared"
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."


def _touches_output_of(group: Group, modules: set[str]) -> bool:
    return any(m.axis == "out" and m.module in modules for m in group.members)


def _call_order(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, int]:
    order: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            order.setdefault(name, len(order))

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with torch.inference_mode():
            compute_logits(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _coupled(
    model: nn.Module, example: Mapping[str, Tensor], order: Mapping[str, int]
) -> list[Group | FrozenGroup]:
    """Groups as the dependency graph sees them, or one frozen entry when it can't be built."""
    with torch.inference_mode(False), torch.enable_grad():  # tracing needs gradients
        return _trace(model, {name: x.clone() for name, x in example.items()}, order)


def _trace(
    model: nn.Module, example: Mapping[str, Tensor], order: Mapping[str, int]
) -> list[Group | FrozenGroup]:
    import torch_pruning as tp

    try:
        twin = copy.deepcopy(model)  # whether its parameters need gradients is the user's to set
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        names = {module: name for name, module in twin.named_modules()}
        inputs: Any = dict(example) if len(example) > 1 else next(iter(example.values()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its remarks on parameters it will not prune
            graph = tp.DependencyGraph().build_dependency(
                twin,
                example_inputs=inputs,
                output_transform=_logits_of,
                verbose=False,
            )
            raw_groups = list(graph.get_all_groups(root_module_types=[*LAYERS]))
    except Exception as error:  # the graph builder raises whatever the model's shape provokes
        reason = f"the dependency graph can't be built: {_one_line(error)}"
        return [FrozenGroup(id="channels:*", reason=reason)]
    return [item for raw in raw_groups for item in _read_group(raw, names, order)]


def _logits_of(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return output[0]


def _read_group(
    raw: Any, names: Mapping[nn.Module, str], order: Mapping[str, int]
) -> Iterator[Group | FrozenGroup]:
    members: list[Member] = []
    reason: str | None = None
    width = len(raw[0].idxs)
    for item in raw:
        module = item.dep.target.module
        if module not in names:
            if isinstance(module, nn.Parameter):
                reason = reason or "coupled with a bare parameter (a position embedding, say)"
            continue
        found = _member(item, module, names[module], width)
        if isinstance(found, str):
            reason = reason or found
        else:
            members.append(found)
    producers = [m.module for m in members if m.axis == "out" and m.module in order]
    if not producers:
        return
    root = min(producers, key=lambda name: order[name])
    group = Group(
        id=f"{_kind(members, names)}:{root}",
        kind=_kind(members, names),
        root=root,
        width=width,
        members=tuple(_merge(members)),
    )
    if not group.consumers:
        reason = reason or "its units are the model's output"
    yield group if reason is None else FrozenGroup(id=group.id, reason=reason)


def _kind(members: Sequence[Member], names: Mapping[nn.Module, str]) -> Any:
    modules = {name: module for module, name in names.items()}
    layers = [modules[m.module] for m in members]
    return "mlp" if all(isinstance(layer, nn.Linear) for layer in layers) else "channels"


def _member(item: Any, module: nn.Module, name: str, width: int) -> Member | str:
    """The member that a graph item stands for, or why it can't be pruned."""
    axis = "in" if "in_channels" in item.dep.handler.__name__ else "out"
    if isinstance(module, nn.Conv2d | nn.Conv1d) and module.groups > 1:
        if module.groups != module.out_channels or module.groups != module.in_channels:
            return f"{name!r} is a grouped convolution"
        axis = "out"
    elif isinstance(module, BATCH_NORMS):
        axis = "out"
    elif not isinstance(module, LAYERS):
        return f"coupled with {name!r}, a {type(module).__name__}"
    units = _units(item, width)
    if units is None:
        return f"the units of {name!r} don't divide evenly"
    return Member(module=name, axis=axis, units=units)


def _units(item: Any, width: int) -> np.ndarray | None:
    """(width, k) array: which k indices of the member's axis belong to each unit."""
    indices, roots = np.asarray(item.idxs), np.asarray(item.root_idxs)
    if len(indices) != len(roots) or len(indices) % width:
        return None
    per_unit = len(indices) // width
    if not (np.bincount(roots, minlength=width) == per_unit).all():
        return None
    return indices[np.argsort(roots, kind="stable")].reshape(width, per_unit)


def _merge(members: Sequence[Member]) -> Iterator[Member]:
    """One member per module and axis: the same layer may be reached along several paths."""
    merged: dict[tuple[str, str], Member] = {}
    for member in members:
        key = (member.module, member.axis)
        if key not in merged:
            merged[key] = member
        elif not np.array_equal(merged[key].units, member.units):
            both = np.concatenate([merged[key].units, member.units], axis=1)
            unique = [np.unique(row) for row in both]
            if len({len(row) for row in unique}) == 1:
                merged[key] = Member(module=member.module, axis=member.axis, units=np.stack(unique))
    yield from merged.values()
