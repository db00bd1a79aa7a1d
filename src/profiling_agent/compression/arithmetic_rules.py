"""Rules of ATen operators that compute: products, norms, reductions, windows over space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from profiling_agent.compression.axis_rules import (
    POSITIONS,
    Axes,
    elementwise,
    outputs_of,
    rule,
    unknown,
)
from profiling_agent.compression.slots import HEADS, Axis


def _set_first(axes: Axes, out: Any, ours: Sequence[Axis]) -> None:
    """Axes of the first output; the others are statistics that nobody reads."""
    first, *others = outputs_of(out)
    axes.set(first, ours)
    for other in others:
        axes.set(other, [axes.fixed(n) for n in other.shape])


# ---- products


@rule("mm")
def _mm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    a, b = axes.of(args[0]), axes.of(args[1])
    axes.slots.tie(a[1], b[0])
    axes.set(out, [a[0], b[1]])


@rule("addmm")
def _addmm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    a, b = axes.of(args[1]), axes.of(args[2])
    axes.slots.tie(a[1], b[0])
    axes.set(out, [a[0], b[1]])
    bias = axes.of(args[0])
    if bias and len(bias[-1]) == len(b[1]):
        axes.slots.tie(bias[-1], b[1])
    if len(bias) > 1 and len(bias[0]) == len(a[0]):
        axes.slots.tie(bias[0], a[0])


@rule("bmm")
def _bmm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    a, b = axes.of(args[0]), axes.of(args[1])
    axes.slots.tie(a[0], b[0])
    axes.slots.mark(a[0], HEADS)
    axes.slots.tie(a[2], b[1])
    axes.set(out, [a[0], a[1], b[2]])


@rule("baddbmm")
def _baddbmm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    _bmm(axes, args[1:], kwargs, out)
    axes.set(out, axes.aligned([out, args[0]], out.shape))


@rule("matmul")
def _matmul(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    a, b = axes.of(args[0]), axes.of(args[1])
    if len(a) < 2 or len(b) < 2:
        unknown(axes, args, kwargs, out, "matmul")
        return
    axes.slots.tie(a[-1], b[-2])
    batch: list[Axis] = []
    for back in range(out.dim(), 2, -1):
        met = [t[-back] for t in (a, b) if len(t) >= back and len(t[-back]) == out.shape[-back]]
        for other in met[1:]:
            axes.slots.tie(met[0], other)
        batch.append(met[0])
    if batch:
        axes.slots.mark(batch[-1], HEADS)
    axes.set(out, [*batch, a[-2], b[-1]])


@rule("linear")
def _linear(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    x, weight = axes.of(args[0]), axes.of(args[1])
    axes.slots.tie(x[-1], weight[1])
    if len(args) > 2 and args[2] is not None:
        axes.slots.tie(axes.of(args[2])[0], weight[0])
    axes.set(out, [*x[:-1], weight[0]])


@rule("mv", "dot")
def _mv(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    a, b = axes.of(args[0]), axes.of(args[1])
    axes.slots.tie(a[-1], b[0])
    axes.set(out, a[:-1])


WHOLE_GROUPS = 4
"""From so many groups on a grouped convolution loses whole groups, below it channels of each."""


@rule("conv1d", "conv2d", "conv3d")
def _composite_convolution(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """As inference mode leaves it: without the flag for transposed ones."""
    given = [*args, None][:3] if len(args) < 3 else list(args[:3])
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    _convolution(axes, (*given, None, None, None, False, None, groups), kwargs, out)


@rule("convolution", "_convolution", "mkldnn_convolution")
def _convolution(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    x, weight = axes.of(args[0]), axes.of(args[1])
    transposed, num_groups = bool(args[6]), int(args[8])
    for axis in [*x[2:], *weight[2:]]:
        axes.slots.freeze(axis, POSITIONS)
    if num_groups > 1:
        produced = _grouped(axes, x[1], weight, num_groups, transposed)
    elif transposed:
        axes.slots.tie(x[1], weight[0])
        produced = weight[1]
    else:
        axes.slots.tie(x[1], weight[1])
        produced = weight[0]
    if args[2] is not None:
        axes.slots.tie(axes.of(args[2])[0], produced)
    axes.set(out, [x[0], produced, *(axes.fixed(n) for n in out.shape[2:])])


def _grouped(axes: Axes, read: Axis, weight: list[Axis], num_groups: int, transposed: bool) -> Axis:
    """Grouped: whole groups go, or the same channels of every group; returns the output axis."""
    slots = axes.slots
    if transposed:
        for axis in (read, weight[0], weight[1]):
            slots.freeze(axis, "a grouped transposed convolution")
        return axes.fixed(len(weight[1]) * num_groups, "a grouped transposed convolution")
    inputs, outputs = read.reshape(num_groups, -1), weight[0].reshape(num_groups, -1)
    if num_groups >= WHOLE_GROUPS or inputs.shape[1] == 1:
        for axis in (inputs, outputs):
            slots.tie(axis.reshape(-1), np.repeat(inputs[:, 0], axis.shape[1]))
        slots.freeze(weight[1], "inside the groups of a convolution")
    else:
        for axis in (inputs, outputs):
            slots.tie(axis.reshape(-1), np.tile(axis[0], num_groups))
        slots.tie(weight[1], inputs[0])
    return weight[0]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "scaled_dot_product_attention",
)
def _attention(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """Heads and value widths may go, and key widths, whose scale is a stated size.

    A head of keys and values may serve several queries in a row (``enable_gqa``), or all of them.
    """
    query, key, value = (axes.of(tensor) for tensor in args[:3])
    slots = axes.slots
    for position in range(len(query) - 2):
        slots.tie(key[position], value[position])
        ours, theirs = query[position], value[position]
        if len(ours) == len(theirs) or len(theirs) > 1:
            slots.tie(ours, np.repeat(theirs, len(ours) // len(theirs)))
    slots.mark(query[-3], HEADS)
    slots.tie(query[-1], key[-1])
    slots.freeze(key[-2], POSITIONS)
    slots.freeze(value[-2], POSITIONS)
    _set_first(axes, out, [*query[:-1], value[-1]])
    mask = kwargs.get("attn_mask")
    if isinstance(mask, Tensor):
        for ours, theirs in zip(reversed(axes.of(mask)[:-2]), reversed(query[:-2]), strict=False):
            if len(ours) == len(theirs) and len(ours) > 1:
                slots.tie(ours, theirs)


# ---- norms, softmax, reductions


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "batch_norm",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
)
def _batch_norm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = axes.of(args[0])
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            axes.slots.tie(axes.of(tensor)[0], ours[1])
    _set_first(axes, out, ours)


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours, normed = axes.of(args[0]), len(args[1])
    for axis in ours[-normed:]:
        axes.on_reduced(axis, "normalised over")
    for tensor in args[2:4]:
        if isinstance(tensor, Tensor):
            for axis, theirs in zip(ours[-normed:], axes.of(tensor), strict=True):
                axes.slots.tie(theirs, axis)
    _set_first(axes, out, ours)


@rule("native_group_norm")
def _group_norm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """Channels leave every group alike, so that the groups stay of one size."""
    ours, num_groups = axes.of(args[0]), int(args[6])
    grid = ours[1].reshape(num_groups, -1)
    if grid.shape[1] > 1:
        axes.slots.tie(ours[1], np.tile(grid[0], num_groups))
        axes.on_reduced(ours[1], "normalised over")
    for tensor in args[1:3]:
        if isinstance(tensor, Tensor):
            axes.slots.tie(axes.of(tensor)[0], ours[1])
    _set_first(axes, out, ours)


@rule("_softmax", "softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort")
def _along(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = list(axes.of(args[0]))
    given = next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1)
    dim = kwargs.get("dim", given)
    axes.slots.freeze(ours[dim], "weighed against each other (softmax or sorting)")
    for result in outputs_of(out):
        axes.set(
            result,
            [
                axis if len(axis) == n else axes.fixed(n)
                for axis, n in zip(ours, result.shape, strict=True)
            ],
        )


@rule("topk")
def _topk(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    _along(axes, (args[0], *args[2:]), kwargs, out)


@rule("glu")
def _glu(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """A unit and its gate, in the other half, go together."""
    ours = list(axes.of(args[0]))
    dim = args[1] if len(args) > 1 else -1
    half = out.shape[dim]
    axes.slots.tie(ours[dim][:half], ours[dim][half:])
    ours[dim] = ours[dim][:half]
    axes.set(out, ours)


@rule("linalg_vector_norm", "norm")
def _norm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    _reduce(axes, (args[0], *args[2:]), kwargs, out)  # without the order, a number like a dim


@rule(
    "mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod",
    "logsumexp", "any", "all", "argmax", "argmin", "median",
)  # fmt: skip
def _reduce(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    tensors = [value for value in args if isinstance(value, Tensor)]
    if len(tensors) > 1:  # max(a, b)
        elementwise(axes, args, kwargs, out)
        return
    ours = axes.of(args[0])
    results = outputs_of(out)
    if results[0].dim() == len(ours):  # keepdim
        gone = [d for d in range(len(ours)) if results[0].shape[d] != len(ours[d])]
        kept = [
            axes.slots.fresh(1) if results[0].shape[d] == 1 else axis for d, axis in enumerate(ours)
        ]
    else:
        named = next(
            (v for v in [*args[1:], kwargs.get("dim")] if isinstance(v, tuple | list | int)
             and not isinstance(v, bool)),
            None,
        )  # fmt: skip
        if torch.is_tensor(out) and args[0].dim() and out.dim() == 0:
            named = list(range(len(ours)))
        dims = [named] if isinstance(named, int) else list(named or range(len(ours)))
        gone = [dim % len(ours) for dim in dims]
        kept = [axis for d, axis in enumerate(ours) if d not in gone]
    for dim in gone:
        axes.on_reduced(ours[dim], "averaged or compared over")
    for result in results:
        axes.set(result, kept)


# ---- windows over space


@rule(
    "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "avg_pool1d",
    "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mkldnn_max_pool2d", "max_pool1d", "max_pool3d",
    "adaptive_avg_pool1d", "_adaptive_avg_pool3d", "avg_pool3d", "max_pool3d_with_indices",
    "upsample_nearest2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa", "reflection_pad2d", "replication_pad2d", "upsample_linear1d",
    "_upsample_nearest_exact2d", "grid_sampler_2d",
)  # fmt: skip
def _window(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = axes.of(args[0])
    spatial = args[0].dim() - 2
    for axis in ours[-spatial:]:
        axes.slots.freeze(axis, POSITIONS)
    for result in outputs_of(out):
        axes.set(result, [*ours[:-spatial], *(axes.fixed(n) for n in result.shape[-spatial:])])


@rule("im2col")
def _im2col(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = axes.of(args[0])
    for axis in ours[2:]:
        axes.slots.freeze(axis, POSITIONS)
    patch = out.shape[1] // len(ours[1])
    axes.set(out, [ours[0], np.repeat(ours[1], patch), axes.fixed(out.shape[2])])


@rule("col2im")
def _col2im(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = axes.of(args[0])
    channels = ours[1].reshape(out.shape[1], -1)
    axes.slots.tie(ours[1], np.repeat(channels[:, 0], channels.shape[1]))
    axes.slots.freeze(ours[2], POSITIONS)
    axes.set(out, [ours[0], channels[:, 0], *(axes.fixed(n) for n in out.shape[2:])])


@rule("pixel_unshuffle", "pixel_shuffle")
def _shuffled_pixels(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = axes.of(args[0])
    few, many = sorted((len(ours[1]), out.shape[1]))
    if len(ours[1]) == few:
        channels = np.repeat(ours[1], many // few)
    else:
        channels = ours[1].reshape(few, -1)[:, 0]
        axes.slots.tie(ours[1], np.repeat(channels, many // few))
    axes.set(out, [ours[0], channels, *(axes.fixed(n) for n in out.shape[2:])])


@rule("native_channel_shuffle", "channel_shuffle")
def _channel_shuffle(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours, num_groups = axes.of(args[0]), int(args[1])
    grid = ours[1].reshape(num_groups, -1)
    axes.slots.tie(ours[1], np.tile(grid[0], num_groups))
    axes.set(out, [ours[0], np.ascontiguousarray(grid.T).reshape(-1), *ours[2:]])


@rule("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "rand")
def _filled(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """One value everywhere, so that it fits any width."""
    axes.set(out, [axes.slots.fresh(n) for n in out.shape])
