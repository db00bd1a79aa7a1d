"""The onnxruntime artefact: one ``model.onnx``, float or with dynamically quantized linear layers.

``int8-dynamic`` is onnxruntime's own ``quantize_dynamic`` with its defaults, on the matrix products
that come from ``nn.Linear``; convolutions stay float, because quantizing them dynamically makes
them slower.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from profiling_agent.deployment.exporting import (
    WRAPPER_PREFIX,
    Exported,
    export_program,
    first_line,
    module_logits,
    quiet_exporter,
)
from profiling_agent.deployment.lowered import Lowered, keeps_float, plain_linears
from profiling_agent.deployment.torch_runtime import inference_copy
from profiling_agent.errors import MissingDependency, TrialError
from profiling_agent.records.common import Machine, RuntimeName
from profiling_agent.records.plan import Quantization

MODEL_FILE = "model.onnx"
INSTALL_LINE = 'pip install "profiling-agent[cpu]"'
FP32, INT8 = "fp32", "int8-dynamic"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf message ends at 2 GiB; weights beyond this go into a file beside the graph.
MAX_INLINE_BYTES = 1_800_000_000
_INT8_PRODUCTS = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
_SCOPES = "pkg.torch.onnx.name_scopes"


class OnnxRuntime:
    """Runs artefacts with onnxruntime and numpy; fp32 and dynamic int8 of linear layers."""

    name: RuntimeName = "onnxruntime"

    def version(self) -> str | None:
        if any(importlib.util.find_spec(package) is None for package in PACKAGES):
            return None
        return metadata.version("onnxruntime")

    def schemes(self, machine: Machine) -> tuple[str, ...]:
        return (FP32, INT8) if self.version() else ()

    def lower(
        self,
        model: nn.Module,
        example: dict[str, Tensor],
        quantization: Quantization,
        folder: Path,
    ) -> Lowered:
        require_packages()
        if quantization.scheme not in (FP32, INT8):
            raise TrialError(
                f"The onnxruntime runtime has no scheme {quantization.scheme!r}. "
                f"Use {FP32!r} or {INT8!r}."
            )
        model = inference_copy(model)
        exported = export_program(model, example)
        proto = to_onnx(exported, model, tuple(example))
        linears = tuple(plain_linears(model))
        int8_layers: tuple[str, ...] = ()
        if quantization.scheme == INT8:
            proto, int8_layers = _quantize(proto, model, quantization)
        files = _save(proto, folder)
        return Lowered(
            model_files=files,
            weight_bytes=_weight_bytes(proto),
            int8_layers=int8_layers,
            float_layers=tuple(name for name in linears if name not in int8_layers),
            fixed_batch=exported.fixed_batch,
            notes=exported.notes,
        )

    def reference(
        self, model: nn.Module, example: dict[str, Tensor], quantization: Quantization
    ) -> Tensor | None:
        if quantization.scheme != FP32:
            return None
        return module_logits(inference_copy(model), example)


def require_packages() -> None:
    """``MissingDependency`` with the install line unless everything needed is there."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependency(
            f"The onnxruntime runtime needs {', '.join(missing)}. Install with: {INSTALL_LINE}"
        )


def to_onnx(exported: Exported, model: nn.Module, names: tuple[str, ...]) -> Any:
    """An ``onnx.ModelProto`` without traces of source code or of this machine.

    Raises ``TrialError`` naming the operator that onnx can't express.
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
            f"{type(model).__name__!r} can't be exported to onnx: {_operator_at_fault(error)}. "
            "Use the torch runtime or replace the operator."
        ) from error
    assert program is not None
    return program.model_proto


def _operator_at_fault(error: BaseException) -> str:
    """The operator that a chain of exporter errors names, or its first line."""
    link: BaseException | None = error
    while link is not None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(link))
        found = found or re.search(r"%\w+ : .*?target=(?:torch\.ops\.)?([\w.]+)\]", str(link))
        if found:
            return f"there is no translation of the operator {found.group(1)!r}"
        link = link.__cause__ or link.__context__
    return first_line(error)


def _quantize(
    proto: Any, model: nn.Module, quantization: Quantization
) -> tuple[Any, tuple[str, ...]]:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.onnx_model import ONNXModel

    # Shapes noted before the rewriting contradict it, and quantize_dynamic then stops.
    del proto.graph.value_info[:]
    _name_nodes(proto)
    owners = {node.name: _owner(node) for node in proto.graph.node}
    rewritten = ONNXModel(proto)
    rewritten.replace_gemm_with_matmul()
    proto = rewritten.model
    wanted = {
        node: module
        for node, module in _linear_nodes(proto, owners, model).items()
        if not keeps_float(module, quantization.keep_float)
    }
    # Marked as preprocessed, or onnxruntime writes its advice to the root logger.
    entry = proto.metadata_props.add()
    entry.key, entry.value = "onnx.quant.pre_process", "onnxruntime.quant"
    products = [node.name for node in proto.graph.node if node.op_type == "MatMul"]
    large = _weight_bytes(proto) >= MAX_INLINE_BYTES
    try:
        with tempfile.TemporaryDirectory() as folder:
            quantize_dynamic(
                proto,
                Path(folder) / MODEL_FILE,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=[name for name in products if name not in wanted],
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
            )
            result = onnx.load(str(Path(folder) / MODEL_FILE))
    except OSError:
        raise
    except Exception as error:  # onnxruntime raises bare exceptions
        raise TrialError(f"onnxruntime can't quantize the model: {first_line(error)}.") from error
    return result, _count_int8(result, products, wanted, quantization)


def _count_int8(
    result: Any, products: list[str], wanted: dict[str, str], quantization: Quantization
) -> tuple[str, ...]:
    left = {node.name for node in result.graph.node if node.op_type == "MatMul"}
    done = [name for name in products if name not in left]
    num_int8 = sum(node.op_type in _INT8_PRODUCTS for node in result.graph.node)
    if not num_int8 or not done:
        raise TrialError(
            f"The scheme {INT8!r} quantizes nothing here: there is no nn.Linear that keep_float "
            f"{list(quantization.keep_float)!r} leaves. Use {FP32!r} or keep fewer layers float."
        )
    assert num_int8 == len(done), "every quantized product leaves one integer product"
    return tuple(dict.fromkeys(wanted[name] for name in done))


def _name_nodes(proto: Any) -> None:
    # quantize_dynamic excludes by name, and takes an unnamed node for one that may be quantized.
    taken: set[str] = set()
    for index, node in enumerate(proto.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}_named"
        taken.add(node.name)


def _linear_nodes(proto: Any, owners: dict[str, str], model: nn.Module) -> dict[str, str]:
    """Matrix products with a constant weight to the ``nn.Linear`` they come from."""
    linears = plain_linears(model)
    constants = {value.name for value in proto.graph.initializer}
    found: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            # A Gemm that was split in two gave its name and this suffix to the product.
            module = owners.get(node.name) or owners.get(node.name.removesuffix("_MatMul"), "")
            if module in linears:
                found[node.name] = module
    return found


def _owner(node: Any) -> str:
    """Dotted name of the module that a node was traced in, empty for the model itself."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            # The last scope is the operator's own.
            return str(scopes[-2]).split("@")[0].removeprefix(WRAPPER_PREFIX)
    return ""


def _save(proto: Any, folder: Path) -> tuple[str, ...]:
    import onnx

    _forget_sources(proto)
    if _weight_bytes(proto) < MAX_INLINE_BYTES:
        (folder / MODEL_FILE).write_bytes(proto.SerializeToString())
        return (MODEL_FILE,)
    weights = f"{MODEL_FILE}.data"
    onnx.save(proto, str(folder / MODEL_FILE), save_as_external_data=True, location=weights)
    return (MODEL_FILE, weights)


def _forget_sources(proto: Any) -> None:
    # The exporter notes source lines and paths of the machine it ran on, at every node.
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


def _weight_bytes(proto: Any) -> int:
    from onnx import numpy_helper

    return sum(numpy_helper.to_array(value).nbytes for value in proto.graph.initializer)
