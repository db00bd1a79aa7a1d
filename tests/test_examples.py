"""The examples are taken as a user takes them; they rot otherwise."""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.demo import DEMO_DATA, DEMO_FOLDER
from profiling_agent.acquisition.factories import build_model
from profiling_agent.acquisition.images import load_image
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload, compute_logits
from profiling_agent.compression.groups import find_groups
from profiling_agent.deployment.artefact import build_artefact, open_artefact
from profiling_agent.records.common import Deployment
from profiling_agent.records.plan import Plan
from profiling_agent.records.workload import ImageTransform, Preprocessing
from test_deployment import ACHIEVED, record

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


NAMES = ("ant", "bee", "cat", "dog")
PHOTOS = ImageTransform(resize=18, crop=(16, 16), interpolation="bicubic")


@pytest.fixture(scope="module")
def serving() -> Any:
    """``examples/serving/app.py`` as a module."""
    path = EXAMPLES / "serving" / "app.py"
    spec = importlib.util.spec_from_file_location("serving_app", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve_images(
    folder: Path,
    *,
    runtime: str = "onnxruntime",
    layout: str = "hwc",
    image: ImageTransform | None = PHOTOS,
    names: tuple[str, ...] = NAMES,
    answers: tuple[int, ...] = (),
) -> Path:
    """An artefact of a small classifier of images, 16 x 16, grey where the layout is ``hw``."""
    torch.manual_seed(0)
    shape = (1 if layout == "hw" else 3, 16, 16)
    model = nn.Sequential(nn.Conv2d(shape[0], 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1176, 4))
    steps = Preprocessing(layout=layout, scale=1 / 255, mean=(0.5,), std=(0.2,), image=image)  # pyright: ignore
    known = record(shape, steps, class_names=names)
    known = known.model_copy(update={"task": known.task.model_copy(update={"answers": answers})})
    plan = Plan(runtime=runtime)  # pyright: ignore[reportArgumentType]
    example = {"x": torch.rand(2, *shape)}
    build_artefact(model.eval(), known, example, plan, ACHIEVED, folder, Deployment())
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such an artefact for onnxruntime; not to be changed."""
    return serve_images(tmp_path_factory.mktemp("serving") / "artefact")


def photo(width: int = 40, height: int = 30, *, mode: str = "RGB", kind: str = "PNG") -> bytes:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


class TestServing:
    def test_answers_as_the_artefact_does(self, images: Path, serving: Any) -> None:
        served, classifier = open_artefact(images), serving.Classifier(images)
        for content in (photo(), photo(20, 50), photo(16, 16, mode="L"), photo(kind="JPEG")):
            raw = load_image(content, PHOTOS)[None]
            answer = classifier.answer(content)
            assert answer["label"] == served.predict(raw)[0]
            logits = torch.from_numpy(served.logits(raw)[0])
            found = {entry["label"]: entry["probability"] for entry in answer["classes"]}
            expected = dict(zip(NAMES, logits.softmax(0).tolist(), strict=True))
            assert found == pytest.approx(expected, rel=1e-5)
            assert list(found) == sorted(found, key=lambda name: -found[name])
            assert classifier.answer(content, top=2)["classes"] == answer["classes"][:2]
        described = {"name": "tiny", "runtime": "onnxruntime", "scheme": "fp32"}
        assert classifier.describe() == described

    @pytest.mark.parametrize("mode", ["RGB", "BGR", "L"])
    @pytest.mark.parametrize("resize", [None, 21, (24, 19)])
    @pytest.mark.parametrize("crop", [None, (17, 40)])
    def test_reads_images_as_acquisition_does(
        self, serving: Any, mode: Any, resize: Any, crop: Any
    ) -> None:
        transform = ImageTransform(mode=mode, resize=resize, crop=crop, interpolation="lanczos")
        stated = json.loads(transform.to_json())  # as it stands in a manifest
        for content in (photo(), photo(25, 63), photo(30, 30, mode="L"), photo(kind="JPEG")):
            pixels = serving.load_image(content, stated)
            assert np.array_equal(pixels, load_image(content, transform))

    @pytest.mark.parametrize("layout", ["hw", "hwc", "chw"])
    def test_arrays_that_were_never_files_are_taken_in_their_size(
        self, tmp_path: Path, serving: Any, layout: str
    ) -> None:
        folder = serve_images(tmp_path / "a", runtime="torch", layout=layout, image=None)
        classifier = serving.Classifier(folder)
        mode = "L" if layout == "hw" else "RGB"
        content = photo(16, 16, mode=mode)
        raw = load_image(content, ImageTransform(mode=mode))
        raw = raw.transpose(2, 0, 1) if layout == "chw" else raw
        assert np.array_equal(classifier.read(content), raw)
        assert classifier.answer(content)["label"] == open_artefact(folder).predict(raw[None])[0]
        with pytest.raises(serving.BadImage, match="40 x 30 pixels and must be 16 x 16"):
            classifier.answer(photo())

    def test_only_classes_that_may_be_answered(self, tmp_path: Path, serving: Any) -> None:
        folder = serve_images(tmp_path / "a", runtime="torch", answers=(1, 3), names=())
        classes = serving.Classifier(folder).answer(photo())["classes"]
        assert {entry["label"] for entry in classes} == {1, 3}
        assert sum(entry["probability"] for entry in classes) == pytest.approx(1.0)

    def test_what_is_no_image_is_told_in_a_sentence(
        self, images: Path, serving: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        classifier = serving.Classifier(images)
        bad = (b"", b"no image", photo()[:-200], b"%!PS-Adobe-3.0 EPSF-3.0\n")
        for content in bad:
            with pytest.raises(serving.BadImage, match="can't be decoded as an image"):
                classifier.answer(content)
        monkeypatch.setattr(serving, "MAX_PIXELS", 1000)
        with pytest.raises(serving.BadImage, match="40 x 30 pixels; at most 1,000"):
            classifier.answer(photo())
        with pytest.raises(serving.BadImage, match="would be resized to 2880 x 18"):
            classifier.answer(photo(320, 2))

    def test_artefacts_of_other_things_are_refused_at_the_start(
        self, tmp_path: Path, images: Path, serving: Any
    ) -> None:
        vectors = nn.Linear(12, 4).eval()
        example, plan = {"x": torch.rand(2, 12)}, Plan(runtime="torch")
        build_artefact(vectors, record(), example, plan, ACHIEVED, tmp_path / "v", Deployment())
        with pytest.raises(ValueError, match=r"takes x \(12,\).* not an image"):
            serving.Classifier(tmp_path / "v")
        folder = shutil.copytree(images, tmp_path / "a")
        manifest = json.loads((folder / "manifest.json").read_text())
        (taken,) = manifest["inputs"]
        for raw_dtype in ("uint8", None):  # None: not stated by older versions
            changed = {**manifest, "inputs": [{**taken, "raw_dtype": raw_dtype}]}
            (folder / "manifest.json").write_text(json.dumps(changed))
            serving.Classifier(folder)
        changed = {**manifest, "inputs": [{**taken, "raw_dtype": "float32"}]}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="arrays of float32"):
            serving.Classifier(folder)
        (folder / "manifest.json").write_text(json.dumps({**manifest, "num_classes": None}))
        with pytest.raises(ValueError, match="not classes"):
            serving.Classifier(folder)

    def test_several_callers_at_once_get_their_own_answers(
        self, tmp_path: Path, serving: Any
    ) -> None:
        classifier = serving.Classifier(serve_images(tmp_path / "a", runtime="openvino"))
        contents = [photo(size, 40) for size in range(20, 60)]
        alone = [classifier.answer(content) for content in contents]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(classifier.answer, contents)) == alone

    def test_needs_neither_torch_nor_this_package(
        self, tmp_path: Path, images: Path, serving: Any
    ) -> None:
        content = photo()
        (tmp_path / "photo.png").write_bytes(content)
        blocked = ["torch", "profiling_agent", "pydantic", "safetensors", "onnx", "fastapi"]
        code = (
            "import json, pathlib, sys\n"
            f"sys.modules.update({{name: None for name in {blocked!r}}})\n"
            f"sys.path.insert(0, {str(EXAMPLES / 'serving')!r})\n"
            "import app\n"
            f"classifier = app.Classifier({str(images)!r}, threads=1)\n"
            f"content = pathlib.Path({str(tmp_path / 'photo.png')!r}).read_bytes()\n"
            "print(json.dumps(classifier.answer(content)))\n"
        )
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", code], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        expected = serving.Classifier(images, threads=1).answer(content)
        assert json.loads(done.stdout)["label"] == expected["label"]

    def test_over_http(self, images: Path, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("fastapi")
        client = pytest.importorskip("fastapi.testclient").TestClient
        monkeypatch.setenv("ARTEFACT", str(images))
        asking = client(serving.create_app())
        assert asking.get("/health").json()["status"] == "ok"
        answered = asking.post("/predict?top=2", files={"file": photo()})
        assert answered.status_code == 200
        expected = serving.Classifier(images).answer(photo(), top=2)
        assert answered.json() == expected
        refused = asking.post("/predict", files={"file": b"no image"})
        assert refused.status_code == 422
        assert "can't be decoded" in refused.json()["detail"]
        monkeypatch.setattr(serving, "MAX_BYTES", 100)
        assert asking.post("/predict", files={"file": photo()}).status_code == 413

    def test_the_dockerfile_installs_what_the_app_imports(self, serving: Any) -> None:
        folder = EXAMPLES / "serving"
        stated = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
        packages = {line for line in stated if line and not line.startswith("#")}
        imported: set[str] = set()
        for node in ast.walk(ast.parse((folder / "app.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
        needed = {"pillow" if name == "PIL" else name for name in imported}
        assert needed - sys.stdlib_module_names <= packages
        dockerfile = (folder / "Dockerfile").read_text(encoding="utf-8")
        copied = re.findall(r"^COPY (?:--\S+ )?(\S+)", dockerfile, flags=re.MULTILINE)
        assert copied.pop() == "artefact/"
        assert all((folder / name).is_file() for name in copied)
        (factory,) = re.findall(r'"app:(\w+)"', dockerfile)
        assert callable(getattr(serving, factory))
