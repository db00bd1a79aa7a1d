"""The baseline: the untouched model in eager PyTorch, with the face of an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from profiling_agent.acquisition.acquire import reopen
from profiling_agent.acquisition.workload import Workload, compute_logits


class EagerModel:
    """``prepare`` and ``run`` as in every ``serve.py``, over the live module.

    ``threads`` None leaves torch's own setting alone (a live object in the user's process).
    """

    def __init__(self, data: Path | Workload, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._workload = data if isinstance(data, Workload) else reopen(data)

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return self._workload.tensors(inputs)

    def logits(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.run(self.prepare(inputs))

    def run(self, prepared: Mapping[str, Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return compute_logits(self._workload.model, prepared).numpy()
