"""Anyone's model and data through acquisition; tasks other than classes through the whole loop."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_files import photo, write_images
from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.data import Sample
from profiling_agent.acquisition.formats.objects import open_object
from profiling_agent.acquisition.reading import Reader, settle_length
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.workload import Workload
from profiling_agent.api import load, optimize, profile
from profiling_agent.errors import BudgetError, DataError, ModelError
from profiling_agent.records.workload import Overrides

SIDE = 20


class Net(nn.Module):
    """Any image of three channels to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def get(folder: Path, **named: Any) -> Workload:
    own = {key: named.pop(key) for key in ("max_unreadable",) if key in named}
    return acquire(Request(model=named.pop("model", Net()), **named), folder=folder, **own)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 30 photos of one size in three classes."""
    names = [f"{name}/{number:02d}.png" for name in ("ape", "bee", "cat") for number in range(10)]
    write_images(tmp_path / "photos", names, SIDE)
    return tmp_path / "photos"


class TestImages:
    def test_a_folder_goes_to_bytes_with_the_class_of_its_folder(
        self, photos: Path, tmp_path: Path
    ) -> None:
        workload = get(tmp_path / "splits", data=photos)
        record = workload.record
        assert sum(split.num_samples for split in record.splits) == 30
        assert record.task.class_names == ("ape", "bee", "cat")
        image = record.preprocessing.image
        assert image is not None and image.source == "as they are" and image.resize is None
        assert workload.splits["test"].inputs["x"].dtype == np.uint8
        assert record.reading is not None and record.reading.samples_per_s > 0
        for split in workload.splits.values():
            assert split.labels is not None
            for pixels, label in zip(split.inputs["x"], split.labels, strict=True):
                known = [np.asarray(photo(SIDE, SIDE, 10 * int(label) + i)) for i in range(10)]
                assert any(np.array_equal(pixels, each) for each in known)

    def test_sizes_that_differ_are_brought_to_the_model_s(
        self, photos: Path, tmp_path: Path
    ) -> None:
        photo(12, 31).save(photos / "ape" / "00.png")
        record = get(tmp_path / "splits", data=photos).record
        image = record.preprocessing.image
        assert image is not None and image.crop == record.inputs[0].shape[1:]
        assert any("found by probing" in note for note in record.notes)

    def test_the_user_s_wish_goes_before_what_is_found(self, photos: Path, tmp_path: Path) -> None:
        wish = Overrides(resize=16, crop=(10, 12), mean=(0.5,), std=(0.25,), mode="BGR")
        workload = get(tmp_path / "splits", data=photos, overrides=wish)
        made = workload.record.preprocessing
        assert workload.record.inputs[0].shape == (3, 10, 12)
        assert made.image is not None and (made.mean, made.std) == ((0.5,), (0.25,))
        assert "user" in made.source and "user" in made.image.source

    def test_arrays_of_another_size_are_resized_too(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)
        wish = Overrides(resize=(14, 14))
        workload = get(tmp_path / "a", data=(x, np.arange(40) % 3), overrides=wish)
        assert workload.record.inputs[0].shape == (3, 14, 14)

    def test_arrays_of_the_right_size_can_have_their_channels_reversed(
        self, tmp_path: Path
    ) -> None:
        x = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)
        data = (x, np.arange(40) % 3)
        plain = get(tmp_path / "a", data=data)
        assert plain.record.preprocessing.image is None  # nothing was done to them
        turned = get(tmp_path / "b", data=data, overrides=Overrides(mode="BGR"))
        assert turned.record.preprocessing.image is not None
        one, other = (each.splits["test"].inputs["x"] for each in (plain, turned))
        assert np.array_equal(one, other[..., ::-1])

    def test_a_loader_s_channels_are_reversed_once(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.uint8)
        data = [(image, i % 3) for i, image in enumerate(x)]
        workload = get(tmp_path / "a", data=iter(data), overrides=Overrides(mode="BGR"))
        known = {image[..., ::-1].tobytes() for image in x}
        for split in workload.splits.values():
            assert all(np.ascontiguousarray(each).tobytes() in known for each in split.inputs["x"])

    def test_flags_that_can_do_nothing_are_refused(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).standard_normal((40, 3, 9, 9), dtype=np.float32)
        with pytest.raises(DataError, match="--resize can't be applied"):
            get(tmp_path / "a", data=(x, np.arange(40) % 3), overrides=Overrides(resize=8))

    def test_a_mode_does_not_switch_off_the_search_for_the_size(
        self, photos: Path, tmp_path: Path
    ) -> None:
        photo(12, 31).save(photos / "ape" / "00.png")
        workload = get(tmp_path / "a", data=photos, overrides=Overrides(mode="BGR"))
        image = workload.record.preprocessing.image
        assert image is not None and image.mode == "BGR" and image.crop is not None

    def test_test_data_that_are_search_data_are_refused(self, photos: Path, tmp_path: Path) -> None:
        shutil.copytree(photos, tmp_path / "copy")
        with pytest.raises(DataError, match="search samples too"):
            get(tmp_path / "a", data=photos, test_data=tmp_path / "copy")

    def test_a_few_damaged_files_are_left_out_and_many_are_refused(
        self, photos: Path, tmp_path: Path
    ) -> None:
        (photos / "bee" / "03.png").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"1 of \d+ \w+ samples can't be read .*03\.png"):
            get(tmp_path / "strict", data=photos)
        workload = get(tmp_path / "lenient", data=photos, max_unreadable=0.5)
        assert sum(split.num_samples for split in workload.record.splits) == 29
        assert workload.record.reading is not None
        assert workload.record.reading.num_unreadable == 1
        assert any("03.png" in note for note in workload.record.notes)

    def test_answers_can_be_those_present(self, photos: Path, tmp_path: Path) -> None:
        lines = tmp_path / "classes.txt"
        lines.write_text("cat\ndog\nbee\nape\n")
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 4))
        named = {"model": model, "data": photos, "classes": str(lines)}
        task = get(tmp_path / "splits", answers="present", **named).record.task
        assert task.answers == (0, 2, 3)
        with pytest.raises(DataError, match="--answers"):
            get(tmp_path / "other", answers="present", metric="agreement", **named)


class Words:
    """A tokenizer of letters."""

    limit, max_length = 64, 16

    def count(self, text: str | tuple[str, str]) -> int:
        return sum(len(each) + 1 for each in ([text] if isinstance(text, str) else text))

    def encode(self, text: str | tuple[str, str], length: int) -> dict[str, np.ndarray]:
        joined = text if isinstance(text, str) else "|".join(text)
        ids = [ord(letter) for letter in joined[:length]]
        return {"ids": np.array(ids + [0] * (length - len(ids)), dtype=np.int64)}


class TestTexts:
    def test_one_text_a_pair_and_what_stands_beside(self) -> None:
        reader = Reader(tokenizer=Words(), length=8)

        def ids(inputs: dict[str, Any]) -> str:
            array = reader.read(Sample(inputs=inputs, label=0)).inputs["ids"]
            return "".join(map(chr, array)).rstrip("\0")

        assert ids({"": "good"}) == "good"
        assert ids({"": ("a", "b")}) == "a|b"
        assert ids({"premise": "a", "hypothesis": "b", "idx": 3}) == "a|b"
        assert any("'idx'" in note for note in reader.notes)
        with pytest.raises(DataError, match="3 texts"):
            ids({"a": "x", "b": "y", "c": "z"})

    def test_the_length_is_the_longest_text_s_and_can_be_limited(self) -> None:
        source = open_object([("a" * n, 0) for n in (3, 9, 12)], None).parts["all"]
        assert settle_length(Words(), [source], None)[0] == 16
        length, words = settle_length(Words(), [source], 8)
        assert length == 8 and "66.7%" in words
        stream = open_object((("a", 0) for _ in range(3)), None).parts["all"]
        assert settle_length(Words(), [stream], None)[0] == 16


class TestOtherMetrics:
    def test_has_no_default_for_what_may_be_lost(self, tmp_path: Path) -> None:
        with pytest.raises(BudgetError, match="needs --max-drop"):
            optimize(Net(), tmp_path, metric=lambda o, t: 0.0, out=tmp_path / "run")

    def test_named_inputs_of_an_npz_need_no_labels(self, tmp_path: Path) -> None:
        class Two(nn.Module):
            def forward(self, left: Tensor, right: Tensor) -> Tensor:
                return left + right

        arrays = np.random.default_rng(0).standard_normal((2, 60, 3), dtype=np.float32)
        np.savez(tmp_path / "d.npz", left=arrays[0], right=arrays[1])
        workload = get(
            tmp_path / "a", model=Two(), data=str(tmp_path / "d.npz"), metric="agreement"
        )
        assert [spec.name for spec in workload.record.inputs] == ["left", "right"]

    def test_agreement_needs_no_labels(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).standard_normal((60, 3, 9, 9), dtype=np.float32)
        with pytest.raises(DataError, match="--metric agreement"):
            get(tmp_path / "a", data=[(each,) for each in x])
        record = get(tmp_path / "b", data=[(each,) for each in x], metric="agreement").record
        assert {split.name for split in record.splits} == {"calibration", "search", "test"}
        assert not any(split.labelled for split in record.splits)
        assert (record.task.metric, record.task.num_classes) == ("agreement", 3)

    def test_targets_of_any_shape_reach_a_metric_of_one_s_own(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).standard_normal((60, 3, 9, 9), dtype=np.float32)
        boxes = np.random.default_rng(1).uniform(size=(60, 4)).astype(np.float32)
        data = [(image, box) for image, box in zip(x, boxes, strict=True)]
        workload = get(tmp_path / "a", data=data, metric=lambda o, t: np.zeros(len(o)))
        labels = workload.splits["test"].labels
        assert labels is not None and labels.shape[1:] == (4,) and labels.dtype == np.float32
        assert workload.record.task.num_classes is None
        ragged = [(image, box[: 1 + i % 2]) for i, (image, box) in enumerate(data)]
        with pytest.raises(DataError, match="pad them to one"):
            get(tmp_path / "b", data=ragged, metric=lambda o, t: np.zeros(len(o)))

    def test_a_regression_of_one_axis_can_be_profiled(self, tmp_path: Path) -> None:
        class Regressor(Net):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)[:, 0]

        x = np.random.default_rng(0).standard_normal((60, 3, 9, 9), dtype=np.float32)
        data = [(each, float(each.mean())) for each in x]
        known = profile(Regressor(), data, metric=lambda o, t: np.abs(o - t), seconds=8.0)
        assert known.groups and all(group.sensitivity for group in known.groups)

    def test_integers_of_several_kinds_find_their_types(self, tmp_path: Path) -> None:
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding, self.head = nn.Embedding(9, 3), nn.Linear(2, 3)

            def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
                return self.embedding(ids).mean(1) + self.head(numbers)

        rng = np.random.default_rng(0)
        data = [
            ({"ids": rng.integers(0, 9, 5), "numbers": rng.integers(0, 9, 2)}, i % 3)
            for i in range(60)
        ]
        inputs = get(tmp_path / "a", model=Mixed(), data=data).record.inputs
        assert [spec.dtype for spec in inputs] == ["int64", "float32"]

    def test_several_outputs_are_refused_in_one_sentence(self, tmp_path: Path) -> None:
        class Pair(Net):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x), x.mean()

        x = np.random.default_rng(0).standard_normal((60, 3, 9, 9), dtype=np.float32)
        data = [(each, 0.0) for each in x]
        with pytest.raises(ModelError, match="joins its outputs into one"):
            get(tmp_path / "a", model=Pair(), data=data, metric=lambda o, t: 0.0)

    def test_an_unknown_metric_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BudgetError, match="no metric 'map'"):
            get(tmp_path / "a", data=tmp_path, metric="map")

    def test_numbers_from_one_are_told(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).standard_normal((60, 3, 9, 9), dtype=np.float32)
        with pytest.raises(DataError, match="numbered from 1"):
            get(tmp_path / "a", data=(x, 1 + np.arange(60) % 3))


# ---- the whole loop ---------------------------------------------------------------------------


class Detector(nn.Module):
    """Grey images with one bright box to its corners (batch, 4), as shares of the side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 24, 5, 2, 2), nn.Conv2d(24, 48, 3, 2, 1)
        self.fc1, self.fc2 = nn.Linear(48 * 36, 512), nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1)))).sigmoid()


def boxes(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (num, 1, 24, 24) float32 and corners (num, 4)."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 12, (num, 2))
    ends = start + rng.integers(5, 12, (num, 2))
    images = 0.1 * rng.standard_normal((num, 1, 24, 24))
    for image, (top, left), (bottom, right) in zip(images, start, ends, strict=True):
        image[0, top:bottom, left:right] += 1.0
    return images.astype(np.float32), (np.hstack([start, ends]) / 24).astype(np.float32)


def overlap(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Intersection over union of each box, (samples,)."""
    low = np.maximum(outputs[:, :2], targets[:, :2])
    high = np.minimum(outputs[:, 2:], targets[:, 2:])
    both = np.clip(high - low, 0, None).prod(1)
    areas = [np.clip(each[:, 2:] - each[:, :2], 0, None).prod(1) for each in (outputs, targets)]
    return both / np.maximum(areas[0] + areas[1] - both, 1e-9)


def share_found(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float((overlap(outputs, targets) > 0.9).mean())


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    net = Detector()
    x, y = (torch.from_numpy(each) for each in boxes(6000, 1))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(400):
        rows = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        loss = F.l1_loss(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("metric", [overlap, share_found])
def test_a_detector_is_optimized_by_a_metric_of_one_s_own(
    detector: Detector, metric: Any, tmp_path: Path
) -> None:
    x, y = boxes(3000, 2)
    result = optimize(
        detector,
        list(zip(x, y, strict=True)),
        max_drop=0.02,
        metric=metric,
        out=tmp_path / "run",
        time_budget=90.0,
        max_trials=3,
        show_progress=False,
    )
    assert result.verdict is not None and result.verdict.trial_id is not None
    assert result.verdict.drop is not None and result.verdict.drop.estimate <= 0.02
    final = next(e for e in result.final if e.artefact == result.verdict.trial_id)
    accuracy = final.on("test")
    assert accuracy is not None and 0.5 < accuracy.value < 1.0
    served = load(tmp_path / "run" / "artefact", result.settings.deployment.threads)
    inputs = np.load(tmp_path / "run" / "data" / "test" / "x.npy")
    targets = np.load(tmp_path / "run" / "data" / "test" / "labels.npy")
    outputs = np.concatenate([served.logits(each[None]) for each in inputs])
    assert float(np.mean(metric(outputs, targets), dtype=np.float64)) == accuracy.value
    assert np.array_equal(served.predict(inputs[:1])[0], outputs[0])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_original_no_better_than_shuffled_targets_is_refused(
    detector: Detector, tmp_path: Path
) -> None:
    x, y = boxes(800, 2)
    data = list(zip(x, y[::-1], strict=True))
    with pytest.raises(DataError, match="shuffled"):
        optimize(detector, data, 0.02, metric=overlap, out=tmp_path / "r", show_progress=False)
