"""Two mobile-style networks trained on Fashion-MNIST: one ordinary, one that plain int8 ruins.

    python benchmarks/mobile_model.py --out models

writes ``mobile.safetensors`` and ``uneven.safetensors``, which the factories here take:

    profiling-agent optimize benchmarks/mobile_model.py:uneven \\
        --weights models/uneven.safetensors \\
        --data src/profiling_agent/acquisition/demo_data/fashion_mnist.npz

``mobile`` has inverted residuals (Sandler et al. 2018) with squeeze-and-excitation and hard swish
(Howard et al. 2019). ``uneven`` has plain ReLUs and is trained alike; then, in a few blocks, each
channel between two convolutions is multiplied by a factor of its own and divided by it again in
the weights that read it. A ReLU lets positive factors through, so the network computes what it
did, but the channels of these tensors now lie orders of magnitude apart, as those of trained
MobileNets do to a lesser degree (Nagel et al. 2019), and one int8 scale can't serve them all.

Training sees the 55,000 images that the demo's networks were trained on (Debian's
``dataset-fashion-mnist``); the demo's data hold others. It is seeded and takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.acquisition.demo import DEMO_DATA

FASHION_MNIST = Path(__file__).resolve().parents[1] / "examples" / "fashion_mnist"
EXPANSION = 4
BLOCKS: tuple[tuple[int, int], ...] = (  # width and stride of each
    (48, 1), (48, 1), (48, 1),
    (96, 2), (96, 1), (96, 1), (96, 1), (96, 1),
)  # fmt: skip
UNEVEN_BLOCKS = (0, 3)  # without a shortcut around them
FACTORS = (1e-2, 1e2)
EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 128, 4e-3


class SqueezeExcite(nn.Module):
    """Weighs channels by what their means say (Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width // 4, 1)
        self.expand = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(weights)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; a shortcut where the shapes allow one."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, is_modern: bool) -> None:
        super().__init__()
        hidden = EXPANSION * inputs
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.excite = SqueezeExcite(hidden) if is_modern else nn.Identity()
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.act = nn.Hardswish() if is_modern else nn.ReLU()
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.expand(x)))
        y = self.excite(self.act(self.norm2(self.depthwise(y))))
        y = self.norm3(self.project(y))
        return x + y if self.has_shortcut else y


class MobileNet(nn.Module):
    """Input (batch, 1, 28, 28), output (batch, 10); ``is_modern`` as MobileNetV3, else as V2."""

    def __init__(self, *, is_modern: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        blocks: list[nn.Module] = []
        inputs = 32
        for width, stride in BLOCKS:
            blocks.append(InvertedResidual(inputs, width, stride, is_modern=is_modern))
            inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(inputs, EXPANSION * inputs, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(EXPANSION * inputs)
        self.act = nn.Hardswish() if is_modern else nn.ReLU()
        self.head = nn.Linear(EXPANSION * inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.norm(self.stem(x))))
        x = self.act(self.last_norm(self.last(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mobile() -> nn.Module:
    """The ordinary network, untrained."""
    return MobileNet(is_modern=True)


def uneven() -> nn.Module:
    """The network that plain int8 ruins once it has its weights, untrained."""
    return MobileNet(is_modern=False)


NETWORKS = {"mobile": mobile, "uneven": uneven}


@torch.no_grad()
def make_uneven(model: MobileNet, seed: int = 0) -> None:
    """Scale the hidden channels of some blocks apart, log-uniformly, without changing outputs."""
    rng = torch.Generator().manual_seed(seed)
    low, high = np.log(FACTORS)
    for number in UNEVEN_BLOCKS:
        block = model.blocks[number]
        assert isinstance(block, InvertedResidual)
        for norm, consumer, axis in (
            (block.norm1, block.depthwise, 0),
            (block.norm2, block.project, 1),
        ):
            factors = torch.empty(norm.num_features).uniform_(low, high, generator=rng).exp()
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            shape = [1, 1, 1, 1]
            shape[axis] = -1
            consumer.weight.div_(factors.reshape(shape))


def train(name: str, epochs: int, seed: int = 0) -> MobileNet:
    """The network after so many epochs, in eval mode; about a minute each on two cores."""
    sys.path.insert(0, str(FASHION_MNIST))
    from train import (  # pyright: ignore[reportMissingImports] - the example's, beside us
        NUM_TRAIN,
        SOURCE,
        augment,
        load,
        normalise,
    )

    torch.manual_seed(seed)
    images, labels = load(SOURCE, "train")
    x_train, y_train = torch.tensor(images[:NUM_TRAIN]), torch.tensor(labels[:NUM_TRAIN])
    model = NETWORKS[name]().to(memory_format=torch.channels_last)  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    steps = NUM_TRAIN // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps * epochs, pct_start=0.2
    )
    for epoch in range(epochs):
        model.train()
        start, seen_loss = time.monotonic(), 0.0
        order = torch.randperm(NUM_TRAIN)
        for step in range(steps):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            x = augment(normalise(x_train[rows])[:, None], 1)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y_train[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            seen_loss += loss.item()
        seconds = time.monotonic() - start
        print(f"{name} epoch {epoch + 1}/{epochs} loss {seen_loss / steps:.4f} {seconds:.0f} s")
    return model.eval().to(memory_format=torch.contiguous_format)  # pyright: ignore


@torch.inference_mode()
def demo_logits(model: nn.Module, part: str = "test") -> tuple[Tensor, Tensor]:
    """Logits (samples, 10) and classes (samples,) of one part of the demo's data."""
    with np.load(DEMO_DATA, allow_pickle=False) as data:
        mean, std = float(data["mean"][0]), float(data["std"][0])
        images = (torch.tensor(data[f"x_{part}"]).float() / 255 - mean) / std
        labels = torch.tensor(data[f"y_{part}"].astype(np.int64))
    return torch.cat([model(x) for x in images[:, None].split(500)]), labels


def make(name: str, epochs: int, out: Path) -> Path:
    """Train one network and save it as ``OUT/NAME.safetensors``; prints what it is worth."""
    model = train(name, epochs)
    logits, labels = demo_logits(model)
    accuracy = 100.0 * float((logits.argmax(1) == labels).float().mean())
    print(f"{name} test accuracy {accuracy:.2f} % on {len(labels):,} images")
    if name == "uneven":
        make_uneven(model)
        difference = float((demo_logits(model)[0] - logits).abs().max())
        print(f"{name} made uneven: logits differ by {difference:.1e} at most")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.safetensors"
    save_file(model.state_dict(), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("networks", nargs="*", help="of mobile, uneven; default both")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    for name in args.networks or NETWORKS:
        make(name, args.epochs, args.out)


if __name__ == "__main__":
    main()
