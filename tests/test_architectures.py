"""The paper's architectures from three libraries: small ones counted by hand, real ones known."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.hubs.calls import import_library, quiet
from profiling_agent.acquisition.request import Request
from profiling_agent.errors import MissingDependency
from profiling_agent.profiling.static import StaticCosts, count
from profiling_agent.records.common import Deployment

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
EXTRAS = {"timm": "timm", "torchvision": "torchvision", "transformers": "hf"}
SIDE, NUM_CLASSES = 32, 5


def load(name: str) -> ModuleType:
    """A benchmark script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


architectures, paper = load("architectures"), load("paper_quantization")


def library(name: str) -> ModuleType:
    """The library, or a skip that names its extra."""
    try:
        return import_library(name, EXTRAS[name])
    except MissingDependency:
        pytest.skip(f"{name} is not installed (extra {EXTRAS[name]})")


def counted(build: Callable[[], nn.Module], input_name: str = "x") -> StaticCosts:
    """Counted on the meta device; nothing may be left out."""
    with quiet(), torch.device("meta"):
        model, image = build().eval(), torch.zeros(2, 3, SIDE, SIDE)
    costs = count(model, {input_name: image})
    assert costs.unsupported_operators == ()
    return costs


# ---- by hand: a batch of two images of 32 x 32

VIT_WIDTH, VIT_DEPTH, VIT_PATCH = 16, 2, 8


def vit_macs(num_extra_tokens: int) -> int:
    patches = (SIDE // VIT_PATCH) ** 2
    tokens, width = patches + num_extra_tokens, VIT_WIDTH
    block = 12 * tokens * width**2 + 2 * tokens**2 * width  # qkv, proj, mlp; both products
    embed = patches * width * 3 * VIT_PATCH**2
    return 2 * (embed + VIT_DEPTH * block + width * NUM_CLASSES)


def vit_parameters(num_extra_tokens: int) -> int:
    patches, width = (SIDE // VIT_PATCH) ** 2, VIT_WIDTH
    tokens = patches + num_extra_tokens
    embed = width * (3 * VIT_PATCH**2 + 1) + num_extra_tokens * width + tokens * width
    block = 12 * width**2 + 13 * width
    return embed + VIT_DEPTH * block + 2 * width + NUM_CLASSES * (width + 1)


def timm_vit() -> nn.Module:
    return library("timm").models.VisionTransformer(
        img_size=SIDE, patch_size=VIT_PATCH, embed_dim=VIT_WIDTH, depth=VIT_DEPTH, num_heads=2,
        num_classes=NUM_CLASSES,
    )  # fmt: skip


def torchvision_vit() -> nn.Module:
    return library("torchvision").models.VisionTransformer(
        SIDE, VIT_PATCH, VIT_DEPTH, 2, VIT_WIDTH, 4 * VIT_WIDTH, num_classes=NUM_CLASSES
    )


def hf_vit(kind: str, attention: str) -> nn.Module:
    transformers = library("transformers")
    config = getattr(transformers, f"{kind}Config")(
        image_size=SIDE, patch_size=VIT_PATCH, hidden_size=VIT_WIDTH, num_hidden_layers=VIT_DEPTH,
        num_attention_heads=2, intermediate_size=4 * VIT_WIDTH, num_labels=NUM_CLASSES,
        attn_implementation=attention,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForImageClassification")(config)


@pytest.mark.parametrize("build", [timm_vit, torchvision_vit])
def test_vit(build: Callable[[], nn.Module]) -> None:
    whole = counted(build).module("")
    assert whole.macs == vit_macs(1)
    assert whole.num_parameters == vit_parameters(1)


def test_torchvisions_attention_counts_within_its_module() -> None:
    tokens = (SIDE // VIT_PATCH) ** 2 + 1
    attention = counted(torchvision_vit).module("encoder.layers.encoder_layer_0.self_attention")
    assert attention.type == "MultiheadAttention"
    assert attention.self_macs == 2 * (4 * tokens * VIT_WIDTH**2 + 2 * tokens**2 * VIT_WIDTH)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "num_extra_tokens"), [("ViT", 1), ("DeiT", 2)])
def test_transformers_vit(kind: str, attention: str, num_extra_tokens: int) -> None:
    whole = counted(lambda: hf_vit(kind, attention), "pixel_values").module("")
    assert whole.macs == vit_macs(num_extra_tokens)
    assert whole.num_parameters == vit_parameters(num_extra_tokens)


SWIN_WIDTH, SWIN_WINDOW = 8, 4


def swin_macs() -> int:
    """Two stages of a plain and a shifted block; windows of 4 x 4 on 8 x 8 and 4 x 4 positions."""
    total = 64 * SWIN_WIDTH * 3 * 4**2
    for tokens, width in ((64, SWIN_WIDTH), (16, 2 * SWIN_WIDTH)):
        total += 2 * (12 * tokens * width**2 + 2 * tokens * SWIN_WINDOW**2 * width)
    merging = 16 * (4 * SWIN_WIDTH) * (2 * SWIN_WIDTH)
    return 2 * (total + merging + 2 * SWIN_WIDTH * NUM_CLASSES)


def timm_swin() -> nn.Module:
    return library("timm").models.SwinTransformer(
        img_size=SIDE, patch_size=4, embed_dim=SWIN_WIDTH, depths=(2, 2), num_heads=(1, 2),
        window_size=SWIN_WINDOW, num_classes=NUM_CLASSES,
    )  # fmt: skip


def torchvision_swin() -> nn.Module:
    return library("torchvision").models.SwinTransformer(
        [4, 4], SWIN_WIDTH, [2, 2], [1, 2], [SWIN_WINDOW] * 2, num_classes=NUM_CLASSES
    )


def hf_swin() -> nn.Module:
    transformers = library("transformers")
    config = transformers.SwinConfig(
        image_size=SIDE, embed_dim=SWIN_WIDTH, depths=[2, 2], num_heads=[1, 2],
        window_size=SWIN_WINDOW, num_labels=NUM_CLASSES,
    )  # fmt: skip
    return transformers.SwinForImageClassification(config)


@pytest.mark.parametrize(
    ("build", "input_name"),
    [(timm_swin, "x"), (torchvision_swin, "x"), (hf_swin, "pixel_values")],
)
def test_swin(build: Callable[[], nn.Module], input_name: str) -> None:
    assert counted(build, input_name).module("").macs == swin_macs()


def bottleneck_macs(inside: int, before: int, after: int, positions: int, stride: int) -> int:
    """1x1, a strided 3x3 (the stride of v1.5) and 1x1, with a projecting shortcut."""
    small = positions // stride**2
    return (
        positions * before * inside
        + small * (9 * inside**2 + inside * after)
        + small * before * after
    )


def timm_resnet() -> nn.Module:
    resnet = library("timm").models.resnet
    return resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), base_width=8, num_classes=NUM_CLASSES)


def torchvision_resnet() -> nn.Module:
    resnet = library("torchvision").models.resnet
    return resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8, num_classes=NUM_CLASSES
    )


@pytest.mark.parametrize("build", [timm_resnet, torchvision_resnet])
def test_resnet(build: Callable[[], nn.Module]) -> None:
    total, before = 16**2 * 64 * 3 * 49, 64
    for stage, positions in enumerate((64, 64, 16, 4)):
        after, stride = 256 * 2**stage, 1 if stage == 0 else 2
        total += bottleneck_macs(8 * 2**stage, before, after, positions, stride)
        before = after
    assert counted(build).module("").macs == 2 * (total + before * NUM_CLASSES)


def test_transformers_resnet() -> None:
    def build() -> nn.Module:
        transformers = library("transformers")
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck",
            num_labels=NUM_CLASSES,
        )  # fmt: skip
        return transformers.ResNetForImageClassification(config)

    total = (
        16**2 * 4 * 3 * 49 + bottleneck_macs(4, 4, 16, 64, 1) + bottleneck_macs(8, 16, 32, 64, 2)
    )
    assert counted(build, "pixel_values").module("").macs == 2 * (total + 32 * NUM_CLASSES)


# ---- the real ones


@pytest.mark.parametrize(
    "candidate", architectures.CANDIDATES, ids=lambda c: f"{c.library}-{c.architecture}"
)
def test_real_architectures_against_the_literature(candidate: object) -> None:
    library(candidate.library)
    with quiet():
        row = architectures.measure_costs(candidate)
    assert row["unsupported_operators"] == []
    assert abs(row["parameters_off_percent"]) < 1.0
    assert abs(row["macs_off_percent"]) < 1.0


# ---- what it costs, and whom it names


def test_a_profile_takes_at_most_thirty_forwards(tmp_path: Path) -> None:
    workload = acquire(Request(model=timm_vit()), folder=tmp_path / "data")
    deployment = Deployment(threads=2)
    profile, num_passes = architectures.profile_counted(workload, deployment)
    assert num_passes <= 30
    assert not workload.model._forward_pre_hooks
    timed = [module for module in profile.modules if module.self_time is not None]
    assert len(timed) > 20
    for module in timed:
        assert module.self_time.num_passes == module.total.num_passes == 10
        assert module.total.low_ms <= module.total.median_ms <= module.total.high_ms


class Threaded(nn.Module):
    """Notes how many threads each forward gets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.seen: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(torch.get_num_threads())
        return self.layer(x)


def test_every_forward_of_a_profile_runs_as_deployed(tmp_path: Path) -> None:
    data = [(x.numpy(), index % 2) for index, x in enumerate(torch.randn(40, 4))]
    workload = acquire(Request(model=Threaded(), data=data), folder=tmp_path / "data")
    workload.model.seen.clear()
    architectures.profile_counted(workload, Deployment(threads=3))
    assert workload.model.seen == {3}


class Uneven(nn.Module):
    """One layer does nearly all the work; the rest is small."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(1024, 8)
        self.large = nn.Conv2d(8, 64, 5, padding=2)
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.large(x).mean((2, 3))) + self.small(x.flatten(1)[:, :1024]).sum()


def test_both_profilers_name_the_same_bottleneck(tmp_path: Path) -> None:
    model = Uneven()
    inputs = {"x": torch.randn(4, 8, 64, 64)}
    theirs = architectures.profile_with_torch(model, inputs, 5, 1)
    assert set(theirs.modules) == {"", "small", "large", "head"}
    assert max(theirs.modules, key=theirs.modules.get) == "large"
    assert all(not name.startswith(("module:", "pass:")) for name in theirs.operators)
    assert any("conv" in name for name in theirs.operators)
    data = [(x.numpy(), index % 3) for index, x in enumerate(torch.randn(40, 8, 64, 64))]
    workload = acquire(Request(model=model, data=data), folder=tmp_path / "data")
    profile, _ = architectures.profile_counted(workload, Deployment(batch_size=4))
    row = architectures.weigh(profile, theirs)
    assert row["slowest"][0]["name"] == row["slowest_torch"][0] == "large"
    assert row["captured"] == pytest.approx(1.0)
    assert sum(row["share_by_type"].values()) == pytest.approx(1.0)


# ---- the quantization row


def test_artefacts_of_the_quantization_row(tmp_path: Path) -> None:
    workload = acquire(Request(model=timm_vit()), folder=tmp_path / "data")
    built = paper.build(workload, tmp_path, Deployment())
    assert built["int8"].achieved.num_int8_layers == 4 * VIT_DEPTH + 1
    assert built["int8"].size_bytes < sum(4 * p.numel() for p in workload.model.parameters())
    before = paper.saved_bytes(workload.model)
    linears = tuple(paper.plain_linears(workload.model))
    after = paper.saved_bytes(paper.quantize_dynamic(paper.inference_copy(workload.model), linears))
    assert before > after


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quantization_row_of_a_resnet(tmp_path: Path) -> None:
    library("timm")
    out = tmp_path / "row.json"
    script = str(BENCHMARKS / "paper_quantization.py")
    done = subprocess.run(
        [sys.executable, script, "--quick", "resnet101", "--json", str(out)],
        capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(out.read_text())["rows"][0]
    assert row["num_int8_layers"] == 1
    assert row["sizes"]["reduction_percent"] == pytest.approx(3.4, abs=0.3)
    assert row["timing"]["eager"]["median_ms"] > 0
