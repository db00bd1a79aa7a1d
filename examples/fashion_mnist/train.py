"""Train the demo's networks on Fashion-MNIST, from the original files to safetensors.

    python examples/fashion_mnist/train.py resnet --out DIR --epochs 8
    python examples/fashion_mnist/train.py vit --out DIR --epochs 9
    python examples/fashion_mnist/train.py vit --out DIR --epochs 5 --start DIR/vit.safetensors
    python examples/fashion_mnist/train.py vit --out DIR --epochs 4 --start DIR/vit.safetensors \\
        --teacher DIR/resnet.safetensors --shift 1

The first 55,000 training images are trained on; the other 5,000 are never seen here, they become
the demo's calibration and search data (``pack.py``). The test images only serve to
print the accuracy at the end of a run. On two CPU cores an epoch takes one to two minutes.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.acquisition.demo_models import DemoResNet, DemoViT

SOURCE = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530
NUM_TRAIN = 55_000
TEMPERATURE = 2.0


def read_idx(path: Path) -> np.ndarray:
    """Array of unsigned bytes from a gzipped IDX file (the format of the MNIST family)."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = np.frombuffer(raw, ">u4", ndim, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape.astype(int))


def load(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(source / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz")
    return images, labels.astype(np.int64)


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN) / STD


def augment(x: Tensor, most_pixels: int) -> Tensor:
    """Flip every other image and shift each by at most so many pixels, at random."""
    batch, _, height, width = x.shape
    flip = torch.rand(batch) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    if most_pixels == 0:
        return x
    padded = F.pad(x, (most_pixels,) * 4, value=-MEAN / STD)
    top, left = torch.randint(0, 2 * most_pixels + 1, (2, batch, 1))
    rows, columns = torch.arange(height) + top, torch.arange(width) + left
    samples = torch.arange(batch)[:, None, None]
    return padded[samples, 0, rows[:, :, None], columns[:, None, :]][:, None]


def loss_of(logits: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
    """Cross-entropy, half of it against a teacher's softened answers (Hinton et al. 2015)."""
    loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
    if taught is None:
        return loss
    softened = F.log_softmax(logits / TEMPERATURE, 1), F.softmax(taught / TEMPERATURE, 1)
    taught_loss = TEMPERATURE**2 * F.kl_div(*softened, reduction="batchmean")
    return 0.3 * loss + 0.7 * taught_loss


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(normalise(x)[:, None]).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def train(name: str, args: argparse.Namespace) -> nn.Module:
    epochs, batch_size, start = args.epochs, args.batch_size, args.start
    torch.manual_seed(args.seed)
    images, labels = load(args.source, "train")
    x_train, y_train = torch.tensor(images[:NUM_TRAIN]), torch.tensor(labels[:NUM_TRAIN])
    model: nn.Module
    if name == "vit":
        model, lr, decay = DemoViT(), 1e-3, 0.05
    else:
        model, lr, decay = DemoResNet(), 3e-3, 0.02
    if start is not None:  # a second, gentler cycle
        model.load_state_dict(load_file(start))
        lr /= 2
    teacher = DemoResNet().eval() if args.teacher else None
    if teacher is not None:
        teacher.load_state_dict(load_file(args.teacher))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    steps = NUM_TRAIN // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps * epochs, pct_start=0.15
    )
    for epoch in range(epochs):
        model.train()
        start, seen_loss = time.monotonic(), 0.0
        order = torch.randperm(NUM_TRAIN)
        for step in range(steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
            x = augment(normalise(x_train[rows])[:, None], args.shift)
            taught = None
            with torch.autocast("cpu", torch.bfloat16):
                if teacher is not None:
                    with torch.no_grad():
                        taught = teacher(x).float()
                logits = model(x)
            loss = loss_of(logits.float(), y_train[rows], taught)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen_loss += loss.item()
        seconds = time.monotonic() - start
        print(
            f"{name} epoch {epoch + 1}/{epochs} loss {seen_loss / steps:.4f} {seconds:.0f} s",
            flush=True,
        )
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["vit", "resnet"])
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of the four .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for MODEL.safetensors")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--start", type=Path, help="weights to go on from, at half the rate")
    parser.add_argument("--teacher", type=Path, help="weights of a trained resnet to learn from")
    parser.add_argument("--shift", type=int, default=0, help="pixels of random shift")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = train(args.model, args)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out / f"{args.model}.safetensors")
    images, labels = load(args.source, "t10k")
    score = accuracy(model, torch.tensor(images), torch.tensor(labels))
    print(f"{args.model} test accuracy {100 * score:.2f} % on {len(labels):,} images")


if __name__ == "__main__":
    main()
