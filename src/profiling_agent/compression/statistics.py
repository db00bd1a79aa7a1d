"""Second moments of what the consumers read, streamed over calibration data.

Everything the closed-form importance and repair need is the mean and the Gram matrix of each
consumer's input: their size depends on the layer and not on the amount of data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.group import Group
from profiling_agent.machine.memory import release_free_memory

BLOCK = 512
"""Rows of a Gram matrix that are held together."""
MAX_HELD = 8
"""Samples, one from each of the first batches, whose inputs are held out."""
RIDGE = 1e-3
"""Of the mean variance of the inputs, where nothing was held out to choose it by."""
MAX_ROWS_PER_SAMPLE = 64
"""Positions of one sample that enter a Gram matrix; neighbouring ones say nearly the same."""


class Gram:
    """A sum of outer products, of which the blocks on and above the diagonal are held.

    That is half the memory, and half the work, of the whole matrix.
    """

    def __init__(self, size: int) -> None:
        starts = range(0, size, BLOCK)
        self._blocks = [
            torch.zeros(min(BLOCK, size - i), size - i, dtype=torch.double) for i in starts
        ]
        self._size = size

    def add(self, rows: Tensor, factor: float = 1.0) -> None:
        """Add ``factor`` times the outer products of the rows (n, size), in double precision."""
        rows = rows.double()
        for number, block in enumerate(self._blocks):
            start = number * BLOCK
            left, right = rows[:, start : start + len(block)], rows[:, start:]
            block.addmm_(left.T, right, alpha=factor)

    def whole(self) -> Tensor:
        """The matrix (size, size)."""
        full = torch.empty(self._size, self._size, dtype=torch.double)
        for number, block in enumerate(self._blocks):
            start = number * BLOCK
            full[start : start + len(block), start:] = block
            full[start:, start : start + len(block)] = block.T
        return full

    def copy(self) -> Gram:
        other = Gram(0)
        other._blocks, other._size = [block.clone() for block in self._blocks], self._size
        return other


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean (d,) and sum of outer products of a layer's inputs, double precision.

    For a convolution an input is an unfolded patch, channel-major: d = channels x kernel size.
    ``held`` (rows, d) are the inputs of some samples, single precision, with which a choice can be
    judged that was made ``without_held``; empty when there is a single batch. ``ridge`` is the
    regularisation of a refit, as a share of the mean variance.
    """

    mean: Tensor
    gram: Gram
    num_rows: int
    held: Tensor
    ridge: float = RIDGE

    @property
    def second(self) -> Tensor:
        """Mean outer product (d, d); put together anew each time."""
        return self.gram.whole().div_(self.num_rows)

    @property
    def covariance(self) -> Tensor:
        """That of the inputs (d, d); put together anew each time."""
        return self.second.addr_(self.mean, self.mean, alpha=-1)

    def without_held(self) -> Moments:
        """Those of all inputs but the held ones."""
        gram, left = self.gram.copy(), self.num_rows - len(self.held)
        gram.add(self.held, -1.0)
        return Moments(
            mean=(self.mean * self.num_rows - self.held.double().sum(0)) / left,
            gram=gram,
            num_rows=left,
            held=self.held.new_empty(0, self.held.shape[1]),
        )


def repairable(layer: nn.Module) -> bool:
    """Whether the layer's input can be written as rows times a weight matrix here."""
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and isinstance(layer.padding, tuple)


def consumers_of(model: nn.Module, groups: Sequence[Group]) -> tuple[str, ...]:
    """Names of the consumers whose inputs can be described, each once."""
    names = {m.module: None for g in groups for m in g.consumers}
    return tuple(name for name in names if repairable(model.get_submodule(name)))


@torch.inference_mode()
def gather_moments(
    model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Moments]:
    """Moments of the input of each named layer; one forward per batch, all layers at once."""
    sums: dict[str, _Sum] = {name: _Sum() for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(total.add)
        for name, total in sums.items()
    ]
    try:
        for batch in batches:
            compute_logits(model, batch)
            release_free_memory()
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.moments() for name, total in sums.items() if total.num_rows}


class _Sum:
    """A running sum; a hook."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.gram: Gram | None = None
        self.held: list[Tensor] = []
        self.num_rows = 0

    def add(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = input_rows(layer, args[0])
        if self.mean is None or self.gram is None:
            self.mean, self.gram = rows.double().sum(0), Gram(rows.shape[1])
        else:
            self.mean = self.mean + rows.double().sum(0)
        self.gram.add(rows)
        self.num_rows += rows.shape[0]
        if len(self.held) < MAX_HELD:
            self.held.append(rows[: rows.shape[0] // len(args[0])].clone())  # of the first sample

    def moments(self) -> Moments:
        assert self.mean is not None and self.gram is not None
        return Moments(
            mean=self.mean / self.num_rows,
            gram=self.gram,
            num_rows=self.num_rows,
            held=torch.cat(
                self.held if len(self.held) > 1 else [self.held[0].new_empty(0, len(self.mean))]
            ),
        )


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's input as (rows, d), at most 64 evenly spread positions of each sample."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return _spread(rows, MAX_ROWS_PER_SAMPLE).reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    padding = layer.padding
    assert isinstance(padding, tuple)
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0, 0)
    if layer.kernel_size == (1, 1) and padding == (0, 0):
        patches = x[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
    else:
        patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    rows = _spread(patches.transpose(1, 2), MAX_ROWS_PER_SAMPLE)
    return rows.reshape(-1, rows.shape[-1])


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """The layer's output as (rows, outputs), at the positions of ``input_rows``."""
    if isinstance(layer, nn.Linear):
        rows = y.reshape(y.shape[0], -1, y.shape[-1])
    else:
        rows = y.flatten(2).transpose(1, 2)
    return _spread(rows, MAX_ROWS_PER_SAMPLE).reshape(-1, rows.shape[-1])


def _spread(rows: Tensor, limit: int) -> Tensor:
    """At most ``limit`` positions of axis 1; a prime-like stride so that no column is favoured."""
    count = rows.shape[1]
    if count <= limit:
        return rows
    positions = (torch.arange(limit) * count) // limit
    positions = (positions + torch.arange(limit) * 7) % count
    return rows[:, torch.unique(positions)]
