"""Runs this artefact with onnxruntime and numpy alone.

    python serve.py images.npy            one label a line

    from serve import Model, predict
    predict(images)                       labels of raw images, (batch, ...) as in manifest.json
    Model(threads=1).logits(images)       float32 (batch, classes)

``model.onnx`` holds the model. Its threads spin while they wait for work (onnxruntime's default,
the fastest); on a processor shared with others set ``session.intra_op.allow_spinning`` to "0".
Threads may share a ``Model``.
"""

import json  # noqa: F401 - for what follows in serve.py
import sys  # noqa: F401 - for what follows in serve.py
import threading  # noqa: F401 - for what follows in serve.py
from pathlib import Path

import numpy as np
import onnxruntime

from profiling_agent.deployment.serving.common import (
    in_blocks,
    name_classes,
    preprocess,
    read_manifest,
)


class Model:
    """The artefact, opened; ``logits`` is ``run(prepare(inputs))``."""

    def __init__(self, folder=None, threads=None):
        folder = Path(folder) if folder is not None else Path(__file__).parent
        self.manifest = read_manifest(folder)
        self.fixed_batch = self.manifest["batch_size"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or self.manifest["deployment"]["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=["CPUExecutionProvider"],
            # It would put layers in int8 that were kept float on purpose.
            disabled_optimizers=["WeightBiasQuantization"],
        )
        self.names = [value.name for value in self.session.get_inputs()]

    def prepare(self, inputs):
        """Raw arrays (one, or a dict by input name) to the feed that ``run`` takes."""
        return dict(zip(self.names, preprocess(inputs, self.manifest), strict=True))

    def run(self, prepared):
        """Logits of prepared inputs as an array (batch, classes), float32."""
        return np.asarray(self.session.run(None, prepared)[0], dtype=np.float32)

    def logits(self, inputs):
        """Logits of raw inputs as an array (batch, classes), float32."""
        prepared = self.prepare(inputs)
        if self.fixed_batch is None:
            return self.run(prepared)
        values = tuple(prepared.values())
        return in_blocks(self.run_values, values, self.fixed_batch, np.concatenate)

    def run_values(self, values):
        """``run`` on values in the order of the graph's inputs."""
        return self.run(dict(zip(self.names, values, strict=True)))

    def predict(self, inputs):
        """Labels of raw inputs: class names when the manifest has them, else class indices."""
        return name_classes(self.logits(inputs), self.manifest)
