"""The table of runtimes: what can execute an artefact, and what each offers here."""

from __future__ import annotations

from profiling_agent.deployment.lowered import Lowered, Runtime
from profiling_agent.deployment.onnx_runtime import INSTALL_LINE, OnnxRuntime
from profiling_agent.deployment.openvino_runtime import OpenVinoRuntime
from profiling_agent.deployment.torch_runtime import TorchRuntime
from profiling_agent.errors import MissingDependency, PlanError
from profiling_agent.records.common import Machine, NotMeasured
from profiling_agent.records.profile import RuntimeSchemes

__all__ = [
    "INSTALL_LINES",
    "RUNTIMES",
    "Lowered",
    "Runtime",
    "available",
    "get_runtime",
    "require_runtime",
]

RUNTIMES: dict[str, Runtime] = {
    "torch": TorchRuntime(),
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVinoRuntime(),
}
INSTALL_LINES: dict[str, str] = {
    "torch": "pip install torch",
    "onnxruntime": INSTALL_LINE,
    "openvino": INSTALL_LINE,
}


def get_runtime(name: str) -> Runtime:
    """The runtime of that name, or ``PlanError`` with the names there are."""
    if name not in RUNTIMES:
        raise PlanError(f"There is no runtime {name!r} yet. Use one of {sorted(RUNTIMES)!r}.")
    return RUNTIMES[name]


def require_runtime(name: str) -> None:
    """``MissingDependency`` with the install line when the runtime exists but isn't installed."""
    runtime = RUNTIMES.get(name)
    if runtime is not None and runtime.version() is None:
        raise MissingDependency(
            f"The runtime {name!r} is not installed; install it with: {INSTALL_LINES[name]}."
        )


def available(machine: Machine) -> tuple[RuntimeSchemes, ...]:
    """What every runtime of the table offers on this processor, the missing ones with a reason."""
    return tuple(_offer(runtime, machine) for runtime in RUNTIMES.values())


def _offer(runtime: Runtime, machine: Machine) -> RuntimeSchemes:
    version = runtime.version()
    reason = "" if version else f"not installed; {INSTALL_LINES[runtime.name]}"
    refused = runtime.refused(machine) if version else {}
    return RuntimeSchemes(
        runtime=runtime.name,
        version=version,
        schemes=runtime.schemes(machine),
        reason=reason,
        refused=tuple(NotMeasured(what=name, reason=why) for name, why in refused.items()),
    )
