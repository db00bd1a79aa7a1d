"""Real models and data for the benchmarks, as factories the command line can name.

    profiling-agent optimize benchmarks/workloads.py:resnet56 --data benchmarks/workloads.py:cifar10

The files are found through the environment variable PROFILING_AGENT_ASSETS; the networks are
written out here, so that no model library is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

RESNET_WEIGHTS = "cifar10_resnets/resnet56-4bfd9763.th"
VIT_WEIGHTS = "vit_tiny_imagenet/vit_tiny_patch16_224.safetensors"


def asset(name: str) -> Path:
    """A file of the assets; ``FileNotFoundError`` names it and the variable when it is absent."""
    folder = os.environ.get("PROFILING_AGENT_ASSETS")
    path = Path(folder or ".") / name
    if folder is None or not path.exists():
        raise FileNotFoundError(f"{name} (set PROFILING_AGENT_ASSETS to the folder that holds it)")
    return path


# ---- ResNet-56 on CIFAR-10 (He et al. 2016, option-A shortcuts)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; a shortcut that strides and pads with zero channels."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.widens = stride != 1 or in_planes != planes
        self.pad = (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widens:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """6n+2 layers; input (batch, 3, 32, 32), output (batch, 10)."""

    def __init__(self, blocks_per_stage: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        in_planes = 16
        for number, planes in enumerate((16, 32, 64), start=1):
            blocks: list[nn.Module] = []
            for position in range(blocks_per_stage):
                stride = 2 if number > 1 and position == 0 else 1
                blocks.append(CifarBlock(in_planes, planes, stride))
                in_planes = planes
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet56() -> nn.Module:
    """ResNet-56 with its trained weights."""
    model = CifarResNet(9)
    state = torch.load(asset(RESNET_WEIGHTS), map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model


class _Cifar:
    """Raw images with the normalisation they were trained with."""

    preprocessing: ClassVar = {
        "layout": "hwc",
        "scale": 1 / 255,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self._labels[index])


def cifar10() -> dict[str, _Cifar]:
    """Calibration and search from training images, test on the 1,017 test images."""
    data = np.load(asset("cifar10_exact_subset.npz"))
    x, y = data["x_train"], data["y_train"]
    return {
        "calibration": _Cifar(x[:1024], y[:1024]),
        "search": _Cifar(x[1024:4096], y[1024:4096]),
        "test": _Cifar(data["x_test"], data["y_test"]),
    }


# ---- ViT-Tiny/16 on ImageNet


class Attention(nn.Module):
    """Multi-head attention with a fused projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """fc1, GELU, fc2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """One projection per patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 16, stride=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al. 2021) with timm's names; input (batch, 3, 224, 224)."""

    def __init__(self, width: int = 192, depth: int = 12, num_heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_tiny() -> nn.Module:
    """ViT-Tiny/16 with its ImageNet weights."""
    model = VisionTransformer()
    model.load_state_dict(load_file(asset(VIT_WEIGHTS)))
    return model


class _ImageNet:
    """Images as the model was trained to see them: bicubic to 248, the middle 224, bytes."""

    preprocessing: ClassVar = {
        "layout": "hwc",
        "scale": 1 / 255,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }

    def __init__(self, samples: list[tuple[Path, int]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path, label = self._samples[index]
        with Image.open(path) as image:
            image = image.convert("RGB")
            scale = 248 / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.BICUBIC)
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            return np.asarray(image.crop((left, top, left + 224, top + 224))), label

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return (self[index] for index in range(len(self)))


def _imagenet(folder: str) -> list[tuple[Path, int]]:
    lines = asset("imagenet_classes.txt").read_text().splitlines()
    classes = {line.split()[0]: index for index, line in enumerate(lines)}
    paths = sorted(asset(folder).glob("*/*.JPEG"))
    return [(path, classes[path.parent.name]) for path in paths]


def imagenet() -> dict[str, _ImageNet]:
    """Calibration: the 200 sample images; search: even validation images; test: odd ones."""
    validation = _imagenet("imagenet_val_650")
    return {
        "calibration": _ImageNet(_imagenet("imagenet_sample_200")),
        "search": _ImageNet(validation[0::2]),
        "test": _ImageNet(validation[1::2]),
    }
