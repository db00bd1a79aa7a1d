"""The onnxruntime artefact: one ``model.onnx``, float, or with int8 products.

``int8-dynamic`` is onnxruntime's own ``quantize_dynamic`` with its defaults, on the matrix products
that come from ``nn.Linear``; convolutions stay float, because quantizing them dynamically makes
them slower. ``int8-static`` is ours, in QDQ form (``onnx_static.py``): the library's own, with its
defaults, takes ViT-Tiny from 83 % to 0 %.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from profiling_agent.deployment.capabilities import int8_support
from profiling_agent.deployment.exporting import (
    Exported,
    export_program,
    first_line,
    module_logits,
)
from profiling_agent.deployment.lowered import (
    Lowered,
    Lowering,
    check_calibration_memory,
    keeps_float,
    plain_linears,
    product_layers,
)
from profiling_agent.deployment.onnx_calibration import activation_bytes, calibrate
from profiling_agent.deployment.onnx_export import to_onnx
from profiling_agent.deployment.onnx_graph import (
    MAX_INLINE_BYTES,
    MODEL_FILE,
    constants,
    count_float_products,
    count_products,
    forget_sources,
    module_of,
    name_added_nodes,
    name_nodes,
    save_model,
    weight_bytes,
)
from profiling_agent.deployment.onnx_qdq import quantize
from profiling_agent.deployment.onnx_static import (
    FULL_RANGE,
    REDUCED_RANGE,
    choose_range,
    plan_static,
)
from profiling_agent.deployment.torch_runtime import inference_copy
from profiling_agent.errors import MissingDependency, TrialError
from profiling_agent.records.common import Machine, RuntimeName
from profiling_agent.records.plan import Quantization

INSTALL_LINE = 'pip install "profiling-agent[cpu]"'
FP32, DYNAMIC, STATIC = "fp32", "int8-dynamic", "int8-static"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class _Quantized:
    """A graph after quantization, the layers whose weights are int8 in it, and what to say."""

    proto: Any
    layers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class OnnxRuntime:
    """Runs artefacts with onnxruntime and numpy: float, or int8 as the module describes."""

    name: RuntimeName = "onnxruntime"

    def version(self) -> str | None:
        if any(importlib.util.find_spec(package) is None for package in PACKAGES):
            return None
        return metadata.version("onnxruntime")

    def schemes(self, machine: Machine) -> tuple[str, ...]:
        if not self.version():
            return ()
        return (FP32, DYNAMIC, STATIC) if int8_support(machine).usable else (FP32,)

    def refused(self, machine: Machine) -> dict[str, str]:
        support = int8_support(machine)
        if support.usable or not self.version():
            return {}
        return dict.fromkeys((DYNAMIC, STATIC), support.reason)

    def lower(
        self, model: nn.Module, example: dict[str, Tensor], lowering: Lowering, folder: Path
    ) -> Lowered:
        scheme = lowering.quantization.scheme
        require_packages()
        _refuse(scheme, lowering)
        model = inference_copy(model)
        exported = export_program(model, example)
        proto = to_onnx(exported, model, tuple(example))
        layers = product_layers(model)
        scopes = name_nodes(proto, {name: model.get_submodule(name) for name in layers})
        if scheme == FP32:
            done, candidates = _Quantized(proto=proto), tuple(plain_linears(model))
        elif scheme == DYNAMIC:
            done, candidates = (
                _quantize_dynamic(proto, model, lowering),
                tuple(plain_linears(model)),
            )
        else:
            done, candidates = _quantize_static(proto, scopes, layers, exported, lowering), layers
        files = _save(done.proto, folder)
        num_int8, num_products = _count(done.proto, scheme, folder)
        return Lowered(
            model_files=files,
            weight_bytes=weight_bytes(done.proto),
            int8_layers=done.layers,
            float_layers=tuple(name for name in candidates if name not in done.layers),
            num_int8_operators=num_int8,
            num_products=num_products,
            fixed_batch=exported.fixed_batch,
            notes=(*exported.notes, *done.notes),
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


def _refuse(scheme: str, lowering: Lowering) -> None:
    if scheme not in (FP32, DYNAMIC, STATIC):
        raise TrialError(
            f"The onnxruntime runtime has no scheme {scheme!r}. "
            f"Use {FP32!r}, {DYNAMIC!r} or {STATIC!r}."
        )
    support = int8_support(lowering.machine)
    if scheme != FP32 and not support.usable:
        raise TrialError(
            f"The onnxruntime runtime does not offer {scheme!r} here: {support.reason}. "
            f"Use {FP32!r}."
        )
    if scheme == STATIC and lowering.calibration is None:
        raise TrialError(
            f"The scheme {STATIC!r} needs calibration samples and there are none. Give calibration "
            f"data, or use {DYNAMIC!r}."
        )


def _quantize_dynamic(proto: Any, model: nn.Module, lowering: Lowering) -> _Quantized:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.onnx_model import ONNXModel

    keep_float = lowering.quantization.keep_float
    support = int8_support(lowering.machine)
    # Shapes noted before the rewriting contradict it, and quantize_dynamic then stops.
    del proto.graph.value_info[:]
    rewritten = ONNXModel(proto)
    rewritten.replace_gemm_with_matmul()
    proto = rewritten.model
    linears, weights = plain_linears(model), constants(proto)
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    wanted = {
        node.name: module_of(node)
        for node in products
        if node.input[1] in weights
        and module_of(node) in linears
        and not keeps_float(module_of(node), keep_float)
    }
    if not wanted:
        raise _nothing(DYNAMIC, "nn.Linear", keep_float)
    # Marked as preprocessed, or onnxruntime writes its advice to the root logger.
    entry = proto.metadata_props.add()
    entry.key, entry.value = "onnx.quant.pre_process", "onnxruntime.quant"
    try:
        with tempfile.TemporaryDirectory() as folder:
            quantize_dynamic(
                proto,
                Path(folder) / MODEL_FILE,
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=[node.name for node in products if node.name not in wanted],
                weight_type=QuantType.QInt8,
                reduce_range=support.reduce_range,
                use_external_data_format=weight_bytes(proto) >= MAX_INLINE_BYTES,
            )
            result = onnx.load(str(Path(folder) / MODEL_FILE))
    except OSError:
        raise
    except Exception as error:  # onnxruntime raises bare exceptions
        raise TrialError(f"onnxruntime can't quantize the model: {first_line(error)}.") from error
    left = {node.name for node in result.graph.node if node.op_type == "MatMul"}
    layers = dict.fromkeys(layer for name, layer in wanted.items() if name not in left)
    name_added_nodes(result)
    return _Quantized(proto=result, layers=tuple(layers), notes=_range_note(lowering, {False}))


def _quantize_static(
    proto: Any,
    scopes: dict[str, str],
    layers: tuple[str, ...],
    exported: Exported,
    lowering: Lowering,
) -> _Quantized:
    keep_float = lowering.quantization.keep_float
    kept = {
        node
        for node, scope in scopes.items()
        if keeps_float(scope, keep_float) or keeps_float(node.partition("::")[0], keep_float)
    }
    plan = plan_static(proto, kept)
    if not plan.products:
        raise _nothing(STATIC, "linear layer or convolution", keep_float)
    # A processor works through single samples about as fast as through batches.
    batch = exported.fixed_batch or 1
    check_calibration_memory(
        weight_bytes(proto), activation_bytes(proto, batch), batch, lowering.machine, DYNAMIC
    )
    assert lowering.calibration is not None
    bounds = calibrate(
        proto, plan.to_calibrate(), lowering.calibration, batch, lowering.deployment.threads
    )
    fixed = exported.fixed_batch is not None
    # With all sizes known onnxruntime would merge the sum of the outliers into a float product.
    ranges = {name: choose_range(value, not fixed) for name, value in bounds.items()}
    reduced = int8_support(lowering.machine).reduce_range
    quantize(proto, plan, ranges, REDUCED_RANGE if reduced else FULL_RANGE, int8_sums=fixed)
    modules = {name.partition("::")[0] for name in plan.products}
    split = {
        name.partition("::")[0]: len(ranges[product.source].outliers)
        for name, product in plan.products.items()
        if product.source in ranges and len(ranges[product.source].outliers)
    }
    name_added_nodes(proto)
    return _Quantized(
        proto=proto,
        layers=tuple(name for name in layers if name in modules),
        notes=(
            *_range_note(lowering, {product.is_depthwise for product in plan.products.values()}),
            *_outlier_note(split),
        ),
    )


def _nothing(scheme: str, kind: str, keep_float: tuple[str, ...]) -> TrialError:
    return TrialError(
        f"The scheme {scheme!r} quantizes nothing here: there is no {kind} that keep_float "
        f"{list(keep_float)!r} leaves. Use {FP32!r} or keep fewer layers float."
    )


def _range_note(lowering: Lowering, depthwise: set[bool]) -> tuple[str, ...]:
    """Of a graph with depthwise products (True), others (False) or both."""
    support = int8_support(lowering.machine)
    if not support.reduce_range or False not in depthwise:
        return ()
    but = ", those of depthwise convolutions eight" if True in depthwise else ""
    return (f"The int8 weights have seven bits{but}: {support.reason}.",)


def _outlier_note(split: dict[str, int]) -> tuple[str, ...]:
    if not split:
        return ()
    listed = ", ".join(f"{module} ({count})" for module, count in split.items())
    return (
        "Input channels far beyond all others are multiplied in float where they leave the int8 "
        f"range: {listed}.",
    )


def _save(proto: Any, folder: Path) -> tuple[str, ...]:
    forget_sources(proto)
    return save_model(proto, folder)


def _count(proto: Any, scheme: str, folder: Path) -> tuple[int, int]:
    """Products in int8 and in all; ``TrialError`` when an int8 scheme ends without any."""
    if scheme == FP32:
        return 0, count_float_products(proto)
    num_int8, num_products = count_products(folder)
    if not num_int8:
        raise TrialError(
            f"The scheme {scheme!r} has no effect: onnxruntime runs none of the {num_products} "
            f"products in int8. Use {FP32!r}."
        )
    return num_int8, num_products
