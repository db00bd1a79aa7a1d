"""Attention heads as groups: a head is one unit of the query, key, value and output projections.

Recognised by what a module holds, not by its class: a fused ``qkv`` or separate projections, an
output projection and a number of heads. What is recognised here is believed only after the proof
in ``groups.py``; attention of another make is listed as frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from profiling_agent.compression.group import Attribute, Group, Member
from profiling_agent.records.profile import FrozenGroup

FUSED = ("qkv", "in_proj", "c_attn", "query_key_value")
SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
)
OUTPUTS = ("proj", "out_proj", "o_proj", "to_out", "to_out.0", "output.dense", "out_lin", "dense")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "heads", "n_heads", "nhead")
INNER_WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "num_heads_x_head_dim")


@dataclass(frozen=True, kw_only=True)
class _Attention:
    name: str
    module: nn.Module
    num_heads: int
    projections: tuple[str, ...]
    output: str
    inner: int


def find_attention_heads(model: nn.Module) -> tuple[list[Group], list[FrozenGroup]]:
    """A group of heads for every attention module of a known make; frozen entries for others."""
    groups: list[Group] = []
    frozen: list[FrozenGroup] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = "torch.nn.MultiheadAttention insists on heads that fill the embedding"
            frozen.append(FrozenGroup(id=f"heads:{name}", reason=reason))
            continue
        found = _recognise(model, name, module)
        if found is not None and found.num_heads > 1:
            groups.append(_heads(found))
    return groups, frozen


def _recognise(model: nn.Module, name: str, module: nn.Module) -> _Attention | None:
    num_heads = next(
        (v for a in HEAD_COUNTS if isinstance(v := getattr(module, a, None), int) and v > 0), None
    )
    if num_heads is None:
        return None
    for projections in _projections(module):
        layers = [module.get_submodule(p) for p in projections]
        widths = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
        inner = widths[0] // 3 if len(projections) == 1 else widths[0]
        if inner % num_heads or len(set(widths)) != 1:
            continue
        output = _output(model, name, inner)
        if output is not None:
            prefix = f"{name}." if name else ""
            return _Attention(
                name=name,
                module=module,
                num_heads=num_heads,
                projections=tuple(prefix + p for p in projections),
                output=output,
                inner=inner,
            )
    return None


def _projections(module: nn.Module) -> Iterator[tuple[str, ...]]:
    children = dict(module.named_children())
    for fused in FUSED:
        if isinstance(children.get(fused), nn.Linear):
            yield (fused,)
    for names in SEPARATE:
        if all(isinstance(children.get(part), nn.Linear) for part in names):
            yield names


def _output(model: nn.Module, name: str, inner: int) -> str | None:
    """The linear layer that reads the heads: in the module itself, or beside it."""
    parents = [name] if name == "" else [name, name.rpartition(".")[0]]
    for parent in parents:
        for candidate in OUTPUTS:
            path = f"{parent}.{candidate}" if parent else candidate
            try:
                layer = model.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(layer, nn.Linear) and layer.in_features == inner:
                return path
    return None


def _heads(found: _Attention) -> Group:
    head_dim = found.inner // found.num_heads
    one = np.arange(found.inner).reshape(found.num_heads, head_dim)
    fused = len(found.projections) == 1
    rows = np.concatenate([one + part * found.inner for part in range(3)], axis=1) if fused else one
    members = [Member(module=p, axis="out", units=rows) for p in found.projections]
    members.append(Member(module=found.output, axis="in", units=one))
    attributes = [
        Attribute(module=found.name, name=attribute, per_unit=1)
        for attribute in HEAD_COUNTS
        if getattr(found.module, attribute, None) == found.num_heads
    ]
    attributes += [
        Attribute(module=found.name, name=attribute, per_unit=head_dim)
        for attribute in INNER_WIDTHS
        if getattr(found.module, attribute, None) == found.inner
    ]
    return Group(
        id=f"heads:{found.projections[0]}",
        kind="heads",
        root=found.projections[0],
        width=found.num_heads,
        members=tuple(members),
        attributes=tuple(attributes),
    )
