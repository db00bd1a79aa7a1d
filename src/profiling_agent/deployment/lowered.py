"""What a runtime must offer, and what it reports of a model it has lowered.

Kept apart from the table in ``runtimes.py``, so that a runtime can import it without a circle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import regex
from torch import Tensor, nn

from profiling_agent.errors import PlanError
from profiling_agent.records.common import Machine, RuntimeName
from profiling_agent.records.plan import Quantization

PATTERN_TIMEOUT_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """Files written into a folder, and what was counted on them.

    ``int8_layers`` and ``float_layers`` are the dotted names of the ``nn.Linear`` modules whose
    weights are stored as int8 and as floats. ``fixed_batch`` is the only batch size the graph
    takes, or None when it takes any; ``notes`` say why.
    """

    model_files: tuple[str, ...]
    weight_bytes: int
    int8_layers: tuple[str, ...]
    float_layers: tuple[str, ...]
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

    def lower(
        self,
        model: nn.Module,
        example: dict[str, Tensor],
        quantization: Quantization,
        folder: Path,
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
