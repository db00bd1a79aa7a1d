"""How much the outputs change when one group is pruned, or one layer quantized, alone.

Measured on calibration inputs, without labels: the Kullback-Leibler divergence of the softmax of
the logits, after the repair that a trial would make.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.compress import Compressor
from profiling_agent.compression.divergence import comparable, divergences
from profiling_agent.compression.surgery import pruned
from profiling_agent.deployment.torch_runtime import quantize_dynamic
from profiling_agent.machine.clock import now
from profiling_agent.profiling.group_costs import levels
from profiling_agent.profiling.prefix import Prefix
from profiling_agent.records.patterns import units_kept
from profiling_agent.records.plan import Importance, Repair
from profiling_agent.records.profile import GroupCost, LayerQuantization, SensitivityPoint

MIN_IMAGES, MAX_IMAGES = 32, 96
BATCH = 32
RUINED = 0.5
"""Share of changed answers beyond which a group is not cut any further."""


class Divergence:
    """Compares the model as it is now with how it was at the start, on fixed inputs.

    As ``divergences`` says; outputs that are no classes spread as the original's do. What ran
    before the changed modules is not run again (``prefix.py``).
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        has_classes: bool,
    ) -> None:
        self._prefix = Prefix(model, batches)
        self._has_classes = has_classes
        self._original = [self._output(logits) for logits in self._prefix.first]
        self.num_images = sum(len(output) for output in self._original)
        together = torch.cat(self._original)
        self._variance = float((together - together.mean(dim=0)).square().mean())

    def _output(self, logits: Tensor) -> Tensor:
        return comparable(logits, has_classes=self._has_classes)

    def measure(self, modules: Collection[str] | None = None) -> tuple[float, float, float]:
        """Mean divergence (nats), its standard error, and the share of changed top classes.

        When only some ``modules`` are other than they were, what ran before them is not run again.
        """
        parts: list[Tensor] = []
        changed = 0
        for before, logits in zip(self._original, self._prefix.run(modules), strict=True):
            after = self._output(logits)
            parts.append(
                divergences(before, after, has_classes=self._has_classes, variance=self._variance)
            )
            if self._has_classes:
                changed += int((before.argmax(-1) != after.argmax(-1)).sum())
        each = torch.cat(parts)
        error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else 0.0
        return float(each.mean()), error, changed / len(each)


def calibration_inputs(compressor: Compressor, num_images: int) -> list[dict[str, Tensor]]:
    return list(compressor.calibration_batches(num_images))


def affordable_images(compressor: Compressor, num_evaluations: int, seconds: float) -> int:
    """How many images each evaluation may use: 32 to 256, judged by one timed batch."""
    batch = next(compressor.calibration_batches(BATCH))
    with torch.inference_mode():
        compute_logits(compressor.model, batch)
        start = now()
        compute_logits(compressor.model, batch)
        per_image = (now() - start) / len(next(iter(batch.values())))
    affordable = int(seconds / max(1e-9, per_image * max(1, num_evaluations)))
    return max(MIN_IMAGES, min(MAX_IMAGES, affordable // BATCH * BATCH))


def group_sensitivity(
    compressor: Compressor,
    divergence: Divergence,
    cost: GroupCost,
    importance: Importance = "obs",
    repair: Repair = "least-squares",
) -> tuple[SensitivityPoint, ...]:
    """Divergence at each level of one group, mildest first.

    Ends after the first level at which most answers are others: no plan would go as far.
    """
    points: list[SensitivityPoint] = []
    groups = compressor.discovery.groups
    modules = next(group for group in groups if group.id == cost.id).modules
    for ratio in levels(cost):
        kept = {cost.id: compressor.keep(cost.id, units_kept(cost.width, ratio), importance)}
        with pruned(compressor.model, groups, kept, compressor.repaired(kept, repair)):
            kl, error, changed = divergence.measure(modules)
        points.append(
            SensitivityPoint(
                ratio=ratio,
                kl=kl,
                kl_error=error,
                disagreement=changed,
                num_images=divergence.num_images,
            )
        )
        if changed > RUINED:
            break
    return tuple(points)


def layer_sensitivity(
    model: nn.Module, inputs: Mapping[str, Tensor], name: str, divergence: Divergence
) -> LayerQuantization:
    """Dynamic int8 of one linear layer alone: divergence, and its time before and after."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].detach().clone())
    )
    try:
        with torch.inference_mode():
            compute_logits(model, inputs)
    finally:
        handle.remove()
    original = model.get_submodule(name)
    with _swapped(model, name):
        kl, error, _changed = divergence.measure((name,))
        float_ms, int8_ms = (
            _race(original, model.get_submodule(name), seen[0])
            if seen
            else (
                None,
                None,
            )
        )
    return LayerQuantization(name=name, kl=kl, kl_error=error, float_ms=float_ms, int8_ms=int8_ms)


class StaticInt8:
    """Static int8 of one layer at a time, simulated in eager mode as the runtimes compute it.

    Inputs are rounded to 256 steps between the least and the largest value seen in calibration,
    weights to 255 steps per output channel. ``names`` are linear layers and convolutions.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self._model = model
        self._ranges: dict[str, tuple[float, float]] = {}
        self._errors: dict[str, float] = {}
        self._observe(names, batches)

    def worst_first(self) -> list[str]:
        """Names of the layers that are called, by the error that int8 makes at their output."""
        return sorted(self._errors, key=lambda name: -self._errors[name])

    def sensitivity(self, name: str, divergence: Divergence) -> LayerQuantization:
        """Divergence of the outputs with this layer alone in int8."""
        layer = self._model.get_submodule(name)
        weight = layer.weight
        handle = layer.register_forward_pre_hook(
            lambda _layer, args: (self._rounded(name, args[0]), *args[1:])
        )
        try:
            layer.weight = nn.Parameter(_rounded_weight(weight), requires_grad=False)  # pyright: ignore
            kl, error, _changed = divergence.measure((name,))
        finally:
            layer.weight = weight
            handle.remove()
        return LayerQuantization(
            name=name, scheme="int8-static", kl=kl, kl_error=error, float_ms=None, int8_ms=None
        )

    def _observe(self, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Ranges of the inputs over all batches, then errors of the outputs on the first."""
        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(self._seer(name))
            for name in names
        ]
        self._run(batches, handles)
        handles = [
            self._model.get_submodule(name).register_forward_hook(self._judge(name))
            for name in self._ranges
        ]
        self._run(batches[:1], handles)

    def _run(self, batches: Sequence[Mapping[str, Tensor]], handles: Sequence[Any]) -> None:
        try:
            with torch.inference_mode():
                for batch in batches:
                    compute_logits(self._model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def _seer(self, name: str) -> Any:
        def see(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                low, high = self._ranges.get(name, (0.0, 0.0))  # zero must stay exact
                self._ranges[name] = (
                    min(low, float(args[0].min())),
                    max(high, float(args[0].max())),
                )

        return see

    def _judge(self, name: str) -> Any:
        def judge(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight, small = layer.weight, _rounded_weight(layer.weight)  # pyright: ignore
            x = self._rounded(name, args[0])
            if isinstance(layer, nn.Linear):
                again = F.linear(x, small, layer.bias)
            else:
                again = layer._conv_forward(x, small, layer.bias)  # pyright: ignore
            spread = float(output.var()) if output.numel() > 1 else 0.0
            assert weight.shape == small.shape
            self._errors[name] = float((again - output).square().mean()) / max(spread, 1e-30)

        return judge

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        low, high = self._ranges[name]
        scale = max(high - low, 1e-12) / 255
        return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)


def _rounded_weight(weight: Tensor) -> Tensor:
    """A weight (out, ...) rounded to -127 to 127 steps of each output channel's own scale."""
    scale = weight.detach().abs().flatten(1).amax(1).clamp_min(1e-30) / 127
    scale = scale.reshape([-1] + [1] * (weight.dim() - 1))
    return (weight.detach() / scale).round() * scale


@contextmanager
def _swapped(model: nn.Module, name: str) -> Iterator[None]:
    parent, _, leaf = name.rpartition(".")
    original = model.get_submodule(name)
    quantize_dynamic(model, (name,))
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), leaf, original)


def _race(first: nn.Module, second: nn.Module, x: Tensor) -> tuple[float, float]:
    """Median milliseconds of two layers on one input, in alternation."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(12):
            for layer, into in zip((first, second), times, strict=True):
                layer(x)
                start = now()
                layer(x)
                into.append((now() - start) * 1e3)
    return (
        float(torch.tensor(times[0]).median()),
        float(torch.tensor(times[1]).median()),
    )
