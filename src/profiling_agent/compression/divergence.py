"""How far a model's outputs lie from the original's, sample by sample, without labels.

For logits of classes the Kullback-Leibler divergence of their softmax; for other outputs half the
squared difference over a variance, which is that divergence between two normal distributions that
spread by it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


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
