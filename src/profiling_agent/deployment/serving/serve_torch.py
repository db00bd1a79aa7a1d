"""Runs this artefact with torch and numpy alone.

    python serve.py images.npy            one label a line

    from serve import Model, predict
    predict(images)                       labels of raw images, (batch, ...) as in manifest.json
    Model(threads=1).logits(images)       float32 (batch, classes)

``graph.py`` holds the model as a function, ``weights.safetensors`` its tensors; int8 weights are
packed for the processor when the model is opened. A bf16 graph takes and gives float32 as well.
Threads may share a ``Model``.
"""

import json
import sys  # noqa: F401 - for what follows in serve.py
import threading  # noqa: F401 - for what follows in serve.py
import warnings
from pathlib import Path

import numpy as np
import torch

from profiling_agent.deployment.serving.common import (
    in_blocks,
    name_classes,
    preprocess,
    read_manifest,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
ENGINES = ("x86", "fbgemm", "qnnpack")


class Weights:
    """Tensors of a safetensors file, read one by one when ``graph.py`` asks for them."""

    def __init__(self, path):
        self.file = path.open("rb")
        length = int.from_bytes(self.file.read(8), "little")
        self.header = json.loads(self.file.read(length))
        self.start = 8 + length

    def close(self):
        self.file.close()

    def tensor(self, name):
        entry = self.header[name]
        first, last = entry["data_offsets"]
        flat = torch.empty(
            int(np.prod(entry["shape"], dtype=np.int64)), dtype=DTYPES[entry["dtype"]]
        )
        if last > first:
            self.file.seek(self.start + first)
            read = self.file.readinto(flat.view(torch.uint8).numpy().data)
            if read != last - first:
                raise ValueError(f"The weights file ends within {name!r}; copy the artefact again.")
        return flat.reshape(entry["shape"])

    def int8_linear(self, name, scales, bias):
        """Pack an int8 weight, its scale of each output and its bias for ``linear_dynamic``."""
        engine = next((e for e in ENGINES if e in torch.backends.quantized.supported_engines), None)
        if engine is None:
            raise RuntimeError("This torch has no int8 engine for this processor.")
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor, ")
            steps = self.tensor(scales)
            # Called through torch.ops, its warning would reach stderr past every filter.
            make = torch._make_per_channel_quantized_tensor  # pyright: ignore
            weight = make(self.tensor(name), steps, torch.zeros_like(steps, dtype=torch.int64), 0)
            values = None if bias is None else self.tensor(bias)
            return torch.ops.quantized.linear_prepack(weight, values)

    def folded(self, weight, bias, gamma, beta, mean, variance, eps):
        """Weight and bias of a convolution that does the batch norm after it as well."""
        kernel, centre = self.tensor(weight), self.tensor(mean)
        scale = torch.rsqrt(self.tensor(variance) + eps)
        if gamma is not None:
            scale = scale * self.tensor(gamma)
        shift = -centre * scale
        if bias is not None:
            shift = shift + self.tensor(bias) * scale
        if beta is not None:
            shift = shift + self.tensor(beta)
        kernel, dtype = kernel * scale.reshape([-1] + [1] * (kernel.dim() - 1)), kernel.dtype
        return kernel.to(dtype), shift.to(dtype)


class Model:
    """The artefact, opened; ``logits`` is ``run(prepare(inputs))``."""

    def __init__(self, folder=None, threads=None):
        folder = Path(folder) if folder is not None else Path(__file__).parent
        self.manifest = read_manifest(folder)
        torch.set_num_threads(threads or self.manifest["deployment"]["threads"])
        self.fixed_batch = self.manifest["batch_size"]
        keep_freed_memory()
        weights = Weights(folder / "weights.safetensors")
        try:
            self.forward = load_graph(folder / "graph.py")(weights)
        finally:
            weights.close()

    def prepare(self, inputs):
        """Raw arrays (one, or a dict by input name) to the tensors that ``run`` takes."""
        return tuple(torch.from_numpy(value) for value in preprocess(inputs, self.manifest))

    def run(self, prepared):
        """Logits of prepared inputs as an array (batch, classes), float32."""
        with torch.inference_mode():
            return self.forward(*prepared).float().numpy()

    def logits(self, inputs):
        """Logits of raw inputs as an array (batch, classes), float32."""
        prepared = self.prepare(inputs)
        if self.fixed_batch is None:
            return self.run(prepared)
        return in_blocks(self.run, prepared, self.fixed_batch, torch.cat)

    def predict(self, inputs):
        """Labels of raw inputs: class names when the manifest has them, else class indices."""
        return name_classes(self.logits(inputs), self.manifest)


def keep_freed_memory():
    """Let the C library keep what a call frees for the next call, where it is glibc.

    It gives blocks above a limit back to the system, whose pages must then be mapped and zeroed
    again in every call, a quarter of the time of a large model. Freeing a block of just below 32
    MiB, which is never touched, raises that limit to its highest; mallopt(3), M_MMAP_THRESHOLD.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8)


def load_graph(path):
    """The ``build`` function of ``graph.py``."""
    names: dict = {"__name__": "artefact_graph", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return names["build"]
