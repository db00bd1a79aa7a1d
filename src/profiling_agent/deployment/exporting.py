"""One export for all runtimes: any model to a ``torch.export`` program from inputs to logits.

The batch axis stays free where the model allows it. The example's values never reach an artefact:
they only steer the trace.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from profiling_agent.errors import TrialError

WRAPPER_PREFIX = "model."
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch._dynamo", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A program whose parameter names all start with ``WRAPPER_PREFIX``."""

    program: ExportedProgram
    fixed_batch: int | None
    notes: tuple[str, ...]


class LogitsOnly(nn.Module):
    """Calls a model with its inputs in order and returns the logits tensor alone.

    One input is passed by position, several by keyword; of a tuple, a dict or an output object the
    logits are taken.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(self.names) == 1:
            return select_logits(self.model(inputs[0]))
        return select_logits(self.model(**dict(zip(self.names, inputs, strict=True))))


def select_logits(output: Any) -> Tensor:
    """The logits in what a forward returned; ``TrialError`` when there are none."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return select_logits(output.logits)
    if isinstance(output, Mapping) and "logits" in output:
        return select_logits(output["logits"])
    if isinstance(output, (tuple, list)) and output:
        return select_logits(output[0])
    raise TrialError(
        f"The model returned {type(output).__name__!r}, in which there are no logits. Return a "
        "tensor, a tuple that begins with one, or an object with 'logits'."
    )


def module_logits(model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    """Logits of the module itself, (batch, classes); eval mode and no gradients are the caller's
    model's state and ours."""
    with torch.inference_mode():
        return LogitsOnly(model, tuple(example))(*example.values()).float().clone()


def export_program(model: nn.Module, example: Mapping[str, Tensor]) -> Exported:
    """Export with a free batch axis, or with the example's batch size and the reason in a note.

    The model must be in eval mode. Raises ``TrialError`` with the exporter's reason.
    """
    wrapper = LogitsOnly(model, tuple(example)).eval()
    batch = next(iter(example.values())).shape[0]
    # An axis of size 1 would be taken for a constant, so a single sample is doubled.
    widened = tuple(
        torch.cat([value, value]) if batch == 1 else value for value in example.values()
    )
    axis = Dim("batch", min=1, max=65535)
    dynamic = {"inputs": tuple({0: axis} for _ in widened)}
    try:
        return Exported(program=_export(wrapper, widened, dynamic), fixed_batch=None, notes=())
    except Exception as error:  # the exporter raises whatever a model's code made it raise
        reason = first_line(error)
    try:
        program = _export(wrapper, tuple(example.values()), None)
    except Exception as error:  # as above
        raise TrialError(
            f"torch.export can't export {type(model).__name__!r}: {first_line(error)}. Make its "
            "forward free of decisions that depend on tensor values."
        ) from error
    note = f"The batch size is fixed at {batch}, because a free one failed: {reason}"
    return Exported(program=program, fixed_batch=batch, notes=(note,))


def first_line(error: BaseException, limit: int = 300) -> str:
    """Type and first line of an exception's message, cut to ``limit`` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporters' warnings and log lines, which users can't act on, off the terminal."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export(
    wrapper: nn.Module, inputs: tuple[Tensor, ...], dynamic: dict[str, Any] | None
) -> ExportedProgram:
    with quiet_exporter(), torch.no_grad():
        return torch.export.export(wrapper, inputs, dynamic_shapes=dynamic, strict=False)
