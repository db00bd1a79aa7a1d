"""One forward of a model, watched: which positions of which parameters have to go together.

Every ATen operator of a real forward is accounted for by ``axis_rules.py``, so functional code,
fused projections and shared layers are seen as they run; a model's classes don't matter. Beside it
is noted where the forward states sizes (``x.view(B, N, 3, heads, width)``), since these numbers
have to shrink with the units, and which modules average over an axis (norms), since there the
survivors alone will count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression import arithmetic_rules, shape_rules  # noqa: F401  fill the table
from profiling_agent.compression.axis_rules import Axes, apply_rule
from profiling_agent.compression.sizes import STATING, find_caches, forget_caches, stated_sizes
from profiling_agent.compression.slots import Axis, Slots


@dataclass(frozen=True, kw_only=True)
class Source:
    """A parameter or buffer of the model, by the module that holds it."""

    module: str
    tensor: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A size that a module's forward states: in its ``call``-th stating call, at ``place``.

    ``has_batch`` when it also depends on the number of samples.
    """

    module: str
    call: int
    place: tuple[int, ...]
    axis: Axis
    has_batch: bool = False


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """An axis that a module averages over, and where it stands in what the module takes and gives.

    ``dims`` is None when the axis is not in both, so that the survivors can't be told apart there.
    """

    module: str
    axis: Axis
    dims: tuple[int, int] | None


@dataclass(kw_only=True)
class Trace:
    """What a forward demands. ``order`` lists modules as they are first called."""

    slots: Slots
    sources: list[Source] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    reduced: list[Reduced] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)


def trace(model: nn.Module, example: Mapping[str, Tensor]) -> Trace:
    """Watch one forward; ``example`` holds at least two samples by name. Raises what it raises."""
    with torch.inference_mode(False):  # its tensors would run whole layers as single operators
        example = {name: tensor.clone() for name, tensor in example.items()}
    with torch.inference_mode(False), torch.no_grad():
        find_caches(model, lambda: compute_logits(model, example))
    forget_caches(model)
    watch = _Watch(model)
    with watch.inside(), torch.inference_mode(False), torch.no_grad():
        for name, tensor in example.items():
            axes = [watch.axes.fixed(n, f"an axis of the input {name!r}") for n in tensor.shape]
            watch.axes.set(tensor, axes)
        with _Sizes(watch), _Operators(watch.axes):
            logits = compute_logits(model, example)
            for axis in watch.axes.of(logits):
                watch.axes.slots.freeze(axis, "its units are the model's output")
    found = watch.finish()
    found.sites = _with_batch(found.sites, _sizes_of_one(model, example))
    return found


def _with_batch(sites: list[Site], of_one: Mapping[Any, int]) -> list[Site]:
    """A size that is another for one sample depends on their number."""
    return [
        replace(site, has_batch=of_one.get(_key(site), len(site.axis)) != len(site.axis))
        for site in sites
    ]


def _key(site: Site) -> tuple[str, int, tuple[int, ...]]:
    return site.module, site.call, site.place


def _sizes_of_one(model: nn.Module, example: Mapping[str, Tensor]) -> dict[Any, int]:
    """The sizes that a forward of a single sample states, by module, call and place."""
    forget_caches(model)
    watch = _Watch(model)
    watch.axes_of = lambda tensor: [np.empty(n, bool) for n in tensor.shape]
    with watch.inside(), torch.no_grad(), _Sizes(watch):
        compute_logits(model, {name: x[:1] for name, x in example.items()})
    forget_caches(model)
    return {_key(site): len(site.axis) for site in reversed(watch.sites)}


class _Watch:
    """Axes, the modules that are being called, and what is noted of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.axes = Axes()
        self.axes.on_reduced = self._note_reduced
        self.axes_of: Callable[[Tensor], list[Axis]] = self.axes.of
        self.stack: list[_Call] = []
        self.sites: list[Site] = []
        self.order: dict[str, int] = {}
        self._reduced: list[tuple[_Call | None, Axis, str]] = []
        self.sources = self._name_sources()

    def _name_sources(self) -> list[Source]:
        sources: list[Source] = []
        for name, module in self.model.named_modules():
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None:
                    continue
                if self.axes.knows(tensor):
                    for axis in self.axes.of(tensor):
                        self.axes.slots.freeze(axis, f"{leaf!r} is shared with {name!r}")
                    continue
                axes = tuple(self.axes.slots.fresh(n) for n in tensor.shape)
                self.axes.set(tensor, axes)
                sources.append(Source(module=name, tensor=leaf, axes=axes))
        return sources

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Follow which module is being called."""
        handles: list[Any] = []
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.order.setdefault(name, len(self.order))
            given = next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor)), None)
            is_leaf = next(module.children(), None) is None
            taken = list(self.axes_of(given)) if given is not None and is_leaf else []
            self.stack.append(_Call(name=name, taken=taken))

        return hook

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        call = self.stack.pop()
        if call.taken and isinstance(output, Tensor):
            call.given = list(self.axes_of(output))

    def _note_reduced(self, axis: Axis, reason: str) -> None:
        self._reduced.append((self.stack[-1] if self.stack else None, axis, reason))

    def finish(self) -> Trace:
        slots, reduced = self.axes.slots, []
        for call, axis, reason in self._reduced:
            dims = call.dims_of(axis, slots) if call is not None else None
            if call is None or dims is None:
                slots.freeze(axis, reason)
            elif not slots.is_frozen(axis).all():
                reduced.append(Reduced(module=call.name, axis=axis, dims=dims))
        self.axes.grids.resolve()
        return Trace(
            slots=slots, sources=self.sources, sites=self.sites, reduced=reduced, order=self.order
        )


@dataclass(kw_only=True)
class _Call:
    name: str
    taken: list[Axis]
    given: list[Axis] = field(default_factory=list)
    stated: int = 0

    def dims_of(self, axis: Axis, slots: Slots) -> tuple[int, int] | None:
        """Where an axis stands in what went into a leaf module and in what came out."""
        roots = slots.find(axis)

        def position(axes: list[Axis]) -> int | None:
            for dim, other in enumerate(axes):
                if len(other) == len(axis) and (slots.find(other) == roots).all():
                    return dim
            return None

        before, after = position(self.taken), position(self.given)
        return None if before is None or after is None else (before, after)


class _Operators(TorchDispatchMode):
    def __init__(self, axes: Axes) -> None:
        super().__init__()
        self._axes = axes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        apply_rule(self._axes, func, args, kwargs or {}, out)
        return out


class _Sizes(TorchFunctionMode):
    """Counts, for every module that is being called, the calls that state sizes."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in STATING and self._watch.stack:
            self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        innermost = self._watch.stack[-1]
        for place, axis in stated_sizes(func, args, kwargs, out, self._watch.axes_of):
            site = Site(module=innermost.name, call=innermost.stated, place=place, axis=axis)
            self._watch.sites.append(site)
        for call in self._watch.stack:
            call.stated += 1
