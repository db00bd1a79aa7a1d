"""Importance from gradients, and the ridge that is chosen on held-out inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.compression.compress import Compressor
from profiling_agent.compression.groups import find_groups
from profiling_agent.compression.importance import removal_order
from profiling_agent.compression.repair import (
    RIDGES,
    refit,
    repair_consumers,
    with_chosen_ridge,
)
from profiling_agent.compression.sequential import divergence_of, is_held
from profiling_agent.compression.statistics import Gram, gather_moments
from profiling_agent.compression.surgery import pruned
from profiling_agent.compression.taylor import gather_changes
from profiling_agent.errors import TrialError
from profiling_agent.machine.torch_state import threads
from profiling_agent.records.plan import Plan, PruningLine
from small_workload import random_workload


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


class Forked(nn.Module):
    """Units that two layers read, the second with the opposite sign, which cancels the first.

    Half of the units; so nothing changes at the outputs when one of them goes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(6, 8)
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)
        with torch.no_grad():
            self.right.weight[:, :4] = -self.left.weight[:, :4]

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x).tanh()
        return self.left(x) + self.right(x)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.make(x)).detach()


def build(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(7)
    if kind == "linear":
        layers = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)
        return nn.Sequential(*layers).eval(), torch.randn(400, 6)
    if kind == "tokens":
        layers = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.Flatten(), nn.Linear(15, 4)
        return nn.Sequential(*layers).eval(), torch.randn(400, 3, 6)
    layers = (
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 3, 3), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip
    model, x = nn.Sequential(*layers).eval(), torch.randn(400, 1, 6, 6)
    model(x)
    return model, x


@torch.no_grad()
def divergence(model: nn.Module, x: Tensor, layer: str, unit: int, mean: Tensor) -> float:
    """Of the outputs when one channel that a layer reads is its mean."""
    before = F.log_softmax(model(x), -1)

    def silence(_layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        changed = args[0].clone()
        if isinstance(model.get_submodule(layer), nn.Conv2d):
            changed[:, unit] = mean[unit]
        else:
            changed[..., unit] = mean[unit]
        return changed

    handle = model.get_submodule(layer).register_forward_pre_hook(silence)
    after = F.log_softmax(model(x), -1)
    handle.remove()
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["linear", "tokens", "conv"])
def test_taylor_is_twice_the_divergence_of_small_changes(kind: str) -> None:
    model, x = build(kind)
    with torch.no_grad():
        model[2].weight.mul_(0.3)  # small changes, where the expansion holds
    moments = gather_moments(model, ["2"], [{"x": x}])
    changes = gather_changes(model, moments, [{"x": x}] * 10, has_classes=True)["2"]
    assert changes.shape == (8000, 8)
    mean = moments["2"].mean.float().reshape(8, -1).mean(1)
    exact = [divergence(model, x, "2", unit, mean) for unit in range(8)]
    np.testing.assert_allclose(changes.square().mean(0) / 2, exact, rtol=0.2, atol=2e-5)


def test_units_that_cancel_out_go_first() -> None:
    torch.manual_seed(0)
    model, x = Forked().eval(), torch.randn(200, 6)
    (group,) = find_groups(model, {"x": x[:2]}).groups
    moments = gather_moments(model, ["left", "right"], [{"x": x}])
    changes = gather_changes(model, moments, [{"x": x}], has_classes=True)
    assert set(removal_order(model, group, "taylor", moments, changes)[:4]) == {0, 1, 2, 3}
    assert set(removal_order(model, group, "variance", moments)[:4]) != {0, 1, 2, 3}


def test_taylor_leaves_the_model_as_it_was_and_repeats() -> None:
    model, x = build("conv")
    model.requires_grad_(False)
    moments = gather_moments(model, ["2"], [{"x": x[:50]}])
    first, again = (
        gather_changes(model, moments, [{"x": x[:50]}], has_classes=True)["2"] for _ in range(2)
    )
    assert torch.equal(first, again)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not model[2]._forward_pre_hooks


def test_taylor_of_outputs_that_are_no_classes_is_the_squared_change_over_their_spread() -> None:
    model, x = build("linear")
    moments = gather_moments(model, ["2"], [{"x": x}])
    changes = gather_changes(model, moments, [{"x": x}] * 20, has_classes=False)["2"]
    with torch.no_grad():
        deviation = model[:2](x) - moments["2"].mean.float()
        expected = deviation.square().mean(0) * model[2].weight.square().sum(0) / model(x).var()
    np.testing.assert_allclose(changes.square().mean(0), expected, rtol=0.1)


def test_a_model_that_lets_no_gradient_through_is_told_so() -> None:
    model, x = Detached().eval(), torch.randn(20, 6)
    moments = gather_moments(model, ["read"], [{"x": x}])
    with pytest.raises(TrialError, match="'taylor' needs gradients"):
        gather_changes(model, moments, [{"x": x}], has_classes=True)


# ---- the ridge ----------------------------------------------------------------------------------


def wide(num_samples: int, noise: float) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A layer of 48 inputs that 12 hidden causes explain, up to noise, in batches of 10 samples."""
    torch.manual_seed(1)
    causes = torch.randn(12, 48)
    x = torch.randn(num_samples, 12) @ causes + noise * torch.randn(num_samples, 48)
    batches = [{"x": part} for part in x.split(10)]
    return nn.Sequential(nn.Linear(48, 48)).eval(), batches


@pytest.mark.parametrize("size", [1, 512, 700])
def test_half_a_gram_matrix_is_the_whole_one(size: int) -> None:
    torch.manual_seed(2)
    rows = torch.randn(40, size)
    gram = Gram(size)
    gram.add(rows[:25])
    before = gram.copy()
    gram.add(rows[25:])
    torch.testing.assert_close(gram.whole(), rows.double().T @ rows.double())
    gram.add(rows[25:], -1.0)
    torch.testing.assert_close(gram.whole(), before.whole())
    assert sum(block.numel() for block in gram._blocks) <= max(512 * size, 0.85 * size**2)


def test_moments_without_the_held_inputs_are_those_of_the_others() -> None:
    model, batches = wide(60, 0.1)
    moments = gather_moments(model, ["0"], batches)["0"]
    firsts = torch.stack([batch["x"][0] for batch in batches])
    assert torch.equal(moments.held, firsts)
    others = gather_moments(model, ["0"], [{"x": torch.cat([b["x"][1:] for b in batches])}])["0"]
    known = moments.without_held()
    assert known.num_rows == others.num_rows == 54
    torch.testing.assert_close(known.mean, others.mean)
    torch.testing.assert_close(known.second, others.second)
    assert not len(others.held)  # a single batch holds nothing back


@pytest.mark.parametrize("num_samples", [30, 2000])
def test_the_ridge_is_the_one_that_does_best_on_inputs_never_seen(num_samples: int) -> None:
    """Few noisy samples want a strong one, many a weak one; judged on 3,000 fresh inputs."""
    model, batches = wide(num_samples + 3000, 0.5)
    layer, seen = model[0], num_samples // 10
    moments = gather_moments(model, ["0"], batches[:seen])["0"]
    fresh = gather_moments(model, ["0"], batches[seen:])["0"]
    chosen = with_chosen_ridge(layer, moments)
    assert not len(chosen.held)
    assert not chosen.held.untyped_storage().nbytes()  # a view would keep all of them
    gone = np.arange(1, 48, 2)
    errors = {}
    for ridge in RIDGES:
        new = refit(layer, gone, replace(moments, ridge=ridge), "least-squares")
        change = layer.weight.detach().double().clone()
        change[:, ::2] -= new.weight
        errors[ridge] = float(torch.einsum("oi,ij,oj->", change, fresh.covariance, change))
    assert errors[chosen.ridge] <= 1.1 * min(errors.values())
    if num_samples == 30:
        assert chosen.ridge > min(RIDGES)
        assert errors[min(RIDGES)] > 1.1 * errors[chosen.ridge]


def test_a_repair_uses_the_ridge_of_the_moments() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).eval()
    x = torch.randn(64, 6)
    group = find_groups(model, {"x": x[:2]}).groups[0]
    moments = gather_moments(model, ["2"], [{"x": x}])["2"]
    kept = {group.id: np.array([0, 1, 2])}
    strong = {"2": replace(moments, ridge=1e9)}
    new = repair_consumers(model, [group], kept, strong, "least-squares")
    torch.testing.assert_close(new["2"].weight, model[2].weight.detach()[:, :3])
    with torch.inference_mode(), pruned(model, [group], kept, new):
        assert torch.isfinite(model(x)).all()


# ---- repair in the order of the forward ---------------------------------------------------------


def deep() -> nn.Module:
    """Four convolutions in a row, the filters of each in pairs that do nearly the same."""
    torch.manual_seed(11)
    layers: list[nn.Module] = []
    for inputs in (2, 16, 16, 16):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(16 * 36, 5)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                layer.weight[8:] = layer.weight[:8] + 0.3 * layer.weight[8:]
                layer.bias[8:] = layer.bias[:8]
    model.train()
    for _ in range(30):
        model(torch.randn(320, 2, 6, 6))
    return model.eval()


def test_fitting_in_order_brings_the_outputs_of_unseen_samples_nearer() -> None:
    model = deep()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    compressor = Compressor(random_workload(model, (2, 6, 6), num_samples=320))
    line = PruningLine(match="channels:.*", ratio=0.5)
    fresh = [{"x": torch.randn(500, 2, 6, 6)}]
    errors = {}
    for repair in ("none", "least-squares", "sequential"):
        plan = Plan(runtime="torch", pruning=(line,), repair=repair)
        smaller = compressor.compress(plan).model
        errors[repair] = divergence_of(model, smaller, fresh, has_classes=True)
    assert errors["sequential"] < errors["least-squares"] < errors["none"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_which_batches_are_held_out() -> None:
    held = {
        count: [index for index in range(count) if is_held(index, count)] for count in (1, 2, 7, 16)
    }
    assert held == {1: [], 2: [1], 7: [6], 16: [7, 15]}
