"""Groups, their removal and its repair: each claim against a reference computed another way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.acquisition.demo_models import DemoResNet, DemoViT
from profiling_agent.acquisition.workload import compute_logits
from profiling_agent.compression.compress import Compressor
from profiling_agent.compression.group import Group, Member
from profiling_agent.compression.groups import Discovery, find_groups, prove
from profiling_agent.compression.importance import removal_order
from profiling_agent.compression.recast import recast
from profiling_agent.compression.repair import (
    RIDGE,
    columns_that_stay,
    recalibrate_batch_norms,
    repair_consumers,
)
from profiling_agent.compression.statistics import consumers_of, gather_moments
from profiling_agent.compression.surgery import masked, pruned, remove_units, restoring
from profiling_agent.errors import TrialError
from profiling_agent.machine.torch_state import threads
from profiling_agent.records.plan import Importance, Plan, PruningLine, Repair
from small_workload import random_workload


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


# ---- models of each kind ------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Separate projections; the layer that reads the heads belongs to a sibling."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.attention_head_size = width // heads
        self.all_head_size = width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x.reshape(*x.shape[:2], self.all_head_size)


class SelfOutput(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class HfBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.output = SelfOutput(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.output(self.attention(x))


class HfViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.layer = nn.ModuleList(HfBlock(12, 3) for _ in range(2))
        self.norm = nn.LayerNorm(12)
        self.classifier = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.layer:
            x = block(x)
        return self.classifier(self.norm(x).mean(1))


class InterleavedHeads(nn.Module):
    """A fused projection whose heads come first, (heads, 3, head_dim), unlike timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.query_key_value, self.dense = nn.Linear(12, 36), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.query_key_value(x).view(b, t, self.num_heads, 3, 4)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.dense(x.reshape(b, t, -1)).mean(1)


class HeadsAsProperty(InterleavedHeads):
    """The number of heads can't be set: it is read off the layer."""

    num_heads = property(lambda self: self.query_key_value.out_features // 12, lambda self, _: None)


class UnsettableHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 4)

    @property
    def num_heads(self) -> int:
        return self.qkv.out_features // 12

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.num_heads, 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(b, t, -1)).mean(1)


class OptionA(nn.Module):
    """CIFAR's ResNet: a shortcut without parameters, subsampled and padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(x + short).mean((2, 3)))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.bn = nn.BatchNorm2d(6)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.depthwise(F.relu(self.stem(x)))))
        return self.fc(F.relu(self.pointwise(x)).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 5, 3, padding=1)
        self.b = nn.Conv2d(5, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(9)
        self.c = nn.Conv2d(9, 6, 3, padding=1)
        self.fc = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = torch.cat([a, F.relu(self.b(a))], 1)
        c = torch.cat([b, F.relu(self.c(self.bn(b)))], 1)
        return self.fc(c.mean((2, 3)))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 4, 3), nn.Linear(144, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class Baked(Flat):
    """Sizes are written into the forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).view(-1, 144)
        return self.fc2(F.relu(self.fc1(x)).view(-1, 10))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.c, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.c(self.b(F.relu(self.a(x))))).mean((2, 3)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(F.relu(self.shared(F.relu(self.first(x))))))


class Permuted(nn.Module):
    """Moves units in a way the dependency graph can't see; ``scale`` makes the logits small."""

    def __init__(self, permute: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)
        self.permute, self.scale = permute, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.b(self.permute(F.relu(self.a(x))))


class Refuses(nn.Module):
    """Raises a ``KeyError`` at any width but its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h * {8: 1.0}[h.shape[1]])


IMAGE, TOKENS, ROW = (1, 8, 8), (6, 5), (5,)
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vit": (lambda: DemoViT(image_size=8, width=16, num_heads=4, depth=2), IMAGE),
    "resnet": (lambda: DemoResNet(widths=(4, 6, 8), depth=1), IMAGE),
    "hf-vit": (HfViT, TOKENS),
    "interleaved": (InterleavedHeads, (6, 12)),
    "property": (HeadsAsProperty, (6, 12)),
    "unsettable": (UnsettableHeads, (6, 8)),
    "option-a": (OptionA, IMAGE),
    "separable": (Separable, IMAGE),
    "dense": (Dense, IMAGE),
    "flat": (Flat, IMAGE),
    "baked": (Baked, IMAGE),
    "grouped": (Grouped, IMAGE),
    "twice": (Twice, ROW),
}


def awaken(model: nn.Module) -> nn.Module:
    """Eval mode, and batch norms with statistics and weights as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean)
            module.running_var = torch.rand_like(module.running_var) + 0.5
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = ZOO[name]
    model, x = awaken(build()), torch.randn(3, *shape)
    return recast(model, {"x": x}), x


def discover(model: nn.Module, x: Tensor) -> Discovery:
    return find_groups(model, {"x": x})


def frozen_ids(found: Discovery) -> set[str]:
    return {entry.id for entry in found.frozen}


# ---- groups -------------------------------------------------------------------------------------

EXPECTED = {
    "vit": {
        "channels:patch_embed.conv": 32,
        "channels:patch_embed.proj": 16,
        "heads:blocks.0.attn.qkv": 4,
        "mlp:blocks.0.mlp.fc1": 64,
        "heads:blocks.1.attn.qkv": 4,
        "mlp:blocks.1.mlp.fc1": 64,
    },
    "resnet": {
        "channels:conv1": 4,
        "channels:layers.0.0.conv1": 4,
        "channels:layers.1.0.conv1": 6,
        "channels:layers.1.0.conv2": 6,
        "channels:layers.2.0.conv1": 8,
        "channels:layers.2.0.conv2": 8,
    },
    "hf-vit": {
        "channels:embed": 12,
        "heads:layer.0.attention.query": 3,
        "heads:layer.1.attention.query": 3,
    },
    "interleaved": {"heads:query_key_value": 3},
    "property": {"heads:query_key_value": 3},
    "unsettable": {"heads:qkv": 2},
    "option-a": {"channels:stem": 4, "channels:conv1": 8},
    "separable": {"channels:stem": 6, "channels:pointwise": 8},
    "dense": {"channels:a": 5, "channels:b": 4, "channels:c": 6},
    "flat": {"channels:conv": 4, "mlp:fc1": 10},
    "baked": {"channels:conv": 4, "mlp:fc1": 10},
    "grouped": {"channels:a": 4, "channels:b": 4, "channels:c": 6},
    "twice": {"mlp:first": 8},
}


@pytest.mark.parametrize("name", ZOO)
def test_the_groups_of_each_kind_of_model(name: str) -> None:
    found = discover(*make(name))
    assert {group.id: group.width for group in found.groups} == EXPECTED[name]
    assert all(entry.reason for entry in found.frozen)
    assert not frozen_ids(found) & set(EXPECTED[name])


def test_groups_come_in_the_order_of_the_forward() -> None:
    ids = [group.id for group in discover(*make("vit")).groups]
    assert ids == list(EXPECTED["vit"])


@torch.inference_mode()
def gap(model: nn.Module, groups: Sequence[Group], kept: dict[str, np.ndarray], x: Tensor) -> float:
    """Between the model without units and the one with those units silenced."""
    with masked(model, groups, kept):
        reference = compute_logits(model, {"x": x})
    with pruned(model, groups, kept):
        result = compute_logits(model, {"x": x})
    assert result.shape == reference.shape
    return float((result - reference).abs().max() / reference.abs().max())


def draw(group: Group, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(group.width)[: rng.integers(1, group.width)])


@pytest.mark.parametrize("name", [name for name in ZOO if EXPECTED[name]])
def test_removing_any_units_of_a_group_is_silencing_them(name: str) -> None:
    model, x = make(name)
    groups, rng = discover(model, x).groups, np.random.default_rng(1)
    for group in groups:
        for _ in range(3):
            kept = {group.id: draw(group, rng)}
            assert gap(model, groups, kept, x) < 1e-4, group.id
            assert gap(model, groups, kept, x[:1]) < 1e-4, group.id


@pytest.mark.parametrize("name", [name for name in ZOO if EXPECTED[name]])
def test_removing_units_of_all_groups_together_is_silencing_them(name: str) -> None:
    model, x = make(name)
    groups, rng = discover(model, x).groups, np.random.default_rng(2)
    for _ in range(5):
        kept = {group.id: draw(group, rng) for group in groups}
        assert gap(model, groups, kept, x) < 1e-4
        assert gap(model, groups, kept, x[:1]) < 1e-4
        one_each = {group.id: draw(group, rng)[:1] for group in groups}
        assert gap(model, groups, one_each, x[:1]) < 1e-4


PERMUTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "halves swapped by roll": lambda h: torch.roll(h, h.shape[1] // 2, 1),
    "halves swapped by view": lambda h: h.view(-1, 2, h.shape[1] // 2).flip(1).flatten(1),
    "reversed": lambda h: h.flip(1),
    "shuffled": lambda h: h.view(-1, 2, h.shape[1] // 2).transpose(1, 2).flatten(1),
    "normalised over units": lambda h: F.normalize(h, dim=1),
}

IN_PAIRS = ("halves swapped by view", "shuffled")
"""A unit and its fellow in the other half, which a view sets against each other."""


@pytest.mark.parametrize("how", PERMUTATIONS)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_units_that_are_moved_are_frozen_or_go_in_pairs(how: str, scale: float) -> None:
    torch.manual_seed(0)
    model, x = Permuted(PERMUTATIONS[how], scale).eval(), torch.randn(3, 5)
    found = discover(model, x)
    if how not in IN_PAIRS:
        assert found.groups == ()
        assert "mlp:a" in frozen_ids(found)
        return
    assert [(group.id, group.width) for group in found.groups] == [("mlp:a", 4)]
    for unit in range(4):
        assert gap(model, found.groups, {"mlp:a": np.array([unit])}, x) < 1e-4


def test_a_forward_that_raises_anything_at_another_width_is_frozen() -> None:
    found = discover(Refuses().eval(), torch.randn(3, 5))
    assert found.groups == ()
    reasons = {entry.id: entry.reason for entry in found.frozen}
    assert "forward fails" in reasons["mlp:a"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_groups_are_found_without_gradients(mode: Callable[[], Any]) -> None:
    with mode():
        model, x = make("resnet")
        assert {group.id for group in discover(model, x).groups} == set(EXPECTED["resnet"])
    model, x = make("resnet")
    with mode():
        assert {group.id for group in discover(model, x).groups} == set(EXPECTED["resnet"])


def test_finding_groups_leaves_the_model_as_it_was() -> None:
    model, x = make("vit")
    model.patch_embed.conv.weight.requires_grad_(False)
    state, attributes = snapshot(model)
    discover(model, x)
    assert_untouched(model, state, attributes)
    assert [p.requires_grad for p in model.parameters()].count(False) == 1


# ---- surgery ------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = {
        name: {k: v for k, v in vars(module).items() if isinstance(v, int | float | tuple)}
        for name, module in model.named_modules()
    }
    return state, plain


def assert_untouched(
    model: nn.Module, state: dict[str, Tensor], attributes: dict[str, dict[str, Any]]
) -> None:
    now, plain = snapshot(model)
    assert list(now) == list(state)
    assert all(torch.equal(now[key], state[key]) for key in state)
    assert plain == attributes


def stop(model: nn.Module, state: dict[str, Tensor]) -> None:
    changed = model.state_dict()
    assert any(not torch.equal(changed[key], state[key]) for key in state)
    raise RuntimeError("stop")


@pytest.mark.parametrize("name", ["vit", "separable", "dense"])
def test_everything_is_put_back_even_after_an_error(name: str) -> None:
    model, x = make(name)
    groups = discover(model, x).groups
    kept = {group.id: np.arange(1) for group in groups}
    identities = {key: id(value) for key, value in model.named_parameters()}
    state, attributes = snapshot(model)
    for change in (pruned, masked):
        with pytest.raises(RuntimeError, match="stop"), change(model, groups, kept):
            stop(model, state)
        assert_untouched(model, state, attributes)
        assert {key: id(value) for key, value in model.named_parameters()} == identities


def test_a_parameter_that_was_added_meanwhile_is_taken_away() -> None:
    model, x = make("twice")
    groups = discover(model, x).groups
    with restoring(model, groups):
        model.first.register_parameter("extra", nn.Parameter(torch.ones(1)))
        model.first.register_buffer("more", torch.ones(1))
    assert list(model.first.state_dict()) == ["weight", "bias"]


def test_removed_units_leave_their_attributes_and_sizes() -> None:
    model, x = make("hf-vit")
    groups = discover(model, x).groups
    remove_units(model, groups, {"heads:layer.0.attention.query": np.array([0, 2])})
    attention = model.layer[0].attention
    assert attention.query.weight.shape == (8, 12) and attention.query.out_features == 8
    assert model.layer[0].output.dense.weight.shape == (12, 8)
    assert model.layer[1].attention.query.weight.shape == (12, 12)
    assert model(x).shape == (3, 4)
    separable, image = make("separable")
    remove_units(separable, discover(separable, image).groups, {"channels:stem": np.array([1])})
    assert separable.depthwise.weight.shape == (1, 1, 3, 3)
    assert separable.depthwise.groups == separable.bn.num_features == 1
    assert separable(image).shape == (3, 4)


def test_a_group_with_a_wrong_member_does_not_pass_the_proof() -> None:
    model, x = make("flat")
    units = np.arange(4)[:, None] * 36 + np.arange(36)
    members = (
        Member(module="conv", axis="out", units=np.arange(4)[:, None]),
        Member(module="fc1", axis="in", units=units),
    )
    right = Group(id="channels:conv", kind="channels", root="conv", width=4, members=members)
    assert prove(model, [right], {"x": x}) == {right.id: None}
    strided = Member(module="fc1", axis="in", units=np.arange(144).reshape(36, 4).T)
    wrong = Group(id=right.id, kind="channels", root="conv", width=4, members=(members[0], strided))
    reason = prove(model, [wrong], {"x": x})[wrong.id]
    assert reason is not None and "not the same as silencing" in reason
    others = [group for group in discover(model, x).groups if group.id != wrong.id]
    assert others
    together = prove(model, [*others, wrong], {"x": x})
    assert together == {wrong.id: reason, **{group.id: None for group in others}}
    with torch.no_grad():
        model.fc2.bias += 1e4  # beside which all that units do is small
    assert prove(model, [right], {"x": x}) == {right.id: None}
    assert prove(model, [wrong], {"x": x})[wrong.id] is not None


# ---- statistics and repair ----------------------------------------------------------------------


def layer_inputs(model: nn.Module, name: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(*args))
    with torch.inference_mode():
        model(x)
    handle.remove()
    return seen[0]


def rows_of(layer: nn.Module, x: Tensor) -> np.ndarray:
    """Inputs as explicit rows: what one output position of the layer reads."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double().numpy()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, [p for p in reversed(layer.padding) for _ in range(2)], mode=mode)
    k, s = layer.kernel_size[0], layer.stride[0]
    rows = [
        x[:, :, i : i + k, j : j + k].flatten(1)
        for i in range(0, x.shape[2] - k + 1, s)
        for j in range(0, x.shape[3] - k + 1, s)
    ]
    return torch.cat(rows).double().numpy()


def build_pair(kind: str) -> tuple[nn.Module, Tensor]:
    """A producer and a consumer, with few enough positions that all of them are counted."""
    torch.manual_seed(3)
    if kind.startswith("linear"):
        model = nn.Sequential(
            nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5, bias="no bias" not in kind)
        )
        return model.eval(), torch.randn(96, 6)
    mode, stride = ("reflect", 1) if "reflect" in kind else ("zeros", 2)
    consumer = nn.Conv2d(8, 5, 3, stride, 1, bias="no bias" not in kind, padding_mode=mode)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), consumer, nn.Flatten(), nn.LazyLinear(3)
    model, x = nn.Sequential(*layers), torch.randn(40, 1, 7, 7)
    model(x)
    return model.eval(), x


PAIRS = ["linear", "linear, no bias", "conv", "conv, no bias", "conv, reflect"]


@pytest.mark.parametrize("kind", PAIRS)
def test_moments_are_those_of_the_explicit_inputs(kind: str) -> None:
    model, x = build_pair(kind)
    moments = gather_moments(model, ["2"], [{"x": x[:17]}, {"x": x[17:]}])["2"]
    rows = rows_of(model[2], layer_inputs(model, "2", x))
    assert moments.num_rows == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(moments.second, rows.T @ rows / len(rows), atol=1e-5)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T, bias=True), atol=1e-5)


def test_large_maps_are_thinned_out_without_favouring_a_column() -> None:
    """Each channel is one column of the 16 x 16 map: all of them must be seen."""
    columns = torch.eye(16)[:, None, :].expand(16, 16, 16)
    model = nn.Sequential(nn.Conv2d(16, 2, 1)).eval()
    moments = gather_moments(model, ["0"], [{"x": columns.expand(2, 16, 16, 16)}])["0"]
    assert moments.num_rows == 2 * 64
    torch.testing.assert_close(moments.mean, torch.full((16,), 1 / 16).double())


@pytest.mark.parametrize("kind", PAIRS)
def test_least_squares_is_numpys_on_the_explicit_inputs(kind: str) -> None:
    model, x = build_pair(kind)
    group = discover(model, x[:3]).groups[0]
    kept = {group.id: np.array([0, 2, 3, 6])}
    moments = gather_moments(model, ["2"], [{"x": x}])
    new = repair_consumers(model, [group], kept, moments, "least-squares")["2"]

    layer = model[2]
    rows = rows_of(layer, layer_inputs(model, "2", x))
    weight = layer.weight.detach().flatten(1).double().numpy()
    stay = columns_that_stay(layer, np.array([1, 4, 5, 7]))
    center = 0.0 if layer.bias is None else rows.mean(0)
    centered = rows - center
    ridge = np.sqrt(len(rows) * RIDGE * (centered**2).mean())
    left = np.vstack([centered[:, stay], ridge * np.eye(len(stay))])
    right = np.vstack([centered @ weight.T, ridge * weight[:, stay].T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(new.weight.flatten(1), expected, atol=1e-4)
    if layer.bias is None:
        assert new.bias is None
    else:
        moved = layer.bias.detach().numpy() + weight @ center - expected @ center[stay]
        np.testing.assert_allclose(new.bias, moved, atol=1e-4)


@torch.inference_mode()
def consumer_error(kind: str, method: Repair, kept_units: Sequence[int]) -> float:
    model, x = build_pair(kind)
    group = discover(model, x[:3]).groups[0]
    kept = {group.id: np.array(kept_units)}
    reference = model[:3](x)
    new = repair_consumers(model, [group], kept, gather_moments(model, ["2"], [{"x": x}]), method)
    with pruned(model, [group], kept, new):
        return float((model[:3](x) - reference).square().mean())


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("units", [(0, 2, 3, 6), (1,), (0, 1, 2, 3, 4, 5, 6)])
def test_repair_never_makes_the_reconstruction_worse(kind: str, units: tuple[int, ...]) -> None:
    none = consumer_error(kind, "none", units)
    shift = consumer_error(kind, "mean-shift", units)
    squares = consumer_error(kind, "least-squares", units)
    assert squares <= shift * (1 + 1e-5)
    assert shift <= none * (1 + 1e-5)
    assert squares < 0.95 * none


def with_twins(kind: str, width: int = 64) -> tuple[nn.Module, Tensor, list[tuple[int, int]]]:
    """A network in which some units are exact copies of others and some are dead."""
    torch.manual_seed(4)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 6))
        x = torch.randn(600, 12)
    else:
        model = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 6, 1), nn.Flatten()
        )
        x = torch.randn(60, 1, 8, 8)
    twins = [(3, 7), (10, 20), (30, 31), (40, 60)]
    with torch.no_grad():
        for one, other in twins:
            model[0].weight[other] = model[0].weight[one]
            model[0].bias[other] = model[0].bias[one]
        for dead in (1, 63):
            model[0].weight[dead] = 0.0
            model[0].bias[dead] = -1.0
    return model.eval(), x, twins


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dead_units_and_one_of_each_pair_go_first_and_for_free(kind: str) -> None:
    model, x, twins = with_twins(kind)
    group = discover(model, x[:3]).groups[0]
    moments = gather_moments(model, consumers_of(model, [group]), [{"x": x}])
    order = removal_order(model, group, "obs", moments)
    first = set(order[:6].tolist())
    assert {1, 63} <= first
    assert all(len(first & set(pair)) == 1 for pair in twins)

    kept = {group.id: np.sort(order[6:])}
    repaired = repair_consumers(model, [group], kept, moments, "least-squares")
    with torch.inference_mode():
        reference = model(x)
        with pruned(model, [group], kept, repaired):
            error = float((model(x) - reference).square().mean() / reference.var())
        with pruned(model, [group], kept):
            unrepaired = float((model(x) - reference).square().mean() / reference.var())
    assert error < 1e-5
    assert unrepaired > 1e-3


@pytest.mark.parametrize("importance", ["magnitude", "variance", "obs"])
@pytest.mark.parametrize("name", ["vit", "resnet", "flat", "separable"])
def test_an_order_has_every_unit_once(name: str, importance: Importance) -> None:
    model, x = make(name)
    groups = discover(model, x).groups
    moments = gather_moments(model, consumers_of(model, groups), [{"x": x}])
    for group in groups:
        order = removal_order(model, group, importance, moments)
        assert sorted(order) == list(range(group.width))


def test_obs_is_the_exact_growth_of_the_error_for_a_single_unit() -> None:
    """Against brute force: remove each unit, refit, and see whose loss is least."""
    model, x = build_pair("linear")
    group = discover(model, x[:3]).groups[0]
    moments = gather_moments(model, ["2"], [{"x": x}])
    losses = [
        consumer_error("linear", "least-squares", [u for u in range(8) if u != gone])
        for gone in range(8)
    ]
    assert removal_order(model, group, "obs", moments)[0] == int(np.argmin(losses))


def test_magnitude_and_variance_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Identity(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([3.0, 1.0, 2.0])))
        model[2].weight.copy_(torch.tensor([[1.0, 4.0, 1.0], [0.0, 0.0, 0.0]]))
    x = torch.randn(50, 3)
    x[:, 1] = 5.0  # the second unit never changes
    group = discover(model, torch.randn(3, 3)).groups[0]
    moments = gather_moments(model, ["2"], [{"x": x}])
    assert list(removal_order(model, group, "magnitude", moments)) == [2, 0, 1]
    assert list(removal_order(model, group, "variance", moments)) == [1, 2, 0]
    assert removal_order(model, group, "obs", moments)[0] == 1


# ---- batch norms --------------------------------------------------------------------------------


def test_batch_norms_get_the_statistics_of_the_data() -> None:
    norm = nn.BatchNorm1d(3, momentum=0.3)
    model = nn.Sequential(norm).eval()
    data = [{"x": 5 + 2 * torch.randn(16, 3)} for _ in range(3)]
    assert recalibrate_batch_norms(model, data) == 1
    means = torch.stack([batch["x"].mean(0) for batch in data]).mean(0)
    variances = torch.stack([batch["x"].var(0) for batch in data]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.3 and not norm.training


def test_a_batch_of_one_sample_has_no_variance_and_is_left_out() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm).eval()
    batch = {"x": torch.randn(8, 3)}
    recalibrate_batch_norms(model, [batch, {"x": torch.randn(1, 3)}])
    torch.testing.assert_close(norm.running_mean, batch["x"].mean(0))
    before = norm.running_mean.clone()
    assert recalibrate_batch_norms(model, [{"x": torch.randn(1, 3)}]) == 0
    assert torch.equal(norm.running_mean, before)


# ---- compress -----------------------------------------------------------------------------------


def plan_of(ratio: float, repair: Repair = "least-squares", match: str = ".*") -> Plan:
    return Plan(runtime="torch", pruning=(PruningLine(match=match, ratio=ratio),), repair=repair)


@pytest.mark.parametrize("name", ["vit", "resnet", "separable", "hf-vit"])
@pytest.mark.parametrize("repair", ["none", "mean-shift", "least-squares", "sequential"])
def test_compress_counts_what_it_did_and_leaves_the_original(name: str, repair: Repair) -> None:
    model, _ = make(name)
    compressor = Compressor(random_workload(model, ZOO[name][1]))
    state, attributes = snapshot(model)
    done = compressor.compress(plan_of(0.5, repair))
    assert_untouched(model, state, attributes)
    groups = {group.id: group for group in compressor.discovery.groups}
    assert done.achieved.widths == {i: (g.width, (g.width + 1) // 2) for i, g in groups.items()}
    assert {i: len(units) for i, units in done.achieved.kept.items()} == {
        i: after for i, (_, after) in done.achieved.widths.items()
    }
    count = sum(p.numel() for p in done.model.parameters())
    assert done.achieved.num_parameters == count < done.achieved.original_parameters
    assert done.achieved.original_parameters == sum(p.numel() for p in model.parameters())
    assert compute_logits(done.model, compressor.workload.example(3)).isfinite().all()


def test_compress_is_deterministic_and_its_keep_sets_are_nested() -> None:
    model, _ = make("resnet")
    twin = copy.deepcopy(model)
    first = Compressor(random_workload(model, IMAGE)).compress(plan_of(0.5))
    second = Compressor(random_workload(twin, IMAGE)).compress(plan_of(0.5))
    assert first.achieved == second.achieved
    states = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    milder = Compressor(random_workload(model, IMAGE)).compress(plan_of(0.25))
    for group_id, units in first.achieved.kept.items():
        assert set(units) <= set(milder.achieved.kept.get(group_id, range(100)))


def test_a_plan_that_removes_nothing_gives_the_same_model() -> None:
    model, x = make("vit")
    done = Compressor(random_workload(model, IMAGE)).compress(plan_of(0.1, match="heads:.*"))
    assert done.achieved.kept == {}
    assert torch.equal(done.model(x), model(x))
    assert done.model is not model


def test_batch_norms_are_recalibrated_after_channels_went() -> None:
    model, _ = make("resnet")
    workload = random_workload(model, IMAGE, num_samples=32)
    smaller = Compressor(workload).compress(plan_of(0.5)).model
    inputs = workload.example(32)
    seen = layer_inputs(smaller, "layers.2.0.bn2", inputs["x"])
    torch.testing.assert_close(
        smaller.get_submodule("layers.2.0.bn2").running_mean,
        seen.mean((0, 2, 3)),
        atol=0.2,
        rtol=0.1,
    )
    bare = Compressor(workload).compress(plan_of(0.5, "none")).model
    assert torch.isin(bare.bn1.running_mean, model.bn1.running_mean).all()


def test_least_squares_keeps_more_of_the_model_than_no_repair() -> None:
    model, _ = make("vit")
    workload = random_workload(model, IMAGE, num_samples=64)
    inputs = workload.example(64)
    with torch.inference_mode():
        reference = model(inputs["x"])
        errors = {
            repair: float(
                (
                    Compressor(workload).compress(plan_of(0.5, repair, "mlp:.*")).model(inputs["x"])
                    - reference
                )
                .square()
                .mean()
            )
            for repair in ("none", "least-squares")
        }
    assert errors["least-squares"] < 0.5 * errors["none"]


class FailsSmall(Flat):
    """Runs pruned at one ratio in the proof, but not when few units are left."""

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.out_channels < 2:
            raise KeyError("too few channels")
        return super().forward(x)


def test_a_forward_that_fails_or_gives_no_numbers_is_a_trial_error() -> None:
    torch.manual_seed(0)
    compressor = Compressor(random_workload(FailsSmall(), IMAGE))
    with pytest.raises(TrialError, match="forward fails: 'too few channels'"):
        compressor.compress(plan_of(0.75, match="channels:conv"))
    bad = FailsSmall()
    nn.init.constant_(bad.fc2.bias, float("nan"))
    compressor = Compressor(random_workload(FailsSmall(), IMAGE))
    _ = compressor.discovery
    compressor.model.fc2.load_state_dict(bad.fc2.state_dict())
    with pytest.raises(TrialError, match="not finite"):
        compressor.compress(plan_of(0.5, "none"))
