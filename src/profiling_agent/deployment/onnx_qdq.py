"""A graph with its int8 part written in QDQ form: QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from profiling_agent.deployment.onnx_graph import constants, module_of
from profiling_agent.deployment.onnx_static import FULL_RANGE, Product, Range, StaticPlan


def quantize(
    proto: Any, plan: StaticPlan, ranges: dict[str, Range], limit: int, int8_sums: bool
) -> None:
    """Write the int8 form of what the plan names into the graph.

    ``limit`` is the largest int8 weight, but for depthwise convolutions, which take all eight bits.
    Where all sizes are known onnxruntime makes one operator of a product and the sum after it, and
    runs it as a float if the sum's bias is one: with ``int8_sums`` it gets an integer bias.
    """
    writer = _Writer(proto, plan, ranges, limit, int8_sums)
    for value in proto.graph.input:
        if value.name in plan.quantized:
            writer.quantize_activation(value.name, "")
    for node in proto.graph.node:
        writer.rewrite(node)
    writer.finish()


class _Writer:
    """Writes a graph anew, node by node; ``finish`` puts it in place of the old one."""

    def __init__(
        self, proto: Any, plan: StaticPlan, ranges: dict[str, Range], limit: int, int8_sums: bool
    ) -> None:
        self.graph, self.plan, self.ranges = proto.graph, plan, ranges
        self.limits = _find_limits(plan, limit)
        self.weights = constants(proto)
        self.nodes: list[Any] = []
        self.values: dict[str, np.ndarray] = {}
        # Name of a node that adds a bias: the position of the bias, its name and the product.
        self.biases = _find_biases(proto, plan, int8_sums)
        self.scales = self._choose_scales()

    def rewrite(self, node: Any) -> None:
        module, inputs, outputs = module_of(node), list(node.input), list(node.output)
        product = self.plan.products.get(node.name)
        reads = self.plan.reads.get(node.name, ())
        for index, name in enumerate(inputs):
            if index in reads or name in self.plan.carried:
                node.input[index] = f"{name}_dequantized"
        if product is not None:
            node.input[1] = self._quantize_weight(product, module)
        if node.name in self.biases:
            index, bias, biased = self.biases[node.name]
            node.input[index] = self._quantize_bias(bias, biased, node.name)
        self.nodes.append(node)
        if product is not None and len(self._range(product.source).outliers):
            node.output[0] = f"{product.output}_within"
            self._add_outliers(product, node.output[0], module)
        for name in outputs:
            if name in self.plan.quantized:
                self.quantize_activation(name, module)

    def quantize_activation(self, name: str, module: str) -> None:
        span = self._range(name)
        scale = self._hold(f"{name}_scale", np.asarray(span.scale))
        zero = self._hold(f"{name}_zero_point", np.asarray(span.zero_point))
        self._add("QuantizeLinear", [name, scale, zero], f"{name}_int8", module)
        self._add("DequantizeLinear", [f"{name}_int8", scale, zero], f"{name}_dequantized", module)

    def finish(self) -> None:
        from onnx import numpy_helper

        used = {name for node in self.nodes for name in node.input}
        kept = [value for name, value in self.weights.items() if name in used]
        for values in (self.graph.node, self.graph.initializer, self.graph.value_info):
            del values[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(kept)
        self.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self.values.items()
        )

    def _add(
        self, operator: str, inputs: list[str], output: str, module: str, axis: int | None = None
    ) -> str:
        from onnx import helper

        name = f"{module}::{operator}"
        node = helper.make_node(operator, inputs, [output], name=name)
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return output

    def _hold(self, name: str, value: np.ndarray) -> str:
        self.values[name] = value
        return name

    def _array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.weights[name])

    def _range(self, name: str) -> Range:
        while name in self.plan.same_scale:
            name = self.plan.same_scale[name]
        return self.ranges[name]

    def _choose_scales(self) -> dict[str, np.ndarray]:
        """Weight name to the scale of each output; never so small that a bias overflows 32 bits."""
        scales: dict[str, np.ndarray] = {}
        for product in self.plan.products.values():
            weight = self._array(product.weight)
            others = tuple(index for index in range(weight.ndim) if index != product.axis)
            scale = np.maximum(np.abs(weight).max(others) / self.limits[product.weight], 1e-10)
            scales[product.weight] = scale.astype(np.float32)
        for _, bias, product in self.biases.values():
            unit = self._range(product.source).scale * np.float32(2**30)
            least = np.abs(self._array(bias)) / unit
            scales[product.weight] = np.maximum(scales[product.weight], least).astype(np.float32)
        return scales

    def _quantize_weight(self, product: Product, module: str) -> str:
        name, dequantized = product.weight, f"{product.weight}_dequantized"
        if f"{name}_int8" in self.values:
            return dequantized
        weight, scale = self._array(name), self.scales[name]
        shape = [-1 if index == product.axis else 1 for index in range(weight.ndim)]
        limit = self.limits[name]
        steps = np.round(weight / scale.reshape(shape)).clip(-limit, limit)
        parts = [
            self._hold(f"{name}_int8", steps.astype(np.int8)),
            self._hold(f"{name}_scale", scale),
            self._hold(f"{name}_zero_point", np.zeros(len(scale), np.int8)),
        ]
        return self._add("DequantizeLinear", parts, dequantized, module, axis=product.axis)

    def _quantize_bias(self, bias: str, product: Product, node_name: str) -> str:
        # Named after the node, since two products may share a bias but not its scale.
        scale = self.scales[product.weight] * self._range(product.source).scale
        parts = [
            self._hold(f"{node_name}_bias", np.round(self._array(bias) / scale).astype(np.int32)),
            self._hold(f"{node_name}_bias_scale", scale),
        ]
        module = node_name.partition("::")[0]
        return self._add("DequantizeLinear", parts, f"{node_name}_bias_dequantized", module, axis=0)

    def _add_outliers(self, product: Product, within: str, module: str) -> None:
        """Add what a product's outlying channels have beyond the range, times their weights."""
        source, span = product.source, self._range(product.source)
        beyond = f"{source}_beyond"
        if f"{beyond}_channels" not in self.values:
            channels = self._hold(f"{beyond}_channels", span.outliers.astype(np.int64))
            low = self._hold(f"{beyond}_low", np.asarray(span.low, np.float32))
            high = self._hold(f"{beyond}_high", np.asarray(span.high, np.float32))
            outliers = self._add(
                "Gather", [source, channels], f"{source}_outliers", module, axis=-1
            )
            cut = self._add("Clip", [outliers, low, high], f"{source}_cut", module)
            self._add("Sub", [outliers, cut], beyond, module)
        weight = self._array(product.weight)
        rows = weight if product.axis == 1 else weight.T
        columns = self._hold(f"{product.output}_columns", np.ascontiguousarray(rows[span.outliers]))
        added = self._add("MatMul", [beyond, columns], f"{product.output}_beyond", module)
        self._add("Add", [within, added], product.output, module)


def _find_limits(plan: StaticPlan, limit: int) -> dict[str, int]:
    """The largest int8 value of each weight; products that share one have the least of theirs."""
    limits: dict[str, int] = {}
    for product in plan.products.values():
        largest = FULL_RANGE if product.is_depthwise else limit
        limits[product.weight] = min(largest, limits.get(product.weight, largest))
    return limits


def _find_biases(
    proto: Any, plan: StaticPlan, int8_sums: bool
) -> dict[str, tuple[int, str, Product]]:
    weights = constants(proto)
    found = {
        name: (2, product.bias, product) for name, product in plan.products.items() if product.bias
    }
    products = {product.output: product for product in plan.products.values()}
    for node in proto.graph.node if int8_sums else ():
        if node.op_type != "Add":
            continue
        for position, other in ((0, 1), (1, 0)):
            product, bias = products.get(node.input[other]), weights.get(node.input[position])
            if product is None or bias is None:
                continue
            if list(bias.dims) == [weights[product.weight].dims[product.axis]]:
                found[node.name] = position, bias.name, product
    return found
