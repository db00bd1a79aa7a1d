"""How openvino is asked to compile a graph, and what it tells of the one it made; imports neither.

Operators of ``model.xml`` are named ``module::Operator_index`` after the module they were traced
in. Those of the graph that the processor's plugin has made of them state what they stand for.
"""

from __future__ import annotations

from typing import Any

from profiling_agent.deployment.capabilities import int8_support
from profiling_agent.records.common import Machine

MODULE_MARK = "::"
PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "MHA", "RNNSeq")
"""The CPU plugin's names of what multiplies matrices; attention fused to one counts as MatMul."""
_BYTES = ("i8", "u8")


def properties(scheme: str, threads: int) -> dict[str, Any]:
    """How ``serve.py`` compiles the graph: one stream, f32 unless the scheme says bf16, and threads
    not pinned, since every process's would be to the first cores."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if scheme.endswith("bf16") else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


def facts_of(compiled: Any) -> dict[str, dict[str, str]]:
    """What a compiled graph states of its operators, by their names: ``layerType`` and so on."""
    facts: dict[str, dict[str, str]] = {}
    for operator in compiled.get_runtime_model().get_ops():
        known = operator.get_rt_info()
        facts[operator.get_friendly_name()] = {key: known[key].astype(str) for key in known}
    return facts


def precision_of(facts: dict[str, str], machine: Machine) -> str | None:
    """What an operator computes in, ``i8`` for bytes of either kind; None where it isn't told.

    ``runtimePrecision`` is that of the widest input for most operators, but that of the weights for
    a linear layer whose weights are compressed. ``primitiveType`` ends in the type of what goes in
    (``jit_gemm_I8``, ``brgemm_avx2_f32``). Where f32 meets weights in bytes, a processor with VNNI
    or its like quantizes it on the way and multiplies bytes; others make floats of the weights.
    """
    precision = facts.get("runtimePrecision")
    if precision not in _BYTES:
        return precision
    taken = facts.get("primitiveType", "").rpartition("_")[2].lower()
    if taken in _BYTES or facts.get("layerType") != "FullyConnected":
        return "i8"
    support = int8_support(machine)
    is_quantized = taken == "f32" and support.usable and not support.reduce_range
    return "i8" if is_quantized else taken
