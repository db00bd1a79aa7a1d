"""The openvino graph of an exported program, its operators named after the modules they came from.

No file is written and no scheme decided here; ``openvino_runtime.py`` does both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from profiling_agent.deployment.exporting import WRAPPER_PREFIX, Exported, first_line
from profiling_agent.deployment.graph_code import owner
from profiling_agent.deployment.lowered import product_layers
from profiling_agent.deployment.openvino_graph import MODULE_MARK
from profiling_agent.deployment.telemetry import no_telemetry
from profiling_agent.errors import TrialError

_PRODUCT_TYPES = ("Convolution", "GroupConvolution", "MatMul")
# What hands a softmax on to the product it weighs: moves, casts, masks, dropout.
_PASSING = (
    "alias", "clone", "contiguous", "detach", "dropout", "expand", "flatten", "mul", "permute",
    "reshape", "select", "slice", "squeeze", "to", "transpose", "type_as", "unflatten", "unsqueeze",
    "view", "_to_copy", "_unsafe_view",
)  # fmt: skip
_MATRIX_PRODUCTS = ("baddbmm", "bmm", "einsum", "matmul", "mm")


def import_openvino() -> Any:
    with no_telemetry():
        import openvino
    return openvino


def to_openvino(exported: Exported, model: nn.Module, example: dict[str, Tensor]) -> Any:
    """An ``openvino.Model`` whose operators are named ``module::type_index``.

    All axes have the example's sizes, but for the batch where it is free.
    Raises ``TrialError`` naming the operators that openvino can't express, and their modules.
    """
    import_openvino()
    from openvino._offline_transformations import (
        apply_fused_names_cleanup,
        apply_moc_transformations,
    )
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    try:
        with _quiet_decompositions():
            decoder = TorchFXPythonDecoder.from_exported_program(exported.program)
        frontend = FrontEndManager().load_by_framework("pytorch")
        graph = frontend.convert(frontend.load(decoder))
    except Exception as error:  # openvino's errors have no common root
        raise TrialError(
            f"{type(model).__name__!r} can't be converted to openvino: "
            f"{_operators_at_fault(error, exported)}. Use another runtime or replace the operator."
        ) from error
    layers = frozenset(product_layers(model))
    nodes = decoder.pt_module.graph.nodes
    owners = {node.name: _layer_or_owner(node, layers) for node in nodes}
    _name_operators(graph, owners)
    shapes: dict[str, list[int]] = {}
    for parameter, (name, value) in zip(graph.get_parameters(), example.items(), strict=True):
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
        shapes[name] = [exported.fixed_batch or -1, *value.shape[1:]]
    graph.reshape(shapes)
    apply_moc_transformations(graph, cf=False, smart_reshape=True)
    _name_fused(graph, _layers_before(nodes, owners, layers))
    apply_fused_names_cleanup(graph)
    return graph


@contextmanager
def _quiet_decompositions() -> Iterator[None]:
    """Drop what openvino logs, with tracebacks, of operators that this torch doesn't decompose.

    It wants them whole, so that is what it wished for. The root logger, to which it writes, gets no
    handler by that.
    """
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)

    def is_other(record: logging.LogRecord) -> bool:
        return record.msg != "Operation %s not found in decomp table"

    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)


def _operators_at_fault(error: Exception, exported: Exported) -> str:
    """The operators without translation that an error names, with the module they came from."""
    missing = dict.fromkeys(re.findall(r"\baten\.[\w.]+|\b\w+::\w+", str(error)))
    found: list[str] = []
    for node in exported.program.graph.nodes:
        target = str(node.target)
        for name in missing:
            if node.op == "call_function" and target.startswith(name.replace("::", ".")):
                place = owner(node)
                found.append(f"there is no translation of the operator {target!r} in {place!r}")
    return found[0] if found else first_line(error)


def _layer_or_owner(node: fx.Node, layers: frozenset[str]) -> str | None:
    """The layer whose weight a module multiplies by itself, else the module a node was traced in.

    So ``nn.MultiheadAttention`` does with its ``out_proj``, which is never called.
    """
    module = owner(node)
    if module is None or module in layers:
        return module
    for argument in node.all_input_nodes:
        target = str(argument.target)
        if argument.op == "get_attr" and target.endswith(".weight"):
            layer = target.removeprefix(WRAPPER_PREFIX).removesuffix(".weight")
            child = f"{module}.{layer.rpartition('.')[2]}"  # a shared weight has the name of one
            for name in (child, layer):
                if name in layers:
                    return name
    return module


def _name_operators(graph: Any, owners: dict[str, str | None]) -> None:
    """Name operators ``module::type_index``; ``owners`` by the decomposed trace's nodes."""
    for index, operator in enumerate(graph.get_ordered_ops()):
        if operator.get_type_name() in ("Parameter", "Result", "Constant"):
            continue
        module = owners.get(operator.get_friendly_name().split("/")[0])
        if module is not None:
            operator.set_friendly_name(f"{module}{MODULE_MARK}{operator.get_type_name()}_{index}")


def _layers_before(
    nodes: Iterable[fx.Node], owners: dict[str, str | None], layers: frozenset[str]
) -> dict[str, str]:
    """Of each module, a norm say, the one layer whose output it was traced to work on."""
    found: dict[str, set[str]] = {}
    for node in nodes:
        module, inputs = owners[node.name], node.all_input_nodes
        before = owners.get(inputs[0].name) if inputs else None
        if module is not None and before != module and before in layers:
            found.setdefault(module, set()).add(before)
    return {module: min(before) for module, before in found.items() if len(before) == 1}


def _name_fused(graph: Any, layers_before: Mapping[str, str]) -> None:
    """Operators that a fusion made anew get the name of the first product in them.

    Of a grouped convolution only the norm's name comes through, so it is that of the layer before.
    """
    taken = {operator.get_friendly_name() for operator in graph.get_ops()}
    for index, operator in enumerate(graph.get_ordered_ops()):
        name, known = operator.get_friendly_name(), operator.get_rt_info()
        if MODULE_MARK in name or "fused_names_0" not in known:
            continue
        parts = [p.split(MODULE_MARK) for p in known["fused_names_0"].astype(str).split(",")]
        parts = [p for p in parts if len(p) == 2]
        parts.sort(key=lambda part: not part[1].startswith(_PRODUCT_TYPES))
        if parts:
            module, traced = parts[0]
            is_product = operator.get_type_name() in _PRODUCT_TYPES
            if is_product and not traced.startswith(_PRODUCT_TYPES):
                module = layers_before.get(module, module)
            renamed = f"{module}{MODULE_MARK}{operator.get_type_name()}_f{index}"
            if renamed not in taken:
                operator.set_friendly_name(renamed)


def has_attention(program: ExportedProgram) -> bool:
    """Whether a softmax weighs what is computed: the softmax at the end of a classifier doesn't."""
    signature = program.graph_signature
    constant = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    nodes = [
        node
        for part in program.graph_module.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    ]
    for node in nodes:
        if node.all_input_nodes and all(i.name in constant for i in node.all_input_nodes):
            constant.add(node.name)
    return any(
        _name(node) == "scaled_dot_product_attention"
        or (_name(node) in ("softmax", "_softmax") and _weighs(node, constant))
        for node in nodes
    )


def _weighs(softmax: fx.Node, constant: set[str]) -> bool:
    """Whether a softmax reaches a matrix product whose other factor is no weight."""
    waiting, seen = [softmax], {softmax}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            others = [i for i in user.all_input_nodes if i is not node and i.name not in constant]
            if _name(user) in _MATRIX_PRODUCTS and others:
                return True
            if _name(user) in _PASSING and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _name(node: fx.Node) -> str:
    """Of the operator that a node calls, without its library and overload."""
    return str(node.target).removeprefix("aten.").partition(".")[0]
