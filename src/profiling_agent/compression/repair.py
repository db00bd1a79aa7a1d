"""Closed-form repair: the consumers of removed units are refitted without training.

A consumer computes ``W x + b`` over inputs x. With S the inputs that stay, least squares asks for
the weights V and bias c that minimise ``E |W x + b - (V x_S + c)|^2 + r |V - W_S|^2``. They are

    V = W_S + (W C[:, S] - W_S C[S, S]) (C[S, S] + r I)^-1,    c = b + (W mu - V mu_S)

with mu and C the mean and covariance of x (He et al. 2017 without the alternation; Optimal Brain
Compensation and CORP use the same normal equations). Mean shift is the cheap form, V = W_S.
A layer without a bias keeps none: there the raw second moment takes the place of C. The ridge r is
chosen for each layer by the error on inputs that were held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.group import Group, Kept, removed_indices
from profiling_agent.compression.statistics import RIDGE, Moments
from profiling_agent.compression.surgery import NewWeights
from profiling_agent.records.plan import Repair

RIDGES = (RIDGE, 1e-4, 1e-2, 1e-1)
"""Tried on held-out inputs; the first wins a tie."""


def repair_consumers(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Kept,
    moments: Mapping[str, Moments],
    method: Repair,
) -> dict[str, NewWeights]:
    """New weights for every consumer with known moments; an empty dictionary for ``none``."""
    if method == "none":
        return {}
    repaired: dict[str, NewWeights] = {}
    for (name, axis, _, _), gone in removed_indices(groups, kept).items():
        if axis == "in" and name in moments:
            layer = model.get_submodule(name)
            repaired[name] = refit(layer, gone, moments[name], method)
    return repaired


def refit(layer: nn.Module, gone: np.ndarray, moments: Moments, method: Repair) -> NewWeights:
    """New weights of one consumer without the inputs ``gone``; ``method`` is not ``none``."""
    gram = _spread_of_inputs(layer, moments) if method != "mean-shift" else None
    return _refitted(layer, gone, moments, gram)


def _spread_of_inputs(layer: nn.Module, moments: Moments) -> Tensor:
    """What takes the place of C in the equations above."""
    return moments.second if layer.bias is None else moments.covariance


def _refitted(
    layer: nn.Module, gone: np.ndarray, moments: Moments, gram: Tensor | None
) -> NewWeights:
    """By least squares with ``gram``, by mean shift without."""
    assert isinstance(layer.weight, Tensor)
    full = layer.weight.detach()
    weight = full.double().flatten(1)
    bias = layer.bias.detach().double() if isinstance(layer.bias, Tensor) else None
    stay = torch.from_numpy(columns_that_stay(layer, gone))
    new = weight[:, stay] if gram is None else _least_squares(weight, gram, stay, moments.ridge)
    if bias is not None:
        bias = bias + weight @ moments.mean - new @ moments.mean[stay]
    num_kept = full.shape[1] - len(gone)
    return NewWeights(
        weight=new.reshape(full.shape[0], num_kept, *full.shape[2:]).to(full.dtype),
        bias=None if bias is None else bias.to(full.dtype),
    )


def columns_that_stay(layer: nn.Module, gone: np.ndarray) -> np.ndarray:
    """Columns of the flattened weight that belong to the inputs that stay."""
    assert isinstance(layer.weight, Tensor)
    size, patch = layer.weight.shape[1], layer.weight[0, 0].numel()
    stay = np.setdiff1d(np.arange(size), gone)
    return (stay[:, None] * patch + np.arange(patch)).reshape(-1)


def with_chosen_ridge(layer: nn.Module, moments: Moments) -> Moments:
    """The moments with the ridge that reconstructs the held-out inputs best, and without these.

    Judged with every second input gone, fitted to all inputs but the held ones.
    """
    assert isinstance(layer.weight, Tensor)
    ridge, size = RIDGE, layer.weight.shape[1]
    if len(moments.held) and size > 1:
        known, gone = moments.without_held(), np.arange(1, size, 2)
        gram = _spread_of_inputs(layer, known)
        errors = [
            _held_error(layer, gone, _refitted(layer, gone, replace(known, ridge=r), gram), moments)
            for r in RIDGES
        ]
        ridge = RIDGES[int(np.argmin(errors))]
    return replace(moments, held=moments.held.new_empty(0, moments.held.shape[1]), ridge=ridge)


def _held_error(layer: nn.Module, gone: np.ndarray, new: NewWeights, moments: Moments) -> float:
    """Mean squared change of the layer's outputs on the held inputs, refitted without ``gone``."""
    assert isinstance(layer.weight, Tensor)
    held = moments.held
    stay = torch.from_numpy(columns_that_stay(layer, gone))
    change = held @ layer.weight.detach().flatten(1).T - held[:, stay] @ new.weight.flatten(1).T
    if new.bias is not None:
        assert isinstance(layer.bias, Tensor)
        change += layer.bias.detach() - new.bias
    return float(change.double().square().mean())


def _least_squares(weight: Tensor, gram: Tensor, stay: Tensor, ridge: float) -> Tensor:
    inner = gram[stay][:, stay]
    # pulled towards the old weights and not towards zero: what the data never excites keeps
    # the weight it had
    old = weight[:, stay]
    gap = (weight @ gram)[:, stay] - old @ inner
    inner.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-12))
    return old + torch.linalg.solve(inner, gap.T).T


@torch.inference_mode()
def recalibrate_batch_norms(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Re-estimate the running statistics of all batch norms; returns how many there are.

    Batches of a single sample are left out, since they have no variance; without any other batch
    the statistics stay as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats and m.running_mean is not None]
    batches = [batch for batch in batches if len(next(iter(batch.values()))) > 1]
    if not norms or not batches:
        return 0
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average over all batches
            norm.train()
        for batch in batches:
            compute_logits(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    return len(norms)
