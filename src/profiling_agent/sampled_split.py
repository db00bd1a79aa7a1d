"""Samples of one split in random order, put through the untouched model as check needs them.

A split may be sorted by class, so that its beginning says nothing. The samples may be preprocessed
otherwise than stated, since that is arithmetic on the raw arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch

from profiling_agent.acquisition.preprocess import preprocess
from profiling_agent.acquisition.workload import Split, Workload, compute_logits
from profiling_agent.machine.clock import now
from profiling_agent.machine.seeds import generator
from profiling_agent.records.workload import Preprocessing, SplitName

BATCH: Final = 16


class SampledSplit:
    """The split to look at, and the ``rows`` of it that are looked at, in that order.

    ``sample_s``, the seconds of one sample, is known after ``outputs_in_time``.
    """

    sample_s: float

    def __init__(self, workload: Workload, seed: int) -> None:
        self.workload = workload
        self.name: SplitName = _split_to_look_at(workload)
        self.split: Split = workload.splits[self.name]
        self.rows = generator(seed, "check rows").permutation(self.split.info.num_samples)

    @property
    def labels(self) -> np.ndarray | None:
        """Those of ``rows``; None for a split without labels."""
        return None if self.split.labels is None else np.asarray(self.split.labels)[self.rows]

    def first_input(self, rows: np.ndarray) -> np.ndarray:
        """The raw values (rows, ...) of the model's first input."""
        return np.asarray(self.split.inputs[self.workload.record.inputs[0].name][rows])

    def forward(
        self, rows: np.ndarray, preprocessing: Preprocessing | None = None, reverses: bool = False
    ) -> np.ndarray:
        """Outputs (rows, ...) of samples, perhaps preprocessed otherwise."""
        raw = {name: np.asarray(array[rows]) for name, array in self.split.inputs.items()}
        specs = self.workload.record.inputs
        stated = preprocessing or self.workload.record.preprocessing
        if reverses:
            name = specs[0].name
            raw[name] = np.flip(raw[name], axis=1 if stated.layout == "chw" else -1)
        arrays = preprocess(raw, specs, stated)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return compute_logits(self.workload.model, tensors).float().numpy()

    def batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), BATCH):
            yield rows[start : start + BATCH]

    def outputs_in_time(self, seconds: float, *, at_least: int) -> np.ndarray:
        """Outputs of as many rows as the time allows; sets ``rows`` to these, and ``sample_s``."""
        start, outputs, count = now(), [], 0
        for batch in self.batches(self.rows):
            outputs.append(self.forward(batch))
            count += len(batch)
            if now() - start > seconds and count >= at_least:
                break
        self.rows = self.rows[:count]
        self.sample_s = (now() - start) / count
        return np.concatenate(outputs)


def _split_to_look_at(workload: Workload) -> SplitName:
    """Search, where there is one: test is opened once, at the end of a run."""
    names: tuple[SplitName, ...] = ("search", "calibration", "test")
    return next(name for name in names if name in workload.splits)
