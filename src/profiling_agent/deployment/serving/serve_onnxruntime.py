"""Runs this artefact with onnxruntime and numpy alone.

    python serve.py images.npy            one label a line

    from serve import Model, predict
    predict(images)                       labels of raw images, (batch, ...) as in manifest.json
    Model(threads=1).logits(images)       float32 (batch, classes)

``model.onnx`` holds the model. Its threads spin while they wait for work (onnxruntime's default,
the fastest); on a processor shared with others set ``session.intra_op.allow_spinning`` to "0".
Threads may share a ``Model``.
"""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime


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


# --- the same in every runtime's serve.py ---------------------------------------------------------


def read_manifest(folder):
    """The manifest, or a sentence about what is wrong with it."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest.get("schema_version") != 1:
        raise ValueError(
            f"This serve.py reads manifests of schema 1, not {manifest.get('schema_version')!r}."
        )
    return manifest


def preprocess(inputs, manifest):
    """Raw arrays to what the graph takes: ``(x * scale - mean) / std``, channels first."""
    specs = manifest["inputs"]
    if not isinstance(inputs, dict):
        if len(specs) != 1:
            raise ValueError(f"Pass a dict with the inputs {[s['name'] for s in specs]}.")
        inputs = {specs[0]["name"]: inputs}
    if missing := [spec["name"] for spec in specs if spec["name"] not in inputs]:
        raise ValueError(f"The inputs {missing} are missing.")
    steps = manifest["preprocessing"]
    prepared = []
    for position, spec in enumerate(specs):
        value = np.asarray(inputs[spec["name"]])
        if position == 0 and steps["layout"] != "none":
            value = normalise(value, steps)
        value = np.array(value, dtype=spec["dtype"], order="C", ndmin=1)
        if list(value.shape[1:]) != list(spec["shape"]):
            raise ValueError(
                f"Input {spec['name']!r} needs a batch axis and samples of shape {spec['shape']} "
                f"after preprocessing; got an array that became {list(value.shape)}."
            )
        if len(value) == 0:
            raise ValueError(f"Input {spec['name']!r} holds no samples.")
        prepared.append(value)
    return prepared


def normalise(images, steps):
    """Images of any layout to float32 (batch, channels, height, width)."""
    per_channel = [-1, 1, 1] if steps["layout"] == "chw" else [-1]
    images = images.astype(np.float32) * np.float32(steps["scale"])
    if steps["mean"]:
        images = images - np.array(steps["mean"], np.float32).reshape(per_channel)
    if steps["std"]:
        images = images / np.array(steps["std"], np.float32).reshape(per_channel)
    if steps["layout"] == "hw":
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if steps["layout"] == "hwc" else images


def in_blocks(run, prepared, size, join):
    """Run a graph of fixed batch size over any number of samples; the last block is filled up."""
    results = []
    for start in range(0, len(prepared[0]), size):
        block = [value[start : start + size] for value in prepared]
        count = len(block[0])
        if count < size:
            block = [join([value] + [value[-1:]] * (size - count)) for value in block]
        results.append(run(tuple(block))[:count])
    return np.concatenate(results)


def name_classes(logits, manifest):
    """The class of the largest logit of each row; outputs that aren't classes as they are."""
    if manifest["num_classes"] is None:
        return list(logits)
    answers = manifest["answers"] or range(manifest["num_classes"])
    best = logits[:, list(answers)].argmax(axis=1)
    names = manifest["class_names"]
    return [names[answers[index]] if names else int(answers[index]) for index in best]


_default, _opening = [], threading.Lock()


def predict(images):
    """Labels of raw inputs by the artefact in this file's folder, opened once."""
    with _opening:
        if not _default:
            _default.append(Model())
    return _default[0].predict(images)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python serve.py images.npy")
    loaded = np.load(sys.argv[1], allow_pickle=False)
    for label in predict(dict(loaded) if hasattr(loaded, "files") else loaded):
        print(label)
