"""The fastest deployable form of a trained PyTorch model, within an accuracy budget, with proof.

    from profiling_agent import optimize

    result = optimize(model, data, max_drop=0.5, out="result")
    print(result.verdict.kind, result.verdict.reason)

Everything is loaded at first use; importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profiling_agent.api import load, optimize, profile
    from profiling_agent.errors import ProfilingAgentError
    from profiling_agent.records.plan import Plan
    from profiling_agent.records.profile import Profile
    from profiling_agent.records.trial import RunRecord

__all__ = [
    "Plan",
    "Profile",
    "ProfilingAgentError",
    "RunRecord",
    "load",
    "optimize",
    "profile",
]

_HOMES = {
    "Plan": "profiling_agent.records.plan",
    "Profile": "profiling_agent.records.profile",
    "ProfilingAgentError": "profiling_agent.errors",
    "RunRecord": "profiling_agent.records.trial",
    "load": "profiling_agent.api",
    "optimize": "profiling_agent.api",
    "profile": "profiling_agent.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'profiling_agent' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
