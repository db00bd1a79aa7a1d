"""An exported program as an ONNX graph, or the operator at fault and the module it is used in."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from profiling_agent.deployment.exporting import Exported, first_line, quiet_exporter
from profiling_agent.deployment.graph_code import owner
from profiling_agent.errors import TrialError


def to_onnx(exported: Exported, model: nn.Module, names: tuple[str, ...]) -> Any:
    """An ``onnx.ModelProto`` whose nodes still say which module they were traced in.

    Raises ``TrialError`` naming the operator that onnx can't express and its module.
    """
    try:
        with quiet_exporter(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            program = torch.onnx.export(
                exported.program,
                (),
                dynamo=True,
                external_data=False,
                verbose=False,
                input_names=list(names),
                output_names=["logits"],
            )
    except Exception as error:  # the exporter's errors have no common root
        raise TrialError(
            f"{type(model).__name__!r} can't be exported to onnx: "
            f"{_operator_at_fault(error, exported)}. "
            "Use the torch runtime or replace the operator."
        ) from error
    assert program is not None
    return program.model_proto


def _operator_at_fault(error: BaseException, exported: Exported) -> str:
    """The operator that a chain of exporter errors names, with its module, or the first line."""
    link: BaseException | None = error
    operator, where = "", ""
    while link is not None and not where:
        unknown = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(link))
        node = re.search(r"%(\w+) : .*?target=(?:torch\.ops\.)?([\w.]+)\]", str(link))
        if node:
            operator, where = node.group(2), _where(exported, *node.groups())
        operator = operator or (unknown.group(1) if unknown else "")
        link = link.__cause__ or link.__context__
    if not operator:
        return first_line(error)
    return f"there is no translation of the operator {operator!r}{where}"


def _where(exported: Exported, node_name: str, operator: str) -> str:
    """The module in which the operator at fault was traced, in words; empty when unknown."""
    node = _find(exported.program.graph.nodes, node_name, operator)
    if node is None:
        node = _find(_broken_down(exported), node_name, operator)
    module = owner(node) if node is not None else None
    if module is None:
        return ""
    return f", used in {module!r}" if module else ", used in the model's own forward"


def _find(nodes: Iterable[fx.Node], node_name: str, operator: str) -> fx.Node | None:
    # The exporter names an operator by the one it stands for: prims.x for aten.special_x.
    base = operator.removesuffix(".default").rpartition(".")[2]
    calls = [node for node in nodes if node.op == "call_function"]
    by_name = [node for node in calls if node.name == node_name and str(node.target) == operator]
    return next(iter(by_name or [node for node in calls if base in str(node.target)]), None)


def _broken_down(exported: Exported) -> list[fx.Node]:
    """The nodes of the program in simpler operators, as the exporter works on it."""
    try:
        with quiet_exporter():
            return list(exported.program.run_decompositions().graph.nodes)
    except Exception:  # it only adds words to a message, and what broke the export may break it
        return []
