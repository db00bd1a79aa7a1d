"""What acquisition produces: a live model, its data as memory-mapped raw arrays, and the record.

Raw arrays (bytes, say, and not normalised floats) stay small on disk, and the artefact's own
preprocessing is part of what is evaluated.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.preprocess import preprocess
from profiling_agent.errors import DataError, ModelError
from profiling_agent.records.workload import SplitInfo, SplitName, WorkloadRecord


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split; ``inputs`` are raw; ``labels`` int64 ``(samples,)``, targets of the user's metric
    ``(samples, ...)``, or None.

    >>> for raw, labels in workload.splits["search"].batches(32):
    ...     logits = compute_logits(workload.model, workload.tensors(raw))
    """

    info: SplitInfo
    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray | None

    def batches(
        self, batch_size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
        """Raw batches in order, the last one perhaps smaller; at most ``limit`` samples."""
        total = self.info.num_samples if limit is None else min(limit, self.info.num_samples)
        for start in range(0, total, batch_size):
            rows = slice(start, min(start + batch_size, total))
            labels = None if self.labels is None else np.asarray(self.labels[rows])
            yield {name: np.asarray(array[rows]) for name, array in self.inputs.items()}, labels
            for array in self.inputs.values():
                forget_pages(array)


def forget_pages(array: np.ndarray) -> None:
    """Let go of what was read of a memory map, so that it doesn't count as this process's memory.

    It is read again where it is needed again; views of the array stay good.
    """
    mapped = getattr(array, "_mmap", None)
    if isinstance(array, np.memmap) and array.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        cast(mmap.mmap, mapped).madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Live model and data; ``model`` is in eval mode, float32, on the CPU.

    >>> workload = acquire(Request(model="demo:vit"), folder=Path("data"))
    >>> compute_logits(workload.model, workload.example(2)).shape
    torch.Size([2, 10])
    """

    model: nn.Module
    record: WorkloadRecord
    splits: Mapping[SplitName, Split]

    def tensors(self, raw: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """The model's inputs, preprocessed, in the order of ``record.inputs``."""
        arrays = preprocess(raw, self.record.inputs, self.record.preprocessing)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def example(self, batch_size: int) -> dict[str, Tensor]:
        """The first calibration samples as inputs, repeated when there are fewer.

        Raises ``DataError`` when the workload has no calibration split.
        """
        split = self.splits.get("calibration")
        if split is None:
            raise DataError("The workload has no calibration split; acquire it again with data.")
        rows = np.arange(batch_size) % split.info.num_samples
        return self.tensors({name: array[rows] for name, array in split.inputs.items()})


def compute_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's output, usually logits ``(batch, classes)``.

    One input is passed by position, several by name. The output may be a tensor, a tuple or list
    that begins with one, or have ``logits`` as attribute or key; ``ModelError`` otherwise.
    """
    output = _call(model, inputs)
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list) and not hasattr(output, "logits"):
        logits = output[0] if output else None
    else:
        logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model's forward returns {type(output).__name__!r} without logits in it; return "
            "a tensor (batch, classes), a tuple that begins with it, or something with .logits."
        )
    return logits


def compute_output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The one tensor that a model for a metric of the user's own returns, (batch, ...).

    Raises ``ModelError`` for several tensors: which of them the metric means nobody can tell.
    """
    output = _call(model, inputs)
    has_logits = hasattr(output, "logits") or (isinstance(output, Mapping) and "logits" in output)
    if not isinstance(output, Tensor) and not has_logits:
        raise ModelError(
            f"The model's forward returns {type(output).__name__!r}, and a metric of your own gets "
            "one tensor (batch, ...); wrap the model in a factory that joins its outputs into one."
        )
    return compute_logits(model, inputs) if not isinstance(output, Tensor) else output


def _call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    return model(next(iter(inputs.values()))) if len(inputs) == 1 else model(**inputs)
