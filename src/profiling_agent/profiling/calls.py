"""Which module is running, and what it runs: hooks on every module, always removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from profiling_agent.errors import ModelError

Hook = Callable[..., None]


@contextmanager
def watch(
    model: nn.Module, on_enter: Callable[[str], Hook], on_leave: Callable[[str], Hook]
) -> Iterator[None]:
    """Call ``on_enter(name)(module, inputs)`` and ``on_leave(name)(module, inputs, output)``.

    The hooks stand outside any that the user registered, whose work counts to the module. They are
    made beforehand, one for each dotted name, so that a call costs as little as can be. A module
    that raises is not left: use ``Stack``, which closes what is open inside when its caller is.
    TorchScript takes no hooks: children compiled by it are passed over, and a whole model raises
    ``ModelError``.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"The model is a TorchScript {type(model).__name__!r}, which can't be taken apart; "
            "pass the nn.Module that it was made from."
        )
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            before = module.register_forward_pre_hook(on_enter(name), prepend=True)
            stack.callback(before.remove)
            after = module.register_forward_hook(on_leave(name))
            stack.callback(after.remove)
        yield


def call_composed(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run a composite operator (aten.linear in inference mode) as its parts, under ``mode`` again.

    ``NotImplemented`` when the operator is not made of others, or is a higher-order one.
    """
    if not isinstance(func, OpOverload):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


class Stack:
    """Names of the modules that are running, outermost first."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def enter(self, name: str) -> None:
        self.names.append(name)

    def leave(self, name: str) -> None:
        """Close ``name`` and whatever an exception left open inside it."""
        while self.names and self.names.pop() != name:
            pass


def find_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from find_tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from find_tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from find_tensors(getattr(value, field.name))
