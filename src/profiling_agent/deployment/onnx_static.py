"""Static int8: which tensors of a graph are quantized, and to which range.

onnxruntime fuses a product between DequantizeLinear and QuantizeLinear nodes into an int8 one. What
was found to lose least where int8 stays fast (numbers in the benchmarks' log):

- Weights: int8, symmetric, a scale for each output channel. Activations: eight bits, asymmetric,
  one scale, from the lowest to the highest value seen, rare samples left out.
- Linear layers quantize what they read; what they write stays float, so the residual stream, norms,
  softmax and the products between activations of a transformer do.
- Convolutions are fused only when their output is quantized too. So what follows them stays int8 as
  long as every operand is: sums, pooling, concatenation, moves. A ReLU is part of the range.
- A convolution that cuts an image into patches stays float: what it writes is the residual stream,
  and eight bits for that cost ViT-Tiny more than all linear layers together.
- Where sums of products saturate at 16 bits, weights keep to seven bits; the products are then
  exact. Weights in uint8 would be with all eight bits, but give up half of what int8 saves, or all;
  int8 activations are turned into uint8, and saturate as those do. Depthwise convolutions have
  kernels of their own, which add in 32 bits: their weights have eight bits everywhere.
- In a transformer one channel of a layer's input may be far larger than all others (ViT-Tiny: 217
  against 8) and leave them a few steps of the scale. Such a channel saturates in int8, and what it
  has beyond the range is multiplied in float and added: a few columns, as in LLM.int8()
  (arXiv 2208.07339).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from profiling_agent.deployment.onnx_calibration import Bounds
from profiling_agent.deployment.onnx_graph import PRODUCTS, constants

# Operators with an int8 form that has scales of its own.
_RESCALING = (
    "Add",
    "AveragePool",
    "Concat",
    "GlobalAveragePool",
    "LeakyRelu",
    "Mul",
    "Relu",
    "Sigmoid",
)
# Operators that move values, or choose among them, and so keep the scale of their input.
_MOVING = (
    "Flatten",
    "MaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
# Their effect is that of a range which ends where they cut.
_CLIPPING = ("Relu", "Clip")
FULL_RANGE, REDUCED_RANGE = 127, 64
FLOAT32 = 1  # in onnx.TensorProto
# One channel in so many may be an outlier, and only if without them the range is halved at least.
OUTLIER_SHARE = 64


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product of an activation and a constant weight; ``axis`` of it counts the outputs.

    ``bias`` is empty without one. A depthwise convolution has as many groups as inputs and outputs.
    """

    operator: str
    source: str
    weight: str
    bias: str
    axis: int
    output: str
    is_depthwise: bool


@dataclass(kw_only=True)
class StaticPlan:
    """What of a graph is to run in int8.

    ``products`` and ``reads`` are by the node's name; ``reads`` are the positions of the inputs
    that it takes as int8. ``quantized`` are the tensors that get a scale, or by ``same_scale`` that
    of another; those in ``carried`` exist only as int8, so that all nodes read them so.
    ``num_channels`` is the size of the last axis of what linear layers read.
    """

    products: dict[str, Product] = field(default_factory=dict)
    reads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    quantized: dict[str, None] = field(default_factory=dict)
    same_scale: dict[str, str] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)
    num_channels: dict[str, int] = field(default_factory=dict)

    def to_calibrate(self) -> dict[str, int | None]:
        """Tensors to the number of channels to look at one by one, None for the tensor as one."""
        convolved = {p.source for p in self.products.values() if p.operator == "Conv"}
        whole = convolved | self.carried
        return {
            name: None if name in whole else self.num_channels[name]
            for name in self.quantized
            if name not in self.same_scale
        }


@dataclass(frozen=True, kw_only=True)
class Range:
    """What the int8 values of a tensor span; ``outliers`` are the channels that go beyond it."""

    low: float
    high: float
    outliers: np.ndarray

    @property
    def scale(self) -> np.float32:
        return np.float32(max(self.high - self.low, 1e-8) / 255)

    @property
    def zero_point(self) -> np.uint8:
        return np.uint8(np.clip(round(-self.low / float(self.scale)), 0, 255))


def plan_static(proto: Any, kept: set[str]) -> StaticPlan:
    """Choose what runs in int8; nodes named in ``kept`` stay float."""
    plan = StaticPlan()
    weights = constants(proto)
    outputs = {value.name for value in proto.graph.output}
    readers = _readers(proto)
    for node in proto.graph.node:
        if node.name in kept:
            continue
        end = _end(node, readers)
        if not _is_product(node, weights):
            _extend(plan, node, end, outputs)
        elif node.op_type != "Conv" or (end not in outputs and not _cuts_patches(node)):
            # A convolution whose result leaves the graph as floats would run as a float.
            product = _product(node, weights)
            plan.products[node.name] = product
            plan.reads[node.name] = (0,)
            plan.quantized[product.source] = None
            if product.operator == "Conv":
                _carry(plan, end)
            else:
                plan.num_channels[product.source] = weights[product.weight].dims[1 - product.axis]
    return plan


def choose_range(bounds: Bounds, split_outliers: bool) -> Range:
    """The range of a tensor; with ``split_outliers``, without the few channels that widen it."""
    low, high = np.atleast_1d(bounds.low), np.atleast_1d(bounds.high)
    order = np.argsort(-np.maximum(-low, high), kind="stable")
    most = len(order) // OUTLIER_SHARE if split_outliers else 0
    for count in range(1, most + 1):
        rest = order[count:]
        if 2 * (high[rest].max() - low[rest].min()) <= high.max() - low.min():
            outliers = np.sort(order[:count])
            return Range(
                low=float(low[rest].min()), high=float(high[rest].max()), outliers=outliers
            )
    return Range(low=float(low.min()), high=float(high.max()), outliers=order[:0])


def _readers(proto: Any) -> dict[str, list[Any]]:
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _end(node: Any, readers: dict[str, list[Any]]) -> str:
    """The output of a node, or of the ReLU that alone reads it."""
    after = readers.get(node.output[0], [])
    if len(after) == 1 and after[0].op_type in _CLIPPING:
        return after[0].output[0]
    return node.output[0]


def _is_product(node: Any, weights: dict[str, Any]) -> bool:
    """Whether a node multiplies an activation by a float weight in a way that has an int8 form."""
    if node.op_type not in PRODUCTS or node.input[0] in weights or node.input[1] not in weights:
        return False
    weight = weights[node.input[1]]
    bias = node.input[2] if len(node.input) > 2 else ""
    if weight.data_type != FLOAT32 or (bias and bias not in weights):
        return False
    if node.op_type == "MatMul":
        return len(weight.dims) == 2
    if node.op_type == "Conv":
        return True
    set_to = {entry.name: entry for entry in node.attribute}
    plain = all(set_to[name].f == 1.0 for name in ("alpha", "beta") if name in set_to)
    transposed = "transA" in set_to and set_to["transA"].i
    return plain and not transposed and (not bias or len(weights[bias].dims) == 1)


def _cuts_patches(node: Any) -> bool:
    """Whether a convolution moves by the size of its kernel, larger than one."""
    values = {entry.name: list(entry.ints) for entry in node.attribute}
    kernel = values.get("kernel_shape", [])
    return kernel == values.get("strides") and max(kernel, default=1) > 1


def _product(node: Any, weights: dict[str, Any]) -> Product:
    transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
    return Product(
        operator=node.op_type,
        source=node.input[0],
        weight=node.input[1],
        bias=node.input[2] if len(node.input) > 2 else "",
        axis=0 if node.op_type == "Conv" or transposed else 1,
        output=node.output[0],
        is_depthwise=node.op_type == "Conv" and _is_depthwise(node, weights[node.input[1]]),
    )


def _is_depthwise(node: Any, weight: Any) -> bool:
    """Whether a convolution has as many groups as inputs and as outputs."""
    groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
    return groups == weight.dims[0] and weight.dims[1] == 1


def _carry(plan: StaticPlan, name: str) -> None:
    plan.quantized[name] = None
    plan.carried.add(name)


def _extend(plan: StaticPlan, node: Any, end: str, outputs: set[str]) -> None:
    """Let a node run in int8 when all it reads already is."""
    if len(node.output) != 1 or not node.input:
        return
    output = node.output[0]
    if node.op_type in _MOVING and node.input[0] in plan.carried and output not in outputs:
        plan.reads[node.name] = (0,)
        plan.same_scale[output] = node.input[0]
        _carry(plan, output)
    elif node.op_type in _RESCALING and plan.carried.issuperset(node.input) and end not in outputs:
        plan.reads[node.name] = tuple(range(len(node.input)))
        _carry(plan, end)
