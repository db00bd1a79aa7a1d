"""Runs this artefact with openvino and numpy alone.

    python serve.py images.npy            one label a line

    from serve import Model, predict
    predict(images)                       labels of raw images, (batch, ...) as in manifest.json
    Model(threads=1).logits(images)       float32 (batch, classes)

``model.xml`` is the graph and ``model.bin`` its weights. It is compiled for the batch size it was
measured at, and for another when that is first asked for; larger batches run in blocks of it.
Threads may share a ``Model``; their calls run one at a time.
"""

import json  # noqa: F401 - for what follows in serve.py
import sys
import threading
from pathlib import Path

import numpy as np

from profiling_agent.deployment.serving.common import (
    in_blocks,
    name_classes,
    preprocess,
    read_manifest,
)

# With this package openvino tells its maker of every import; it works without.
sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore
import openvino  # noqa: E402

OTHER_SIZES = 4
"""Batch sizes besides the measured one that stay compiled."""


class Model:
    """The artefact, opened; ``logits`` is ``run(prepare(inputs))``."""

    def __init__(self, folder=None, threads=None):
        folder = Path(folder) if folder is not None else Path(__file__).parent
        self.manifest = read_manifest(folder)
        self.fixed_batch = self.manifest["batch_size"]
        self.batch_size = self.fixed_batch or self.manifest["deployment"]["batch_size"]
        self.core = openvino.Core()
        self.graph = self.core.read_model(folder / "model.xml")
        self.names = [value.get_any_name() for value in self.graph.inputs]
        is_bf16 = self.manifest["scheme"].endswith("bf16")
        self.properties = {
            # Left to itself the processor's plugin computes float models in bf16.
            "INFERENCE_PRECISION_HINT": "bf16" if is_bf16 else "f32",
            "INFERENCE_NUM_THREADS": threads or self.manifest["deployment"]["threads"],
            "NUM_STREAMS": 1,
            # Pinned, the threads of every process would share the first cores.
            "ENABLE_CPU_PINNING": False,
        }
        self.requests = {self.batch_size: self.compile(self.batch_size)}
        # A request holds one caller's answer until that is copied.
        self.lock = threading.Lock()

    def compile(self, batch):
        """The graph ready to run at one batch size: a free one is slower, and not always there."""
        graph = self.graph.clone()
        graph.reshape(
            {
                value.get_any_name(): [batch, *list(value.get_partial_shape())[1:]]
                for value in graph.inputs
            }
        )
        return self.core.compile_model(graph, "CPU", self.properties).create_infer_request()

    def prepare(self, inputs):
        """Raw arrays (one, or a dict by input name) to the feed that ``run`` takes."""
        return dict(zip(self.names, preprocess(inputs, self.manifest), strict=True))

    def run(self, prepared):
        """Logits of prepared inputs as an array (batch, classes), float32."""
        with self.lock:
            request = self.request_for(len(prepared[self.names[0]]))
            request.infer(prepared, share_inputs=True)
            return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    def request_for(self, batch):
        """The request of a batch size, compiled now if it isn't there; the lock must be held."""
        if batch not in self.requests:
            others = [size for size in self.requests if size != self.batch_size]
            if len(others) >= OTHER_SIZES:
                del self.requests[others[0]]
            self.requests[batch] = self.compile(batch)
        return self.requests[batch]

    def logits(self, inputs):
        """Logits of raw inputs as an array (batch, classes), float32."""
        values = tuple(self.prepare(inputs).values())
        if self.fixed_batch is not None:
            return in_blocks(self.run_values, values, self.fixed_batch, np.concatenate)
        step, total = self.batch_size, len(values[0])
        blocks = [tuple(v[at : at + step] for v in values) for at in range(0, total, step)]
        return np.concatenate([self.run_values(block) for block in blocks])

    def run_values(self, values):
        """``run`` on values in the order of the graph's inputs."""
        return self.run(dict(zip(self.names, values, strict=True)))

    def predict(self, inputs):
        """Labels of raw inputs: class names when the manifest has them, else class indices."""
        return name_classes(self.logits(inputs), self.manifest)
