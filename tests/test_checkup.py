"""``check``: each mistake people make with a model is found, and what is right raises no alarm."""

from __future__ import annotations

import functools
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.acquisition.request import Request
from profiling_agent.checkup import check
from profiling_agent.errors import DataError, StorageError
from profiling_agent.evaluation import suspicions
from profiling_agent.evaluation.alternatives import alternatives
from profiling_agent.machine.torch_state import threads
from profiling_agent.records.check import CheckedSample, CheckRecord, Finding
from profiling_agent.records.common import Deployment, NotMeasured
from profiling_agent.records.workload import Overrides, Preprocessing
from profiling_agent.report.check_view import draw_samples, render_check

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATED = Overrides(mean=MEAN, std=STD)
NAMES = ("dark red", "light red", "dark green", "light green", "dark blue", "light blue")
ONE = Deployment(batch_size=1, threads=1)


class Colours(nn.Module):
    """Six classes by colour and brightness; right on nearly all images of ``make_images``."""

    def __init__(self, drop: float = 0.0, is_random: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(16, 6)
        self.is_random = is_random

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.conv(x)).mean(dim=(2, 3)))
        return self.head(F.dropout(x, 0.3) if self.is_random else x)


def make_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (n, 8, 8, 3) and classes (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, count)
    colour = np.full((count, 3), 60.0)
    colour[np.arange(count), labels // 2] = 170.0
    colour *= np.where(labels % 2, 1.3, 0.75)[:, None] * rng.uniform(0.9, 1.1, (count, 1))
    noise = rng.normal(0, 25, (count, 8, 8, 3))
    return np.clip(colour[:, None, None] + noise, 0, 255).astype(np.uint8), labels


@functools.cache
def trained() -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = Colours()
    images, labels = make_images(400, seed=1)
    x = (torch.from_numpy(images).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    x, y = x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(net.parameters(), 3e-2)
    with threads(1):  # two that wait for each other are slower on a busy machine
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.state_dict()


def colours(**options: Any) -> Colours:
    net = Colours(**options)
    net.load_state_dict(trained())
    return net.eval()


def look(
    images: np.ndarray, labels: np.ndarray, model: nn.Module | None = None, **request: Any
) -> CheckRecord:
    request = {"overrides": STATED} | request
    given = Request(model=model or colours(), data=(images, labels), **request)
    return check(given, deployment=ONE, seconds=20.0)


def kinds(record: CheckRecord) -> set[str]:
    return {finding.kind for finding in record.findings}


def found(record: CheckRecord, kind: str) -> Finding:
    return next(finding for finding in record.findings if finding.kind == kind)


class TestWholeWorkloads:
    def test_nothing_is_wrong_with_what_is_right(self, tmp_path: Path) -> None:
        given = Request(model=colours(), data=make_images(900), overrides=STATED)
        record = check(given, deployment=ONE, out=tmp_path / "seen", seconds=20.0)
        assert not record.has_problems and kinds(record) <= {"few samples", "slow data"}
        assert record.value is not None and record.value.estimate > 90
        assert record.chance is not None and record.chance < 30
        assert len(record.samples) == 16 and record.split == "search"
        assert record.latency is not None and record.latency.median_ms > 0
        assert CheckRecord.read(tmp_path / "seen" / "check.json") == record
        with Image.open(tmp_path / "seen" / str(record.picture)) as sheet:
            assert sheet.width > 600 and sheet.height > 600
        assert sum(record.defaults.splits.values()) == 900

    @pytest.mark.parametrize(
        "wrong", [{"mean": (0.2,), "std": (0.3,)}, {"mean": None, "std": None}, {"scale": 1.0}]
    )
    def test_wrong_mean_and_std(self, wrong: dict[str, Any]) -> None:
        record = look(*make_images(900), overrides=STATED.model_copy(update=wrong))
        finding = found(record, "preprocessing")
        assert finding.level == "problem"
        assert "--mean" in finding.next_step and "--std" in finding.next_step
        assert {"as stated", "ImageNet's mean and std"} <= {trial.name for trial in record.trials}

    def test_the_flags_it_names_are_the_cure(self) -> None:
        wrong = look(*make_images(900), overrides=Overrides())
        words = found(wrong, "preprocessing").next_step.rstrip(".").split()
        flags = dict(zip(words[1::2], words[2::2], strict=True))
        cure = Overrides(
            scale=float(flags["--scale"]),
            mean=tuple(float(each) for each in flags["--mean"].split(",")),
            std=tuple(float(each) for each in flags["--std"].split(",")),
        )
        assert not look(*make_images(900), overrides=cure).has_problems

    def test_bgr_for_rgb(self) -> None:
        images, labels = make_images(900)
        finding = found(look(images[..., ::-1].copy(), labels), "preprocessing")
        assert "BGR" in finding.text and "--mode BGR" in finding.next_step

    @pytest.mark.parametrize(("by", "words"), [(1, "one too high"), (-1, "one too low")])
    def test_labels_shifted_by_one(self, by: int, words: str) -> None:
        images, labels = make_images(900)
        record = look(images, (labels + by) % 6)
        assert words in found(record, "shifted labels").text
        assert not kinds(record) & {"class order", "preprocessing"}

    def test_labels_from_one_on_are_refused_with_their_range(self) -> None:
        images, labels = make_images(900)
        with pytest.raises(DataError, match="from 1 to 6"):
            look(images, labels + 1)

    def test_another_order_of_classes(self) -> None:
        images, labels = make_images(900)
        order = np.array([3, 5, 0, 1, 4, 2])
        record = look(images, order[labels])
        finding = found(record, "class order")
        assert "--classes" in finding.next_step and "3 is its 0" in finding.text
        assert not kinds(record) & {"shifted labels", "preprocessing"}

    def test_two_classes_that_are_swapped(self) -> None:
        images, labels = make_images(900)
        record = look(images, np.array([0, 1, 5, 3, 4, 2])[labels])
        assert "class order" in kinds(record) and "chance" not in kinds(record)

    def test_a_model_in_training_mode(self) -> None:
        finding = found(look(*make_images(900), colours(drop=0.5).train()), "training mode")
        assert finding.level == "hint" and ".eval()" in finding.next_step
        # Without a layer that cares it makes no difference, and every new module is in that mode.
        assert "training mode" not in kinds(look(*make_images(900), colours().train()))

    def test_a_model_that_is_random_in_eval_mode(self) -> None:
        record = look(*make_images(900), colours(is_random=True))
        assert found(record, "random answers").level == "problem"
        assert "mixed samples" not in kinds(record)

    def test_a_model_that_mixes_the_samples_of_a_batch(self) -> None:
        class Mixing(Colours):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x - x.mean(dim=(0, 2, 3), keepdim=True))

        net = Mixing()
        net.load_state_dict(trained())
        assert found(look(*make_images(900), net.eval()), "mixed samples").level == "problem"

    def test_a_model_that_was_never_trained(self) -> None:
        torch.manual_seed(0)
        record = look(*make_images(900), Colours().eval())
        assert found(record, "chance").level == "problem"
        assert "--weights" in found(record, "chance").next_step

    def test_floats_for_a_model_that_states_a_normalisation(self) -> None:
        images, labels = make_images(600)
        floats = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
        given = look(floats, labels)
        assert "0 to 255" in found(given, "floats").next_step
        assert any(each.what == "preprocessing" for each in given.not_judged)
        ready = (floats - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        assert "floats" not in kinds(look(ready.astype(np.float32), labels))

    def test_without_time_it_says_what_it_did_not_judge(self) -> None:
        given = Request(model=colours(), data=make_images(900), overrides=Overrides())
        record = check(given, deployment=ONE, seconds=0.0)
        assert len(record.samples) == 16 and record.trials == ()
        reasons = {each.what: each.reason for each in record.not_judged}
        assert "too" in reasons["preprocessing"] or "samples" in reasons["preprocessing"]

    def test_the_whole_of_the_data_counts_for_the_proof(self) -> None:
        record = look(*make_images(3000))
        assert sum(split.num_samples for split in record.workload.splits) <= 1000
        assert record.num_test == pytest.approx(1500, abs=10)
        assert record.num_test == record.defaults.splits["test"]

    def test_few_test_samples(self) -> None:
        assert found(look(*make_images(60)), "few samples").level == "problem"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    images, labels = make_images(240)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / NAMES[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"{index:03}.png")
    return folder


class TestFiles:
    def classes(self, tmp_path: Path) -> str:
        path = tmp_path / "classes.txt"
        path.write_text("\n".join(NAMES))
        return str(path)

    def test_a_folder_and_its_names(self, folder: Path, tmp_path: Path) -> None:
        given = Request(
            model=colours(), data=str(folder), classes=self.classes(tmp_path), overrides=STATED
        )
        record = check(given, deployment=ONE, out=tmp_path / "out", seconds=20.0)
        assert {sample.true for sample in record.samples} <= set(NAMES)
        assert {finding.kind for finding in record.problems} == {"few samples"}
        assert record.picture is not None

    def test_half_of_the_images_are_corrupt(self, folder: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(folder, tmp_path / "broken")
        for path in sorted(broken.glob("*/*.png"))[::2]:
            path.write_bytes(path.read_bytes()[:60])
        given = Request(
            model=colours(), data=str(broken), classes=self.classes(tmp_path), overrides=STATED
        )
        record = check(given, deployment=ONE, seconds=20.0)
        finding = found(record, "unreadable")
        assert finding.level == "problem" and "120 of 240" in finding.text


class TestOtherTasks:
    def test_agreement_needs_no_labels(self) -> None:
        given = Request(
            model=colours(), data=make_images(600)[0], metric="agreement", overrides=STATED
        )
        record = check(given, deployment=ONE, seconds=20.0)
        assert record.value is None and not record.has_problems
        assert {"metric", "labels", "preprocessing"} <= {each.what for each in record.not_judged}
        assert all(each.true is None and each.predicted is not None for each in record.samples)

    def test_a_metric_of_ones_own(self) -> None:
        def error(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
            return np.abs(outputs[:, 0] - targets)

        rng = np.random.default_rng(0)
        x = rng.normal(size=(400, 8)).astype(np.float32)
        data = [(each, np.float32(each.sum())) for each in x]
        net = nn.Linear(8, 1)
        given = Request(model=net.eval(), data=data, metric=error, higher_is_better=False)
        record = check(given, deployment=ONE, seconds=20.0)
        assert record.value is not None and record.value.estimate > 0
        assert record.provable_drop is None
        assert any("metric" in each.reason for each in record.not_judged)

    def test_vectors_have_no_picture_and_no_channels(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(600, 4)).astype(np.float32)
        net = nn.Linear(4, 4)
        with torch.no_grad():
            net.weight.copy_(torch.eye(4))
            net.bias.zero_()
        given = Request(model=net.eval(), data=(x, x.argmax(axis=1)))
        record = check(given, deployment=ONE, out=tmp_path, seconds=20.0)
        assert record.picture is None and not record.has_problems
        assert [each.what for each in record.not_judged] == ["preprocessing"]

    def test_without_data_there_is_nothing_to_look_at(self) -> None:
        with pytest.raises(DataError, match="--data"):
            check(Request(model=colours()), deployment=ONE)

    def test_out_must_be_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        given = Request(model=colours(), data=make_images(60))
        with pytest.raises(StorageError, match="--out"):
            check(given, deployment=ONE, out=tmp_path / "file")


def outcomes(rng: np.random.Generator, share: float, count: int) -> np.ndarray:
    return rng.random(count) < share


class TestSuspicions:
    def test_two_points_of_noise_raise_no_alarm(self) -> None:
        rng = np.random.default_rng(0)
        stated = outcomes(rng, 0.85, 300)
        slightly = stated.copy()
        slightly[np.flatnonzero(~stated)[:6]] = True  # two points better, and nothing lost
        assert suspicions.find_preprocessing("x", stated, slightly, "") is None
        alarms = sum(
            suspicions.find_preprocessing(
                "x", outcomes(rng, 0.85, 300), outcomes(rng, 0.85, 300), ""
            )
            is not None
            for _ in range(300)
        )
        assert alarms <= 3
        much = stated | outcomes(rng, 0.6, 300)
        assert suspicions.find_preprocessing("x", stated, much, "") is not None

    def test_labels_that_are_right_are_never_reordered(self) -> None:
        rng = np.random.default_rng(0)
        for share in (0.95, 0.6, 0.3, 0.1):
            labels = rng.integers(0, 10, 300)
            answers = np.where(rng.random(300) < share, labels, rng.integers(0, 10, 300))
            assert suspicions.find_order(answers, labels, 10) is None
            assert suspicions.find_shift(answers, labels, 10) is None

    def test_folders_numbered_among_a_thousand_classes(self) -> None:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 10, 200)
        meant = np.array([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])[labels]
        answers = np.where(rng.random(200) < 0.85, meant, rng.integers(0, 1000, 200))
        remedy = suspicions.find_order(answers, labels, 1000)
        assert isinstance(remedy, suspicions.Remedy) and remedy.value > 70
        assert "is its 574" in remedy.finding.text and "0 is its" not in remedy.finding.text

    def test_an_order_can_not_be_judged_by_a_few_samples(self) -> None:
        labels = np.arange(100)
        assert isinstance(suspicions.find_order(labels, labels, 100), NotMeasured)

    def test_a_constant_answer(self) -> None:
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 5, 200)
        finding = suspicions.find_constant(np.full(200, 3), labels, tuple("abcde"))
        assert finding is not None and "'d'" in finding.text
        assert suspicions.find_constant(labels, labels) is None
        rare = np.where(rng.random(200) < 0.95, 0, 1)  # the labels are as lopsided
        assert suspicions.find_constant(np.zeros(200, dtype=int), rare) is None
        assert suspicions.find_constant(np.zeros(50, dtype=int), None) is not None
        assert suspicions.find_constant(rng.integers(0, 5, 50), None) is None

    def test_some_of_the_classes(self) -> None:
        rng = np.random.default_rng(0)
        finding = suspicions.find_subset(rng.integers(0, 10, 300), 1000, 1000)
        assert finding is not None and "--answers present" in finding.next_step
        assert suspicions.find_subset(rng.integers(0, 10, 300), 1000, 10) is None
        # 300 samples can't show a thousand classes, even if all are there.
        assert suspicions.find_subset(rng.integers(0, 1000, 300), 1000, 1000) is None

    def test_unreadable_samples(self) -> None:
        assert suspicions.find_unreadable(0, 100) is None
        few, many = suspicions.find_unreadable(1, 999), suspicions.find_unreadable(20, 980)
        assert few is not None and few.level == "hint"
        assert many is not None and many.level == "problem" and "20 of 1,000" in many.text

    def test_samples_for_a_budget(self) -> None:
        refused, weak = suspicions.find_few(100, 0.5), suspicions.find_few(1_000, 0.5)
        assert refused is not None and refused.level == "problem" and "200" in refused.next_step
        assert weak is not None and weak.level == "hint"
        assert suspicions.find_few(suspicions.samples_for(0.5), 0.5) is None

    def test_data_slower_than_the_model(self) -> None:
        slow = suspicions.find_slow_data(150.0, 100.0)
        assert slow is not None and "bottleneck" in slow.text
        assert suspicions.find_slow_data(200.0, 100.0) is None

    def test_outputs_that_are_not_finite(self) -> None:
        outputs = np.zeros((10, 3))
        assert suspicions.find_not_finite(outputs) is None
        outputs[2, 1] = np.nan
        finding = suspicions.find_not_finite(outputs)
        assert finding is not None and "1 of 10" in finding.text
        assert suspicions.find_random(outputs, outputs) is None


class TestAlternatives:
    def test_what_is_stated_is_not_tried_again(self) -> None:
        images = make_images(20)[0]
        stated = Preprocessing(layout="hwc", scale=1 / 255, mean=MEAN, std=STD)
        names = [each.name for each in alternatives(stated, images)]
        assert "ImageNet's mean and std" not in names
        assert "values from 0 to 1" in names and any("BGR" in name for name in names)

    def test_grey_images_have_no_channels_to_reverse(self) -> None:
        images = make_images(20)[0][..., 0]
        found = alternatives(Preprocessing(layout="hw", scale=1 / 255), images)
        assert found and not any(each.reverses for each in found)
        assert all("ImageNet" not in each.name for each in found)

    def test_vectors_have_none(self) -> None:
        assert alternatives(Preprocessing(), np.zeros((4, 8), dtype=np.float32)) == []


class TestView:
    def test_the_page_says_what_was_found(self) -> None:
        images, labels = make_images(900)
        record = look(images, (labels + 1) % 6)
        file = io.StringIO()
        Console(file=file, width=100).print(render_check(record))
        page = " ".join(file.getvalue().split())
        for words in (
            "shifted labels",
            "next step",
            "eager fp32",
            "test samples",
            "any of the 6 classes",
        ):
            assert words in page
        assert "points" in page and "15 min" in page

    def test_borders_tell_right_from_wrong(self) -> None:
        samples = [
            CheckedSample(split="search", row=0, true="a", predicted="a", is_right=True),
            CheckedSample(split="search", row=1, true="\u732b" * 80, predicted="b", is_right=False),
            CheckedSample(split="search", row=2, predicted="c", confidence=0.5),
        ]
        images = [np.zeros((8, 8), np.uint8), np.zeros((300, 100, 3), np.uint8)]
        sheet = Image.open(io.BytesIO(draw_samples(samples, [*images, images[0]])))
        borders = [sheet.getpixel((12 + 198 * column, 12)) for column in range(3)]
        assert borders == [(46, 160, 67), (207, 34, 46), (140, 140, 140)]
