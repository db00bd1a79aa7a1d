"""Times of an artefact's operators according to openvino's own performance counters.

The processor's plugin reports the operators of the graph it has made; each names the operators of
``model.xml`` it stands for, and those are named ``module::Operator_index``.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.deployment.openvino_graph import (
    MODULE_MARK,
    facts_of,
    precision_of,
    properties,
)
from profiling_agent.deployment.telemetry import no_telemetry
from profiling_agent.machine.processor import describe_machine
from profiling_agent.records.profile import OperatorCost

MODEL_FILE = "model.xml"
WARM_UP = 3
_PRODUCTS = ("Convolution", "GroupConvolution", "MatMul", "ScaledDotProductAttention")
# They take no time of their own: the graph's ends.
_ENDS = ("Input", "Output", "Parameter", "Result", "Const", "Constant")


def operator_costs(
    folder: Path,
    manifest: dict[str, Any],
    prepared_inputs: list[np.ndarray],
    threads: int,
    passes: int,
) -> list[OperatorCost]:
    """Median milliseconds of every operator over ``passes`` calls, in the order they run.

    ``prepared_inputs`` are what ``serve.py`` gives the graph, (batch, ...), in the order of the
    manifest's inputs.
    """
    with no_telemetry():
        import openvino

    core = openvino.Core()
    graph = core.read_model(folder / MODEL_FILE)
    names = [value.get_any_name() for value in graph.inputs]
    graph.reshape(
        {name: list(value.shape) for name, value in zip(names, prepared_inputs, strict=True)}
    )
    asked = properties(manifest["scheme"], threads) | {"PERF_COUNT": True}
    compiled = core.compile_model(graph, "CPU", asked)
    request = compiled.create_infer_request()
    feed = dict(zip(names, prepared_inputs, strict=True))
    times: dict[str, list[float]] = {}
    types: dict[str, str] = {}
    for index in range(WARM_UP + passes):
        request.infer(feed, share_inputs=True)
        for counted in request.get_profiling_info() if index >= WARM_UP else ():
            times.setdefault(counted.node_name, []).append(counted.real_time.total_seconds() * 1e3)
            types[counted.node_name] = counted.node_type
    known, machine = facts_of(compiled), describe_machine()
    costs: list[OperatorCost] = []
    for name, values in times.items():
        facts = known.get(name, {})
        kind = facts.get("layerType", types[name])
        if kind not in _ENDS:
            costs.append(
                OperatorCost(
                    name=name,
                    type=kind,
                    precision=precision_of(facts, machine),
                    ms=statistics.median(values),
                    module=module_of(facts.get("originalLayersNames", name)),
                )
            )
    return costs


def module_of(original_names: str) -> str | None:
    """The module of the first product among the operators fused into one, else of the first."""
    parts = [name.split(MODULE_MARK) for name in original_names.split(",") if MODULE_MARK in name]
    parts.sort(key=lambda part: not part[1].startswith(_PRODUCTS))
    return parts[0][0] if parts else None
