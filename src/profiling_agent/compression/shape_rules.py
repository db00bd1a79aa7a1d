"""Rules of ATen operators that move, pick or join elements, for ``axis_rules.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from profiling_agent.compression.axis_rules import POSITIONS, Axes, rule, unknown
from profiling_agent.compression.slots import Axis


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def _view(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    axes.set(out, axes.reshaped(axes.of(args[0]), out.shape))


@rule("as_strided", "as_strided_")
def _as_strided(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """Only where it changes the layout in memory and no size."""
    if [len(axis) for axis in axes.of(args[0])] != list(out.shape):
        unknown(axes, args, kwargs, out, "as_strided")
    axes.set(out, axes.of(args[0]))


@rule("squeeze", "unsqueeze")
def _squeeze(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    kept = iter([axis for axis in axes.of(args[0]) if len(axis) > 1])
    axes.set(out, [next(kept) if size > 1 else axes.slots.fresh(1) for size in out.shape])


@rule("permute")
def _permute(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = axes.of(args[0])
    axes.set(out, [ours[dim] for dim in args[1]])


@rule("transpose")
def _transpose(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = list(axes.of(args[0]))
    if ours:
        ours[args[1]], ours[args[2]] = ours[args[2]], ours[args[1]]
    axes.set(out, ours)


@rule("t", "numpy_T")
def _t(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    axes.set(out, axes.of(args[0])[::-1])


@rule("expand", "broadcast_to")
def _expand(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = axes.of(args[0])
    result: list[Axis] = []
    for back in range(out.dim(), 0, -1):
        size = out.shape[-back]
        same = back <= len(ours) and len(ours[-back]) == size
        result.append(ours[-back] if same else axes.fixed(size, "repeated"))
    axes.set(out, result)


@rule("repeat")
def _repeat(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours, times = axes.of(args[0]), list(args[1])
    ours = [axes.slots.fresh(1)] * (len(times) - len(ours)) + ours
    axes.set(out, [np.tile(axis, count) for axis, count in zip(ours, times, strict=True)])


@rule("select")
def _select(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = list(axes.of(args[0]))
    axes.slots.freeze(ours.pop(args[1]), "picked by number")
    axes.set(out, ours)


@rule("unbind")
def _unbind(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = list(axes.of(args[0]))
    axes.slots.freeze(
        ours.pop(args[1] if len(args) > 1 else kwargs.get("dim", 0)), "picked by number"
    )
    for result in out:
        axes.set(result, ours)


@rule("slice")
def _slice(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    dim = args[1] if len(args) > 1 else 0
    start, end, step = (*args[2:], *[None] * 3)[:3]
    ours = list(axes.of(args[0]))
    ours[dim] = ours[dim][slice(start, end, step)]
    axes.set(out, ours)


@rule(
    "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk"
)
def _split(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """Parts may shrink apart: their sizes are stated ones (``sizes.py``)."""
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
    ours = axes.of(args[0])
    start = 0
    for result in out:
        stop = start + result.shape[dim]
        axes.set(result, [*ours[:dim], ours[dim][start:stop], *ours[dim + 1 :]])
        start = stop


@rule("cat", "concat")
def _cat(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    tensors = [t for t in args[0] if t.dim() == out.dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    result: list[Axis] = []
    for position in range(out.dim()):
        parts = [axes.of(t)[position] for t in tensors]
        if position == dim:
            result.append(np.concatenate(parts))
            continue
        for other in parts[1:]:
            axes.slots.tie(parts[0], other)
        result.append(parts[0])
    axes.set(out, result)


@rule("stack")
def _stack(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    first = axes.of(args[0][0])
    for tensor in args[0][1:]:
        for ours, theirs in zip(first, axes.of(tensor), strict=True):
            axes.slots.tie(ours, theirs)
    axes.set(out, [*first[:dim], axes.fixed(out.shape[dim], "stacked"), *first[dim:]])


@rule("constant_pad_nd")
def _pad(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours, amounts = list(axes.of(args[0])), list(args[1])
    for number in range(len(amounts) // 2):
        dim, low, high = len(ours) - 1 - number, amounts[2 * number], amounts[2 * number + 1]
        axis = ours[dim]
        if low < 0 or high < 0:
            axis = axis[max(0, -low) : len(axis) - max(0, -high)]
        pads = [axes.fixed(max(0, n), "padding with zeros") for n in (low, high)]
        ours[dim] = np.concatenate([pads[0], axis, pads[1]])
    axes.set(out, ours)


@rule("roll", "flip")
def _moved(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    dims = args[2] if len(args) > 2 else args[1]
    ours = axes.of(args[0])
    for dim in dims:
        axes.slots.freeze(ours[dim], POSITIONS)
    axes.set(out, ours)


@rule("index", "_unsafe_index")
def _index(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours, indices = axes.of(args[0]), list(args[1])
    at = [dim for dim, index in enumerate(indices) if index is not None]
    for dim in at:
        axes.slots.freeze(ours[dim], "picked by number")
    shape = torch.broadcast_shapes(*(indices[dim].shape for dim in at))
    if any(indices[dim].dtype == torch.bool for dim in at):
        axes.set(out, [axes.fixed(n) for n in out.shape])
        return
    picked = [axes.fixed(n, "picked by number") for n in shape]
    rest = [axis for dim, axis in enumerate(ours) if dim not in at]
    together = at == list(range(at[0], at[0] + len(at)))
    before = at[0] if together else 0
    axes.set(out, [*rest[:before], *picked, *rest[before:]])


@rule("index_select")
def _index_select(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = list(axes.of(args[0]))
    axes.slots.freeze(ours[args[1]], "picked by number")
    ours[args[1]] = axes.fixed(out.shape[args[1]], "picked by number")
    axes.set(out, ours)


@rule("embedding")
def _embedding(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    table = axes.of(args[0])
    axes.slots.freeze(table[0], "picked by number")
    axes.set(out, [*axes.of(args[1]), table[1]])


@rule("gather")
def _gather(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours, theirs = axes.of(args[0]), axes.of(args[2])
    dim = args[1] % out.dim()
    result: list[Axis] = []
    for position in range(out.dim()):
        axes.slots.freeze(ours[position], "picked by number")
        axes.slots.freeze(theirs[position], "picked by number")
        result.append(theirs[position] if position != dim else axes.fixed(out.shape[dim]))
    axes.set(out, result)
