"""Forwards that begin where something changed: what came before is answered from memory.

Sensitivity changes one group or layer at a time and runs the same inputs again. Every part of the
model that was done before the first changed module began gives what it gave before, so its output
is kept and handed out in place of computing it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.machine.clock import now

LARGE = 1 / 8
"""A part that takes more than this share of the forward is kept as its children instead."""
MAX_BYTES = 512 * 1024**2
"""Of all outputs that are kept; with more, nothing is."""
NUM_CHECKS = 6
"""Places at which the answers from memory are compared with a whole forward."""


class Prefix:
    """Outputs of a model's parts on fixed batches.

    ``run`` gives the outputs of the model as it is now, if only ``changed`` modules differ from
    when this was made. A part that is called twice, or returns anything but tensors, is computed;
    all are when a part was found to do more than return something, such as writing into what it was
    given.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._model, self._batches = model, batches
        self._kept: dict[str, list[Any]] = {}
        self._bytes = 0
        self._started: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        for name in self._watch():
            self._kept[name] = []
        self.first = [self._record(batch) for batch in batches]
        if not self._holds():
            self._kept = {}

    def run(self, changed: Collection[str] | None) -> Iterator[Tensor]:
        """Logits of every batch; with ``None`` everything is computed."""
        parts = [] if changed is None else self.unchanged(changed)
        for index, batch in enumerate(self._batches):
            with torch.inference_mode(), self._answering(parts, index):
                yield compute_logits(self._model, batch)

    def unchanged(self, changed: Collection[str]) -> list[str]:
        """Parts that end before any of the changed modules starts."""
        first = min((self._started.get(name, 0) for name in changed), default=0)
        return [name for name in self._kept if self._ended[name] < first]

    def _holds(self) -> bool:
        """Whether nothing depends on a part but through what it returns, at a few cuts."""
        parts = sorted(self._kept, key=lambda name: self._ended[name])
        for cut in sorted(
            {len(parts) * number // NUM_CHECKS for number in range(1, NUM_CHECKS + 1)}
        ):
            with torch.inference_mode(), self._answering(parts[:cut], 0):
                if not torch.equal(compute_logits(self._model, self._batches[0]), self.first[0]):
                    return False
        return True

    def _watch(self) -> list[str]:
        """Starts and ends of all modules in one forward; returns the parts worth keeping."""
        calls: dict[str, int] = {}
        seconds: dict[str, float] = {}
        handles: list[Any] = []
        clock = iter(range(1_000_000_000))

        def watch(name: str) -> tuple[Any, Any]:
            def start(*_: Any) -> None:
                self._started.setdefault(name, next(clock))
                calls[name] = calls.get(name, 0) + 1
                seconds[name] = seconds.get(name, 0.0) - now()

            def end(*_: Any) -> None:
                self._ended[name] = next(clock)
                seconds[name] += now()

            return start, end

        for name, module in self._model.named_modules():
            start, end = watch(name)
            handles += [
                module.register_forward_pre_hook(start),
                module.register_forward_hook(end),
            ]
        try:
            with torch.inference_mode():
                compute_logits(self._model, self._batches[0])
        finally:
            for handle in handles:
                handle.remove()
        parts = _parts(self._model, "", seconds, LARGE * seconds.get("", 0.0))
        return [name for name in parts if calls.get(name) == 1 and name in self._ended]

    def _record(self, batch: Mapping[str, Tensor]) -> Tensor:
        handles = [
            self._model.get_submodule(name).register_forward_hook(self._keeper(name))
            for name in tuple(self._kept)
        ]
        try:
            with torch.inference_mode():
                return compute_logits(self._model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if name not in self._kept:
                return
            try:
                self._kept[name].append(_copied(output))
            except TypeError:
                del self._kept[name]
                return
            self._bytes += _bytes_of(output)
            if self._bytes > MAX_BYTES:
                self._kept.clear()

        return keep

    @contextmanager
    def _answering(self, parts: Sequence[str], index: int) -> Iterator[None]:
        before: list[tuple[nn.Module, Any]] = []
        try:
            for name in parts:
                module = self._model.get_submodule(name)
                before.append((module, vars(module).get("forward")))
                vars(module)["forward"] = _answer(self._kept[name][index])
            yield
        finally:
            for module, forward in before:
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward


def _answer(output: Any) -> Any:
    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return _copied(output)  # what comes after may write into it

    return forward


def _parts(
    model: nn.Module, name: str, seconds: Mapping[str, float], large: float
) -> Iterator[str]:
    """Names of modules that cover the model, none of them large unless it has no children."""
    for child, _ in model.get_submodule(name).named_children():
        full = f"{name}.{child}" if name else child
        has_children = any(True for _ in model.get_submodule(full).children())
        if has_children and (full not in seconds or seconds[full] > large):
            yield from _parts(model, full, seconds, large)
        elif full in seconds:
            yield full


def _copied(output: Any) -> Any:
    """A copy of a tensor, or of a tuple of tensors and Nones; ``TypeError`` for anything else."""
    if isinstance(output, Tensor):
        return output.clone()
    if type(output) is tuple:
        return tuple(None if value is None else _copied(value) for value in output)
    raise TypeError


def _bytes_of(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    return sum(_bytes_of(value) for value in output if value is not None)
