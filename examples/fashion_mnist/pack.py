"""Pack Fashion-MNIST and the trained weights into the data that the demo ships.

    python examples/fashion_mnist/pack.py --weights DIR

Calibration and search samples come from the last 5,000 training images, which ``train.py`` never
sees, the test samples from the official test images. A deflated ``.npz`` is about 440 bytes an
image; LZMA, WebP and PNG are 8 to 15 % smaller and not worth another reader: like this the file
can be passed to ``--data`` as it is.
"""

from __future__ import annotations

import argparse
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
from train import MEAN, NUM_TRAIN, SOURCE, STD, load

from profiling_agent.acquisition.demo import DEMO_DATA, DEMO_FOLDER, build_demo
from profiling_agent.acquisition.weights import load_weights, settle

NUM_CALIBRATION = 1_000
NUM_TEST = 10_000
LIMIT_BYTES = 15_500_000
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def collect(source: Path) -> dict[str, np.ndarray]:
    """All arrays of the demo's ``.npz``, images as bytes (samples, 28, 28)."""
    images, labels = load(source, "train")
    test_images, test_labels = load(source, "t10k")
    held_out, held_labels = images[NUM_TRAIN:], labels[NUM_TRAIN:]
    parts = {
        "calibration": (held_out[:NUM_CALIBRATION], held_labels[:NUM_CALIBRATION]),
        "search": (held_out[NUM_CALIBRATION:], held_labels[NUM_CALIBRATION:]),
        "test": (test_images[:NUM_TEST], test_labels[:NUM_TEST]),
    }
    arrays = {
        "mean": np.array([MEAN]),
        "std": np.array([STD]),
        "scale": np.array(1 / 255),
        "layout": np.array("hw"),
        "class_names": np.array(CLASS_NAMES),
    }
    for name, (x, y) in parts.items():
        arrays[f"x_{name}"] = x
        arrays[f"y_{name}"] = y.astype(np.uint8)
    return arrays


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A deflated ``.npz`` with fixed dates, so that the same arrays give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue())


def pack_weights(folder: Path, target: Path) -> None:
    """Copy the networks' weights that are there, once they are seen to fit."""
    for name in ("vit", "resnet"):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            print(f"{path} is not there: {name} is left as it was")
            continue
        model = build_demo(f"demo:{name}")
        load_weights(model, path)
        settle(model)
        shutil.copyfile(path, target / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the four .gz files")
    parser.add_argument("--weights", type=Path, help="folder of vit and resnet .safetensors")
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER, help="default: the package's own")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_npz(args.out / DEMO_DATA.name, collect(args.source))
    if args.weights is not None:
        pack_weights(args.weights, args.out)
    files = sorted(path for path in args.out.iterdir() if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:>12,} bytes  {path.name}")
    total = sum(path.stat().st_size for path in files)
    print(f"{total:>12,} bytes  in all")
    if total > LIMIT_BYTES:
        raise SystemExit(f"The demo's data exceed {LIMIT_BYTES:,} bytes; lower NUM_TEST.")


if __name__ == "__main__":
    main()
