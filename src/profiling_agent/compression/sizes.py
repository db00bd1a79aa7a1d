"""Sizes that a forward states as numbers, and how they are made to follow the units that stay.

``x.reshape(B, N, self.num_heads, self.head_dim)`` holds numbers that come from attributes, from
shapes seen before, or are simply written there. Where they come from can't be told in general, but
in which call of which module they are used can. A module whose sizes must shrink gets a forward
that runs the old one and corrects these numbers on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from profiling_agent.compression.slots import Axis

_SHAPES = {
    torch.Tensor.view,
    torch.Tensor.reshape,
    torch.reshape,
    torch.Tensor.expand,
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.Tensor.new_zeros,
    torch.Tensor.new_ones,
    torch.Tensor.new_empty,
}
_UNFLATTEN = {torch.Tensor.unflatten, torch.unflatten}
_SPLIT = {
    torch.Tensor.split,
    torch.split,
    torch.Tensor.split_with_sizes,
    torch.split_with_sizes,
}
_CHUNK = {torch.Tensor.chunk, torch.chunk}
_ATTENTION = {F.scaled_dot_product_attention}
_INDEX = {torch.Tensor.__getitem__}
_NARROW = {torch.Tensor.narrow, torch.narrow}
STATING = _SHAPES | _UNFLATTEN | _SPLIT | _CHUNK | _ATTENTION | _INDEX | _NARROW
"""Functions whose arguments may hold sizes."""

Place = tuple[int, ...]
SCALE: Place = (-1,)
"""The width of attention's keys, of which the scale is the inverse square root."""
Corrections = Mapping[int, Mapping[Place, int]]
"""Number of the stating call in a module's forward, place in its arguments, and the new number."""


def stated_sizes(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
    axes_of: Callable[[Tensor], list[Axis]],
) -> Iterator[tuple[Place, Axis]]:
    """Each number in a call that counts positions of an axis, with the positions it counts.

    A place is a path into the positional arguments. Numbers of -1 follow by themselves.
    """
    tensor: Any = args[0] if args else None
    if func in _SHAPES and isinstance(out, Tensor):
        yield from _of_shape(args, _first_size(func), axes_of(out))
    elif func in _UNFLATTEN and len(args) == 3:
        dim = args[1] % args[0].dim()
        axes = axes_of(out)[dim : dim + len(args[2])]
        yield from (((2, n), axis) for n, axis in enumerate(axes) if args[2][n] != -1)
    elif func in _SPLIT | _CHUNK and len(args) > 1:
        dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % args[0].dim()
        yield from (((1, n), axes_of(part)[dim]) for n, part in enumerate(out))
    elif func in _ATTENTION and kwargs.get("scale") is None and len(args) >= 3:
        yield SCALE, axes_of(args[0])[-1]
    elif func in _INDEX:
        yield from _of_index(args, axes_of(tensor))
    elif func in _NARROW and len(args) == 4:
        axis = axes_of(args[0])[args[1]]
        yield (2,), axis[: args[2]]
        yield (3,), axis[args[2] : args[2] + args[3]]


def _first_size(func: Any) -> int:
    return 0 if func in (torch.zeros, torch.ones, torch.empty) else 1


def _of_shape(args: tuple[Any, ...], start: int, axes: list[Axis]) -> Iterator[tuple[Place, Axis]]:
    given: list[Any] = list(args[start:])
    nested = bool(given) and isinstance(given[0], tuple | list)
    sizes: list[Any] = list(given[0]) if nested else given
    if len(sizes) != len(axes):
        return
    for number, (size, axis) in enumerate(zip(sizes, axes, strict=True)):
        if isinstance(size, int) and size != -1 and size == len(axis):
            yield ((start, number) if nested else (start + number,)), axis


def _of_index(args: tuple[Any, ...], axes: list[Axis]) -> Iterator[tuple[Place, Axis]]:
    nested = isinstance(args[1], tuple)
    index = args[1] if nested else (args[1],)
    if any(isinstance(part, Tensor) for part in index):
        return
    dim = 0
    for number, part in enumerate(index):
        if part is Ellipsis:
            dim = len(axes) - sum(1 for p in index[number + 1 :] if p is not None)
            continue
        if part is None:
            continue
        if isinstance(part, slice) and dim < len(axes):
            for end, value in enumerate((part.start, part.stop)):
                if isinstance(value, int) and 0 < value <= len(axes[dim]):
                    yield ((1, number, end) if nested else (1, end)), axes[dim][:value]
        dim += 1


class _Correcting(TorchFunctionMode):
    def __init__(self, corrections: Corrections) -> None:
        super().__init__()
        self._corrections = corrections
        self._calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in STATING:
            sizes = self._corrections.get(self._calls)
            self._calls += 1
            if sizes and func in _SPLIT | _CHUNK:
                return torch.split(args[0], [sizes[p] for p in sorted(sizes)], *args[2:], **kwargs)
            for place, size in (sizes or {}).items():
                if place == SCALE:
                    kwargs = kwargs | {"scale": size**-0.5}
                else:
                    args = _replaced(args, place, size)
        return func(*args, **kwargs)


def _replaced(value: Any, place: Place, size: int) -> Any:
    if not place:
        return size
    if isinstance(value, slice):
        start, stop = (size, value.stop) if place[0] == 0 else (value.start, size)
        return slice(start, stop, value.step)
    parts = list(value)
    parts[place[0]] = _replaced(parts[place[0]], place[1:], size)
    return tuple(parts) if isinstance(value, tuple) else parts


class _Forward:
    """A module's forward with corrected sizes; copied with the module."""

    def __init__(self, module: nn.Module, corrections: Corrections) -> None:
        self._module, self.corrections = module, corrections

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _forget(self._module)  # what it computed once would not be stated again
        with _Correcting(self.corrections):
            return type(self._module).forward(self._module, *args, **kwargs)


def correct_sizes(module: nn.Module, corrections: Corrections) -> None:
    """From now on the module's forward uses these sizes; undone by removing ``forward``.

    Sizes that were corrected before, when other units went, stay so unless they are among these.
    """
    before = vars(module).get("forward")
    if isinstance(before, _Forward):
        calls = {*before.corrections, *corrections}
        corrections = {
            call: {**before.corrections.get(call, {}), **corrections.get(call, {})}
            for call in calls
        }
    vars(module)["forward"] = _Forward(module, corrections)


class Cache(dict[Any, Any]):
    """A module's dictionary that its forward is known to fill again when it is empty."""


def find_caches(model: nn.Module, run: Callable[[], object]) -> None:
    """Make those dictionaries of modules that ``run``, a forward, fills again a ``Cache``.

    Those that it only reads hold constants, which nothing would bring back, and stay as they are.
    """
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) is dict and not name.startswith("_") and _may_be_cache(value)
    ]
    if not held:
        return
    for module, name, _ in held:
        vars(module)[name] = Cache()
    try:
        run()
        filled = [_is_filled(vars(m)[name], before) for m, name, before in held]
    except Exception:  # whatever a forward raises that misses its constants
        filled = [False] * len(held)
    for (module, name, before), is_cache in zip(held, filled, strict=True):
        if not is_cache:
            vars(module)[name] = before


def _may_be_cache(value: dict[Any, Any]) -> bool:
    return not value or any(isinstance(entry, Tensor) for entry in value.values())


def _is_filled(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    return set(before) <= set(now) and any(isinstance(entry, Tensor) for entry in now.values())


def forget_caches(model: nn.Module) -> None:
    """Empty the dictionaries in which modules keep tensors of an earlier forward.

    Such as the attention biases of LeViT, which are kept by device and would stay as wide.
    """
    for module in model.modules():
        _forget(module)


def _forget(module: nn.Module) -> None:
    for name, value in vars(module).items():
        if isinstance(value, Cache):
            vars(module)[name] = Cache()
