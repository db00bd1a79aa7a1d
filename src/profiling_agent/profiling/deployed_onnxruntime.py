"""Times of an artefact's operators according to onnxruntime's own profiler.

The profiler reports the operators of the graph that onnxruntime has made of the artefact's. Nodes
of ``model.onnx`` are named ``module::Operator_index``; a fused node often keeps the name of one it
was made of, and else the tensor it writes leads back to the node that wrote it before.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.deployment.onnx_operators import (
    DISABLED_OPTIMIZERS,
    INT8_PRODUCTS,
    PRODUCTS,
)
from profiling_agent.errors import MissingDependency
from profiling_agent.records.profile import OperatorCost

MODEL_FILE, OPTIMIZED = "model.onnx", "optimized.onnx"
WARM_UP = 3
# They only change how values are laid out or stored, for the node that reads them.
_CONVERSIONS = (
    "Cast",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QuantizeLinear",
    "ReorderInput",
    "ReorderOutput",
    "Transpose",
)
_PRECISIONS = {
    "float": "f32",
    "double": "f64",
    "float16": "f16",
    "uint8": "u8",
    "int8": "i8",
    "int32": "i32",
    "int64": "i64",
    "bool": "bool",
}
# onnxruntime names a convolution in its blocked layout after the tensor it writes.
_BLOCKED = "_nchwc"
_KERNEL = "_kernel_time"
_MAX_STEPS = 4


def operator_costs(
    folder: Path,
    manifest: dict[str, Any],
    prepared_inputs: list[np.ndarray],
    threads: int,
    passes: int,
) -> list[OperatorCost]:
    """Median milliseconds of every operator over ``passes`` calls, in the order they run.

    ``prepared_inputs`` are what ``serve.py`` gives the graph, (batch, ...), in the order of the
    manifest's inputs. Raises ``MissingDependency`` without onnx, which reads the graphs.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependency(
            "Reading an onnxruntime artefact's graph needs onnx. "
            'Install with: pip install "profiling-agent[cpu]"'
        ) from None
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        events = _profile(folder, prepared_inputs, threads, passes, scratch)
        optimized = onnx.load(str(scratch / OPTIMIZED), load_external_data=False).graph
    original = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph
    modules = map_modules(original, optimized)
    return [_cost(name, found, passes, modules) for name, found in events.items()]


def map_modules(original: Any, optimized: Any) -> dict[str, str]:
    """Node names of an optimized graph to modules, where the graphs tell; both are GraphProtos."""
    writers = {output: node for node in original.node for output in node.output}
    modules: dict[str, str] = {}
    for node in optimized.node:
        module = _origin(node, writers)
        if module is not None:
            modules[node.name] = module
    readers: dict[str, Any] = {}
    for node in reversed(optimized.node):
        if node.name not in modules and node.op_type in _CONVERSIONS:
            reader = next((readers[name] for name in node.output if name in readers), None)
            if reader is not None and reader.name in modules:
                modules[node.name] = modules[reader.name]
        readers.update(dict.fromkeys(node.input, node))
    return modules


def _profile(
    folder: Path, inputs: list[np.ndarray], threads: int, passes: int, scratch: Path
) -> dict[str, list[dict[str, Any]]]:
    """Node name to the profiler's events, warm-up included, in the order the nodes first ran."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    options.optimized_model_filepath = str(scratch / OPTIMIZED)
    weights = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{weights}_file_name", "weights")
    options.add_session_config_entry(f"{weights}_min_size_in_bytes", "1024")
    session = onnxruntime.InferenceSession(
        str(folder / MODEL_FILE),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(DISABLED_OPTIMIZERS),
    )
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, inputs, strict=True))
    for _ in range(WARM_UP + passes):
        session.run(None, feed)
    written = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    events: dict[str, list[dict[str, Any]]] = {}
    for event in written:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            events.setdefault(event["name"].removesuffix(_KERNEL), []).append(event)
    return events


def _cost(
    name: str, events: list[dict[str, Any]], passes: int, modules: dict[str, str]
) -> OperatorCost:
    # A node in a loop's body runs several times in a call.
    times = len(events) // (WARM_UP + passes) or 1
    calls = [events[index : index + times] for index in range(0, len(events), times)]
    durations = [sum(event["dur"] for event in call) / 1000 for call in calls]
    arguments = events[0]["args"]
    return OperatorCost(
        name=name,
        type=arguments["op_name"],
        precision=_precision(arguments),
        ms=statistics.median(durations[-passes:]),
        module=modules.get(name),
    )


def _precision(arguments: dict[str, Any]) -> str | None:
    if arguments["op_name"] in INT8_PRODUCTS:
        return "i8"
    types = [next(iter(entry)) for entry in arguments.get("input_type_shape", []) if entry]
    return _PRECISIONS.get(types[0], types[0]) if types else None


def _origin(node: Any, writers: dict[str, Any]) -> str | None:
    """Module of a node by its own name, or by the node that first wrote what it writes."""
    if "::" in node.name:
        return node.name.partition("::")[0]
    tensors = [*node.output]
    if node.name.endswith(_BLOCKED):
        tensors.insert(0, node.name.removesuffix(_BLOCKED))
    writer = next((writers[name] for name in tensors if name in writers), None)
    if writer is None or "::" not in writer.name:
        return None
    if node.op_type in PRODUCTS:
        writer = _product_before(writer, writers)
    return writer.name.partition("::")[0]


def _product_before(node: Any, writers: dict[str, Any]) -> Any:
    """The product a fused node was made of: the node itself, or the one an activation follows."""
    before = node
    for _ in range(_MAX_STEPS):
        if before.op_type in PRODUCTS:
            return before
        found = next((writers[name] for name in before.input if name in writers), None)
        if found is None:
            break
        before = found
    return node
