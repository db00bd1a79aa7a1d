"""What every ``serve.py`` ends in; ``serve_text`` puts it behind a runtime's own part.

An artefact's ``serve.py`` is one file that imports nothing of this package, so the two are joined
when it is written. What stands above the first dashed line here stays behind.
"""

import json
import sys
import threading
from typing import Any

import numpy as np

Model: Any = None
"""Each runtime's own, above this in its serve.py."""

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
