"""Equal modules in place of some whose weights can't be cut where they stand.

``nn.MultiheadAttention`` checks that its heads fill the embedding; layers with weight
standardisation, weight norm and the like compute their weights anew at each call. Both are written
out with plain layers and fixed weights before groups are looked for. What is written out gives the
same results, to rounding, or is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from profiling_agent.acquisition.workload import compute_logits

TOLERANCE = 1e-4
"""Largest difference of the outputs over the largest output."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CALLS = {F.linear, F.conv1d, F.conv2d, F.conv3d}


@torch.no_grad()
def recast(model: nn.Module, example: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model in which layers hold the weights they multiply by; itself if they do.

    ``example`` holds inputs by name, at least two samples. A copy that would not give the model's
    results, on them and on the first alone, is thrown away. Attention of the copy returns no
    weights where the logits don't depend on them, since their mean ties all heads.
    """
    if not any(_needs_recast(module) for module in model.modules()):
        return model
    alone = {name: x[:1] for name, x in example.items()}
    before = [(inputs, compute_logits(model, inputs)) for inputs in (example, alone)]
    twin = copy.deepcopy(model)
    try:
        if not _write_out(twin, example) or not _agrees(twin, before):
            return model
    except Exception:  # whatever a forward raises when layers of it are others
        return model
    _drop_unread_weights(twin, before)
    return twin


Results = list[tuple[Mapping[str, Tensor], Tensor]]
"""Inputs and the logits that belong to them."""


def _agrees(model: nn.Module, results: Results) -> bool:
    """With other samples beside it, or none, a weight that depends on the input is another."""
    for inputs, before in results:
        gap = float((compute_logits(model, inputs) - before).abs().max())
        if not gap <= TOLERANCE * max(float(before.abs().max()), 1e-12):
            return False
    return True


def _drop_unread_weights(model: nn.Module, results: Results) -> None:
    attentions = [module for module in model.modules() if isinstance(module, PlainAttention)]
    for attention in attentions:
        attention.gives_weights = False
    try:
        is_same = not attentions or _agrees(model, results)
    except Exception:  # whatever a forward raises that reads them
        is_same = False
    for attention in attentions:
        attention.gives_weights = not is_same


def _needs_recast(module: nn.Module) -> bool:
    return _is_attention(module) or (
        isinstance(module, _LAYERS) and (_is_rewritten(module) or _computes_its_weight(module))
    )


def _is_rewritten(layer: nn.Module) -> bool:
    """Whether the weight is made of other tensors before each call (weight norm, masks)."""
    return parametrize.is_parametrized(layer) or "weight" not in layer._parameters


def _is_attention(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


def _write_out(model: nn.Module, example: Mapping[str, Tensor]) -> bool:
    """Put plain modules where they are needed; whether there was any that could be put."""
    is_changed = False
    for name, module in list(model.named_modules()):
        if isinstance(module, _LAYERS) and _is_rewritten(module):
            _put(model, name, _fixed(module))
            is_changed = True
        elif _is_attention(module):
            assert isinstance(module, nn.MultiheadAttention)
            _put(model, name, PlainAttention(module))
            is_changed = True
    computed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and _computes_its_weight(module)
    }
    return (bool(computed) and _fix_weights(model, computed, example)) or is_changed


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class PlainAttention(nn.Module):
    """``nn.MultiheadAttention`` of one embedding width, with linear layers of its own.

    Takes and gives what that does, with a batch, but for the weights if ``gives_weights`` is
    false; ``in_proj`` is query, key and value in one.
    """

    batch_first = False  # what nn.TransformerEncoderLayer asks before its fused path
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        assert weight is not None
        self.in_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.in_proj.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            self.in_proj.bias = nn.Parameter(bias.detach(), requires_grad=False)
        out = attention.out_proj
        self.out_proj = nn.Linear(out.in_features, out.out_features, bias=out.bias is not None)
        self.out_proj.load_state_dict(out.state_dict())
        self.out_proj.requires_grad_(False)
        self.num_heads = attention.num_heads
        self.head_dim = attention.head_dim
        self.samples_first = attention.batch_first
        self.gives_weights = True
        self.eval()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.samples_first and query.dim() == 3:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if query is key and key is value:
            parts = self.in_proj(query).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        else:
            weights = self.in_proj.weight.unflatten(0, (3, -1)).unbind(0)
            bias = self.in_proj.bias
            biases = bias.unflatten(0, (3, -1)).unbind(0) if bias is not None else (None,) * 3
            parts = tuple(
                F.linear(x, w, b).unflatten(-1, (self.num_heads, self.head_dim))
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        q, k, v = (part.transpose(-2, -3) for part in parts)
        mask = _joined(attn_mask, key_padding_mask, q)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1)
        result = self.out_proj((weights @ v).transpose(-2, -3).flatten(-2))
        if not self.samples_first and result.dim() == 3:
            result = result.transpose(0, 1)
        if not (need_weights and self.gives_weights):
            return result, None
        return result, weights.mean(-3) if average_attn_weights else weights


def _joined(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """One additive mask that fits (batch, heads, queries, keys)."""
    joined: Tensor | None = None
    for mask in (attn_mask, None if padding is None else padding[:, None, None, :]):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(mask, float("-inf"))
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, q.shape[1]))
        joined = mask if joined is None else joined + mask
    return joined


def _computes_its_weight(layer: nn.Module) -> bool:
    """Whether a class of someone's own stands between the layer's parameters and its product."""
    plain = {
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.modules.linear.NonDynamicallyQuantizableLinear,
    }
    return type(layer).forward not in {kind.forward for kind in plain}


class _Recorder(TorchFunctionMode):
    """Remembers the last product of a layer: what was multiplied by which weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CALLS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fix_weights(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Mapping[str, Tensor]
) -> bool:
    """Layers that multiply by a computed weight become plain ones that hold it, if there are."""
    fixed: dict[str, nn.Module] = {}
    handles: list[Any] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            if name in fixed:
                return
            fixed[name] = layer  # its own forward runs below and must not come here again
            recorder = _Recorder()
            with recorder:
                type(layer).forward(layer, *args)
            found = _plain(layer, args, recorder)
            fixed[name] = found if found is not None else layer

        return hook

    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(watch(name)))
    try:
        compute_logits(model, example)
    finally:
        for handle in handles:
            handle.remove()
    replaced = {name: layer for name, layer in fixed.items() if layer is not layers[name]}
    for name, layer in replaced.items():
        _put(model, name, layer)
    return bool(replaced)


def _plain(layer: nn.Module, args: tuple[Any, ...], recorder: _Recorder) -> nn.Module | None:
    if len(recorder.calls) != 1:
        return None
    _, given, kwargs = recorder.calls[0]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call = dict(zip(names, given, strict=False)) | kwargs
    weight, bias = call["weight"], call.get("bias")
    if weight is layer.weight:
        return None
    padded = isinstance(args[0], Tensor) and call["input"].shape != args[0].shape
    twin = _bare(layer)
    twin.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    twin.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    if isinstance(layer, nn.Linear):
        return twin
    padding = call.get("padding", 0)
    vars(twin)["padding"] = (padding,) * (weight.dim() - 2) if isinstance(padding, int) else padding
    vars(twin)["padding_mode"] = "zeros"
    return nn.Sequential(_pads(args[0], call["input"]), twin) if padded else twin


def _fixed(layer: Any) -> nn.Module:
    """A plain layer with the weights that a parametrized one computes."""
    twin = _bare(layer)
    twin.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    bias = layer.bias
    twin.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return twin


def _bare(layer: Any) -> Any:
    """A plain layer of the same kind and sizes, whose weights are still to be set."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features).eval()
    kind: Any = next(kind for kind in _LAYERS if isinstance(layer, kind))
    return kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    ).eval()


def _pads(before: Tensor, after: Tensor) -> nn.Module:
    """Zeros round the image as "same" padding puts them: the odd one below and to the right."""
    high, wide = after.shape[-2] - before.shape[-2], after.shape[-1] - before.shape[-1]
    return nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2))
