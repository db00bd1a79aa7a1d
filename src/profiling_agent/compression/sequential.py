"""Repair of one consumer after the other, on what the pruned model really hands on.

One pass of least squares fits every consumer on the original's activations, as if it alone had lost
inputs. Here consumers are fitted again in the order of the forward, on the inputs x' that reach
them in the pruned and so far repaired model, towards the outputs y that the original has there (He
et al. 2017, asymmetric form):

    V = V1 + (E[y x'] - V1 E[x' x']) (E[x' x'] + r I)^-1

with V1 the weights of the one pass, means taken off where there is a bias. How far to go from V1 to
V is decided by the divergence of the outputs on samples that were not fitted: where few samples fit
many weights, as in transformers, not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.divergence import comparable, divergences
from profiling_agent.compression.group import Group, Kept, removed_indices
from profiling_agent.compression.statistics import Gram, Moments, input_rows, output_rows

MAX_STAGES = 8
"""Consumers that are fitted on the same forward: all of them in at most so many."""
STEPS = (1.0, 0.5)
"""How far the weights are moved towards those that were fitted."""
HELD_SHARE = 8
"""One batch in so many is held out."""

Batches = Callable[[], Iterator[Mapping[str, Tensor]]]
"""Begins calibration batches anew."""


class _Reached(Exception):
    """The last layer of a stage has run; nothing after it is needed."""


def refine(
    original: nn.Module,
    smaller: nn.Module,
    lost: Mapping[str, np.ndarray],
    moments: Mapping[str, Moments],
    *,
    fitted: Batches,
    held: Batches,
    recalibrate: Callable[[], None],
    has_classes: bool,
) -> None:
    """Fit the consumers of a repaired model again, in place, as far as that helps.

    ``lost`` has every consumer with the outputs that it lost itself. The weights go all of the way
    to those that ``fitted`` batches give, half of it or none, whichever diverges least on the
    ``held`` ones once the norms were recalibrated.
    """

    def divergence() -> float:
        return divergence_of(original, smaller, held(), has_classes=has_classes)

    least, start = divergence(), _State(smaller)
    _fit_in_order(original, smaller, lost, moments, fitted)
    end, best = _State(smaller), start
    for step in STEPS:
        end.put_back(towards=start, share=1.0 - step)
        recalibrate()
        reached = divergence()
        if reached < least:
            least, best = reached, _State(smaller)
    best.put_back()


def lost_outputs(
    groups: Sequence[Group], kept: Kept, moments: Mapping[str, Moments]
) -> dict[str, np.ndarray]:
    """Every consumer that lost inputs and has moments, with the outputs that it lost as well."""
    removed = removed_indices(groups, kept)
    outputs = {
        name: gone
        for (name, axis, tensor, _), gone in removed.items()
        if axis == "out" and tensor is None
    }
    nothing = np.zeros(0, dtype=np.int64)
    return {
        name: outputs.get(name, nothing)
        for name, axis, _, _ in removed
        if axis == "in" and name in moments
    }


class _State:
    """Parameters, which are only ever replaced, and copies of buffers, which are written to."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._parameters = [dict(module._parameters) for module in self._modules]
        self._buffers = [
            {name: None if b is None else b.clone() for name, b in module._buffers.items()}
            for module in self._modules
        ]

    def put_back(self, towards: _State | None = None, share: float = 0.0) -> None:
        """Give the model this state; parameters moved by a ``share`` towards those of another."""
        for index, module in enumerate(self._modules):
            module._buffers.update(
                {n: None if b is None else b.clone() for n, b in self._buffers[index].items()}
            )
            for name, value in self._parameters[index].items():
                other = value if towards is None else towards._parameters[index][name]
                if value is not None and other is not None and other is not value and share > 0:
                    mixed = torch.lerp(value.detach(), other.detach(), share)
                    value = nn.Parameter(mixed, requires_grad=False)
                module._parameters[name] = value


def _fit_in_order(
    original: nn.Module,
    smaller: nn.Module,
    lost: Mapping[str, np.ndarray],
    moments: Mapping[str, Moments],
    batches: Batches,
) -> None:
    """Fit consumers of ``smaller`` again, in place, in the order in which they run."""
    names = _in_order(original, tuple(lost), next(batches()))
    size = -(-len(names) // MAX_STAGES) if names else 1
    for start in range(0, len(names), size):
        stage = names[start : start + size]
        sums = {name: _Pairs(lost[name]) for name in stage}
        for batch in batches():
            read = _read(smaller, stage, batch, outputs=False)
            wanted = _read(original, stage, batch, outputs=True)
            for name in stage:
                if name in read and name in wanted:
                    sums[name].add(read[name], wanted[name])
        for name, total in sums.items():
            total.refit(smaller.get_submodule(name), moments[name].ridge)


def _in_order(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Those of the layers that run, by their first call."""
    order: dict[str, None] = {}

    def noting(name: str) -> Any:
        return lambda *_: order.setdefault(name)

    handles = [model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in names]
    try:
        with torch.inference_mode():
            compute_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(order)


@torch.inference_mode()
def _read(
    model: nn.Module, names: Sequence[str], batch: Mapping[str, Tensor], *, outputs: bool
) -> dict[str, Tensor]:
    """Rows of the inputs, or of the outputs at the same positions, of each layer's first call."""
    found: dict[str, Tensor] = {}

    def keeping(name: str) -> Any:
        def keep(_layer: nn.Module, args: tuple[Tensor, ...], *result: Tensor) -> None:
            if name not in found:
                # rows are taken later: a pruned module's forward counts its reshapes (sizes.py)
                found[name] = (result[0] if outputs else args[0]).clone()
            if len(found) == len(names):
                raise _Reached

        return keep

    layers = [(name, model.get_submodule(name)) for name in names]
    handles = [
        layer.register_forward_hook(keeping(name))
        if outputs
        else layer.register_forward_pre_hook(keeping(name))
        for name, layer in layers
    ]
    try:
        compute_logits(model, batch)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    rows_of = output_rows if outputs else input_rows
    return {name: rows_of(model.get_submodule(name), tensor) for name, tensor in found.items()}


class _Pairs:
    """Sums over what a layer reads in the pruned model and what it gave in the original."""

    def __init__(self, gone: np.ndarray) -> None:
        self._gone = gone
        self._gram: Gram | None = None
        self._cross = self._read = self._wanted = torch.zeros(0)
        self._num_rows = 0

    def add(self, read: Tensor, wanted: Tensor) -> None:
        x, y = read.double(), wanted.double()
        if len(self._gone):
            y = y[:, np.setdiff1d(np.arange(y.shape[1]), self._gone)]
        if self._gram is None:
            self._gram = Gram(x.shape[1])
            self._cross = torch.zeros(y.shape[1], x.shape[1], dtype=torch.double)
            self._read = torch.zeros(x.shape[1], dtype=torch.double)
            self._wanted = torch.zeros(y.shape[1], dtype=torch.double)
        self._gram.add(read)
        self._cross = self._cross + y.T @ x
        self._read, self._wanted = self._read + x.sum(0), self._wanted + y.sum(0)
        self._num_rows += len(x)

    def refit(self, layer: nn.Module, ridge: float) -> None:
        """The weights that give what was wanted, pulled towards those that are there."""
        if self._gram is None:
            return
        assert isinstance(layer.weight, Tensor)
        old = layer.weight.detach().double().flatten(1)
        gram, cross = self._gram.whole() / self._num_rows, self._cross / self._num_rows
        read, wanted = self._read / self._num_rows, self._wanted / self._num_rows
        if isinstance(layer.bias, Tensor):
            gram, cross = gram - torch.outer(read, read), cross - torch.outer(wanted, read)
        added = ridge * gram.diagonal().mean().clamp_min(1e-12)
        inner = gram + added * torch.eye(len(gram), dtype=gram.dtype)
        new = old + torch.linalg.solve(inner, (cross - old @ gram).T).T
        layer.weight = nn.Parameter(
            new.reshape(layer.weight.shape).to(layer.weight.dtype), requires_grad=False
        )
        if isinstance(layer.bias, Tensor):
            bias = (wanted - new @ read).to(layer.bias.dtype)
            layer.bias = nn.Parameter(bias, requires_grad=False)


def is_held(index: int, num_batches: int) -> bool:
    """Whether a batch is kept to judge by: one in eight, and of fewer the last; never the only."""
    if num_batches <= HELD_SHARE:
        return index == num_batches - 1 > 0
    return index % HELD_SHARE == HELD_SHARE - 1


@torch.inference_mode()
def divergence_of(
    original: nn.Module,
    smaller: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    has_classes: bool,
) -> float:
    """Mean divergence of the outputs; 0 without batches."""
    each = [
        divergences(
            comparable(compute_logits(original, batch), has_classes=has_classes),
            comparable(compute_logits(smaller, batch), has_classes=has_classes),
            has_classes=has_classes,
        )
        for batch in batches
    ]
    return float(torch.cat(each).mean()) if each else 0.0
