"""Ranges of activations for static int8, gathered in a stream.

The reductions are part of the graph, so that of each sample only the lowest and highest values
leave the runtime, and nothing grows with the number of samples.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.deployment.exporting import first_line
from profiling_agent.deployment.lowered import Calibration
from profiling_agent.deployment.onnx_graph import MODEL_FILE, module_of, save_model
from profiling_agent.errors import TrialError

# How many standard deviations above its mean the largest value of a batch may count: a few samples
# far beyond the others would cost all others steps of the scale.
DEVIATIONS = 3.0
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where a tensor's values lie, zero included: one value for the tensor or for each channel."""

    low: np.ndarray
    high: np.ndarray


class _Largest:
    """The largest values of many batches, as their greatest, mean and standard deviation."""

    def __init__(self) -> None:
        self.greatest = np.float64(0)
        self.sum = np.float64(0)
        self.sum_of_squares = np.float64(0)
        self.count = 0

    def add(self, values: np.ndarray) -> None:
        values = values.astype(np.float64)
        self.greatest = np.maximum(self.greatest, values)
        self.sum = self.sum + values
        self.sum_of_squares = self.sum_of_squares + values**2
        self.count += 1

    def bound(self) -> np.ndarray:
        """The greatest, but not far from what batches usually have; never below zero."""
        mean = self.sum / self.count
        deviation = np.sqrt(np.maximum(self.sum_of_squares / self.count - mean**2, 0))
        return np.asarray(np.clip(mean + DEVIATIONS * deviation, 0, self.greatest))


def activation_bytes(proto: Any, batch: int) -> int:
    """Bytes of all tensors that a graph computes for a batch, where it notes their shapes."""
    computed = {name for node in proto.graph.node for name in node.output}
    total = 0
    for value in proto.graph.value_info:
        if value.name in computed:
            dims = value.type.tensor_type.shape.dim
            total += 4 * math.prod(_size(dim, batch) for dim in dims)
    return total


def calibrate(
    proto: Any, channels: dict[str, int | None], calibration: Calibration, batch: int, threads: int
) -> dict[str, Bounds]:
    """Bounds of tensors, from all calibration samples, ``batch`` at a time.

    ``channels`` maps a tensor to the size of its last axis, for bounds of each channel, or to None.
    The graph is left as it was. Raises ``TrialError`` for data that don't fit the graph's inputs
    and for activations that aren't finite.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        _save_with_reductions(proto, channels, Path(scratch))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(Path(scratch) / MODEL_FILE), options, providers=["CPUExecutionProvider"]
        )
        return _reduce(session, proto, list(channels), calibration.batches(batch))


def _reduce(
    session: Any, proto: Any, names: list[str], batches: Iterable[dict[str, np.ndarray]]
) -> dict[str, Bounds]:
    wanted = [f"{name}::{kind}" for name in names for kind in ("low", "high")]
    largest = {name: _Largest() for name in wanted}
    num_batches = 0
    for inputs in batches:
        _check_inputs(session, inputs)
        try:
            values = session.run(wanted, inputs)
        except Exception as error:  # onnxruntime raises what it likes
            raise TrialError(
                f"The graph fails on the calibration data: {first_line(error)}. Check the data."
            ) from error
        for name, value in zip(wanted, values, strict=True):
            if not np.isfinite(value).all():
                raise _not_finite(proto, name.rpartition("::")[0])
            largest[name].add(-value if name.endswith("::low") else value)
        num_batches += 1
    if not num_batches:
        raise TrialError("There are no calibration samples. Give at least one for 'int8-static'.")
    return {
        name: Bounds(low=-largest[f"{name}::low"].bound(), high=largest[f"{name}::high"].bound())
        for name in names
    }


def _not_finite(proto: Any, name: str) -> TrialError:
    nodes = [node for node in proto.graph.node if name in node.output]
    where = f"An activation of the module {module_of(nodes[0])!r}" if nodes else f"Input {name!r}"
    return TrialError(
        f"{where} is not finite on the calibration data, so it has no int8 range. Check the "
        "preprocessing, or use 'fp32'."
    )


def _check_inputs(session: Any, inputs: dict[str, np.ndarray]) -> None:
    expected = session.get_inputs()
    if missing := [spec.name for spec in expected if spec.name not in inputs]:
        raise TrialError(
            f"The calibration data have no input {missing[0]!r}, but {sorted(inputs)!r}. Give all "
            f"inputs: {[spec.name for spec in expected]!r}."
        )
    for spec in expected:
        value = np.asarray(inputs[spec.name])
        dtype = _DTYPES.get(spec.type, spec.type)
        fits = len(value.shape) == len(spec.shape) and all(
            have == want
            for have, want in zip(value.shape, spec.shape, strict=True)
            if isinstance(want, int)
        )
        if not fits or value.dtype != dtype:
            shape = [size if isinstance(size, int) else "batch" for size in spec.shape]
            raise TrialError(
                f"The calibration data's input {spec.name!r} has shape {list(value.shape)} and "
                f"type {value.dtype}, but the graph takes {shape} and {dtype}. Calibrate with the "
                "workload's own preprocessed samples."
            )


def _save_with_reductions(proto: Any, channels: dict[str, int | None], folder: Path) -> None:
    """Save the graph with the bounds of tensors as further outputs; undone before returning."""
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    before = len(graph.node), len(graph.output), len(graph.initializer)
    first = numpy_helper.from_array(np.array([0], np.int64), "::first_axis")
    graph.initializer.append(first)
    for name, num_channels in channels.items():
        source, axes = name, []
        if num_channels is not None:
            source, axes = f"{name}::rows", [first.name]
            shape = np.array([-1, num_channels], np.int64)
            graph.initializer.append(numpy_helper.from_array(shape, f"{name}::shape"))
            graph.node.append(helper.make_node("Reshape", [name, f"{name}::shape"], [source]))
        for operator, kind in (("ReduceMin", "low"), ("ReduceMax", "high")):
            output = f"{name}::{kind}"
            graph.node.append(
                helper.make_node(operator, [source, *axes], [output], keepdims=0, name=output)
            )
            graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    try:
        save_model(proto, folder)
    finally:
        del graph.node[before[0] :]
        del graph.output[before[1] :]
        del graph.initializer[before[2] :]


def _size(dim: Any, batch: int) -> int:
    """Size of a noted dimension: a number, the batch, or a multiple of it such as 64*batch."""
    if not dim.dim_param:
        return max(dim.dim_value, 1)
    return batch * math.prod(int(number) for number in re.findall(r"(?<!\w)\d+", dim.dim_param))
