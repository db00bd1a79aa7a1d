"""What every scheme of the onnxruntime runtime does with an ONNX graph: names, counts, saving.

A node is named ``module::Operator_index``, so that whoever profiles an artefact can read back which
module a node came from; the module is empty for what the model's own forward computes.
"""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from profiling_agent.deployment.exporting import WRAPPER_PREFIX
from profiling_agent.deployment.onnx_operators import (
    DISABLED_OPTIMIZERS,
    INT8_PRODUCTS,
    PRODUCTS,
)

MODEL_FILE = "model.onnx"
# A protobuf message ends at 2 GiB; weights beyond this go into a file beside the graph.
MAX_INLINE_BYTES = 1_800_000_000
_FLOAT_PRODUCTS = (
    *PRODUCTS,
    "ConvTranspose",
    "FusedConv",
    "NhwcFusedConv",
    "FusedMatMul",
    "FusedGemm",
    "Attention",
    "MultiHeadAttention",
)
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(proto: Any, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Name every node after its module; node name to the module whose forward computes it.

    The two differ for a convolution that took in the batch norm after it, and for the projection
    that ``nn.MultiheadAttention`` applies itself: such a product is named after the one of
    ``layers`` (dotted names to modules) whose weight it multiplies by.
    """
    weights = constants(proto)
    scopes: dict[str, str] = {}
    for index, node in enumerate(proto.graph.node):
        scope = _scope(node)
        layer = _layer(node, scope, weights, layers)
        node.name = f"{layer}::{node.op_type}_{index}"
        scopes[node.name] = scope
    return scopes


def name_added_nodes(proto: Any) -> None:
    """Give nodes that a quantizer added the module of the node they feed, and number all anew."""
    readers: dict[str, str] = {}
    for node in reversed(proto.graph.node):
        module, known, _ = node.name.partition("::")
        if not known:
            module = next((readers[name] for name in node.output if name in readers), "")
        readers.update(dict.fromkeys(node.input, module))
        node.name = module
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.name}::{node.op_type}_{index}"


def module_of(node: Any) -> str:
    """The module in a node's name."""
    return node.name.partition("::")[0]


def constants(proto: Any) -> dict[str, Any]:
    """Initializers by name."""
    return {value.name: value for value in proto.graph.initializer}


def weight_bytes(proto: Any) -> int:
    """Bytes of all initializers."""
    from onnx import numpy_helper

    return sum(numpy_helper.to_array(value).nbytes for value in proto.graph.initializer)


def save_model(proto: Any, folder: Path) -> tuple[str, ...]:
    """Write the graph, and beyond 2 GiB its weights beside it; the names of the files."""
    import onnx

    if weight_bytes(proto) < MAX_INLINE_BYTES:
        (folder / MODEL_FILE).write_bytes(proto.SerializeToString())
        return (MODEL_FILE,)
    weights = f"{MODEL_FILE}.data"
    # Saving moves the weights out of the graph it is given.
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    onnx.save(copy, str(folder / MODEL_FILE), save_as_external_data=True, location=weights)
    return (MODEL_FILE, weights)


def forget_sources(proto: Any) -> None:
    """Remove what the exporter notes at every node: source lines and paths of this machine."""
    proto.doc_string = ""
    del proto.metadata_props[:]
    graph = proto.graph
    graph.doc_string = ""
    for values in (graph.node, graph.input, graph.output, graph.initializer):
        for value in values:
            value.doc_string = ""
            del value.metadata_props[:]
    del graph.metadata_props[:]
    del graph.value_info[:]


def count_products(folder: Path) -> tuple[int, int]:
    """(in int8, in all): products in the graph that onnxruntime makes of a saved model."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(Path(scratch) / MODEL_FILE)
        keep_weights_apart(options)
        onnxruntime.InferenceSession(
            str(folder / MODEL_FILE),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(DISABLED_OPTIMIZERS),
        )
        optimized = onnx.load(str(Path(scratch) / MODEL_FILE), load_external_data=False)
    types = [node.op_type for node in optimized.graph.node]
    num_int8 = sum(kind in INT8_PRODUCTS for kind in types)
    return num_int8, num_int8 + sum(kind in _FLOAT_PRODUCTS for kind in types)


def count_float_products(proto: Any) -> int:
    """Products of a graph in which nothing is quantized."""
    return sum(node.op_type in _FLOAT_PRODUCTS for node in proto.graph.node)


def keep_weights_apart(options: Any) -> None:
    """Let a session write the weights of its optimized graph into another file.

    So the graph can be read without them, and may be larger than a protobuf message.
    """
    key = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{key}_file_name", "weights")
    options.add_session_config_entry(f"{key}_min_size_in_bytes", "1024")


def _scope(node: Any) -> str:
    """Dotted name of the module that a node was traced in, empty for the model itself."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            # The last scope is the operator's own; nodes of no module have one scope less.
            scopes = ["", *ast.literal_eval(entry.value)]
            scope = str(scopes[-2]).split("@")[0]
            if scope.startswith(WRAPPER_PREFIX):
                return scope.removeprefix(WRAPPER_PREFIX)
    return ""


def _layer(node: Any, scope: str, weights: dict[str, Any], layers: dict[str, nn.Module]) -> str:
    from onnx import numpy_helper

    if scope in layers or node.op_type not in PRODUCTS or node.input[1] not in weights:
        return scope
    named = node.input[1].removeprefix(WRAPPER_PREFIX).removesuffix(".weight")
    if named in layers:
        return named
    children = {name: layers[name] for name in layers if name.rpartition(".")[0] == scope}
    value = numpy_helper.to_array(weights[node.input[1]]) if children else np.empty(0)
    for name, module in children.items():
        weight: Any = module.weight
        # The exporter transposes the weights of linear layers.
        if weight.dim() == 2 and np.array_equal(value, weight.detach().numpy().T):
            return name
    return scope
