"""What each ATen operator demands of the positions of its axes, for ``tracing.py``.

A rule ties slots that have to go together, freezes those that may not go, and says which slots the
output's axes have. Elementwise operators are known by PyTorch's own tag; an operator without a rule
freezes everything it touches, so that nothing is pruned by guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from profiling_agent.compression.slots import HEADS, Axis, Grids, Slots

POSITIONS = "positions in space or in a sequence"


class Axes:
    """The slots of all tensors of one forward, as far as they are still alive."""

    def __init__(self) -> None:
        from torch.utils.weak import WeakTensorKeyDictionary

        self.slots = Slots()
        self.grids = Grids(self.slots)
        self._known: Any = WeakTensorKeyDictionary()
        self.on_reduced: Callable[[Axis, str], None] = self.slots.freeze

    def of(self, tensor: Tensor) -> list[Axis]:
        """Slots by axis; a tensor that came from nowhere holds constants, which must keep."""
        axes = self._known.get(tensor)
        if axes is None:
            axes = [self.slots.fixed(n, "set against a constant") for n in tensor.shape]
            self._known[tensor] = axes
        return axes

    def knows(self, tensor: Tensor) -> bool:
        return self._known.get(tensor) is not None

    def set(self, tensor: Any, axes: Sequence[Axis]) -> None:
        if not isinstance(tensor, Tensor):
            return
        assert [len(a) for a in axes] == list(tensor.shape), (tensor.shape, [len(a) for a in axes])
        self._known[tensor] = list(axes)

    def fixed(self, size: int, reason: str = POSITIONS) -> Axis:
        return self.slots.fixed(size, reason)

    def reshaped(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """The axes of a tensor after a reshape that keeps the order of its elements."""
        if 0 in sizes:
            return [self.fixed(size) for size in sizes]
        left = [axis for axis in axes if len(axis) > 1]
        result: list[Axis] = []
        position = 0
        while position < len(sizes):
            if sizes[position] == 1:
                result.append(self.slots.fresh(1))
                position += 1
                continue
            wanted, have = [sizes[position]], [left.pop(0)]
            while math.prod(wanted) != math.prod(len(a) for a in have):
                if math.prod(wanted) < math.prod(len(a) for a in have):
                    position += 1
                    wanted.append(sizes[position])
                else:
                    have.append(left.pop(0))
            position += 1
            result += self._rearranged(have, wanted)
        assert not left
        return result

    def _rearranged(self, have: list[Axis], wanted: list[int]) -> list[Axis]:
        if len(have) == 1 and len(wanted) == 1:
            return have
        merged = have[0] if len(have) == 1 else self.grids.merge(have)
        if len(wanted) == 1:
            return [merged]
        factors = iter(self.grids.split(merged, [size for size in wanted if size > 1]))
        return [next(factors) if size > 1 else self.slots.fresh(1) for size in wanted]

    def aligned(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Axis]:
        """Axes of an elementwise result; positions that meet are tied."""
        result: list[Axis] = []
        for back in range(len(shape), 0, -1):
            size = shape[-back]
            met = [self.of(t)[-back] for t in tensors if t.dim() >= back and t.shape[-back] == size]
            if not met:
                result.append(self.fixed(size))
                continue
            for other in met[1:]:
                if size > 1:
                    self.slots.tie(met[0], other)
            result.append(met[0])
        return result


Rule = Callable[[Axes, tuple[Any, ...], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names (``aten::NAME``)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_rule(
    axes: Axes, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Account for one operator that was just executed."""
    name = func._schema.name.partition("::")[2]
    found = RULES.get(name)
    if found is not None:
        found(axes, args, kwargs, out)
    elif torch.Tag.pointwise in func.tags or name.rstrip("_") in _ELEMENTWISE:
        _elementwise(axes, args, kwargs, out)
    else:
        _unknown(axes, args, kwargs, out, name)


_ELEMENTWISE = {
    "_conj", "_prelu_kernel", "_to_copy", "alias", "bernoulli", "celu", "clamp", "clone", "conj",
    "contiguous", "copy", "detach", "dropout", "elu", "empty_like",
    "fake_quantize_per_tensor_affine", "fill", "full_like", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "lift_fresh", "log_sigmoid_forward", "masked_fill", "mish",
    "ones_like", "positive", "prelu", "rand_like", "real", "relu6", "resolve_conj", "resolve_neg",
    "rrelu", "selu", "softshrink", "threshold", "to", "zero", "zeros_like",
}  # fmt: skip


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _outputs(out: Any) -> list[Tensor]:
    values = out if isinstance(out, tuple | list) else [out]
    return [value for value in values if isinstance(value, Tensor)]


def _elementwise(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    inputs = _tensors(args, kwargs)
    for result in _outputs(out):
        axes.set(result, axes.aligned(inputs, result.shape))


def _unknown(axes: Axes, args: Any, kwargs: Any, out: Any, name: str) -> None:
    inputs = _tensors(args, kwargs)
    for tensor in inputs:
        for axis in axes.of(tensor):
            axes.slots.freeze(axis, f"goes through the operator {name!r}, which has no rule here")
    for result in _outputs(out):
        if not any(result is tensor for tensor in inputs):
            axes.set(
                result, [axes.fixed(n, f"comes from the operator {name!r}") for n in result.shape]
            )


# ---- shape


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
def _view(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    axes.set(out, axes.reshaped(axes.of(args[0]), out.shape))


@rule("as_strided", "as_strided_")
def _as_strided(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    """Only where it changes the layout in memory and no size."""
    if [len(axis) for axis in axes.of(args[0])] != list(out.shape):
        _unknown(axes, args, kwargs, out, "as_strided")
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
        _unknown(axes, args, kwargs, out, "matmul")
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
    results = _outputs(out)
    axes.set(results[0], [*query[:-1], value[-1]])
    for extra in results[1:]:
        axes.set(extra, [axes.fixed(n) for n in extra.shape])
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
    results = _outputs(out)
    axes.set(results[0], ours)
    for extra in results[1:]:
        axes.set(extra, [axes.fixed(n) for n in extra.shape])


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours, normed = axes.of(args[0]), len(args[1])
    for axis in ours[-normed:]:
        axes.on_reduced(axis, "normalised over")
    for tensor in args[2:4]:
        if isinstance(tensor, Tensor):
            for axis, theirs in zip(ours[-normed:], axes.of(tensor), strict=True):
                axes.slots.tie(theirs, axis)
    results = _outputs(out)
    axes.set(results[0], ours)
    for extra in results[1:]:
        axes.set(extra, [axes.fixed(n) for n in extra.shape])


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
    results = _outputs(out)
    axes.set(results[0], ours)
    for extra in results[1:]:
        axes.set(extra, [axes.fixed(n) for n in extra.shape])


@rule("_softmax", "softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort")
def _along(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    ours = list(axes.of(args[0]))
    given = next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1)
    dim = kwargs.get("dim", given)
    axes.slots.freeze(ours[dim], "weighed against each other (softmax or sorting)")
    for result in _outputs(out):
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
        _elementwise(axes, args, kwargs, out)
        return
    ours = axes.of(args[0])
    results = _outputs(out)
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
    for result in _outputs(out):
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
