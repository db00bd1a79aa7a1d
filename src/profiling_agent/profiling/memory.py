"""Peak activation memory, from the birth and death of each tensor's storage.

It is counted instead of read off the process, so it is exact, the same on every run and known for
each module. Counted: inputs (the caller holds them meanwhile) and everything the forward makes,
until its last reference is gone. Not counted: parameters and buffers, scratch memory within one
operator, what the allocator holds back. Sparse and nested tensors have no single storage and are
left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.machine.clock import without_collector
from profiling_agent.profiling.calls import Hook, Stack, call_composed, find_tensors, watch
from profiling_agent.profiling.static import decomposed_attention


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Highest live activation bytes of the whole forward, and while each called module ran."""

    total_bytes: int
    modules: dict[str, int]


def measure_peaks(model: nn.Module, inputs: Mapping[str, Tensor]) -> PeakMemory:
    """Follow the activations of one forward of ``model`` on ``inputs``."""
    live = _LiveStorages(model)

    def on_enter(name: str) -> Hook:
        return lambda *_: live.enter(name)

    def on_leave(name: str) -> Hook:
        return lambda *_: live.stack.leave(name)

    for tensor in find_tensors(inputs):
        live.add(tensor)
    with (
        without_collector(),
        torch.no_grad(),
        decomposed_attention(),
        watch(model, on_enter, on_leave),
        live,
    ):
        compute_logits(model, inputs)
    live.close()
    return PeakMemory(total_bytes=live.peak, modules=live.peaks)


class _LiveStorages(TorchDispatchMode):
    """Knows the bytes alive, the highest so far, and the highest for each module."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stack = Stack()
        self.bytes = 0
        self.peak = 0
        self.peaks: dict[str, int] = {}
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        kept = [*model.parameters(), *model.buffers()]
        self._weights = {t.untyped_storage()._cdata for t in kept if _has_storage(t)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = call_composed(self, func, args, kwargs)
        if output is NotImplemented:
            output = func(*args, **kwargs)
        for tensor in find_tensors(output):
            self.add(tensor)
        return output

    def add(self, tensor: Tensor) -> None:
        """Count the tensor's storage unless it is a weight's or already counted."""
        if not _has_storage(tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights:
            return
        known = self._alive.get(key)
        if known is None:
            self._alive[key] = size, weakref.ref(storage, lambda _: self._drop(key))
        else:
            self._alive[key] = size, known[1]
        self.bytes += size - (known[0] if known else 0)
        self._raise_peaks()

    def enter(self, name: str) -> None:
        self.stack.enter(name)
        self._raise_peaks()

    def close(self) -> None:
        """Forget everything, so that no callback comes later."""
        self._alive.clear()

    def _drop(self, key: int) -> None:
        size, _ = self._alive.pop(key, (0, None))
        self.bytes -= size

    def _raise_peaks(self) -> None:
        self.peak = max(self.peak, self.bytes)
        for name in self.stack.names:
            self.peaks[name] = max(self.peaks.get(name, 0), self.bytes)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested
