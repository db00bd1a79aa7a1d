"""How far a model's outputs lie from the original's, sample by sample, without labels.

For logits of classes the Kullback-Leibler divergence of their softmax; for other outputs half the
squared difference over a variance, which is that divergence between two normal distributions that
spread by it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 512
"""Samples that are held in double precision at once."""


def comparable(logits: Tensor, *, has_classes: bool) -> Tensor:
    """Log-probabilities (samples, classes), or outputs (samples, values), as doubles."""
    if has_classes:
        return F.log_softmax(logits.double().flatten(0, -2), -1)
    return logits.double().reshape(len(logits), -1)


def divergences(
    before: Tensor, after: Tensor, *, has_classes: bool, variance: float = 1.0
) -> Tensor:
    """One for each sample, in nats; both are ``comparable``, ``variance`` is of other outputs."""
    if has_classes:
        return (before.exp() * (before - after)).sum(-1)
    return (before - after).square().mean(-1) / (2 * max(variance, 1e-30))


def mean_divergence(before: np.ndarray, after: np.ndarray, *, has_classes: bool) -> float:
    """Mean over samples (samples, ...), in nats; other outputs than logits spread as ``before``."""
    variance = 1.0 if has_classes else float(before.var(axis=0, dtype=np.float64).mean())
    total, count = 0.0, 0
    for first, second in zip(_chunks(before), _chunks(after), strict=True):
        each = divergences(
            comparable(first, has_classes=has_classes),
            comparable(second, has_classes=has_classes),
            has_classes=has_classes,
            variance=variance,
        )
        total, count = total + float(each.sum()), count + each.numel()
    return total / count


def _chunks(outputs: np.ndarray) -> Iterator[Tensor]:
    for start in range(0, len(outputs), CHUNK):
        yield torch.tensor(outputs[start : start + CHUNK])
