"""What an artefact is worth where this package can't be imported.

    python -I benchmarks/serve_check.py RUN

Opens RUN/artefact through its own serve.py, runs the test split at the deployment's batch size and
prints the accuracy (or the agreement with the original's answers) in percent, to the last digit.
"""

import json
import sys
from pathlib import Path

sys.modules["profiling_agent"] = None  # an import would fail from here on

import numpy as np  # noqa: E402

LABELS = "labels.npy"


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

    deployment = record["settings"]["deployment"]
    model = serve.Model(run / "artefact", threads=deployment["threads"])
    size, right = deployment["batch_size"], 0
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        logits = model.logits({name: np.asarray(array[rows]) for name, array in inputs.items()})
        right += int((logits.argmax(axis=1) == labels[rows]).sum())
    print(repr(100.0 * (right / len(labels))))


if __name__ == "__main__":
    main()
