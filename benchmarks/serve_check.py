"""What an artefact is worth where this package can't be imported.

    python -I benchmarks/serve_check.py RUN            the accuracy, to the last digit
    python -I benchmarks/serve_check.py RUN prepare    samples a second that are prepared
    python -I benchmarks/serve_check.py ARTEFACT alone INPUTS.npy LOGITS.npy    writes logits

Only the artefact's runtime with what that itself requires, numpy and pillow can be imported.
Opens RUN/artefact through its own serve.py and runs the test split at the deployment's batch size.
The accuracy (or the agreement with the original's answers) is in percent; preparing is what
serve.py does to raw arrays before the model gets them.
"""

import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path

folder = Path(sys.argv[1])
folder = folder if "alone" in sys.argv[2:] else folder / "artefact"
runtime = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["runtime"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def required_by(names):
    """Distributions that these need, themselves included, without any extras."""
    found, waiting = set(), [normal(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [normal(re.match(r"[\w.-]+", n)[0]) for n in needed if "extra ==" not in n]
    return found


allowed = required_by([runtime, "numpy", "pillow"])
for package, owners in metadata.packages_distributions().items():
    if not allowed & {normal(owner) for owner in owners}:
        sys.modules[package] = None  # an import fails from here on
sys.modules["profiling_agent"] = None

import numpy as np  # noqa: E402

LABELS = "labels.npy"


def prepare_rate(model, inputs, size):
    """Samples a second: the median of calls on one batch, for a second."""
    batch = {name: np.asarray(array[:size]) for name, array in inputs.items()}
    seconds, end = [], time.perf_counter() + 1.0
    while time.perf_counter() < end:
        start = time.perf_counter()
        model.prepare(batch)
        seconds.append(time.perf_counter() - start)
    return size / sorted(seconds)[len(seconds) // 2]


def alone(inputs, out):
    sys.path.insert(0, str(folder))
    import serve

    np.save(out, serve.Model(folder).logits(np.load(inputs)))


def main() -> None:
    if "alone" in sys.argv[2:]:
        alone(*sys.argv[3:])
        return
    run = Path(sys.argv[1])
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    names = [spec["name"] for spec in record["workload"]["inputs"]]
    inputs = {name: np.load(run / f"data/test/{name}.npy", mmap_mode="r") for name in names}
    if record["workload"]["task"]["metric"] == "agreement":
        labels = np.load(run / "data/baseline_test.npy")
    else:
        labels = np.load(run / "data/test" / LABELS)
    sys.path.insert(0, str(run / "artefact"))
    import serve

    task, deployment = record["workload"]["task"], record["settings"]["deployment"]
    answers = np.array(task["answers"] or range(task["num_classes"]))
    model = serve.Model(run / "artefact", threads=deployment["threads"])
    size, right = deployment["batch_size"], 0
    if "prepare" in sys.argv[2:]:
        print(prepare_rate(model, inputs, size))
        return
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        logits = model.logits({name: np.asarray(array[rows]) for name, array in inputs.items()})
        right += int((answers[logits[:, answers].argmax(axis=1)] == labels[rows]).sum())
    print(repr(100.0 * (right / len(labels))))


if __name__ == "__main__":
    main()
