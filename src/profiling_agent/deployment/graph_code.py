"""An exported program written out as plain Python: ``graph.py`` of the torch artefact.

A saved ``.pt2`` archive embeds the example inputs, needs pickle and takes a second and a hundred
megabytes to open. The same graph as source needs none of that, can be read, and runs faster than
the modules it came from: no module calls, weights bound once, batch norms folded into the
convolutions before them, dropouts and shape guards gone. A comment at the end of a line names the
module it was traced in, ``(model)`` the model's own forward.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from profiling_agent.deployment.exporting import WRAPPER_PREFIX
from profiling_agent.errors import TrialError

# Python bindings with the operator's own signature cost half of a call through torch.ops.
_DIRECT = {
    "aten.linear.default": "F.linear",
    "aten.conv1d.default": "torch.conv1d",
    "aten.conv2d.default": "torch.conv2d",
    "aten.conv3d.default": "torch.conv3d",
    "aten.layer_norm.default": "torch.layer_norm",
    "aten.batch_norm.default": "torch.batch_norm",
    "aten.group_norm.default": "torch.group_norm",
    "aten.scaled_dot_product_attention.default": "F.scaled_dot_product_attention",
    "aten.gelu.default": "F.gelu",
    "aten.relu.default": "torch.relu",
    "aten.relu_.default": "torch.relu_",
    "aten.sigmoid.default": "torch.sigmoid",
    "aten.tanh.default": "torch.tanh",
    "aten.softmax.int": "torch.softmax",
    "aten.add.Tensor": "torch.add",
    "aten.add_.Tensor": "torch.Tensor.add_",
    "aten.sub.Tensor": "torch.sub",
    "aten.mul.Tensor": "torch.mul",
    "aten.div.Tensor": "torch.div",
    "aten.matmul.default": "torch.matmul",
    "aten.bmm.default": "torch.bmm",
    "aten.reshape.default": "torch.reshape",
    "aten.view.default": "torch.Tensor.view",
    "aten.flatten.using_ints": "torch.flatten",
    "aten.transpose.int": "torch.transpose",
    "aten.permute.default": "torch.permute",
    "aten.unbind.int": "torch.unbind",
    "aten.select.int": "torch.select",
    "aten.unsqueeze.default": "torch.unsqueeze",
    "aten.squeeze.dim": "torch.squeeze",
    "aten.chunk.default": "torch.chunk",
    "aten.cat.default": "torch.cat",
    "aten.mean.dim": "torch.mean",
    "aten.max_pool2d.default": "torch.max_pool2d",
    "aten.contiguous.default": "torch.Tensor.contiguous",
    "aten.expand.default": "torch.Tensor.expand",
}
_DROPOUTS = {"aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"}
_ASSERTIONS = (
    "aten._assert_scalar",
    "aten._assert_async",
    "aten._assert_tensor_metadata",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
)
_CONVOLUTIONS = {"aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default"}
# Matrix products and convolutions, counted by the operator's name without its overload.
_PRODUCTS = {
    *(f"aten.{name}" for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum")),
    *(f"aten.{kind}{axes}d" for kind in ("conv", "conv_transpose") for axes in (1, 2, 3)),
    *("aten.convolution", "aten.bilinear", "aten.scaled_dot_product_attention"),
}
_WHOLE_AXIS = 2**63 - 1
#: The comment at lines of the model's own forward, whose dotted name is empty.
ROOT_COMMENT = "(model)"


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """A weight stored as int8 under ``stored``, with its scales (out,) under ``scales``."""

    stored: str
    scales: str


@dataclass(kw_only=True)
class GraphSource:
    """The text of ``graph.py``, the names of the tensors it asks for, and what it multiplies.

    ``num_int8`` of ``num_products`` matrix products and convolutions run in int8; an attention
    (its two products) counts as one.
    """

    text: str
    tensors: frozenset[str]
    num_int8: int
    num_products: int


@dataclass(kw_only=True)
class _Writer:
    """Names and lines gathered while the graph is walked."""

    setup: list[str] = field(default_factory=list)
    bound: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)
    num_int8: int = 0
    num_products: int = 0

    def bind(self, expression: str, hint: str) -> str:
        """A name in the closure, made from the hint, for an expression that is evaluated once."""
        if expression not in self.bound:
            name = re.sub(r"\W", "_", hint)
            name = name if name not in self.taken else f"{name}_{len(self.taken)}"
            self.taken.add(name)
            self.bound[expression] = name
            self.setup.append(f"{name} = {expression}")
        return self.bound[expression]

    def weight(self, name: str) -> str:
        self.tensors.add(name)
        return self.bind(f"weights.tensor({name!r})", f"w_{name}")


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One line of the forward: the value it makes, those it uses, the module it came from."""

    line: str
    made: str | None
    used: set[str]
    module: str | None


def parameter_targets(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name to the dotted name of its parameter, buffer or constant in the program."""
    targets = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            if spec.target is None:
                raise TrialError(f"The exported program has no tensor for input {spec.arg.name!r}.")
            targets[spec.arg.name] = spec.target
        elif spec.kind is not InputKind.USER_INPUT:
            raise TrialError(
                f"The model uses a {spec.kind.name.lower()} object, which an artefact can't hold. "
                "Replace it by tensors and modules."
            )
    return targets


# torch's word where a pass of its own made the node.
_NO_STACK = "_empty_nn_module_stack"


def owner(node: fx.Node) -> str | None:
    """Dotted name, in the user's model, of the innermost module that a node was traced in.

    Empty for the model itself, None where the exporter doesn't tell.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0]).split("@")[0]
    if path.startswith(_NO_STACK):
        return None
    return f"{path}.".removeprefix(WRAPPER_PREFIX).removesuffix(".")


def write_graph(
    program: ExportedProgram,
    names: dict[str, str],
    int8: Callable[[fx.Node], Int8Weight | None],
) -> GraphSource:
    """Source of ``graph.py`` for a program.

    ``names`` maps placeholders of weights to the names they are stored under; ``int8`` tells which
    ``aten.linear`` nodes multiply by an int8 weight. Raises ``TrialError`` naming an operator that
    can't be written and the module it came from.
    """
    if any(s.kind is not OutputKind.USER_OUTPUT for s in program.graph_signature.output_specs):
        raise TrialError(
            "The model's forward changes its buffers, which an artefact can't do. Put it in eval "
            "mode or remove the change."
        )
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    _inline_grad_modes(graph, program.graph_module)
    _drop_assertions(graph)
    writer = _Writer()
    parameters, body = _write_body(graph, writer, names, int8)
    setup = [f"    {line}" for line in writer.setup]
    lines = [
        '"""The model as one function of its inputs; ``serve.py`` builds it around the weights."""',
        "",
        "import math",
        "import operator",
        "",
        "import torch",
        "from torch.nn import functional as F",
        "",
        "",
        "def build(weights):",
        *setup,
        "",
        f"    def forward({', '.join(parameters)}):",
        *(f"        {line}" for line in body),
        "",
        "    return forward",
        "",
    ]
    return GraphSource(
        text="\n".join(lines),
        tensors=frozenset(writer.tensors),
        num_int8=writer.num_int8,
        num_products=writer.num_products,
    )


def _inline_grad_modes(graph: fx.Graph, root: torch.nn.Module) -> None:
    # A block under torch.no_grad() is traced as a graph of its own; serving has no gradients.
    for node in list(graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled":
            continue
        inner = root.get_submodule(str(node.args[1].target))
        assert isinstance(inner, fx.GraphModule)
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(node):
            mapped = dict(zip(places, node.args[2:], strict=True))
            results = graph.graph_copy(inner.graph, mapped)
        for user in list(node.users):
            assert user.target is operator.getitem
            assert isinstance(results, (tuple, list))
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[arg-type]
            graph.erase_node(user)
        graph.erase_node(node)


def _drop_assertions(graph: fx.Graph) -> None:
    # Shapes are checked once by serve.py; the traced checks only repeat that on every call.
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and str(node.target).startswith(_ASSERTIONS):
            if node.users:
                raise TrialError(
                    f"The operator '{node.target}'{_place(node)} can't be written into an "
                    "artefact, because its result is used. Remove it from the model."
                )
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _write_body(
    graph: fx.Graph,
    writer: _Writer,
    names: dict[str, str],
    int8: Callable[[fx.Node], Int8Weight | None],
) -> tuple[list[str], list[str]]:
    env: dict[fx.Node, str] = {}
    weights: dict[fx.Node, str] = {}
    parameters: list[str] = []
    steps: list[_Step] = []

    def show(value: Any) -> str:
        return _literal(value, lambda node: _value(node, env, weights, writer))

    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in names:
                weights[node] = names[node.name]
            else:
                env[node] = f"v_{node.name}"
                parameters.append(env[node])
            continue
        used = {env[n] for n in node.all_input_nodes if n in env}
        if node.op == "output":
            (result,) = _outputs(node)
            line = f"return {show(result)}"
            steps.append(_Step(line=line, made=None, used=used, module=None))
            continue
        if node.op == "get_attr":  # the body of a block; the operator that runs it is refused
            continue
        if node.op != "call_function":
            raise TrialError(
                f"The exported graph has a {node.op!r} node{_place(node)} that can't be written."
            )
        same = _same_value(node, env)
        if same is not None:
            env[node] = same
            continue
        expression = _call(node, writer, weights, show, int8)
        env[node] = f"v_{node.name}"
        line = f"{env[node]} = {expression}"
        steps.append(_Step(line=line, made=env[node], used=used, module=owner(node)))
    return parameters, _with_releases(steps)


def _outputs(node: fx.Node) -> tuple[Any, ...]:
    outputs = node.args[0]
    if not isinstance(outputs, (tuple, list)):
        return (outputs,)
    if len(outputs) != 1:
        raise TrialError(f"The exported program returns {len(outputs)} values instead of logits.")
    return tuple(outputs)


def _value(
    node: fx.Node, env: dict[fx.Node, str], weights: dict[fx.Node, str], writer: _Writer
) -> str:
    return writer.weight(weights[node]) if node in weights else env[node]


def _with_releases(steps: list[_Step]) -> list[str]:
    """The lines, with values deleted after their last use, so that peak memory stays eager's."""
    touched = [step.used | ({step.made} if step.made else set()) for step in steps]
    last = {name: index for index, names in enumerate(touched) for name in names}
    lines: list[str] = []
    for index, (step, names) in enumerate(zip(steps, touched, strict=True)):
        comment = "" if step.module is None else f"  # {step.module or ROOT_COMMENT}"
        lines.append(f"{step.line}{comment}")
        ending = sorted(name for name in names if last[name] == index)
        if ending and step.made is not None:
            lines.append(f"del {', '.join(ending)}")
    return lines


def _same_value(node: fx.Node, env: dict[fx.Node, str]) -> str | None:
    """The name of the input that this node returns as it is, or None."""
    target = str(node.target)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if target in _DROPOUTS and node.args[2] is False:
        return env.get(source)
    if target == "aten.slice.Tensor":
        start = node.args[2] if len(node.args) > 2 else None
        end = node.args[3] if len(node.args) > 3 else None
        step = node.args[4] if len(node.args) > 4 else 1
        if start in (None, 0) and end in (None, _WHOLE_AXIS) and step == 1:
            return env.get(source)
    if target == "aten.batch_norm.default" and _folds(node):
        return env.get(source)
    return None


def _folds(norm: fx.Node) -> bool:
    """Whether a batch norm can vanish into the convolution that feeds it and nothing else."""
    convolution = norm.args[0]
    if not isinstance(convolution, fx.Node) or str(convolution.target) not in _CONVOLUTIONS:
        return False
    training, mean, variance = norm.args[5], norm.args[3], norm.args[4]
    tensors = [*norm.args[1:5], *convolution.args[1:3]]
    fixed = all(value is None or _is_placeholder(value) for value in tensors)
    stated = mean is not None and variance is not None
    return len(convolution.users) == 1 and training is False and stated and fixed


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "placeholder"


def _call(
    node: fx.Node,
    writer: _Writer,
    weights: dict[fx.Node, str],
    show: Callable[[Any], str],
    int8: Callable[[fx.Node], Int8Weight | None],
) -> str:
    target = str(node.target)
    writer.num_products += target.rpartition(".")[0] in _PRODUCTS
    if node.target is operator.getitem:
        return f"{show(node.args[0])}[{show(node.args[1])}]"
    if target == "aten.sym_size.int":
        return f"{show(node.args[0])}.shape[{show(node.args[1])}]"
    if target == "aten.linear.default":
        quantized = int8(node)
        if quantized is not None:
            return _int8_call(node, quantized, writer, weights, show)
    if target in _CONVOLUTIONS:
        norm = next(iter(node.users))
        if str(norm.target) == "aten.batch_norm.default" and norm.args[0] is node and _folds(norm):
            return _folded_call(node, norm, writer, weights, show)
    return f"{_function(node, writer)}({_arguments(node.args, node.kwargs, show)})"


def _function(node: fx.Node, writer: _Writer) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in ("aten", "prims"):
            raise TrialError(
                f"The operator '{target.namespace}::{target._opname}'{_place(node)} is not torch's "
                "own, so the artefact couldn't run without its library. Replace it in the model."
            )
        expression = _DIRECT.get(str(target), f"torch.ops.{target}")
        return writer.bind(expression, expression.removeprefix("torch.ops."))
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", str(target))
    if module in ("_operator", "operator"):
        return writer.bind(f"operator.{name}", f"operator_{name}")
    if module in ("math", "torch"):
        return writer.bind(f"{module}.{name}", f"{module}_{name}")
    raise TrialError(
        f"The operator {name!r}{_place(node)} can't be written into an artefact. Replace it in the "
        "model (control flow, autocast and custom operators are not supported)."
    )


def _place(node: fx.Node) -> str:
    """Where a node came from, for a message; empty where the exporter doesn't tell."""
    module = owner(node)
    if module is None:
        return ""
    return f" in module {module!r}" if module else " in the model's own forward"


def _int8_call(
    node: fx.Node,
    quantized: Int8Weight,
    writer: _Writer,
    weights: dict[fx.Node, str],
    show: Callable[[Any], str],
) -> str:
    bias = _argument(node, 2, "bias")
    bias_name = None if bias is None else weights[bias]
    writer.tensors.add(quantized.stored)
    writer.tensors.add(quantized.scales)
    if bias_name is not None:
        writer.tensors.add(bias_name)
    writer.num_int8 += 1
    packed = writer.bind(
        f"weights.int8_linear({quantized.stored!r}, {quantized.scales!r}, {bias_name!r})",
        f"q_{quantized.stored}",
    )
    function = writer.bind("torch.ops.quantized.linear_dynamic.default", "linear_dynamic")
    return f"{function}({show(node.args[0])}, {packed})"


def _folded_call(
    node: fx.Node,
    norm: fx.Node,
    writer: _Writer,
    weights: dict[fx.Node, str],
    show: Callable[[Any], str],
) -> str:
    bias = _argument(node, 2, "bias")
    parts = [node.args[1], bias, *norm.args[1:5]]
    stored = [None if part is None else weights[part] for part in parts]  # type: ignore[index]
    writer.tensors.update(name for name in stored if name is not None)
    eps = norm.args[7]
    folded = writer.bind(
        f"weights.folded({', '.join(map(repr, stored))}, eps={eps!r})", f"c_{stored[0]}"
    )
    weight = writer.bind(f"{folded}[0]", f"{folded}_kernel")
    shift = writer.bind(f"{folded}[1]", f"{folded}_shift")
    rest = [show(argument) for argument in node.args[3:]]
    arguments = ", ".join([show(node.args[0]), weight, shift, *rest])
    keywords = "".join(f", {k}={show(v)}" for k, v in node.kwargs.items() if k != "bias")
    return f"{_function(node, writer)}({arguments}{keywords})"


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _arguments(args: Any, kwargs: Any, show: Callable[[Any], str]) -> str:
    shown = [show(value) for value in args]
    return ", ".join([*shown, *(f"{key}={show(value)}" for key, value in kwargs.items())])


def _literal(value: Any, node: Callable[[fx.Node], str]) -> str:
    """Source of an argument: numbers, strings, nodes, torch's enumerations and nests of them."""
    if isinstance(value, fx.Node):
        return node(value)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_literal(item, node) for item in value)
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, slice):
        parts = (_literal(part, node) for part in (value.start, value.stop, value.step))
        return f"slice({', '.join(parts)})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, torch.device):
        return f"torch.{value!r}"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    raise TrialError(f"The exported graph holds {value!r}, which can't be written as source.")
