"""What removing a unit does to the outputs, to second order, from gradients and without labels.

Replace a unit's activation a by its mean, and the logarithm of the probability that the model gives
class y changes by ``s_y = -sum (a - mean) dlog p(y) / da`` over the places where the unit is read.
The Kullback-Leibler divergence of the outputs is half the mean of ``s_y^2`` over inputs and classes
y drawn from the model's own p (Molchanov et al. 2017 and 2019 take the gradient of a loss with
labels; the Fisher form is Theis et al. 2018). Outputs that are no classes are drawn from a normal
distribution about the model's, as wide as they spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.statistics import Moments
from profiling_agent.errors import TrialError

NUM_DRAWS = 2
"""Answers drawn for each sample."""


def gather_changes(
    model: nn.Module,
    moments: Mapping[str, Moments],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    has_classes: bool,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Of each layer with known moments, ``-s`` by input channel: (samples x draws, channels).

    Raises ``TrialError`` when gradients don't reach a layer.
    """
    names = tuple(moments)
    means = {name: _channel_means(model.get_submodule(name), moments[name]) for name in names}
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches:
        with torch.enable_grad(), _Taps(model, names) as taps:
            drawn = _drawn(compute_logits(model, batch), has_classes, generator)
            for last, value in enumerate(drawn, start=1):
                slopes = taps.slopes(value, keep=last < len(drawn))
                for name in names:
                    parts = [
                        _by_channel(model.get_submodule(name), x - means[name], slope, batch)
                        for x, slope in zip(taps.seen[name], slopes[name], strict=True)
                    ]
                    found[name].append(torch.stack(parts).sum(0))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _drawn(logits: Tensor, has_classes: bool, generator: torch.Generator) -> list[Tensor]:
    """Scalars whose gradients are those of the drawn answers' log-probabilities, each summed."""
    if has_classes:
        scores = logits.flatten(0, -2).log_softmax(-1)
        answers = torch.multinomial(
            scores.detach().exp(), NUM_DRAWS, replacement=True, generator=generator
        )
        return [scores.gather(1, answers[:, i : i + 1]).sum() for i in range(NUM_DRAWS)]
    outputs = logits.flatten(1)
    spread = outputs.detach().std().clamp_min(1e-30)
    noise = torch.randn((NUM_DRAWS, *outputs.shape), generator=generator)
    return [(outputs * noise[i]).sum() / spread for i in range(NUM_DRAWS)]


class _Taps:
    """Holds on to what named layers read, so that gradients can be asked for."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model, self._names = model, names
        self.seen: dict[str, list[Tensor]] = {name: [] for name in names}
        self._handles: list[Any] = []

    def __enter__(self) -> _Taps:
        for name in self._names:
            layer = self._model.get_submodule(name)
            self._handles.append(layer.register_forward_pre_hook(self._tap(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tap(self, name: str) -> Any:
        def tap(_layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            # a view of its own: what several layers read has a gradient for each of them
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            self.seen[name].append(x)
            return (x, *args[1:])

        return tap

    def slopes(self, value: Tensor, *, keep: bool) -> dict[str, list[Tensor]]:
        inputs = [x for name in self._names for x in self.seen[name]]
        try:
            found = list(torch.autograd.grad(value, inputs, retain_graph=keep, allow_unused=True))
        except RuntimeError as error:
            raise TrialError(f"Importance 'taylor' needs gradients: {error}") from error
        slopes: dict[str, list[Tensor]] = {}
        for name in self._names:
            here = [found.pop(0) for _ in self.seen[name]]
            slopes[name] = [slope for slope in here if slope is not None]
            if not here or len(slopes[name]) < len(here):
                raise TrialError(
                    f"Importance 'taylor' needs gradients, and none reach the layer {name!r}. Use "
                    "obs, variance or magnitude."
                )
        return slopes


def _channel_means(layer: nn.Module, moments: Moments) -> Tensor:
    """(channels,) of a linear layer's input, (channels, 1, 1) of a convolution's."""
    if isinstance(layer, nn.Linear):
        return moments.mean.float()
    assert isinstance(layer.weight, Tensor)
    return moments.mean.float().reshape(layer.weight.shape[1], -1).mean(1)[:, None, None]


def _by_channel(
    layer: nn.Module, deviation: Tensor, slope: Tensor, batch: Mapping[str, Tensor]
) -> Tensor:
    """Deviation times slope summed over positions: (samples, channels)."""
    product = (deviation * slope).detach()
    samples = len(next(iter(batch.values())))
    if isinstance(layer, nn.Linear):
        return product.reshape(samples, -1, product.shape[-1]).sum(1)
    return product.sum((2, 3))
