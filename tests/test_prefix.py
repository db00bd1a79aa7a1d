"""Forwards that begin where something changed give what whole forwards give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.demo_models import DemoResNet, DemoViT
from profiling_agent.compression.groups import find_groups
from profiling_agent.compression.surgery import pruned
from profiling_agent.machine.torch_state import threads
from profiling_agent.profiling import prefix
from profiling_agent.profiling.prefix import Prefix
from profiling_agent.profiling.sensitivity import Divergence


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


class Scaled(nn.Module):
    """Writes into what it is given, and returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x.mul_(2.0)
        return self.layer(x), None


class Tangled(nn.Module):
    """A layer that is called twice, one that answers with a dictionary, writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.scaled = nn.Linear(6, 6), nn.Linear(6, 6), Scaled()
        self.named = Named()
        self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)))
        x, _ = self.scaled(x)
        x = self.named(x)["x"].relu_()
        return self.last(self.middle(x).relu())


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x + 1}


def build(kind: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(5)
    if kind == "tangled":
        return Tangled().eval(), [{"x": torch.randn(7, 6)} for _ in range(2)]
    model = (DemoViT if kind == "vit" else DemoResNet)().eval()
    return model, [{"x": torch.randn(4, 1, 28, 28)} for _ in range(2)]


@pytest.mark.parametrize("kind", ["vit", "resnet", "tangled"])
def test_every_group_has_the_outputs_of_whole_forwards(kind: str) -> None:
    model, batches = build(kind)
    groups = find_groups(model, {"x": batches[0]["x"][:2].clone()}).groups
    assert groups
    known = Prefix(model, [dict(batch) for batch in batches])
    for group in groups:
        kept = {group.id: np.arange(0, group.width, 2)}
        with pruned(model, groups, kept):
            whole = [out.clone() for out in known.run(None)]
            short = [out.clone() for out in known.run(group.modules)]
        assert len(whole) == len(short) == 2
        for one, other, before in zip(whole, short, known.first, strict=True):
            assert torch.equal(one, other)
            assert not torch.equal(one, before)
    for again, before in zip(known.run(None), known.first, strict=True):
        assert torch.equal(again, before)
    assert not any("forward" in vars(module) for module in model.modules())


def calls_of(model: nn.Module, known: Prefix, changed: Any) -> set[str]:
    """Names of the modules without children whose own forward runs."""
    ran: set[str] = set()
    leaves = {n: m for n, m in model.named_modules() if not any(True for _ in m.children())}
    kept = {name: module.forward for name, module in leaves.items()}
    for name, module in leaves.items():

        def forward(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            ran.add(_name)
            return kept[_name](*args, **kwargs)

        vars(module)["forward"] = forward
    try:
        list(known.run(changed))
    finally:
        for module in leaves.values():
            vars(module).pop("forward", None)
    return ran


def test_what_comes_before_is_not_run() -> None:
    model, batches = build("vit")
    known = Prefix(model, batches)
    everything = calls_of(model, known, None)
    last = calls_of(model, known, ["head"])
    assert last == {"head"} < everything
    middle = calls_of(model, known, [next(n for n in everything if n.startswith("blocks.1."))])
    assert any(n.startswith("blocks.1") for n in middle)
    assert not any(n.startswith("blocks.0") for n in middle)
    for unknown in (["head", "not there"], [""]):
        assert calls_of(model, known, unknown) == everything


def test_a_layer_that_is_called_twice_or_names_its_outputs_is_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix, "LARGE", 2.0)  # whatever the clock says
    model, batches = build("tangled")
    known = Prefix(model, [dict(batch) for batch in batches])
    assert set(known.unchanged(["last"])) == {"first", "scaled", "middle"}


class Careless(nn.Module):
    """Doubles what it is given in place, and the caller doesn't look at what is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scaled, self.last = nn.Linear(6, 6), Scaled(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.scaled(x)
        return self.last(x)


def test_a_model_whose_parts_write_into_what_they_are_given_is_run_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix, "LARGE", 2.0)
    torch.manual_seed(0)
    model = Careless().eval()
    known = Prefix(model, [{"x": torch.randn(5, 6)}])
    assert known.unchanged(["last"]) == []
    assert torch.equal(next(known.run(["last"])), known.first[0])


def test_too_much_to_keep_means_that_everything_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "MAX_BYTES", 1000)
    model, batches = build("vit")
    known = Prefix(model, batches)
    assert known._kept == {} and known._bytes < 500_000  # one output over the limit
    assert all(torch.equal(a, b) for a, b in zip(known.run(["head"]), known.first, strict=True))


def test_divergence_is_the_same_with_less_work() -> None:
    model, batches = build("vit")
    divergence = Divergence(model, batches, has_classes=True)
    groups = find_groups(model, {"x": batches[0]["x"][:2]}).groups
    group = groups[-1]
    assert divergence.measure(group.modules)[0] == 0.0
    with pruned(model, groups, {group.id: np.arange(group.width // 2)}):
        assert divergence.measure(group.modules) == divergence.measure()
        assert divergence.measure()[0] > 0
