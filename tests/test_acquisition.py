"""Acquisition through its public face: references, weights, data, splits, inputs, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from profiling_agent.acquisition.acquire import acquire, load_model, reopen
from profiling_agent.acquisition.demo import DEMO_DATA, DEMO_FOLDER
from profiling_agent.acquisition.inputs import infer_layout
from profiling_agent.acquisition.preprocess import preprocess
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload, compute_logits
from profiling_agent.errors import DataError, ModelError, StorageError
from profiling_agent.records.workload import InputSpec, Preprocessing, WorkloadSource

NUM_CLASSES = 3


class Tiny(nn.Module):
    """Three-channel images of any size to three classes."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Text(nn.Module):
    """Tokens with a mask to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.fc = nn.Linear(4, NUM_CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids) * attention_mask[..., None]
        return {"logits": self.fc(x.mean(1))}


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, NUM_CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc(features)


MODEL_FILE = """
import torch
from torch import nn
from sizes import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(5, WIDTH)
        self.fc2 = nn.Linear(WIDTH, 3)
    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))

def model():
    return Net()

def broken():
    raise RuntimeError("no such checkpoint")

def number():
    return 3

instance = Net()
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "sizes.py").write_text("WIDTH = 6\n")
    path = folder / "net.py"
    path.write_text(MODEL_FILE)
    return path


def vectors(num: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, 5), dtype=np.float32), np.arange(num) % NUM_CLASSES


def images(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def labels(num: int) -> np.ndarray:
    return np.arange(num) % NUM_CLASSES


def sizes(workload: Workload) -> dict[str, int]:
    return {name: split.info.num_samples for name, split in workload.splits.items()}


def get(model: Any, data: Any, tmp_path: Path, **options: Any) -> Workload:
    own = {key: options.pop(key) for key in ("seed", "max_samples") if key in options}
    request = Request(model=model, data=data, **options)
    return acquire(request, folder=tmp_path / "splits", **own)


class TestModelReference:
    def test_factory_class_and_instance(self, model_file: Path, tmp_path: Path) -> None:
        for name in ("model", "Net", "instance"):
            workload = get(f"{model_file}:{name}", vectors(), tmp_path)
            assert not workload.model.training
            assert workload.record.name == f"net.py:{name}"

    def test_random_weights_are_the_same_in_every_process(self, model_file: Path) -> None:
        source = WorkloadSource(model=f"{model_file}:model")
        first, second = load_model(source), load_model(source)
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_live_module_is_left_as_it_was(self, tmp_path: Path) -> None:
        model = Vector().double().train()
        workload = get(model, vectors(), tmp_path)
        assert model.training
        assert model.fc.weight.dtype == torch.float64
        assert next(workload.model.parameters()).dtype == torch.float32
        assert workload.record.source.model is None
        assert any("training mode" in note for note in workload.record.notes)

    def test_requires_grad_is_kept(self, tmp_path: Path) -> None:
        model = Vector()
        model.fc.bias.requires_grad_(False)
        kept = dict(get(model, vectors(), tmp_path).model.named_parameters())
        assert kept["fc.weight"].requires_grad
        assert not kept["fc.bias"].requires_grad

    @pytest.mark.parametrize(
        ("reference", "words"),
        [
            ("{folder}/none.py:model", "does not exist"),
            ("{file}:modle", "Did you mean 'model'"),
            ("{file}:broken", "RuntimeError: no such checkpoint"),
            ("{file}:number", "returned a 'int'"),
            ("{folder}/sizes.py:WIDTH", "is a 'int'"),
            ("demo:bert", "'demo:vit' and 'demo:resnet'"),
            ("somewhere", "not a model reference"),
        ],
    )
    def test_refusals(self, reference: str, words: str, model_file: Path, tmp_path: Path) -> None:
        filled = reference.format(folder=model_file.parent, file=model_file)
        with pytest.raises(ModelError) as caught:
            get(filled, vectors(), tmp_path)
        assert words in str(caught.value)

    def test_import_error_is_quoted(self, tmp_path: Path) -> None:
        (tmp_path / "bad.py").write_text("import nowhere_to_be_found\n")
        with pytest.raises(ModelError, match="ModuleNotFoundError"):
            get(f"{tmp_path / 'bad.py'}:model", None, tmp_path)

    def test_non_finite_weights(self, tmp_path: Path) -> None:
        model = Vector()
        with torch.no_grad():
            model.fc.weight[0, 0] = float("nan")
        with pytest.raises(ModelError, match=r"'fc\.weight'"):
            get(model, vectors(), tmp_path)


class TestWeights:
    def check(self, path: Path, state: dict[str, Tensor], model_file: Path) -> None:
        model = load_model(WorkloadSource(model=f"{model_file}:model", weights=str(path)))
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key].float())

    @pytest.fixture
    def state(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        shapes = {"fc1.weight": (6, 5), "fc1.bias": (6,), "fc2.weight": (3, 6), "fc2.bias": (3,)}
        return {key: torch.randn(shape) for key, shape in shapes.items()}

    @pytest.mark.parametrize("wrapper", [(), ("state_dict",), ("model",), ("ema", "module")])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
    def test_wrappers_and_prefixes(
        self,
        wrapper: tuple[str, ...],
        prefix: str,
        state: dict[str, Tensor],
        model_file: Path,
        tmp_path: Path,
    ) -> None:
        content: dict[str, Any] = {prefix + key: value for key, value in state.items()}
        for key in reversed(wrapper):
            content = {"epoch": 3, key: content}
        torch.save(content, tmp_path / "w.pt")
        self.check(tmp_path / "w.pt", state, model_file)

    def test_half_precision_safetensors(
        self, state: dict[str, Tensor], model_file: Path, tmp_path: Path
    ) -> None:
        half = {key: value.bfloat16() for key, value in state.items()}
        save_file(half, tmp_path / "w.safetensors")
        self.check(tmp_path / "w.safetensors", half, model_file)
        workload = get(
            f"{model_file}:model", vectors(), tmp_path, weights=str(tmp_path / "w.safetensors")
        )
        assert any("bfloat16" in note for note in workload.record.notes)

    def test_keys_that_do_not_fit(
        self, state: dict[str, Tensor], model_file: Path, tmp_path: Path
    ) -> None:
        del state["fc1.bias"]
        state["extra"] = torch.zeros(1)
        state["fc2.bias"] = torch.zeros(7)
        save_file(state, tmp_path / "w.safetensors")
        with pytest.raises(ModelError) as caught:
            self.check(tmp_path / "w.safetensors", state, model_file)
        message = str(caught.value)
        assert "1 missing from the file: 'fc1.bias'" in message
        assert "1 not in the model: 'extra'" in message
        assert "fc2.bias (file (7,), model (3,))" in message

    def test_pickle_of_a_module(self, model_file: Path, tmp_path: Path) -> None:
        torch.save(Vector(), tmp_path / "w.pt")
        with pytest.raises(ModelError, match="save_file"):
            self.check(tmp_path / "w.pt", {}, model_file)

    @pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "empty.pth"])
    def test_damaged(self, name: str, model_file: Path, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"nothing of the kind" * 9)
        with pytest.raises(ModelError, match="damaged"):
            self.check(tmp_path / name, {}, model_file)

    def test_missing_or_unknown(self, model_file: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="don't exist"):
            self.check(tmp_path / "w.pt", {}, model_file)
        (tmp_path / "w.h5").write_bytes(b"x")
        with pytest.raises(ModelError, match="must end in"):
            self.check(tmp_path / "w.h5", {}, model_file)


class Pictures(Dataset[Any]):
    """PIL images and their class, as torchvision's datasets give them."""

    classes = ("a", "b", "c")
    preprocessing = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}  # noqa: RUF012

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index >= len(self):
            raise IndexError(index)
        return Image.fromarray(images(1, 8, 6, 3, seed=index)[0]), index % 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        x, y = vectors(50)
        return iter(zip(torch.from_numpy(x), y.tolist(), strict=True))


def _dicts() -> list[dict[str, Any]]:
    x, y = vectors(40)
    return [{"image": a, "label": int(b), "path": "a.png"} for a, b in zip(x, y, strict=True)]


X, Y = vectors(40)
TENSORS = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


class TestData:
    @pytest.mark.parametrize(
        ("data", "total"),
        [
            ((X, Y), 40),
            ((torch.from_numpy(X), torch.from_numpy(Y)), 40),
            ({"features": X, "labels": Y}, 40),
            (TENSORS, 40),
            (DataLoader(TENSORS, batch_size=7), 40),
            (DataLoader(TENSORS, 7, True, num_workers=1, persistent_workers=True, timeout=9), 40),
            (DataLoader(Stream(), batch_size=8), 50),
            (Stream(), 50),
            (_dicts(), 40),
            (list(zip(X, Y, strict=True)), 40),
            (DataLoader(_dicts(), batch_size=6), 40),  # type: ignore[arg-type]
            ((X, Y.reshape(-1, 1)), 40),
            (iter([(X[:25], Y[:25]), (X[25:], Y[25:])]), 40),
            (iter([(X[i], np.eye(5)[Y[i]]) for i in range(40)]), 40),
            ((X, np.eye(3, dtype=np.float32)[Y]), 40),
        ],
    )
    def test_forms(self, data: Any, total: int, tmp_path: Path) -> None:
        workload = get(Vector(), data, tmp_path)
        assert sum(sizes(workload).values()) == total
        known = {row.tobytes(): label for row, label in zip(*vectors(50), strict=True)}
        known |= {row.tobytes(): label for row, label in zip(X, Y, strict=True)}
        for split in workload.splits.values():
            assert split.labels is not None
            (array,) = split.inputs.values()
            assert [known[row.tobytes()] for row in array] == split.labels.tolist()

    def test_one_hot_and_left_out_are_noted(self, tmp_path: Path) -> None:
        workload = get(Vector(), (X, np.eye(3, dtype=np.float32)[Y]), tmp_path)
        assert any("one value per class" in note for note in workload.record.notes)
        workload = get(Vector(), _dicts(), tmp_path)
        assert any("'path'" in note for note in workload.record.notes)

    def test_generator_is_read_once(self, tmp_path: Path) -> None:
        pairs = (pair for pair in zip(X, Y, strict=True))
        assert sum(sizes(get(Vector(), pairs, tmp_path)).values()) == 40

    def test_loader_without_labels(self, tmp_path: Path) -> None:
        loader = DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=7)
        workload = get(Vector(), {"calibration": loader, "search": (X, Y)}, tmp_path)
        assert workload.splits["calibration"].info.num_samples == 40
        assert not workload.splits["calibration"].info.labelled

    def test_pil_dataset(self, tmp_path: Path) -> None:
        workload = get(Tiny(), Pictures(), tmp_path)
        record = workload.record
        assert record.preprocessing.layout == "hwc"
        assert record.preprocessing.mean == (0.5, 0.5, 0.5)
        assert record.preprocessing.scale == 1 / 255
        assert record.task.class_names == ("a", "b", "c")
        (spec,) = record.inputs
        assert spec == InputSpec(name="x", shape=(3, 8, 6), dtype="float32", raw_dtype="uint8")
        assert workload.splits["test"].inputs["x"].dtype == np.uint8

    def test_factory_file(self, model_file: Path, tmp_path: Path) -> None:
        path = model_file.parent / "data.py"
        path.write_text(
            "import numpy as np\n"
            "def val():\n"
            "    rng = np.random.default_rng(0)\n"
            "    x = rng.integers(0, 256, (30, 3, 9, 9), dtype=np.uint8)\n"
            "    return {'calibration': [(a,) for a in x[:5]],\n"
            "            'search': list(zip(x[5:15], [0, 1] * 5)),\n"
            "            'test': list(zip(x[15:], [0, 1, 2] * 5))}\n"
            "val.class_names = ['a', 'b', 'c']\n"
            "val.preprocessing = {'mean': 0.5, 'std': 0.25}\n"
        )
        workload = get(Tiny(), f"{path}:val", tmp_path)
        assert sizes(workload) == {"calibration": 5, "search": 10, "test": 15}
        assert not workload.splits["calibration"].info.labelled
        assert workload.record.preprocessing.layout == "chw"
        assert workload.record.task.class_names == ("a", "b", "c")

    def test_several_inputs_by_name(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        samples = [
            {
                "attention_mask": np.ones(7, np.int64),
                "input_ids": rng.integers(0, 11, 7),
                "label": i % 3,
            }
            for i in range(30)
        ]
        workload = get(Text(), samples, tmp_path)
        assert [spec.name for spec in workload.record.inputs] == ["input_ids", "attention_mask"]
        assert workload.record.inputs[0].dtype == "int64"
        assert compute_logits(workload.model, workload.example(4)).shape == (4, 3)
        wrong = [{"tokens": s["input_ids"], "mask": s["attention_mask"], "y": 0} for s in samples]
        with pytest.raises(DataError, match=r"tokens.*input_ids"):
            get(Text(), wrong, tmp_path)

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ((X, np.full(40, 7)), "range from 7 to 7, but the model has 3 classes"),
            ((X, Y - 1), "range from -1 to"),
            ((X, Y + 0.5), "labels must be integers"),
            ((X, np.zeros(40, int)), "of class 0"),
            ((X, Y[:-1]), "different numbers of samples"),
            ((X, np.array(["a"] * 40)), "not an integer"),
            ((X[:0], Y[:0]), "empty"),
            ([], "empty"),
            ((X[:2], Y[:2]), "2 samples"),
            ([(X[i], i % 3) if i != 9 else (X[9][:4], 0) for i in range(40)], r"shape \(\d,\)"),
            ((np.where(np.arange(5) == 2, np.nan, X).astype(np.float32), Y), "NaN"),
            (X, "no labels"),
            ([(X[:8], Y[:8]), (X[8:], Y[8:]), (X, Y)], "one integer per sample"),
            ({"calibration": (X.astype(np.uint8), Y), "test": (X, Y)}, "prepare both alike"),
            ({"search": (X, Y), "test": (X[:, :4], Y)}, r"float32 \(4,\)"),
            ([(X[0], 0, 1)] * 9, "of 3 things"),
            ([("words", 0)] * 9, "brings no tokenizer"),
            ([(object(), 0)] * 9, "not numeric"),
            (17, "can't be read as data"),
            ("data.csv", "don't exist"),
            ("none.npz", "don't exist"),
        ],
    )
    def test_refusals(self, data: Any, words: str, tmp_path: Path) -> None:
        with pytest.raises((DataError, ModelError), match=words):
            get(Vector(), data, tmp_path)
        assert not (tmp_path / "splits" / "workload.json").exists()

    def test_nan_in_one_sample_is_named(self, tmp_path: Path) -> None:
        x = X.copy()
        x[:, 2] = np.where(np.arange(40) > 20, np.nan, x[:, 2])
        data = {"calibration": (x[:10], Y[:10]), "search": (x[10:], Y[10:]), "test": (X, Y)}
        with pytest.raises(DataError, match="NaN"):
            get(Vector(), data, tmp_path)

    def test_user_exception_is_quoted(self, tmp_path: Path) -> None:
        class Failing(Dataset[Any]):
            def __len__(self) -> int:
                return 9

            def __getitem__(self, index: int) -> Any:
                raise KeyError("column")

        with pytest.raises(DataError, match="KeyError"):
            get(Vector(), Failing(), tmp_path)


class TestNpz:
    def save(self, tmp_path: Path, **arrays: Any) -> str:
        path = tmp_path / "data.npz"
        np.savez_compressed(path, **arrays)
        return str(path)

    @pytest.mark.parametrize(
        ("shape", "layout", "channels"),
        [((8, 8), "hw", 1), ((8, 8, 3), "hwc", 3), ((3, 8, 8), "chw", 3), ((8, 8, 1), "hwc", 1)],
    )
    def test_layouts(
        self, shape: tuple[int, ...], layout: str, channels: int, tmp_path: Path
    ) -> None:
        path = self.save(tmp_path, images=images(30, *shape), labels=labels(30))
        workload = get(Tiny(channels), path, tmp_path)
        assert workload.record.preprocessing.layout == layout
        assert workload.record.inputs[0].shape == (channels, 8, 8)
        assert any("no mean and std" in note for note in workload.record.notes)
        low, high = workload.example(3)["x"].aminmax()
        assert low >= 0
        assert high <= 1

    def test_parts_and_settings(self, tmp_path: Path) -> None:
        path = self.save(
            tmp_path,
            x_calibration=images(6, 8, 8),
            y_calibration=labels(6),
            x_val=images(9, 8, 8, seed=1),
            y_val=labels(9),
            x_test=images(12, 8, 8, seed=2),
            y_test=labels(12).astype(np.uint8),
            x_train=images(4, 8, 8),
            y_train=labels(4),
            mean=[0.5],
            std=0.25,
            class_names=["a", "b", "c"],
        )
        workload = get(Tiny(1), path, tmp_path)
        assert sizes(workload) == {"calibration": 6, "search": 9, "test": 12}
        assert workload.record.preprocessing.mean == (0.5,)
        assert workload.record.task.class_names == ("a", "b", "c")
        assert np.array_equal(workload.splits["test"].inputs["x"], images(12, 8, 8, seed=2))

    def test_train_and_test(self, tmp_path: Path) -> None:
        path = self.save(
            tmp_path,
            x_train=X,
            y_train=Y,
            x_test=vectors(9, 5)[0],
            y_test=vectors(9, 5)[1],
        )
        workload = get(Vector(), path, tmp_path)
        assert sizes(workload) == {"calibration": 6, "search": 34, "test": 9}
        assert any("training part" in note for note in workload.record.notes)

    def test_floats_are_taken_as_they_are(self, tmp_path: Path) -> None:
        x = images(30, 3, 8, 8).astype(np.float32)
        workload = get(Tiny(), self.save(tmp_path, x=x, y=labels(30), mean=[1, 1, 1]), tmp_path)
        assert workload.record.preprocessing.layout == "none"
        assert any("not applied" in note for note in workload.record.notes)

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"x": np.array([{}, {}], dtype=object), "y": labels(2)}, "Python objects"),
            ({"a": X}, "needs x and y"),
            ({"x": images(9, 8, 8, 3), "y": labels(9), "mean": [0.5, 0.5]}, "2 values"),
            ({"x": images(9, 8, 8, 3), "y": labels(9), "std": [0.0]}, "std not zero"),
            ({"x": images(9, 8, 8, 3), "y": labels(9), "layout": "hwcn"}, "layout"),
        ],
    )
    def test_refusals(self, arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=words):
            get(Tiny(), self.save(tmp_path, **arrays), tmp_path)

    def test_damaged(self, tmp_path: Path) -> None:
        (tmp_path / "data.npz").write_bytes(b"PK nothing")
        with pytest.raises(DataError, match="damaged"):
            get(Tiny(), str(tmp_path / "data.npz"), tmp_path)


class TestSplits:
    def test_no_sample_is_in_two(self, tmp_path: Path) -> None:
        workload = get(Vector(), vectors(200), tmp_path)
        assert sizes(workload) == {"calibration": 20, "search": 80, "test": 100}
        rows = [r.tobytes() for s in workload.splits.values() for r in s.inputs["features"]]
        assert len(set(rows)) == 200

    def test_seed_decides(self, tmp_path: Path) -> None:
        runs = [
            acquire(
                Request(model=Vector(), data=vectors()), folder=tmp_path / name, seed=seed
            ).record.splits
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        ]
        assert runs[0] == runs[1]
        assert runs[0][2].sha256 != runs[2][2].sha256

    def test_test_data(self, tmp_path: Path) -> None:
        workload = get(Vector(), vectors(100), tmp_path, test_data=vectors(30, 7))
        assert sizes(workload) == {"calibration": 15, "search": 85, "test": 30}
        assert np.array_equal(workload.splits["test"].inputs["features"], vectors(30, 7)[0])
        data = vectors()
        with pytest.raises(DataError, match="must be others"):
            get(Vector(), data, tmp_path, test_data=data)

    def test_the_first_samples_of_search_stand_for_all(self, tmp_path: Path) -> None:
        rows, _ = vectors(300)
        path = tmp_path / "sorted.npz"
        classes = np.repeat([0, 1, 2], 100)
        np.savez(path, x_val=rows, y_val=classes, x_test=-rows, y_test=classes)
        workload = get(Vector(), str(path), tmp_path)
        assert len(set(np.asarray(workload.splits["search"].labels[:30]).tolist())) == 3
        assert np.asarray(workload.splits["test"].labels).tolist() == classes.tolist()

    def test_duplicates_are_counted(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="85 of 100 test samples are search samples too"):
            get(Vector(), vectors(100), tmp_path, test_data=vectors(100))
        x, y = vectors(100)
        workload = get(Vector(), (np.concatenate([x, x]), np.concatenate([y, y])), tmp_path)
        assert any("exact duplicates" in note for note in workload.record.notes)

    @pytest.mark.parametrize("data", [vectors(200), iter(zip(*vectors(200), strict=True))])
    def test_cap(self, data: Any, tmp_path: Path) -> None:
        workload = get(Vector(), data, tmp_path, max_samples=50)
        assert 45 <= sum(sizes(workload).values()) <= 50
        assert any("thinned" in note for note in workload.record.notes)

    def test_batches(self, tmp_path: Path) -> None:
        split = get(Vector(), vectors(100), tmp_path).splits["test"]
        seen = [(len(raw["features"]), y) for raw, y in split.batches(20, limit=45)]
        assert [n for n, _ in seen] == [20, 20, 5]
        assert split.labels is not None
        found = np.concatenate([y for _, y in seen if y is not None])
        assert np.array_equal(found, split.labels[:45])

    def test_resume_and_reopen(self, model_file: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "d.npz", x=X, y=Y)
        reference, folder = f"{model_file}:model", tmp_path / "splits"
        first = get(reference, str(tmp_path / "d.npz"), tmp_path)
        stamp = (folder / "test" / "x.npy").stat().st_mtime_ns
        again = get(reference, str(tmp_path / "d.npz"), tmp_path)
        assert again.record == first.record
        assert (folder / "test" / "x.npy").stat().st_mtime_ns == stamp
        opened = reopen(folder)
        assert opened.record == first.record
        assert torch.equal(
            compute_logits(opened.model, opened.example(4)),
            compute_logits(first.model, first.example(4)),
        )
        (folder / "test" / "labels.npy").unlink()
        with pytest.raises(DataError, match="acquire it again"):
            reopen(folder)
        assert get(reference, str(tmp_path / "d.npz"), tmp_path).record.same_as(first.record)
        np.savez(tmp_path / "d.npz", x=X + 1, y=Y)
        changed = get(reference, str(tmp_path / "d.npz"), tmp_path)
        assert changed.record.splits != first.record.splits
        assert not list(folder.glob(".staging*"))

    def test_reopen_of_a_live_model_needs_it(self, tmp_path: Path) -> None:
        get(Vector(), vectors(), tmp_path)
        with pytest.raises(ModelError, match="live object"):
            reopen(tmp_path / "splits")
        assert reopen(tmp_path / "splits", Vector()).record.task.num_classes == 3
        with pytest.raises(DataError, match="holds no workload"):
            reopen(tmp_path)

    def test_no_permission(self, tmp_path: Path) -> None:
        (tmp_path / "splits").write_text("a file")
        with pytest.raises(StorageError, match="another folder"):
            get(Vector(), vectors(), tmp_path)


class TestInputs:
    @pytest.mark.parametrize(
        ("shape", "layout"),
        [((28, 28), "hw"), ((32, 32, 3), "hwc"), ((3, 32, 32), "chw"), ((13, 64, 64), "chw")],
    )
    def test_infer_layout(self, shape: tuple[int, ...], layout: str) -> None:
        assert infer_layout(shape) == layout

    def test_without_data(self, tmp_path: Path) -> None:
        workload = get(Tiny(), None, tmp_path)
        assert workload.record.inputs[0].found_by == "probing"
        assert sizes(workload) == {"calibration": 8}
        assert any("costs only" in note for note in workload.record.notes)
        assert compute_logits(workload.model, workload.example(2)).shape == (2, 3)

    def test_configuration_first(self, tmp_path: Path) -> None:
        model = Tiny()
        model.default_cfg = {"input_size": (3, 40, 40)}  # type: ignore[assignment]
        spec = get(model, None, tmp_path).record.inputs[0]
        assert (spec.shape, spec.found_by) == ((3, 40, 40), "configuration")

    def test_fixed_size_vector_and_tokens(self, tmp_path: Path) -> None:
        flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3))
        assert get(flat, None, tmp_path).record.inputs[0].shape == (1, 28, 28)
        assert get(Vector(), None, tmp_path).record.inputs[0].shape == (5,)
        tokens = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(32 * 4, 3))
        spec = get(tokens, None, tmp_path).record.inputs[0]
        assert (spec.shape, spec.dtype) == ((32,), "int64")

    @pytest.mark.parametrize("data", [None, vectors()])
    def test_forward_that_fails_is_quoted(self, data: Any, tmp_path: Path) -> None:
        class Broken(Vector):
            def forward(self, features: Tensor) -> Tensor:
                raise RuntimeError("mat1 and mat2")

        with pytest.raises(ModelError, match="RuntimeError: mat1 and mat2"):
            get(Broken(), data, tmp_path)

    def test_output_that_is_no_logits(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="at least two classes"):
            get(nn.Linear(5, 1), vectors(), tmp_path)
        with pytest.raises(ModelError, match="without logits"):
            compute_logits(_Wrapped({"boxes": 1}), {"x": torch.zeros(1, 5)})

    def test_logits_are_found(self) -> None:
        logits = torch.zeros(1, 3)
        for output in (logits, (logits, 1), [logits], {"logits": logits}):
            assert compute_logits(_Wrapped(output), {"x": torch.zeros(1, 5)}) is logits


class _Wrapped(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


class TestPreprocess:
    @pytest.mark.parametrize("layout", ["hw", "hwc", "chw"])
    def test_arithmetic(self, layout: Any) -> None:
        shape = {"hw": (4, 5), "hwc": (4, 5, 3), "chw": (3, 4, 5)}[layout]
        channels = 1 if layout == "hw" else 3
        mean, std = (0.1, 0.2, 0.3)[:channels], (0.5, 0.6, 0.7)[:channels]
        raw = images(2, *shape)
        chosen = Preprocessing(layout=layout, scale=1 / 255, mean=mean, std=std)
        spec = InputSpec(name="x", shape=(channels, 4, 5), dtype="float32")
        found = preprocess({"x": raw}, [spec], chosen)["x"]
        chw = np.moveaxis(raw, -1, 1) if layout == "hwc" else raw.reshape(2, channels, 4, 5)
        for c in range(channels):
            scaled = chw[:, c].astype(np.float32) * np.float32(1 / 255)
            expected = (scaled - np.float32(mean[c])) / np.float32(std[c])
            assert np.array_equal(found[:, c], expected)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.flags.writeable

    def test_only_the_first_input(self) -> None:
        specs = [
            InputSpec(name="a", shape=(1, 2, 2), dtype="float32"),
            InputSpec(name="b", shape=(2, 2), dtype="int64"),
        ]
        raw = {"b": images(1, 2, 2), "a": images(1, 2, 2)}
        found = preprocess(raw, specs, Preprocessing(layout="hw", scale=0.5))
        assert list(found) == ["a", "b"]
        assert found["b"].dtype == np.int64
        assert np.array_equal(found["b"], raw["b"])


class TestDemo:
    @pytest.mark.parametrize("name", ["demo:vit", "demo:resnet"])
    def test_brings_its_data(self, name: str, tmp_path: Path) -> None:
        workload = get(name, None, tmp_path)
        assert workload.record.source.data == "demo"
        assert workload.record.inputs[0].shape == (1, 28, 28)
        assert sizes(workload) == {"calibration": 1000, "search": 4000, "test": 10000}
        assert workload.record.task.class_names[9] == "Ankle boot"
        split = workload.splits["search"]
        raw, truth = next(split.batches(256))
        with torch.no_grad():
            found = compute_logits(workload.model, workload.tensors(raw)).argmax(1)
        assert truth is not None
        assert (found.numpy() == truth).mean() > 0.85

    def test_package_data_are_small(self) -> None:
        assert sum(path.stat().st_size for path in DEMO_FOLDER.iterdir()) <= 16_000_000
        assert DEMO_DATA.exists()


def test_workload_json_is_a_plain_record(tmp_path: Path) -> None:
    get(Vector(), vectors(), tmp_path)
    content = json.loads((tmp_path / "splits" / "workload.json").read_text())
    assert content["schema_version"] == 1
    assert content["task"]["num_classes"] == 3


def test_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse, raising=False)
    with pytest.raises(StorageError, match="No space left"):
        get(Vector(), vectors(), tmp_path)
