"""Groups in modules that each have one trap, also against units that a hook silences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from profiling_agent.compression.group import Group
from profiling_agent.compression.groups import find_groups
from profiling_agent.compression.recast import recast
from profiling_agent.compression.surgery import masked, pruned, remove_units
from profiling_agent.deployment.exporting import export_program

TOKENS, IMAGE = (6, 8), (3, 8, 8)


class Attention(nn.Module):
    """Four heads of width two over tokens of width eight; ``style`` says how it is written."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.heads, self.dim = style, 4, 2
        self.scale = self.dim**-0.5
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(11, 4))
        self.index = torch.arange(6)[:, None] - torch.arange(6)[None, :] + 5
        self.mix = nn.Linear(4, 4)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        qkv = self.qkv(x)
        if self.style == "chunk":
            return tuple(
                part.view(b, n, self.heads, c // self.heads).transpose(1, 2)
                for part in qkv.chunk(3, dim=-1)
            )
        if self.style == "split":
            return tuple(
                part.reshape(b, n, self.heads, -1).transpose(1, 2)
                for part in torch.split(qkv, [8, 8, 8], dim=-1)
            )
        if self.style == "slices":
            return tuple(
                qkv[:, :, at : at + 8].unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
                for at in (0, 8, 16)
            )
        return qkv.reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.parts(x)
        if self.style == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) * self.scale
            if self.style == "table":
                scores = scores + self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
            if self.style == "talking":
                scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class CrossCovariance(nn.Module):
    """XCiT's: channels attend to channels, so their number is fixed inside a head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(8, 24), nn.Linear(8, 8), 4

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        y = scores.softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2).reshape(b, n, c))


class ClassAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x[:, 0]).unsqueeze(1).reshape(b, 1, 4, 2).permute(0, 2, 1, 3)
        k, v = (layer(x).reshape(b, n, 4, 2).permute(0, 2, 1, 3) for layer in (self.k, self.v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return torch.cat([self.proj(y.transpose(1, 2).reshape(b, 1, 8)), x[:, 1:]], 1)


class GroupedQuery(nn.Module):
    """Two key and value heads serve four query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, n) for n in (8, 4, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 2).transpose(1, 2)
        k, v = (
            layer(x).view(b, n, 2, 2).transpose(1, 2)[:, :, None].expand(b, 2, 2, n, 2)
            .reshape(b, 4, n, 2)
            for layer in (self.k, self.v)
        )  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class GroupedByFlag(GroupedQuery):
    """The same, but it is the product that repeats keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class GroupedByRepeat(GroupedQuery):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Swin(nn.Module):
    """Two windows of three tokens, a table of relative positions, and a mask for each window."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(5, 4))
        self.index = torch.arange(3)[:, None] - torch.arange(3)[None, :] + 2
        self.mask = torch.zeros(2, 3, 3)
        self.mask[1, 0, 2] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        windows = x.view(b, 2, 3, c).reshape(-1, 3, c)
        qkv = self.qkv(windows).reshape(-1, 3, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = q @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(3, 3, -1).permute(2, 0, 1)[None]
        scores = scores.view(-1, 2, 4, 3, 3) + self.mask[:, None]
        y = (scores.view(-1, 4, 3, 3).softmax(-1) @ v).transpose(1, 2).reshape(-1, 3, c)
        return self.proj(y).view(b, n, c)


class SingleHead(nn.Module):
    """One head: only its width can go, and the scale must stay that of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, n) for n in (6, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Stale(nn.Module):
    """Keeps what it gathered once by device, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table, self.kept = nn.Parameter(torch.randn(4, 11)), {}
        self.index = torch.arange(6)[:, None] - torch.arange(6)[None, :] + 5

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.table[:, self.index]
        q, k, v = self.qkv(x).view(b, n, 4, -1).split([2, 2, 2], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        scores = (q @ k + self.kept[str(x.device)]).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, 8))


class Response(nn.Module):
    """ConvNeXt V2's global response norm: an average over the units."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=1, keepdim=True)
        return x + self.bias + self.weight * x * size / size.mean(-1, keepdim=True)


class RootMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Strongest(nn.Module):
    """Units of a token compete."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x >= x.topk(3, -1).values[..., -1:])


class OverTokens(nn.Module):
    """A norm whose order, 2, is no axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(2, dim=1)[:, None]


class Constants(nn.Module):
    """Keeps in a dictionary what no forward brings back."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"shift": torch.ones(1)}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kept["shift"]


class Again(nn.Module):
    """One norm, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.relu(self.norm(self.up(x)))))


class OneWeight(nn.Module):
    """Two layers that share a weight, of which only one could be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.one(x)) * self.other(x).sigmoid())


class LayerScale(nn.Module):
    """A branch that starts at almost nothing, so that silencing it would show nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gamma = nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(F.gelu(self.up(x)))


def neurons(between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), between, nn.Linear(12, 8))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tokens(x.transpose(1, 2)).transpose(1, 2)


class Windows(nn.Module):
    """B * C in one axis, as MobileViT unfolds its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        b, c, h, w = x.shape
        x = x.reshape(b * c, h // 2, 2, w).transpose(1, 2).reshape(b, c, h, w)
        return self.down(x)


class Convolutions(nn.Module):
    """A stem of eight channels, something, and a last convolution."""

    def __init__(self, between: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.between = nn.Conv2d(3, 8, 3, padding=1), between
        self.last = nn.Conv2d(width, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(F.relu(self.stem(x))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Res2Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = 2
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.width, 1)
        done: list[Tensor] = []
        for conv, part in zip(self.convs, parts, strict=False):
            done.append(F.relu(conv(part if not done else done[-1] + part)))
        return torch.cat([*done, parts[3]], 1)


class Unequal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, groups=n) for n in (3, 5))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([3, 5], 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, F.relu(self.a(x))], 1)
        return torch.cat([x, F.relu(self.b(x))], 1)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=1).real


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class Head(nn.Module):
    """What ends every model here: the tokens or the pixels averaged, and a classifier."""

    def __init__(self, body: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(8, 4)
        self.dims = (2, 3) if shape == IMAGE else (1,)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.body(x)).mean(self.dims))


Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]
STREAM = {"heads:body.qkv": 4}
CASES: dict[str, Case] = {
    **{
        f"attention, {style}": (lambda s=style: Attention(s), TOKENS, dict(STREAM))
        for style in ("unbind", "chunk", "split", "slices", "fused", "table")
    },
    "talking heads": (lambda: Attention("talking"), TOKENS, dict(STREAM)),
    "cross-covariance": (CrossCovariance, TOKENS, dict(STREAM)),
    "class attention": (ClassAttention, TOKENS, {"heads:body.q": 4}),
    "grouped queries": (GroupedQuery, TOKENS, {"heads:body.q": 2}),
    "grouped queries by flag": (GroupedByFlag, TOKENS, {"heads:body.q": 2}),
    "grouped queries by repeating": (GroupedByRepeat, TOKENS, {"heads:body.q": 2}),
    "windows with a mask": (Swin, TOKENS, dict(STREAM)),
    "single head": (SingleHead, TOKENS, {"mlp:body.q": 6, "mlp:body.v": 8}),
    "a cache that goes stale": (Stale, TOKENS, dict(STREAM)),
    "layer norm over units": (lambda: neurons(nn.LayerNorm(12)), TOKENS, {"channels:body.0": 12}),
    "layer norm without weights": (
        lambda: neurons(nn.LayerNorm(12, elementwise_affine=False)),
        TOKENS,
        {"mlp:body.0": 12},
    ),
    "competition of units": (lambda: neurons(Strongest()), TOKENS, {}),
    "norm over tokens": (lambda: neurons(OverTokens()), TOKENS, {"mlp:body.0": 12}),
    "constants in a dictionary": (lambda: neurons(Constants()), TOKENS, {"mlp:body.0": 12}),
    "gated linear unit": (
        lambda: nn.Sequential(nn.Linear(8, 24), nn.GLU(), nn.Linear(12, 8)),
        TOKENS,
        {"mlp:body.0": 12},
    ),
    "a module called twice": (Again, TOKENS, {"channels:body.up": 12}),
    "shared weights": (OneWeight, TOKENS, {}),
    "layer scale": (LayerScale, TOKENS, {"mlp:body.up": 12}),
    "root mean square": (lambda: neurons(RootMean()), TOKENS, {"channels:body.0": 12}),
    "global response": (lambda: neurons(Response()), TOKENS, {"channels:body.0": 12}),
    "gated": (Gated, TOKENS, {"mlp:body.up": 12}),
    "token mixing": (Mixer, TOKENS, {"mlp:body.tokens.0": 10}),
    "batch times channels": (Windows, IMAGE, {"channels:body.up": 6}),
    "squeeze and excite": (
        lambda: Convolutions(SqueezeExcite()),
        IMAGE,
        {"channels:body.stem": 8, "channels:body.between.reduce": 4},
    ),
    "hierarchical split": (
        lambda: Convolutions(Res2Net()),
        IMAGE,
        {
            "channels:body.stem": 2,
            "channels:body.stem/2": 2,
            "channels:body.stem/3": 2,
            "channels:body.stem/4": 2,
            "channels:body.between.convs.2": 2,
        },
    ),
    "unequal split": (
        lambda: Convolutions(Unequal()),
        IMAGE,
        {"channels:body.stem": 3, "channels:body.stem/2": 5},
    ),
    "channel shuffle": (lambda: Convolutions(Shuffle()), IMAGE, {"channels:body.stem": 4}),
    "two groups": (
        lambda: Convolutions(nn.Conv2d(8, 8, 3, padding=1, groups=2)),
        IMAGE,
        {"channels:body.stem": 4, "channels:body.between": 4},
    ),
    "four groups": (
        lambda: Convolutions(nn.Conv2d(8, 8, 3, padding=1, groups=4)),
        IMAGE,
        {"channels:body.stem": 4},
    ),
    "depthwise": (
        lambda: Convolutions(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        IMAGE,
        {"channels:body.stem": 8},
    ),
    "eight groups": (
        lambda: Convolutions(
            nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 32, 1, groups=8)), 32
        ),
        IMAGE,
        {"channels:body.stem": 8, "channels:body.between.0": 8},
    ),
    "transposed convolution": (
        lambda: Convolutions(nn.ConvTranspose2d(8, 6, 2, stride=2), 6),
        IMAGE,
        {"channels:body.stem": 8},
    ),
    "dense connections": (
        lambda: Convolutions(DenseNet(), 16),
        IMAGE,
        {"channels:body.stem": 8, "channels:body.between.a": 4, "channels:body.between.b": 4},
    ),
    "instance norm": (
        lambda: Convolutions(nn.InstanceNorm2d(8, affine=True)),
        IMAGE,
        {"channels:body.stem": 8},
    ),
    "group norm of each channel": (
        lambda: Convolutions(nn.GroupNorm(8, 8)),
        IMAGE,
        {"channels:body.stem": 8},
    ),
    "group norm": (lambda: Convolutions(nn.GroupNorm(2, 8)), IMAGE, {"channels:body.stem": 4}),
    "batch norm without weights": (
        lambda: Convolutions(nn.BatchNorm2d(8, affine=False)),
        IMAGE,
        {"channels:body.stem": 8},
    ),
    "pixels to channels": (
        lambda: Convolutions(nn.PixelUnshuffle(2), 32),
        IMAGE,
        {"channels:body.stem": 8},
    ),
    "an operator without a rule": (lambda: Convolutions(Fourier()), IMAGE, {}),
    "softmax over channels": (lambda: Convolutions(Softmax()), IMAGE, {}),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Tensor, tuple[Group, ...]]:
    torch.manual_seed(0)
    make, shape, _ = CASES[name]
    model, x = Head(make(), shape).eval(), torch.randn(3, *shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
    model = recast(model, {"x": x})
    return model, x, find_groups(model, {"x": x}).groups


@pytest.mark.parametrize("name", CASES)
def test_the_groups_are_those_that_can_go(name: str) -> None:
    model, x, groups = build(name)
    inside = [group for group in groups if "fc" not in {m.module for m in group.consumers}]
    assert {group.id: group.width for group in inside} == CASES[name][2]
    frozen = find_groups(model, {"x": x}).frozen
    assert all(entry.reason for entry in frozen)
    assert "its units are the model's output" in {e.id: e.reason for e in frozen}["mlp:fc"]


@pytest.mark.parametrize(
    ("name", "group", "reason"),
    [
        ("an operator without a rule", "channels:body.stem", "fft"),
        ("softmax over channels", "channels:body.stem", "softmax"),
        ("competition of units", "mlp:body.0", "sorting"),
        ("shared weights", "mlp:body.one", "'weight' is shared with 'body.other'"),
        ("transposed convolution", "channels:body.between", "transposed"),
    ],
)
def test_what_can_not_go_has_its_reason(name: str, group: str, reason: str) -> None:
    model, x, _ = build(name)
    reasons = {entry.id: entry.reason for entry in find_groups(model, {"x": x}).frozen}
    assert reason in reasons[group]


def test_constants_in_a_dictionary_stay() -> None:
    model, x, _ = build("constants in a dictionary")
    assert list(model.body[2].kept) == ["shift"]
    assert model(x).isfinite().all()


@torch.no_grad()
def test_a_cache_that_is_already_full_is_emptied() -> None:
    torch.manual_seed(0)
    model, x = Head(Stale(), TOKENS).eval(), torch.randn(3, *TOKENS)
    model(x)
    assert model.body.kept
    groups, kept = find_groups(model, {"x": x}).groups, {"heads:body.qkv": np.array([1, 2])}
    with masked(model, groups, kept):
        reference = model(x)
    with pruned(model, groups, kept):
        assert torch.allclose(model(x), reference, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_any_units_may_go_at_any_batch_size_and_the_rest_is_exported(name: str) -> None:
    model, x, groups = build(name)
    before = model(x)
    rng = np.random.default_rng(0)
    for draw in range(3):
        kept = {
            group.id: np.sort(rng.choice(group.width, rng.integers(1, group.width), replace=False))
            for group in groups
        }
        for batch in (1, 3):
            with masked(model, groups, kept):
                reference = model(x[:batch])
            with pruned(model, groups, kept):
                assert torch.allclose(model(x[:batch]), reference, atol=1e-5)
        assert torch.allclose(model(x), before, atol=1e-6), "the model is as it was"
        if draw == 0:
            with pruned(model, groups, kept):
                exported = export_program(model, {"x": x}).program.module()
            with masked(model, groups, kept):
                assert torch.allclose(exported(x), model(x), atol=1e-5)


@torch.no_grad()
def test_a_copy_of_a_smaller_model_is_independent() -> None:
    model, x, groups = build("attention, unbind")
    small = copy.deepcopy(model)
    remove_units(small, groups, {"heads:body.qkv": np.array([0, 2])})
    twin = copy.deepcopy(small)
    reference = small(x)
    small.body.qkv.weight.zero_()
    assert torch.allclose(twin(x), reference)
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("style", ["unbind", "chunk", "split", "slices", "fused", "table"])
def test_what_was_made_smaller_can_be_made_smaller_again(style: str) -> None:
    model, x, groups = build(f"attention, {style}")
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    remove_units(once, groups, {"heads:body.qkv": np.array([0, 3])})
    remove_units(twice, groups, {"heads:body.qkv": np.array([0, 1, 3])})
    fewer = find_groups(twice, {"x": x}).groups
    remove_units(twice, fewer, {"heads:body.qkv": np.array([0, 2])})
    assert torch.allclose(once(x), twice(x), atol=1e-6)


class Viewed(SingleHead):
    """A scale and a size that are corrected in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.proj(y.view(len(x), -1, 8))


@torch.no_grad()
def test_a_scale_corrected_before_stays_when_other_units_go() -> None:
    torch.manual_seed(0)
    model, x = Head(Viewed(), TOKENS).eval(), torch.randn(3, *TOKENS)
    groups = find_groups(model, {"x": x}).groups
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    keys, values = {"mlp:body.q": np.array([0, 2, 5])}, {"mlp:body.v": np.array([1, 6])}
    remove_units(once, groups, keys | values)
    remove_units(twice, groups, keys)
    fewer = find_groups(twice, {"x": x}).groups
    assert "mlp:body.v" in {group.id for group in fewer}
    remove_units(twice, fewer, values)
    assert torch.allclose(once(x), twice(x), atol=1e-6)


# ---- a reference that is not ours: units silenced by hooks after the activation


def silence(layer: nn.Module, gone: list[int]) -> Any:
    """Zero some inputs of a layer; what they feed it is then nothing."""

    def hook(_layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        dim = 1 if x.dim() == 4 else -1
        return (x.index_fill(dim, torch.tensor(gone), 0.0),)

    return layer.register_forward_pre_hook(hook)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "group", "unit", "reader", "columns"),
    [
        ("attention, unbind", "heads:body.qkv", 1, "body.proj", [2, 3]),
        ("attention, table", "heads:body.qkv", 3, "body.proj", [6, 7]),
        ("attention, chunk", "heads:body.qkv", 0, "body.proj", [0, 1]),
        ("grouped queries", "heads:body.q", 1, "body.proj", [4, 5, 6, 7]),
        ("grouped queries by flag", "heads:body.q", 1, "body.proj", [4, 5, 6, 7]),
        ("grouped queries by repeating", "heads:body.q", 0, "body.proj", [0, 1, 2, 3]),
        ("windows with a mask", "heads:body.qkv", 2, "body.proj", [4, 5]),
        ("class attention", "heads:body.q", 1, "body.proj", [2, 3]),
        ("cross-covariance", "heads:body.qkv", 0, "body.proj", [0, 1]),
        ("a cache that goes stale", "heads:body.qkv", 3, "body.proj", [6, 7]),
        ("single head", "mlp:body.v", 5, "body.proj", [5]),
        ("gated linear unit", "mlp:body.0", 4, "body.2", [4]),
        ("norm over tokens", "mlp:body.0", 4, "body.3", [4]),
        ("constants in a dictionary", "mlp:body.0", 8, "body.3", [8]),
        ("dense connections", "channels:body.stem", 3, "body.between", [3]),
        ("squeeze and excite", "channels:body.stem", 6, "body.between", [6]),
        ("hierarchical split", "channels:body.stem/4", 1, "body.last", [7]),
        ("unequal split", "channels:body.stem/2", 4, "body.last", [7]),
        ("two groups", "channels:body.stem", 1, "body.between", [1, 5]),
        ("two groups", "channels:body.between", 1, "body.last", [1, 5]),
        ("four groups", "channels:body.stem", 1, "body.last", [2, 3]),
        ("depthwise", "channels:body.stem", 5, "body.last", [5]),
        ("eight groups", "channels:body.between.0", 2, "body.last", [8, 9, 10, 11]),
        ("transposed convolution", "channels:body.stem", 2, "body.between", [2]),
        ("instance norm", "channels:body.stem", 2, "body.last", [2]),
        ("group norm of each channel", "channels:body.stem", 2, "body.last", [2]),
        ("batch norm without weights", "channels:body.stem", 2, "body.last", [2]),
        ("gated", "mlp:body.up", 7, "body.down", [7]),
        ("token mixing", "mlp:body.tokens.0", 4, "body.tokens.2", [4]),
        ("channel shuffle", "channels:body.stem", 2, "body.last", [4, 5]),
        ("batch times channels", "channels:body.up", 3, "body.down", [3]),
        ("pixels to channels", "channels:body.stem", 6, "body.last", [24, 25, 26, 27]),
    ],
)
def test_a_removed_unit_is_one_whose_reader_sees_zeros(
    name: str, group: str, unit: int, reader: str, columns: list[int]
) -> None:
    model, x, groups = build(name)
    handle = silence(model.get_submodule(reader), columns)
    reference = model(x)
    handle.remove()
    width = next(g.width for g in groups if g.id == group)
    with pruned(model, groups, {group: np.delete(np.arange(width), unit)}):
        assert torch.allclose(model(x), reference, atol=1e-5)


@torch.no_grad()
def test_keys_that_go_leave_the_scale_of_the_attention() -> None:
    model, x, groups = build("single head")
    body = model.body
    q, k, v = (layer(x) for layer in (body.q, body.k, body.v))
    q, k = q[..., [0, 2, 5]], k[..., [0, 2, 5]]
    y = (q @ k.transpose(-2, -1) * 6**-0.5).softmax(-1) @ v
    reference = model.fc(torch.tanh(body.proj(y)).mean(1))
    with pruned(model, groups, {"mlp:body.q": np.array([0, 2, 5])}):
        assert torch.allclose(model(x), reference, atol=1e-5)


def by_hand(norm: Any, hidden: Tensor, stay: Tensor) -> Tensor:
    """What a norm of these units alone gives, written out."""
    if isinstance(norm, nn.LayerNorm):
        weight, bias = (1, 0) if norm.weight is None else (norm.weight[stay], norm.bias[stay])
        centred = hidden - hidden.mean(-1, keepdim=True)
        return weight * centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() + bias
    if isinstance(norm, RootMean):
        return norm.weight[stay] * hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    size = hidden.square().sum(1, keepdim=True).sqrt()
    share = size / size.mean(-1, keepdim=True)
    return hidden + norm.bias[stay] + norm.weight[stay] * hidden * share


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["layer norm over units", "layer norm without weights", "root mean square", "global response"],
)
def test_norms_average_over_the_units_that_stay(name: str) -> None:
    model, x, groups = build(name)
    first, gelu, norm, last = model.body.children()
    stay = torch.tensor([1, 2, 6, 9])
    normed = by_hand(norm, gelu(first(x))[..., stay], stay)
    reference = model.fc(torch.tanh(F.linear(normed, last.weight[:, stay], last.bias)).mean(1))
    root = next(group.id for group in groups if group.root == "body.0")
    with pruned(model, groups, {root: stay.numpy()}):
        assert torch.allclose(model(x), reference, atol=1e-5)


@torch.no_grad()
def test_a_group_norm_averages_over_what_stays_of_each_group() -> None:
    model, x, groups = build("group norm")
    body, stay = model.body, torch.tensor([0, 3, 4, 7])
    hidden = F.relu(body.stem(x))[:, stay]
    normed = F.group_norm(hidden, 2, body.between.weight[stay], body.between.bias[stay])
    mixed = F.conv2d(normed, body.last.weight[:, stay], body.last.bias)
    reference = model.fc(torch.tanh(mixed).mean((2, 3)))
    with pruned(model, groups, {"channels:body.stem": np.array([0, 3])}):
        assert torch.allclose(model(x), reference, atol=1e-5)
