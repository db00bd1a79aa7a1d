"""The examples are taken as a user takes them; they rot otherwise."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.demo import DEMO_DATA, DEMO_FOLDER
from profiling_agent.acquisition.factories import build_model
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload, compute_logits
from profiling_agent.compression.groups import find_groups

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """The own model as its README says, on random images and weights."""
    folder = tmp_path_factory.mktemp("own_model")
    for name in ("model.py", "data.py"):
        shutil.copyfile(EXAMPLES / "own_model" / name, folder / name)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 28, 28), dtype=np.uint8)
    np.savez(folder / "val.npz", images=images, classes=rng.integers(0, 10, 90, dtype=np.uint8))
    reference = f"{folder / 'model.py'}:model"
    weights = folder / "weights.safetensors"
    save_file(build_model(reference).state_dict(), weights)
    data = f"{folder / 'data.py'}:val"
    request = Request(model=reference, data=data, weights=str(weights))
    return acquire(request, folder=folder / "splits")


def test_the_own_model_is_acquired_with_its_preprocessing(workload: Workload) -> None:
    record = workload.record
    assert record.inputs[0].shape == (1, 28, 28)
    assert record.task.num_classes == 10
    steps = record.preprocessing
    assert (steps.layout, steps.mean, steps.std) == ("hw", (0.286,), (0.353,))
    assert steps.scale == pytest.approx(1 / 255)
    assert {split.name: split.num_samples for split in record.splits} == {
        "calibration": 9,
        "search": 36,
        "test": 45,
    }


def test_the_own_model_can_be_pruned(workload: Workload) -> None:
    example = workload.example(2)
    assert compute_logits(workload.model, example).shape == (2, 10)
    groups = find_groups(workload.model, example).groups
    assert [(group.id, group.width) for group in groups] == [
        ("channels:0.0", 16),
        ("channels:1.0", 32),
    ]


def test_the_recipe_is_the_one_that_made_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "fashion_mnist"))
    pack, train = importlib.import_module("pack"), importlib.import_module("train")
    with np.load(DEMO_DATA, allow_pickle=False) as demo:
        counts = {name: len(demo[f"x_{name}"]) for name in ("calibration", "search", "test")}
        assert (float(demo["mean"][0]), float(demo["std"][0])) == (train.MEAN, train.STD)
        assert tuple(demo["class_names"]) == pack.CLASS_NAMES
    assert counts["calibration"] == pack.NUM_CALIBRATION
    assert counts["test"] == pack.NUM_TEST
    assert counts["calibration"] + counts["search"] + train.NUM_TRAIN == 60_000
    page = (EXAMPLES / "fashion_mnist" / "README.md").read_text(encoding="utf-8")
    stated = [int(n.replace(",", "")) for n in re.findall(r"^\| ([\d,]+) \|", page, re.MULTILINE)]
    assert stated == [train.NUM_TRAIN, *counts.values()]
    total = sum(path.stat().st_size for path in DEMO_FOLDER.iterdir() if path.is_file())
    assert total <= pack.LIMIT_BYTES
