"""Static cost of each module, counted at the operators that really run.

Counting at ATen's level sees what module-level counters miss: functional attention, ``einsum``,
``@``, and models that use a child's weights without calling it. One forward, no timing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.profiling.calls import Hook, Stack, call_composed, find_tensors, watch
from profiling_agent.profiling.operators import count_macs, operator_name


@dataclass(frozen=True, kw_only=True)
class ModuleCount:
    """Counts of one module for one forward of the batch.

    ``macs`` with everything inside, ``self_macs`` without called children. Parameters are those of
    the module and of all inside it, a shared one once; ``weight_bytes`` are theirs and those of
    the buffers that a state dict keeps. ``output_bytes`` sums over the calls.
    """

    name: str
    type: str
    num_calls: int
    macs: int
    self_macs: int
    num_parameters: int
    weight_bytes: int
    output_bytes: int


@dataclass(frozen=True, kw_only=True)
class StaticCosts:
    """Counts of every module in the order of ``named_modules``; the whole model's name is ''."""

    modules: tuple[ModuleCount, ...]
    unsupported_operators: tuple[str, ...]

    def module(self, name: str) -> ModuleCount:
        return next(module for module in self.modules if module.name == name)


def count(model: nn.Module, inputs: Mapping[str, Tensor]) -> StaticCosts:
    """Count one forward of ``model`` on ``inputs`` (keyed by input name, batch axis first).

    The fast path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` is switched off
    meanwhile: it hides a whole block in one operator, and the work is the same. What the forward
    raises passes through, with hooks removed.
    """
    stack = Stack()
    counter = _Counter(stack)
    calls: Counter[str] = Counter()
    output_bytes: Counter[str] = Counter()

    def on_enter(name: str) -> Hook:
        return lambda *_: stack.enter(name)

    def on_leave(name: str) -> Hook:
        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            stack.leave(name)
            calls[name] += 1
            output_bytes[name] += sum(tensor.nbytes for tensor in find_tensors(output))

        return leave

    with torch.no_grad(), decomposed_attention(), watch(model, on_enter, on_leave), counter:
        compute_logits(model, inputs)
    macs = _with_uncalled(model, counter, calls)
    return StaticCosts(
        modules=tuple(
            ModuleCount(
                name=name,
                type=type(module).__name__,
                num_calls=calls[name],
                macs=macs[name],
                self_macs=counter.self_macs[name],
                num_parameters=sum(parameter.numel() for parameter in module.parameters()),
                weight_bytes=count_weight_bytes(module),
                output_bytes=output_bytes[name],
            )
            for name, module in model.named_modules()
        ),
        unsupported_operators=tuple(sorted(counter.unsupported)),
    )


def count_weight_bytes(module: nn.Module) -> int:
    """Bytes of the tensors in the module's state dict, each counted once."""
    kept = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in kept.values() if isinstance(tensor, Tensor))


@contextmanager
def decomposed_attention() -> Iterator[None]:
    """Let torch's own attention modules run as separate operators, then restore the setting."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Counter(TorchDispatchMode):
    """Adds each operator's MACs to the running module and to all around it."""

    supports_higher_order_operators = True

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self.macs: Counter[str] = Counter()
        self.self_macs: Counter[str] = Counter()
        self.unsupported: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = call_composed(self, func, args, kwargs)
        if output is not NotImplemented:
            return output
        output = func(*args, **kwargs)
        self._add(func, args, output)
        return output

    def _add(self, func: Any, args: tuple[Any, ...], output: Any) -> None:
        where = self.stack.names[-1] if self.stack.names else ""
        macs = count_macs(func, args, output)
        if macs is None:
            if any(t.is_floating_point() or t.is_complex() for t in find_tensors(output)):
                place = f"module {where!r}" if where else "the model itself"
                self.unsupported.add(f"{operator_name(func)} in {place}")
            return
        self.self_macs[where] += macs
        for name in {*self.stack.names, ""}:
            self.macs[name] += macs


def _with_uncalled(model: nn.Module, counter: _Counter, calls: Counter[str]) -> dict[str, int]:
    """MACs of all names; a container without a forward (a ModuleList) gets those inside it."""
    names = [name for name, _ in model.named_modules()]
    macs = {name: counter.macs[name] for name in names}
    for name in names:
        if not calls[name]:
            inside = [other for other in names if other.startswith(f"{name}.")]
            macs[name] += sum(counter.self_macs[other] for other in inside)
    return macs
