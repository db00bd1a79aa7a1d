"""The positions of every tensor's axes, and the table of what operators demand of them.

A rule ties slots that have to go together, freezes those that may not go, and says which slots the
output's axes have: ``shape_rules.py`` for operators that move elements, ``arithmetic_rules.py`` for
those that compute. Elementwise operators are known by PyTorch's own tag; an operator without a rule
freezes everything it touches, so that nothing is pruned by guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from profiling_agent.compression.slots import Axis, Grids, Slots

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
        elementwise(axes, args, kwargs, out)
    else:
        unknown(axes, args, kwargs, out, name)


_ELEMENTWISE = {
    "_conj", "_prelu_kernel", "_to_copy", "alias", "bernoulli", "celu", "clamp", "clone", "conj",
    "contiguous", "copy", "detach", "dropout", "elu", "empty_like",
    "fake_quantize_per_tensor_affine", "fill", "full_like", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "lift_fresh", "log_sigmoid_forward", "masked_fill", "mish",
    "ones_like", "positive", "prelu", "rand_like", "real", "relu6", "resolve_conj", "resolve_neg",
    "rrelu", "selu", "softshrink", "threshold", "to", "zero", "zeros_like",
}  # fmt: skip


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def outputs_of(out: Any) -> list[Tensor]:
    values = out if isinstance(out, tuple | list) else [out]
    return [value for value in values if isinstance(value, Tensor)]


def elementwise(axes: Axes, args: Any, kwargs: Any, out: Any) -> None:
    inputs = tensors_of(args, kwargs)
    for result in outputs_of(out):
        axes.set(result, axes.aligned(inputs, result.shape))


def unknown(axes: Axes, args: Any, kwargs: Any, out: Any, name: str) -> None:
    inputs = tensors_of(args, kwargs)
    for tensor in inputs:
        for axis in axes.of(tensor):
            axes.slots.freeze(axis, f"goes through the operator {name!r}, which has no rule here")
    for result in outputs_of(out):
        if not any(result is tensor for tensor in inputs):
            axes.set(
                result, [axes.fixed(n, f"comes from the operator {name!r}") for n in result.shape]
            )
