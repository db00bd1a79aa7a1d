"""What a user gets without us: every runtime's artefacts of the untouched model."""

from __future__ import annotations

from profiling_agent.deployment.runtimes import available
from profiling_agent.records.common import Machine
from profiling_agent.records.plan import Plan, Quantization
from profiling_agent.records.trial import RunSettings

LIKELY_FIRST = {
    ("openvino", "int8-static"): 0,
    ("openvino", "fp32"): 1,
    ("onnxruntime", "int8-dynamic"): 2,
    ("onnxruntime", "fp32"): 3,
    ("openvino", "bf16"): 4,
    ("onnxruntime", "int8-static"): 5,
    ("torch", "int8-dynamic"): 6,
    ("torch", "fp32"): 7,
}
"""Controls in the order in which they are usually worth knowing, in case the time runs out, int8
beside its float counterpart, which says what int8 gains; the others come last."""


def control_plans(machine: Machine, settings: RunSettings) -> tuple[list[Plan], list[str]]:
    """Plans without pruning for the runtimes asked for, the likeliest first; and what is not
    offered here or not installed, each with its reason."""
    plans: list[Plan] = []
    left_out: list[str] = []
    for offer in available(machine):
        if offer.runtime not in settings.runtimes:
            continue
        left_out += [f"{offer.runtime} {r.what} is left out: {r.reason}." for r in offer.refused]
        if offer.version is None:
            left_out.append(f"{offer.runtime} is {offer.reason}; it often is faster.")
        plans += [
            Plan(
                seed=settings.seed,
                runtime=offer.runtime,  # pyright: ignore[reportArgumentType]
                quantization=Quantization(scheme=scheme),
                repair="none",
                why="off the shelf",
            )
            for scheme in offer.schemes
        ]
    last = len(LIKELY_FIRST)
    plans.sort(key=lambda p: LIKELY_FIRST.get((p.runtime, p.quantization.scheme), last))
    return plans, left_out
