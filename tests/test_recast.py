"""Plain modules in place of those whose weights can't be cut where they stand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from profiling_agent.compression.groups import find_groups
from profiling_agent.compression.recast import PlainAttention, recast
from profiling_agent.compression.surgery import masked, pruned


class Standardised(nn.Conv2d):
    """Weights without mean, and zeros round the image so that it keeps its size (BiT's)."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        missing = [(-(-n // 2) - 1) * 2 + 3 - n for n in (input.shape[-1], input.shape[-2])]
        pads = [half for n in missing for half in (n // 2, n - n // 2)]
        return F.conv2d(F.pad(input, pads), weight, self.bias, self.stride)


class Standardised1d(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(input, weight, self.bias, padding=1)


class SameConv(nn.Conv2d):
    """A forward of its own, but the weight is the parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


class Dynamic(nn.Linear):
    """A weight that depends on what comes in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * (1 + torch.tanh(input.mean())), self.bias)


def standardised() -> nn.Module:
    layers = Standardised(3, 8, 3, stride=2), nn.ReLU(), Standardised(8, 6, 3, stride=2)
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))


def one_dimensional() -> nn.Module:
    layers = Standardised1d(3, 8, 3), nn.ReLU(), Standardised1d(8, 4, 3)
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))


def two_layers(wrap: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(5, 8)), nn.ReLU(), wrap(nn.Linear(8, 4)))


def with_old_weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]
ROWS: tuple[tuple[int, ...], dict[str, int]] = ((5,), {"mlp:0": 8})
COMPUTED: dict[str, Case] = {
    "weight norm": (lambda: two_layers(weight_norm), *ROWS),
    "weight norm by a hook": (lambda: two_layers(with_old_weight_norm), *ROWS),
    "spectral norm by a hook": (lambda: two_layers(nn.utils.spectral_norm), *ROWS),
    "masked weights": (lambda: two_layers(lambda f: prune.l1_unstructured(f, "weight", 3)), *ROWS),
    "standardised": (standardised, (3, 7, 8), {"channels:0.1": 8, "channels:2.1": 6}),
    "standardised, 1d": (one_dimensional, (3, 6), {"channels:0": 8, "channels:2": 4}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_written_out_and_the_original_is_unharmed(name: str) -> None:
    torch.manual_seed(0)
    build, shape, expected = COMPUTED[name]
    model, x = build().eval(), torch.randn(3, *shape)
    before, keys = model(x), list(model.state_dict())
    state = copy.deepcopy(model.state_dict())
    plain = recast(model, {"x": x})
    assert plain is not model
    for inputs in (x, x[:1], 2 * x + 1):
        assert torch.allclose(plain(inputs), model(inputs), atol=1e-5)
    groups = find_groups(plain, {"x": x}).groups
    assert {group.id: group.width for group in groups} == expected
    for group in groups:
        kept = {group.id: np.arange(group.width)[1::3]}
        with masked(plain, groups, kept):
            reference = plain(x)
        with pruned(plain, groups, kept):
            assert torch.allclose(plain(x), reference, atol=1e-5)
    assert torch.equal(model(x), before) and list(model.state_dict()) == keys
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", [Dynamic, SameConv, nn.Linear])
def test_a_model_that_can_or_need_not_be_recast_is_returned_as_it_is(wrap: Any) -> None:
    torch.manual_seed(0)
    if wrap is SameConv:
        model, x = nn.Sequential(SameConv(3, 8, 3), nn.Flatten(), nn.Linear(128, 4)), (3, 4, 4)
    else:
        model, x = nn.Sequential(wrap(5, 8), nn.ReLU(), nn.Linear(8, 4)), (5,)
    model.eval()
    assert recast(model, {"x": torch.randn(3, *x)}) is model


class ChecksItsLayer(nn.Module):
    """A forward that fails when its layer is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.attention, nn.MultiheadAttention):
            raise TypeError(self.attention)
        return self.fc(self.attention(x, x, x)[0].mean(1))


def test_a_forward_that_fails_without_its_own_layers_keeps_them() -> None:
    model = ChecksItsLayer().eval()
    assert recast(model, {"x": torch.randn(3, 6, 8)}) is model


# ---- attention ----------------------------------------------------------------------------------

PADDING = torch.zeros(3, 6, dtype=torch.bool)
PADDING[0, 4:] = True
BOOLEAN = torch.ones(5, 6, dtype=torch.bool).triu(2)
MASKS = {
    "none": None,
    "additive": torch.randn(5, 6),
    "boolean": BOOLEAN,
    "by head": torch.randn(12, 5, 6),
}


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("padding", [None, PADDING, -1.5 * PADDING.float()])
@pytest.mark.parametrize("batch_first", [True, False])
def test_plain_attention_is_torchs(mask: str, padding: Tensor | None, batch_first: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4, batch_first=batch_first).eval()
    assert attention.in_proj_bias is not None
    nn.init.normal_(attention.in_proj_bias)
    plain = PlainAttention(attention)
    query, key, value = torch.randn(3, 5, 8), torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    for given in ((query, key, value), (query, key, key)):
        for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            call = {"attn_mask": MASKS[mask], "key_padding_mask": padding, **options}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a float and a boolean mask together
                expected, weights = attention(*given, **call)
            result, plain_weights = plain(*given, **call)
            assert torch.allclose(result, expected, atol=1e-5)
            assert (weights is None) == (plain_weights is None)
            if weights is not None:
                assert torch.allclose(plain_weights, weights, atol=1e-6)


class Tokens(nn.Module):
    """Attention of tokens to themselves, called as most do: with weights, which nobody reads."""

    def __init__(self, batch_first: bool, reads: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=batch_first)
        self.fc, self.batch_first, self.reads = nn.Linear(8, 4), batch_first, reads

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y, weights = self.attention(x, x, x)
        y = self.fc(y.mean(1 if self.batch_first else 0))
        return y + weights[:, 0, :4] if self.reads else y


class Transformer(nn.Module):
    """Encoder and decoder, both masked as for a language."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"dim_feedforward": 16, "batch_first": batch_first}
        self.embed, self.fc, self.batch_first = nn.Linear(8, 8), nn.Linear(8, 4), batch_first
        layer = nn.TransformerEncoderLayer(8, 4, **sizes)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 4, **sizes), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x if self.batch_first else x.transpose(0, 1))
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        y = self.decoder(x, self.encoder(x, mask=mask, is_causal=True), tgt_mask=mask)
        return self.fc(y.mean(1 if self.batch_first else 0))


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [Tokens, Transformer])
def test_heads_of_torchs_attention_can_go(kind: Any, batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = kind(batch_first).eval(), torch.randn(3, 6, 8)
    state = copy.deepcopy(model.state_dict())
    plain = recast(model, {"x": x})
    assert plain is not model and torch.allclose(plain(x), model(x), atol=1e-5)
    assert list(model.state_dict()) == list(state)
    assert not any(isinstance(module, PlainAttention) for module in model.modules())
    groups = find_groups(plain, {"x": x}).groups
    attentions = [n for n, m in plain.named_modules() if isinstance(m, PlainAttention)]
    heads = {group.id: group.width for group in groups if group.kind == "heads"}
    assert heads == {f"heads:{name}.in_proj": 4 for name in attentions}
    for group in groups:
        kept = {group.id: np.arange(group.width)[1::2]}
        for inputs in (x, x[:1]):
            with masked(plain, groups, kept):
                reference = plain(inputs)
            with pruned(plain, groups, kept):
                assert torch.allclose(plain(inputs), reference, atol=1e-5)


@torch.no_grad()
def test_a_head_that_goes_is_one_that_adds_nothing() -> None:
    """Against torch's own attention, whose output projection doesn't read the head."""
    torch.manual_seed(0)
    model, x = Tokens(True).eval(), torch.randn(3, 6, 8)
    plain = recast(model, {"x": x})
    groups = find_groups(plain, {"x": x}).groups
    model.attention.out_proj.weight[:, 2:4] = 0.0
    with pruned(plain, groups, {"heads:attention.in_proj": np.array([0, 2, 3])}):
        assert torch.allclose(plain(x), model(x), atol=1e-5)


@torch.no_grad()
def test_heads_stay_where_their_weights_are_read() -> None:
    torch.manual_seed(0)
    model, x = Tokens(True, reads=True).eval(), torch.randn(3, 6, 8)
    plain = recast(model, {"x": x})
    assert torch.allclose(plain(x), model(x), atol=1e-5)
    found = find_groups(plain, {"x": x})
    assert not any(group.kind == "heads" for group in found.groups)
    assert any(entry.id.endswith("attention.in_proj") for entry in found.frozen)
