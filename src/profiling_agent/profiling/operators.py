"""How many multiply-accumulates an ATen operator does, and which do none worth counting.

Conventions, those of the field (fvcore, and torch's FlopCounterMode at two flops a MAC):

- matrix products and convolutions count each multiply-accumulate once, biases nothing;
- attention counts QK^T and AV over all positions, a causal mask changes nothing;
- a layer of an LSTM counts its two matrix products a step;
- elementwise operators, reductions, normalisation, softmax, pooling, interpolation, sorting,
  indexing, random numbers and moving data count zero.

An operator that is neither counted nor known to count zero is unknown: it gets listed, since
silence would read as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

Formula = Callable[[tuple[Any, ...], Any], int]


def count_macs(operator: Any, args: tuple[Any, ...], output: Any) -> int | None:
    """MACs of one call; 0 for what counts zero by convention; None for an unknown operator.

    ``operator`` and ``args`` as a TorchDispatchMode gets them, ``output`` what the call returned.
    """
    if not isinstance(operator, OpOverload):  # flex attention, control flow
        return None
    namespace, name = operator.namespace, base_name(operator)
    if namespace == "aten" and name in _FORMULAS:
        return _FORMULAS[name](args, output)
    if operator.is_view or not _ZERO_TAGS.isdisjoint(operator.tags):
        return 0
    if namespace == "aten" and (name in _ZERO or name.startswith(_ZERO_PREFIXES)):
        return 0
    return None


def operator_name(operator: Any) -> str:
    """``aten.fft_fft`` and the like, without the overload."""
    return str(getattr(operator, "overloadpacket", operator))


def base_name(operator: OpOverload) -> str:
    """``addmm`` for aten.addmm.default, ``relu`` for aten.relu_.default."""
    name = operator.overloadpacket.__name__
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape)


def _product(left: int, right: int) -> Formula:
    """The matrix product of the arguments at these two places."""
    return lambda args, _: prod(_shape(args[left])) * prod(_shape(args[right])[-1:])


def _matrix_vector(matrix: int) -> Formula:
    return lambda args, _: prod(_shape(args[matrix]))


def _convolution(args: tuple[Any, ...], output: Tensor) -> int:
    data, weight, transposed = args[0], args[1], bool(args[6])
    per_position = prod(_shape(weight)[1:])  # input channels of the group times the kernel
    return (data.numel() if transposed else output.numel()) * per_position


def _attention(args: tuple[Any, ...], _: Any) -> int:
    """Query (..., L, E), key (..., S, E), value (..., S, Ev), leading axes those of the query."""
    query, key, value = (_shape(tensor) for tensor in args[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _lstm_layer(args: tuple[Any, ...], _: Any) -> int:
    """oneDNN's layer: data (steps, batch, inputs), weights (4 hidden, inputs), (4 hidden, hidden).

    One direction; every step multiplies by both weights.
    """
    data, weight_input, weight_hidden = args[:3]
    return prod(_shape(data)[:2]) * (weight_input.numel() + weight_hidden.numel())


_FORMULAS: dict[str, Formula] = {
    "mm": _product(0, 1),
    "_int_mm": _product(0, 1),
    "_scaled_mm": _product(0, 1),
    "bmm": _product(0, 1),
    "addmm": _product(1, 2),
    "_addmm_activation": _product(1, 2),
    "baddbmm": _product(1, 2),
    "addbmm": _product(1, 2),
    "mv": _matrix_vector(0),
    "addmv": _matrix_vector(1),
    "dot": _matrix_vector(0),
    "vdot": _matrix_vector(0),
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    "mkldnn_rnn_layer": _lstm_layer,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
}

_ZERO_TAGS = {torch.Tag.pointwise, torch.Tag.inplace_view}
if hasattr(torch.Tag, "reduction"):  # newer than the oldest torch we accept
    _ZERO_TAGS.add(torch.Tag.reduction)

_ZERO_PREFIXES = (
    "native_", "_native_batch_norm", "_batch_norm", "upsample_", "_upsample_", "grid_sampler",
    "max_pool", "avg_pool", "adaptive_", "_adaptive_", "fractional_max_pool", "mkldnn_max_pool",
    "reflection_pad", "replication_pad", "index", "_index", "_unsafe_index", "scatter", "select_",
    "slice_", "as_strided", "empty", "new_", "full", "ones", "zeros", "rand", "normal", "uniform",
    "_assert", "sym_",
)  # fmt: skip

_ZERO = frozenset(
    {
        "_unsafe_view", "_reshape_alias", "_reshape_copy", "_to_copy", "copy", "clone", "lift",
        "lift_fresh", "detach", "set", "resize",
        "cat", "stack", "repeat", "repeat_interleave", "roll", "flip", "rot90", "tril", "triu",
        "diag_embed", "constant_pad_nd", "pad",
        "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "split_with_sizes_copy",
        "contiguous",
        "gather", "take", "put", "masked_fill", "masked_scatter", "masked_select", "nonzero",
        "where", "fill", "zero",
        "embedding", "_embedding_bag", "_embedding_bag_forward_only", "one_hot",
        "arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "scalar_tensor",
        "_efficientzerotensor",
        "bernoulli", "multinomial", "exponential", "random", "randperm", "dropout",
        "_fused_dropout",
        "_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "logsumexp",
        "_fused_rms_norm", "linalg_vector_norm", "norm", "renorm", "glu", "_prelu_kernel",
        "hardswish", "hardsigmoid",
        "sum", "mean", "prod", "amax", "amin", "max", "min", "aminmax", "argmax", "argmin", "all",
        "any", "std", "var", "std_mean", "var_mean",
        "count_nonzero", "median", "nanmedian", "mode", "kthvalue",
        "sort", "topk", "searchsorted", "bucketize", "unique", "_unique2", "unique_dim",
        "unique_consecutive", "histc", "bincount",
        "im2col", "col2im", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
        "_local_scalar_dense", "item", "is_same_size", "equal", "isin", "complex", "polar",
        "_fused_sdp_choice",
    }
)  # fmt: skip
