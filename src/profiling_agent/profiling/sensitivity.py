"""How much the outputs change when one group is pruned, or one layer quantized, alone.

Measured on calibration inputs, without labels: the Kullback-Leibler divergence of the softmax of
the logits, after the repair that a trial would make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.compress import Compressor
from profiling_agent.compression.surgery import pruned
from profiling_agent.deployment.torch_runtime import quantize_dynamic
from profiling_agent.machine.clock import now
from profiling_agent.profiling.group_costs import levels
from profiling_agent.records.patterns import units_kept
from profiling_agent.records.plan import Importance, Repair
from profiling_agent.records.profile import GroupCost, LayerQuantization, SensitivityPoint

MIN_IMAGES, MAX_IMAGES = 32, 256
BATCH = 32


class Divergence:
    """Compares the model as it is now with how it was at the start, on fixed inputs.

    For logits of classes by the Kullback-Leibler divergence; for other outputs by half the squared
    difference over the variance of the original's, which is that divergence between two normal
    distributions that spread as the outputs do.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        num_classes: int | None,
    ) -> None:
        self._model, self._batches = model, batches
        self._has_classes = num_classes is not None
        self._original = list(self._outputs())
        self.num_images = sum(len(output) for output in self._original)
        together = torch.cat(self._original)
        self._variance = float((together - together.mean(dim=0)).square().mean())

    def _outputs(self) -> Iterator[Tensor]:
        """Log-probabilities (samples, classes), or outputs (samples, values), as doubles."""
        with torch.inference_mode():
            for batch in self._batches:
                if self._has_classes:
                    logits = compute_logits(self._model, batch).double().flatten(0, -2)
                    yield F.log_softmax(logits, -1)
                else:
                    outputs = compute_logits(self._model, batch).double()
                    yield outputs.reshape(len(outputs), -1)

    def measure(self) -> tuple[float, float, float]:
        """Mean divergence (nats), its standard error, and the share of changed top classes."""
        parts: list[Tensor] = []
        changed = 0
        for before, after in zip(self._original, self._outputs(), strict=True):
            if self._has_classes:
                parts.append((before.exp() * (before - after)).sum(-1))
                changed += int((before.argmax(-1) != after.argmax(-1)).sum())
            else:
                square = (before - after).square().mean(-1)
                parts.append(square / (2 * max(self._variance, 1e-30)))
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
    """Divergence at each level of one group, mildest first."""
    points: list[SensitivityPoint] = []
    groups = compressor.discovery.groups
    for ratio in levels(cost):
        kept = {cost.id: compressor.keep(cost.id, units_kept(cost.width, ratio), importance)}
        with pruned(compressor.model, groups, kept, compressor.repaired(kept, repair)):
            kl, error, changed = divergence.measure()
        points.append(
            SensitivityPoint(
                ratio=ratio,
                kl=kl,
                kl_error=error,
                disagreement=changed,
                num_images=divergence.num_images,
            )
        )
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
        kl, error, _changed = divergence.measure()
        float_ms, int8_ms = (
            _race(original, model.get_submodule(name), seen[0])
            if seen
            else (
                None,
                None,
            )
        )
    return LayerQuantization(name=name, kl=kl, kl_error=error, float_ms=float_ms, int8_ms=int8_ms)


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
