"""The openvino artefact: an intermediate representation in float, bf16, or int8 by NNCF.

``int8-static`` is NNCF's post-training quantization of weights (per channel) and activations (per
tensor) with bias correction; for models with attention its transformer preset, which smooths
outliers into the weights and leaves softmax alone. What isn't quantized computes in f32, or in
bf16 with ``int8-static-bf16``. ``int8-weights`` stores weights as int8; openvino multiplies linear
layers in int8 too, with activations quantized on the fly in groups of channels, where the processor
has VNNI or AMX.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.deployment.capabilities import bf16_support, int8_support
from profiling_agent.deployment.exporting import (
    Exported,
    export_program,
    first_line,
    module_logits,
    quiet_exporter,
)
from profiling_agent.deployment.lowered import (
    Calibration,
    Lowered,
    Lowering,
    check_calibration_memory,
    keeps_float,
    product_layers,
)
from profiling_agent.deployment.openvino_export import (
    has_attention,
    import_openvino,
    to_openvino,
)
from profiling_agent.deployment.openvino_graph import (
    MODULE_MARK,
    PRODUCTS,
    facts_of,
    precision_of,
    properties,
)
from profiling_agent.deployment.telemetry import no_telemetry
from profiling_agent.deployment.torch_runtime import inference_copy
from profiling_agent.errors import MissingDependency, TrialError
from profiling_agent.records.common import Machine, RuntimeName
from profiling_agent.records.plan import Quantization

MODEL_FILE, WEIGHTS_FILE = "model.xml", "model.bin"
INSTALL_LINE = 'pip install "profiling-agent[cpu]"'
PACKAGES = ("openvino", "nncf")
FP32, BF16 = "fp32", "bf16"
INT8, INT8_BF16, INT8_WEIGHTS = "int8-static", "int8-static-bf16", "int8-weights"
SCHEMES = (FP32, BF16, INT8, INT8_BF16, INT8_WEIGHTS)
_DISK_FAULTS = ("iostream error", "Can't open", "Couldn't create directory")


class OpenVinoRuntime:
    """Runs artefacts with openvino and numpy: f32, bf16, static int8, int8 weights."""

    name: RuntimeName = "openvino"

    def version(self) -> str | None:
        if any(importlib.util.find_spec(package) is None for package in PACKAGES):
            return None
        return metadata.version("openvino")

    def schemes(self, machine: Machine) -> tuple[str, ...]:
        if self.version() is None:
            return ()
        refused = self.refused(machine)
        return tuple(scheme for scheme in SCHEMES if scheme not in refused)

    def refused(self, machine: Machine) -> dict[str, str]:
        if self.version() is None:
            return {}
        refused: dict[str, str] = {}
        int8, bf16 = int8_support(machine), bf16_support(machine)
        if not bf16.usable:
            refused |= {BF16: bf16.reason, INT8_BF16: bf16.reason}
        if not int8.usable:
            refused |= {INT8: int8.reason, INT8_BF16: int8.reason}
        return refused

    def lower(
        self, model: nn.Module, example: dict[str, Tensor], lowering: Lowering, folder: Path
    ) -> Lowered:
        require_packages()
        scheme = lowering.quantization.scheme
        self._check_scheme(scheme, lowering)
        model = inference_copy(model)
        exported = export_program(model, example)
        with quiet_libraries():
            graph = to_openvino(exported, model, example)
            if scheme in (INT8, INT8_BF16):
                graph = _quantize(graph, exported, model, lowering)
            elif scheme == INT8_WEIGHTS:
                graph = _compress_weights(graph, model, lowering)
            _save(graph, folder, scheme)
            counted = _count(folder / MODEL_FILE, scheme, exported, lowering)
        layers = product_layers(model)
        int8_layers = tuple(name for name in layers if name in counted.int8_modules)
        if scheme in (INT8, INT8_BF16, INT8_WEIGHTS) and not int8_layers:
            raise TrialError(
                f"The scheme {scheme!r} quantizes nothing here: no layer that keep_float "
                f"{list(lowering.quantization.keep_float)!r} leaves runs in int8. Use another "
                "scheme or keep fewer layers float."
            )
        return Lowered(
            model_files=(MODEL_FILE, WEIGHTS_FILE),
            weight_bytes=counted.weight_bytes,
            int8_layers=int8_layers,
            float_layers=tuple(name for name in layers if name not in counted.int8_modules),
            num_int8_operators=counted.num_int8,
            num_products=counted.num_products,
            fixed_batch=exported.fixed_batch,
            notes=(*exported.notes, *_range_notes(scheme, lowering.machine)),
        )

    def reference(
        self, model: nn.Module, example: dict[str, Tensor], quantization: Quantization
    ) -> Tensor | None:
        if quantization.scheme != FP32:
            return None
        return module_logits(inference_copy(model), example)

    def _check_scheme(self, scheme: str, lowering: Lowering) -> None:
        if scheme not in SCHEMES:
            raise TrialError(
                f"The openvino runtime has no scheme {scheme!r}. Use one of {', '.join(SCHEMES)}."
            )
        reason = self.refused(lowering.machine).get(scheme)
        if reason is not None:
            raise TrialError(f"The scheme {scheme!r} is not offered here: {reason}.")
        if scheme in (INT8, INT8_BF16) and lowering.calibration is None:
            raise TrialError(
                f"The scheme {scheme!r} needs calibration samples, and there are no data. Pass "
                "data (labels are not looked at)."
            )


def require_packages() -> None:
    """``MissingDependency`` with the install line unless everything needed is there."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependency(
            f"The openvino runtime needs {', '.join(missing)}. Install with: {INSTALL_LINE}"
        )


def _quantize(graph: Any, exported: Exported, model: nn.Module, lowering: Lowering) -> Any:
    """NNCF's static int8 of a graph.

    NNCF walks through the samples once for each of its steps (smoothing, ranges, biases), one batch
    at a time. It holds copies of the weights, what the graph computes for that batch, and of each
    sample a value for each tensor or channel, so that nothing to speak of grows with the samples.
    """
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        OverflowFix,
    )

    calibration, batch = lowering.calibration, exported.fixed_batch or 1
    assert calibration is not None
    _check_calibration(graph, calibration, batch)
    check_calibration_memory(
        _weight_bytes(graph), _activation_bytes(graph, batch), batch, lowering.machine, INT8_WEIGHTS
    )
    reduce_range = int8_support(lowering.machine).reduce_range
    try:
        return nncf.quantize(
            graph,
            nncf.Dataset(_Stream(calibration, batch)),  # pyright: ignore
            subset_size=calibration.num_samples,
            model_type=nncf.ModelType.TRANSFORMER if has_attention(exported.program) else None,
            ignored_scope=_ignored(graph, model, lowering),
            advanced_parameters=AdvancedQuantizationParameters(
                overflow_fix=OverflowFix.ENABLE if reduce_range else OverflowFix.DISABLE
            ),
        )
    except Exception as error:  # nncf raises what its steps raise
        raise TrialError(f"NNCF can't quantize the model: {first_line(error)}.") from error


def _compress_weights(graph: Any, model: nn.Module, lowering: Lowering) -> Any:
    import nncf

    try:
        return nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT8_ASYM,
            ignored_scope=_ignored(graph, model, lowering),
        )
    except Exception as error:  # as above
        raise TrialError(f"NNCF can't compress the weights: {first_line(error)}.") from error


class _Stream:
    """Calibration batches, read anew whenever a step of NNCF walks through them."""

    def __init__(self, calibration: Calibration, batch_size: int) -> None:
        self._calibration, self._batch_size = calibration, batch_size

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._calibration.batches(self._batch_size)

    def __len__(self) -> int:
        return max(1, self._calibration.num_samples // self._batch_size)


def _check_calibration(graph: Any, calibration: Calibration, batch_size: int) -> None:
    """``TrialError`` when the samples aren't what the graph takes."""
    first = next(calibration.batches(batch_size), None)
    if first is None:
        raise TrialError("There are no calibration samples. Pass data (labels are not looked at).")
    for parameter in graph.get_parameters():
        name = parameter.get_friendly_name()
        shape = parameter.get_partial_shape()
        if name not in first:
            raise TrialError(f"The calibration samples have no input {name!r}.")
        given = first[name].shape
        fits = len(given) == len(shape) and all(
            axis.is_dynamic or axis.get_length() == size
            for axis, size in zip(shape, given, strict=True)
        )
        if not fits:
            raise TrialError(
                f"The calibration samples of input {name!r} have shape {tuple(given)} and the "
                f"model takes {shape}. Calibrate with the data the model was traced with."
            )


def _ignored(graph: Any, model: nn.Module, lowering: Lowering) -> Any:
    """What stays float: everything traced directly in a module that a pattern names."""
    import nncf

    patterns = lowering.quantization.keep_float
    kept: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name and keeps_float(name, patterns):
            kept.add(name)
            if isinstance(module, nn.MultiheadAttention):  # which multiplies by it itself
                kept.add(f"{name}.out_proj")
    names = [
        operator.get_friendly_name()
        for operator in graph.get_ops()
        if operator.get_friendly_name().split(MODULE_MARK)[0] in kept
        and operator.get_type_name() != "Constant"
    ]
    return nncf.IgnoredScope(names=names, validate=False) if names else None


def _save(graph: Any, folder: Path, scheme: str) -> None:
    """``OSError`` when the disk refuses, which openvino tells as a ``RuntimeError``."""
    half = scheme == BF16  # weights in 16 bits carry more than bf16 computes with
    try:
        import_openvino().save_model(graph, folder / MODEL_FILE, compress_to_fp16=half)
    except RuntimeError as error:
        reason = first_line(error)
        if any(words in str(error) for words in _DISK_FAULTS):
            raise OSError(errno.EIO, f"openvino could not write it ({reason})") from error
        raise TrialError(
            f"openvino can't save the model: {reason}. Use another runtime."
        ) from error


class _Counted:
    """What the saved graph holds and how the processor's plugin will run it."""

    def __init__(self) -> None:
        self.int8_modules: set[str] = set()
        self.num_int8 = self.num_products = self.weight_bytes = 0


def _count(path: Path, scheme: str, exported: Exported, lowering: Lowering) -> _Counted:
    openvino = import_openvino()
    counted = _Counted()
    core = openvino.Core()
    graph = core.read_model(path)
    counted.weight_bytes = _weight_bytes(graph)
    if scheme == INT8_WEIGHTS:
        counted.int8_modules = _stored_int8(graph)
    _fix_batch(graph, exported.fixed_batch or lowering.deployment.batch_size)
    try:
        compiled = core.compile_model(graph, "CPU", properties(scheme, lowering.deployment.threads))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise TrialError(
            f"openvino's processor plugin can't run the scheme {scheme!r} of this model: {reason} "
            "Use another scheme."
        ) from error
    for facts in facts_of(compiled).values():
        if facts.get("layerType") not in PRODUCTS:
            continue
        counted.num_products += 1
        if precision_of(facts, lowering.machine) == "i8":
            counted.num_int8 += 1
            names = facts["originalLayersNames"].split(",")
            counted.int8_modules |= {n.split(MODULE_MARK)[0] for n in names if MODULE_MARK in n}
    return counted


def _weight_bytes(graph: Any) -> int:
    return sum(
        math.prod(operator.get_output_shape(0)) * operator.get_element_type().bitwidth // 8
        for operator in graph.get_ops()
        if operator.get_type_name() == "Constant"
    )


def _activation_bytes(graph: Any, batch: int) -> int:
    """Bytes of all tensors that a graph computes for a batch."""
    graph = graph.clone()
    _fix_batch(graph, batch)
    outputs = [
        output
        for operator in graph.get_ops()
        if operator.get_type_name() not in ("Constant", "Parameter", "Result")
        for output in operator.outputs()
        if output.get_partial_shape().is_static
    ]
    return sum(
        math.prod(output.get_shape()) * output.get_element_type().bitwidth // 8
        for output in outputs
    )


def _fix_batch(graph: Any, batch: int) -> None:
    graph.reshape(
        {
            value.get_any_name(): [batch, *list(value.get_partial_shape())[1:]]
            for value in graph.inputs
        }
    )


def _stored_int8(graph: Any) -> set[str]:
    """Modules of the products whose second factor comes from an int8 constant."""
    found: set[str] = set()
    for operator in graph.get_ops():
        name = operator.get_friendly_name()
        if MODULE_MARK in name and len(operator.inputs()) > 1:
            source = operator.input_value(1).get_node()
            for _ in range(8):  # convert, subtract, multiply, convert, reshape
                if source.get_type_name() == "Constant" or not source.inputs():
                    break
                source = source.input_value(0).get_node()
            if source.get_type_name() == "Constant" and source.get_element_type().to_string() in (
                "u8",
                "i8",
            ):
                found.add(name.split(MODULE_MARK)[0])
    return found


def _range_notes(scheme: str, machine: Machine) -> tuple[str, ...]:
    support = int8_support(machine)
    is_static = scheme in (INT8, INT8_BF16)
    return (
        (f"The int8 weights have seven bits: {support.reason}.",)
        if is_static and support.reduce_range
        else ()
    )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep progress bars, log lines and warnings, which users can't act on, off the terminal."""
    with (
        no_telemetry(),
        quiet_exporter(),
        torch.no_grad(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        import nncf  # noqa: F401 - its import logs and warns

        logger = logging.getLogger("nncf")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logger.setLevel(level)
