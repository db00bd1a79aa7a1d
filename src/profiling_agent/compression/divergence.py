"""How far a model's outputs lie from the original's, sample by sample, without labels.

For logits of classes the Kullback-Leibler divergence of their softmax; for other outputs half the
squared difference over a variance, which is that divergence between two normal distributions that
spread by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**21
"""Outputs that are held in double precision at once."""
MAX_STEPS, SMALLEST_FACTOR = 20, 1 / 64
"""Of the search for the factor that brings logits nearest."""


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
    """Mean over samples (samples, ...), in nats; other outputs than logits spread as ``before``.

    Logits are multiplied by the one factor that brings them nearest before they are compared: it
    changes no answer. Without that quantization seems to do harm where it only makes a model a
    little more or less sure (the inverse temperature of Guo et al. 2017, section 4.2).
    """
    if not has_classes:
        variance = float(before.var(axis=0, dtype=np.float64).mean())
        return _mean(
            divergences(first, second, has_classes=False, variance=variance)
            for first, second in _pairs(before, after, has_classes=False)
        )
    factor = _nearest_factor(before, after)
    return _mean(
        divergences(first, F.log_softmax(factor * second, -1), has_classes=True)
        for first, second in _pairs(before, after, has_classes=True)
    )


def _nearest_factor(before: np.ndarray, after: np.ndarray) -> float:
    """Of the logits ``after``, by Newton's method: the mean divergence is convex in it, with the
    difference of the mean logits as its slope and their variance as its curvature."""
    factor = 1.0
    for _ in range(MAX_STEPS):
        slope = curvature = 0.0
        for first, second in _pairs(before, after, has_classes=True):
            weights = F.softmax(factor * second, -1)
            mean = (weights * second).sum(-1)
            slope += float((mean - (first.exp() * second).sum(-1)).sum())
            curvature += float((weights * (second - mean[:, None]).square()).sum())
        step = slope / max(curvature, 1e-30)
        moved = min(2 * factor, max(factor / 2, factor - step))
        if not SMALLEST_FACTOR < moved < 1 / SMALLEST_FACTOR:
            return factor
        if abs(moved - factor) < 1e-6 * factor:
            return moved
        factor = moved
    return factor


def _mean(parts: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for part in parts:
        total, count = total + float(part.sum()), count + part.numel()
    return total / count


def _pairs(
    before: np.ndarray, after: np.ndarray, *, has_classes: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, some samples at a time, ``comparable``."""
    rows = max(1, CHUNK * len(before) // max(1, before.size))
    for start in range(0, len(before), rows):
        first, second = (torch.tensor(each[start : start + rows]) for each in (before, after))
        yield (
            comparable(first, has_classes=has_classes),
            comparable(second, has_classes=has_classes),
        )
