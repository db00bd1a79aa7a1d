"""What an artefact is worth where this package can't be imported.

    python -I benchmarks/serve_check.py RUN            the accuracy, to the last digit
    python -I benchmarks/serve_check.py RUN prepare    samples a second that are prepared

Opens RUN/artefact through its own serve.py and runs the test split at the deployment's batch size.
The accuracy (or the agreement with the original's answers) is in percent; preparing is what
serve.py does to raw arrays before the model gets them.
"""

import json
import sys
import time
from pathlib import Path

sys.modules["profiling_agent"] = None  # an import would fail from here on

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


def main() -> None:
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
