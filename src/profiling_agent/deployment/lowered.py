"""What a runtime must offer, and what it reports of a model it has lowered.

Kept apart from the table in ``runtimes.py``, so that a runtime can import it without a circle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import regex
from torch import Tensor, nn

from profiling_agent.errors import PlanError, TrialError
from profiling_agent.records.common import Deployment, Machine, RuntimeName
from profiling_agent.records.plan import Quantization

PATTERN_TIMEOUT_S = 0.1
WEIGHT_COPIES = 4
"""While a graph is calibrated: the model's, the graph's, the runtime's packed ones, one on the way.
"""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Samples for static quantization, preprocessed, streamed anew at each call of ``batches``.

    ``batches(size)`` yields inputs (size, ...) by name, in the order of the model's inputs; a last
    batch that would be smaller is left out unless it is the only one.
    """

    num_samples: int
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """How a model is to be lowered: for which processor and use, and what it may look at.

    ``calibration`` is None where there are no data; static schemes then raise ``TrialError``.
    """

    quantization: Quantization
    machine: Machine
    deployment: Deployment
    calibration: Calibration | None = None


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """Files written into a folder, and what was counted on them.

    ``int8_layers`` and ``float_layers`` are the dotted names of the modules that the scheme could
    quantize (``nn.Linear``; convolutions too for static and weight-only schemes) and whose weights
    are stored as int8 and as floats. ``num_int8_operators`` of ``num_products`` matrix products and
    convolutions run in int8 according to the runtime itself (its optimized graph); None where it
    does not tell. ``fixed_batch`` is the only batch size the graph takes, or None when it takes
    any; ``notes`` say why.
    """

    model_files: tuple[str, ...]
    weight_bytes: int
    int8_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
    num_int8_operators: int | None = None
    num_products: int | None = None
    fixed_batch: int | None = None
    notes: tuple[str, ...] = ()


class Runtime(Protocol):
    """Something that executes artefacts; ``lower`` leaves the model it is given unchanged."""

    name: RuntimeName

    def version(self) -> str | None:
        """The installed version, or None; never imports the runtime."""
        ...

    def schemes(self, machine: Machine) -> tuple[str, ...]:
        """The quantization schemes it offers on this processor; empty when not installed."""
        ...

    def refused(self, machine: Machine) -> dict[str, str]:
        """Schemes it does not offer on this processor, with the reason; none when not installed."""
        ...

    def lower(
        self, model: nn.Module, example: dict[str, Tensor], lowering: Lowering, folder: Path
    ) -> Lowered:
        """Write the model's files into an existing folder.

        Raises ``MissingDependency`` without the package, ``TrialError`` when the model can't be
        lowered or the scheme quantizes nothing, ``PlanError`` for a bad pattern, ``OSError`` from
        the disk.
        """
        ...

    def reference(
        self, model: nn.Module, example: dict[str, Tensor], quantization: Quantization
    ) -> Tensor | None:
        """The logits (batch, classes) the artefact must reproduce; None where none is exact."""
        ...


def check_calibration_memory(
    weight_bytes: int, activation_bytes: int, batch: int, machine: Machine, instead: str
) -> None:
    """``TrialError`` when calibrating a graph would hold more than the machine has.

    ``activation_bytes`` are those of all tensors that it computes for a batch, since ranges may be
    asked of any; ``instead`` is the scheme to name.
    """
    needed = WEIGHT_COPIES * weight_bytes + activation_bytes
    if needed > machine.memory_bytes:
        raise TrialError(
            f"Calibration would need about {needed / 1e9:.2g} GB (copies of the weights and the "
            f"activations of {batch} sample{'s' * (batch > 1)}), and this machine has "
            f"{machine.memory_bytes / 1e9:.2g} GB. Use {instead!r}, or a machine with more memory."
        )


def keeps_float(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the whole dotted name; ``PlanError`` for a bad pattern."""
    for pattern in patterns:
        try:
            if regex.fullmatch(pattern, name, timeout=PATTERN_TIMEOUT_S):
                return True
        except (regex.error, TimeoutError) as error:
            raise PlanError(
                f"The keep_float pattern {pattern!r} can't be used on {name!r}: "
                f"{error or 'it takes too long'}. Write a simpler regular expression."
            ) from None
    return False


def product_layers(model: nn.Module) -> tuple[str, ...]:
    """Dotted names of the linear layers and convolutions that a static scheme may quantize.

    Their weights are constants of a graph, so the output projection of ``nn.MultiheadAttention``
    counts too.
    """
    kinds = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    )
    return tuple(
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module) in kinds
    )


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The modules dynamic quantization may swap, by dotted name, every name of a shared one.

    As ``quantize_dynamic`` chooses: exactly ``nn.Linear`` and inside the model. The weights of
    subclasses (the output projection of ``nn.MultiheadAttention``, parametrized layers) are read
    by others or computed.
    """
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module) is nn.Linear
    }
