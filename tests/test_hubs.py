"""Models by name: built, fed as their libraries feed them, and refused in one sentence."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from profiling_agent.acquisition.hubs import calls, torchvision_models
from profiling_agent.acquisition.hubs.calls import import_library, is_reachable, quiet
from profiling_agent.acquisition.hubs.found import FoundModel, find_model
from profiling_agent.acquisition.hubs.image_processors import compare, synthetic_photo, translate
from profiling_agent.acquisition.images import load_image
from profiling_agent.acquisition.preprocess import preprocess
from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.errors import MissingDependency, ModelError
from profiling_agent.records.workload import ImageTransform, InputSpec, Preprocessing


def needs(library: str, extra: str) -> pytest.MarkDecorator:
    is_missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(is_missing, reason=f"needs profiling-agent[{extra}]")


needs_hf = needs("transformers", "hf")
needs_timm = needs("timm", "timm")
needs_torchvision = needs("torchvision", "torchvision")

# height, width and mode of images that go different ways through a transform
IMAGES = [
    (300, 400, "RGB"),
    (401, 257, "RGB"),
    (224, 224, "RGB"),
    (37, 500, "RGB"),
    (19, 23, "RGB"),
    (333, 250, "L"),
    (301, 222, "RGBA"),
    (240, 319, "P"),
]


def picture(height: int, width: int, mode: str) -> Image.Image:
    photo = synthetic_photo(height, width)
    if mode == "RGBA":
        photo.putalpha(photo.convert("L"))
    return photo.convert(mode)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache and nothing that answers, without asking any real server."""
    monkeypatch.setattr(calls, "is_reachable", lambda *_: False)
    monkeypatch.setattr(torchvision_models, "is_reachable", lambda *_: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def weights_sum(module: nn.Module) -> float:
    return sum(float(p.detach().double().abs().sum()) for p in module.parameters())


class TestTimm:
    pytestmark = needs_timm

    @pytest.mark.parametrize(
        "name", ["vit_tiny_patch16_224", "resnet18", "swin_s3_tiny_224", "beit_base_patch16_384"]
    )
    @pytest.mark.parametrize(("height", "width", "mode"), IMAGES)
    def test_images_are_those_of_its_own_transform(
        self, name: str, height: int, width: int, mode: str
    ) -> None:
        timm = import_library("timm", "timm")
        from profiling_agent.acquisition.hubs.timm_models import data_transform

        config = timm.data.resolve_data_config(pretrained_cfg=_timm_config(name))
        image, _, notes = data_transform(config)
        theirs = timm.data.create_transform(**config, is_training=False, normalize=False)
        photo = picture(height, width, mode)
        expected = theirs(photo.convert("RGB")).numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(load_image(photo, image), expected)
        assert not notes

    def test_squashing_and_other_crops(self) -> None:
        timm = import_library("timm", "timm")
        from profiling_agent.acquisition.hubs.timm_models import data_transform

        config = {
            **timm.data.resolve_data_config(pretrained_cfg=_timm_config("resnet18")),
            "crop_mode": "squash",
            "input_size": (3, 96, 128),
        }
        image, _, notes = data_transform(config)
        theirs = timm.data.create_transform(**config, is_training=False, normalize=False)
        photo = picture(200, 301, "RGB")
        expected = theirs(photo).numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(load_image(photo, image), expected)
        assert not notes
        assert "'border'" in data_transform({**config, "crop_mode": "border"})[2][0]

    def test_random_weights_are_the_same_each_time(self) -> None:
        before = torch.random.get_rng_state()
        first = find_model("timm:resnet18", "random")
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(77)
        second = find_model("timm:resnet18", "random")
        assert weights_sum(first.module) == weights_sum(second.module)
        assert all(p.requires_grad for p in first.module.parameters())
        assert first.class_ids[0] == "n01440764"
        assert first.class_names[0].startswith("tench")
        assert first.normalisation["mean"] == (0.485, 0.456, 0.406)
        with torch.no_grad():
            assert first.module(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)

    def test_weights_of_a_file_decide_on_the_head(self, tmp_path: Path) -> None:
        timm = import_library("timm", "timm")
        with quiet():
            trained = timm.create_model("resnet18", num_classes=7)
        file = tmp_path / "w.pth"
        torch.save({"state_dict": trained.state_dict()}, file)
        found = find_model("timm:resnet18", str(file))
        assert weights_sum(found.module) == weights_sum(trained)
        assert "7 classes" in found.notes[0]
        assert found.class_names == () and found.class_ids == ()

    def test_weights_of_another_architecture(self, tmp_path: Path) -> None:
        save_file({"conv.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
        with pytest.raises(ModelError, match="don't fit the model"):
            find_model("timm:resnet18", str(tmp_path / "w.safetensors"))
        with pytest.raises(ModelError, match="don't exist"):
            find_model("timm:resnet18", str(tmp_path / "none.pth"))

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("resnet81", "no model 'resnet81'. Did you mean 'resnet1"),
            ("resnet18.imagenet", "no weights 'imagenet' for 'resnet18'; it has 'a1_in1k'"),
            ("vit_base_patch14_dinov2", "no classifier"),
            ("test_vit.", ""),
        ],
    )
    def test_names_it_does_not_have(self, name: str, words: str) -> None:
        if not words:
            assert find_model("timm:test_vit", "random").module is not None
            return
        with pytest.raises(ModelError, match=words):
            find_model(f"timm:{name}", "random")

    @pytest.mark.usefixtures("no_network")
    def test_without_a_network(self) -> None:
        start = time.monotonic()
        with pytest.raises(ModelError, match=r"no network is reachable; pass --weights FILE, or"):
            find_model("timm:vit_tiny_patch16_224")
        assert time.monotonic() - start < 20

    @pytest.mark.slow
    def test_it_sees_photos_as_it_was_trained(self) -> None:
        root = Path(os.environ.get("PROFILING_AGENT_ASSETS", ""))
        file = root / "vit_tiny_imagenet" / "vit_tiny_patch16_224.safetensors"
        photos = sorted((root / "imagenet_sample_200").glob("*/*"))
        if not file.is_file() or not photos:
            pytest.skip(f"{file.name} is not there (PROFILING_AGENT_ASSETS)")
        found = find_model("timm:vit_tiny_patch16_224", str(file))
        index = {wnid: i for i, wnid in enumerate(found.class_ids)}
        found.module.eval()
        right = 0
        for start in range(0, len(photos), 50):
            some = photos[start : start + 50]
            with torch.no_grad():
                logits = found.module(as_batch(found, some))
            right += sum(
                int(logits[i].argmax()) == index[path.parent.name] for i, path in enumerate(some)
            )
        assert right / len(photos) >= 0.8


class TestTorchvision:
    pytestmark = needs_torchvision

    @pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "swin_v2_t", "inception_v3"])
    @pytest.mark.parametrize(("height", "width", "mode"), IMAGES)
    def test_images_are_those_of_its_own_transform(
        self, name: str, height: int, width: int, mode: str
    ) -> None:
        models = import_library("torchvision", "torchvision").models
        entry = models.get_model_weights(name).DEFAULT
        image, normalisation = torchvision_models._preset(entry)
        preset = entry.transforms()
        photo = picture(height, width, mode)
        tensor = preset(photo.convert("RGB")).numpy()
        std = np.reshape(normalisation["std"], (-1, 1, 1))
        mean = np.reshape(normalisation["mean"], (-1, 1, 1))
        expected = np.rint((tensor * std + mean) * 255).astype(np.uint8).transpose(1, 2, 0)
        np.testing.assert_array_equal(load_image(photo, image), expected)

    def test_random_weights_and_classes(self) -> None:
        first = find_model("torchvision:mobilenet_v3_small", "random")
        second = find_model("torchvision:mobilenet_v3_small", "random")
        assert weights_sum(first.module) == weights_sum(second.module)
        assert first.class_names[:2] == ("tench", "goldfish")
        has_ids = importlib.util.find_spec("timm") is not None
        assert first.class_ids[:1] == (("n01440764",) if has_ids else ())

    def test_weights_may_be_asked_for_by_tag(self) -> None:
        best = find_model("torchvision:resnet50", "random")
        first = find_model("torchvision:resnet50.IMAGENET1K_V1", "random")
        assert best.image is not None and first.image is not None
        assert (best.image.resize, first.image.resize) == (232, 256)
        with pytest.raises(ModelError, match=r"it has 'IMAGENET1K_V1', 'IMAGENET1K_V2'\."):
            find_model("torchvision:resnet50.V1", "random")

    @pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
    def test_weights_of_a_file_decide_on_the_head(self, tmp_path: Path, name: str) -> None:
        models = import_library("torchvision", "torchvision").models
        trained = models.get_model(name, weights=None, num_classes=5)
        save_file(trained.state_dict(), tmp_path / "w.safetensors")
        found = find_model(f"torchvision:{name}", str(tmp_path / "w.safetensors"))
        assert weights_sum(found.module) == weights_sum(trained)
        assert found.class_names == () and "5 classes" in found.notes[0]

    def test_heads_for_training_alone_are_left_out(self, tmp_path: Path) -> None:
        models = import_library("torchvision", "torchvision").models
        with quiet():
            full = models.get_model("googlenet", weights=None, init_weights=False)
        file = tmp_path / "w.pth"
        torch.save(full.state_dict(), file)
        found = find_model("torchvision:googlenet", str(file))
        assert "auxiliary heads" in found.notes[-1]
        assert found.module.transform_input
        assert not any(key.startswith("aux") for key in found.module.state_dict())
        drawn = find_model("torchvision:googlenet", "random")
        assert set(drawn.module.state_dict()) == set(found.module.state_dict())

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("resnet19", "no model 'resnet19'. Did you mean 'resnet1"),
            ("fasterrcnn_resnet50_fpn", r"torchvision\.models\.detection and no plain classifier"),
            ("fcn_resnet50", r"torchvision\.models\.segmentation .* --metric"),
        ],
    )
    def test_names_that_are_no_classifiers(self, name: str, words: str) -> None:
        with pytest.raises(ModelError, match=words):
            find_model(f"torchvision:{name}", "random")

    @pytest.mark.usefixtures("no_network")
    def test_without_a_network(self) -> None:
        with pytest.raises(ModelError, match=r"resnet18-.*no network is reachable; pass --weights"):
            find_model("torchvision:resnet18")


def _timm_config(name: str) -> dict[str, Any]:
    import_library("timm", "timm")
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    assert config is not None
    return config.to_dict()


def as_batch(found: FoundModel, photos: list[Any]) -> torch.Tensor:
    """Photos as the model wants them, through the two steps of acquisition."""
    assert found.image is not None
    raw = np.stack([load_image(photo, found.image) for photo in photos])
    how = Preprocessing(layout="hwc", **found.normalisation)
    spec = InputSpec(name="x", shape=raw.shape[1:], dtype="float32")
    return torch.from_numpy(preprocess({"x": raw}, [spec], how)["x"])


@pytest.fixture
def transformers() -> Any:
    return import_library("transformers", "hf")


@pytest.fixture
def vit_folder(tmp_path: Path, transformers: Any) -> Path:
    """A small ViT as a user would have saved it, with its processor."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, id2label={0: "cat", 1: "dog", 2: "eel"},
    )  # fmt: skip
    torch.manual_seed(3)
    return save(
        tmp_path / "vit",
        transformers.ViTForImageClassification(config),
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}),
    )


def save(folder: Path, *parts: Any) -> Path:
    with quiet():
        for part in parts:
            part.save_pretrained(folder)
    return folder


class TestHuggingFaceImages:
    pytestmark = needs_hf

    def test_a_folder_is_all_it_takes(self, vit_folder: Path, transformers: Any) -> None:
        found = find_model(f"hf:{vit_folder}")
        assert found.image == ImageTransform(
            resize=(32, 32), interpolation="bilinear", source="the model's ViTImageProcessor"
        )
        assert found.normalisation["mean"] == (0.5, 0.5, 0.5)
        assert found.class_names == ("cat", "dog", "eel")
        assert found.notes == () and found.tokenizer is None
        photos = [picture(50, 70, "RGB"), picture(64, 40, "RGB")]
        batch = as_batch(found, photos)
        with quiet():
            theirs = transformers.AutoImageProcessor.from_pretrained(vit_folder)(
                photos, return_tensors="pt"
            )["pixel_values"]
        assert float((batch - theirs).abs().mean()) < 2 / 255 / 0.5
        with torch.no_grad():
            assert found.module.eval()(batch).logits.shape == (2, 3)

    def test_weights_by_the_names_they_are_saved_under(self, vit_folder: Path) -> None:
        stored = find_model(f"hf:{vit_folder}").module
        file = vit_folder / "model.safetensors"
        again = find_model(f"hf:{vit_folder}", str(file)).module
        assert weights_sum(again) == weights_sum(stored)
        own = vit_folder / "own.pth"
        torch.save(stored.state_dict(), own)
        assert weights_sum(find_model(f"hf:{vit_folder}", str(own)).module) == weights_sum(stored)
        short = load_file(file)
        del short["classifier.weight"]
        save_file(short, vit_folder / "short.safetensors")
        with pytest.raises(ModelError, match="missing from the file"):
            find_model(f"hf:{vit_folder}", str(vit_folder / "short.safetensors"))

    def test_random_weights_need_none(self, vit_folder: Path) -> None:
        (vit_folder / "model.safetensors").unlink()
        first = find_model(f"hf:{vit_folder}", "random").module
        torch.manual_seed(9)
        assert weights_sum(find_model(f"hf:{vit_folder}", "random").module) == weights_sum(first)
        assert all(p.requires_grad for p in first.parameters())
        with pytest.raises(ModelError, match=r"weights of .* can't be used"):
            find_model(f"hf:{vit_folder}")

    def test_a_head_that_is_not_in_the_weights(self, vit_folder: Path) -> None:
        file = vit_folder / "model.safetensors"
        state = load_file(file)
        del state["classifier.weight"]
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lack 1 tensors .*'classifier.weight'"):
            find_model(f"hf:{vit_folder}")
        state["classifier.weight"] = torch.zeros(9, 16)
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(
            ModelError, match=r"'classifier.weight' \(file \(9, 16\), model \(3, 16"
        ):
            find_model(f"hf:{vit_folder}")

    def test_without_a_processor(self, vit_folder: Path) -> None:
        (vit_folder / "preprocessor_config.json").unlink()
        found = find_model(f"hf:{vit_folder}")
        assert found.image is None and not found.normalisation
        assert "no image processor" in found.notes[0]
        (vit_folder / "preprocessor_config.json").write_text("{")
        with pytest.raises(ModelError, match=r"image processor of .* can't be used"):
            find_model(f"hf:{vit_folder}")

    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("ViTImageProcessor", {}),
            ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
            ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
            ("ConvNextImageProcessor", {}),
            ("DeiTImageProcessor", {}),
            ("BitImageProcessor", {}),
            ("CLIPImageProcessor", {}),
            ("BeitImageProcessor", {}),
            ("LevitImageProcessor", {}),
            ("MobileNetV2ImageProcessor", {}),
            ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),
            ("PoolFormerImageProcessor", {}),
            ("PvtImageProcessor", {}),
            ("EfficientNetImageProcessor", {}),
            ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
            ("PerceiverImageProcessor", {}),
            ("SiglipImageProcessor", {}),
        ],
    )
    def test_processors_are_understood(
        self, transformers: Any, kind: str, settings: dict[str, Any]
    ) -> None:
        with quiet():
            processor = getattr(transformers, kind)(**settings)
            found = translate(processor)
            assert found.image is not None
            assert compare(processor, found.image, found.normalisation)[0] < 2.0
        assert found.notes == ()

    def test_a_processor_that_does_something_else_is_named(self, transformers: Any) -> None:
        class Inverting(transformers.ViTImageProcessor):
            def __call__(self, *args: Any, **options: Any) -> Any:
                batch = super().__call__(*args, **options)
                batch["pixel_values"] = -batch["pixel_values"]
                return batch

        class Flattening(transformers.ViTImageProcessor):
            def __call__(self, *args: Any, **options: Any) -> Any:
                batch = super().__call__(*args, **options)
                batch["pixel_values"] = batch["pixel_values"].flatten(1)
                return batch

        with quiet():
            assert "on average" in translate(Inverting()).notes[0]
            found = translate(Flattening())
        assert found.image is None and "resize, crop and normalisation" in found.notes[0]

    def test_other_tasks_and_their_way_out(self, tmp_path: Path, transformers: Any) -> None:
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            image_size=32, patch_size=8,
        )  # fmt: skip
        save(tmp_path / "m", transformers.ViTModel(config))
        with pytest.raises(ModelError, match=r"a 'ViTModel' and no classifier .* --metric"):
            find_model(f"hf:{tmp_path / 'm'}")

    def test_code_of_a_repository_is_not_run(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(
            '{"model_type": "mine", "architectures": ["MineForImageClassification"], "auto_map": '
            '{"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Model"}}'
        )
        (tmp_path / "mine.py").write_text("raise SystemExit('was run')")
        with pytest.raises(ModelError, match=r"its own code, .*pass --trust-remote-code"):
            find_model(f"hf:{tmp_path}")

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (None, r"configuration \(config.json\) of .* can't be used"),
            ("{", "can't be used"),
            ('{"model_type": "nothing"}', "can't be used"),
        ],
    )
    def test_folders_that_hold_no_model(
        self, tmp_path: Path, config: str | None, words: str
    ) -> None:
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=words) as caught:
            find_model(f"hf:{tmp_path}")
        assert len(str(caught.value).splitlines()) == 1

    def test_a_folder_that_is_not_there(self) -> None:
        with pytest.raises(ModelError, match="looks like a folder and there is none"):
            find_model("hf:./nowhere/vit")

    @pytest.mark.usefixtures("no_network")
    def test_without_a_network(self) -> None:
        start = time.monotonic()
        with pytest.raises(ModelError, match="no network is reachable; pass a local folder as"):
            find_model("hf:someone/vit")
        assert time.monotonic() - start < 20

    @pytest.mark.usefixtures("no_network")
    def test_what_is_in_the_cache_needs_no_network(self, tmp_path: Path, vit_folder: Path) -> None:
        repository = tmp_path / "models--someone--vit"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c0ffee")
        snapshot = repository / "snapshots" / "c0ffee"
        shutil.copytree(vit_folder, snapshot)
        found = find_model("hf:someone/vit")
        assert found.image is not None and found.image.resize == (32, 32)
        (snapshot / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"lacks its weights, .* or --weights random"):
            find_model("hf:someone/vit")
        assert find_model("hf:someone/vit", "random").class_names == ("cat", "dog", "eel")


WORDS = ["good", "bad", "film", "a", "very", "the", "is"]


def word_tokenizer(transformers: Any, **options: Any) -> Any:
    """A tokenizer of whole words with BERT's special tokens, made from nothing."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{"pad_token": "[PAD]", **names, **options},
    )


SMALL = {
    "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "num_labels": 2,
}  # fmt: skip


@pytest.fixture
def bert_folder(tmp_path: Path, transformers: Any) -> Path:
    config = transformers.BertConfig(max_position_embeddings=24, **SMALL)
    return save(
        tmp_path / "bert",
        transformers.BertForSequenceClassification(config),
        word_tokenizer(transformers),
    )


class TestHuggingFaceTexts:
    pytestmark = needs_hf

    def test_texts_and_pairs(self, bert_folder: Path) -> None:
        found = find_model(f"hf:{bert_folder}")
        tokenizer = found.tokenizer
        assert tokenizer is not None and found.image is None
        assert found.class_names == ()  # LABEL_0 says nothing
        assert tokenizer.max_length == 24
        assert tokenizer.count("a very good film") == 6
        assert tokenizer.count(("a film", "is bad")) == 7
        one = tokenizer.encode("a good film", 8)
        assert list(one) == ["input_ids", "attention_mask", "token_type_ids"]
        assert one["input_ids"].tolist() == [2, 7, 4, 6, 3, 0, 0, 0]
        assert one["input_ids"].dtype == np.int64
        assert one["attention_mask"].sum() == 5
        pair = tokenizer.encode(("a film", "is bad"), 8)
        assert pair["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
        assert tokenizer.encode("a very good film", 4)["input_ids"].tolist() == [2, 7, 8, 3]
        found.module.eval()
        both = {key: torch.from_numpy(np.stack([one[key], pair[key]])) for key in one}
        assert compute_logits(found.module, both).shape == (2, 2)

    def test_threads_do_not_disturb_each_other(self, bert_folder: Path) -> None:
        tokenizer = find_model(f"hf:{bert_folder}").tokenizer
        assert tokenizer is not None
        faults: list[str] = []

        def work(length: int) -> None:
            for _ in range(50):
                if tokenizer.encode("a good film", length)["input_ids"].shape != (length,):
                    faults.append(str(length))
                if tokenizer.count("a very good film") != 6:
                    faults.append("count")

        threads = [threading.Thread(target=work, args=(n,)) for n in (5, 9, 12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults

    def test_only_names_that_forward_takes(self, tmp_path: Path, transformers: Any) -> None:
        config = transformers.DistilBertConfig(
            vocab_size=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=2
        )
        save(
            tmp_path / "m",
            transformers.DistilBertForSequenceClassification(config),
            word_tokenizer(transformers),
        )
        tokenizer = find_model(f"hf:{tmp_path / 'm'}").tokenizer
        assert tokenizer is not None
        assert list(tokenizer.encode("a film", 6)) == ["input_ids", "attention_mask"]

    def test_positions_that_roberta_leaves_unused(self, tmp_path: Path, transformers: Any) -> None:
        config = transformers.RobertaConfig(max_position_embeddings=34, pad_token_id=1, **SMALL)
        save(
            tmp_path / "m",
            transformers.RobertaForSequenceClassification(config),
            word_tokenizer(transformers, pad_token="[UNK]"),
        )
        found = find_model(f"hf:{tmp_path / 'm'}")
        assert found.tokenizer is not None and found.tokenizer.max_length == 32
        longest = found.tokenizer.encode("a very good film " * 20, found.tokenizer.max_length)
        batch = {key: torch.from_numpy(value)[None] for key, value in longest.items()}
        assert compute_logits(found.module.eval(), batch).shape == (1, 2)

    def test_decoders_get_a_token_to_pad_by(self, tmp_path: Path, transformers: Any) -> None:
        config = transformers.GPT2Config(
            vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=2048, num_labels=2
        )
        save(
            tmp_path / "m",
            transformers.GPT2ForSequenceClassification(config),
            word_tokenizer(transformers, pad_token=None, eos_token="[SEP]"),
        )
        found = find_model(f"hf:{tmp_path / 'm'}")
        assert found.tokenizer is not None and found.tokenizer.max_length == 512
        assert any("padded by '[SEP]'" in note for note in found.notes)
        assert any("2,048 tokens" in note for note in found.notes)
        texts = [found.tokenizer.encode(text, 6) for text in ("a film", "a very good film")]
        batch = {key: torch.from_numpy(np.stack([t[key] for t in texts])) for key in texts[0]}
        assert compute_logits(found.module.eval(), batch).shape == (2, 2)

    def test_without_a_tokenizer(self, tmp_path: Path, transformers: Any) -> None:
        for kind in ("Bert", "Roberta"):
            config = getattr(transformers, f"{kind}Config")(**SMALL)
            model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
            found = find_model(f"hf:{save(tmp_path / kind, model)}")
            assert found.tokenizer is None
            assert "no tokenizer" in found.notes[-1]

    def test_regression_is_said(self, tmp_path: Path, transformers: Any) -> None:
        config = transformers.BertConfig(**{**SMALL, "num_labels": 1})
        save(tmp_path / "m", transformers.BertForSequenceClassification(config))
        assert any("--metric" in note for note in find_model(f"hf:{tmp_path / 'm'}").notes)


def test_the_libraries_are_quiet_only_for_us() -> None:
    logger = logging.getLogger("timm")
    before = logger.level
    with quiet():
        warnings.warn("not shown", stacklevel=1)
        assert not logger.isEnabledFor(logging.ERROR)
    assert logger.level == before
    with pytest.raises(UserWarning):
        warnings.warn("shown again", stacklevel=1)


def test_a_missing_library_is_named_with_its_extra() -> None:
    with pytest.raises(MissingDependency, match=r"pip install 'profiling-agent\[hf\]'"):
        import_library("no_such_library", "hf")


def test_nothing_answers_at_a_closed_port() -> None:
    assert not is_reachable("http://127.0.0.1:9", 2.0)
    assert not is_reachable("not an address", 2.0)


def test_naming_hubs_costs_no_import() -> None:
    code = (
        "import sys; import profiling_agent.acquisition.hubs.found; "
        "sys.exit(any(m in sys.modules for m in ('timm', 'transformers', 'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
