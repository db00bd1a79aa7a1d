"""The cost half of a profile: every module counted and timed as it will be deployed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import nn

from profiling_agent.acquisition.workload import Workload
from profiling_agent.errors import ModelError
from profiling_agent.machine.clock import now
from profiling_agent.machine.torch_state import threads
from profiling_agent.profiling.dynamic import DynamicCosts, measure_modules
from profiling_agent.profiling.memory import PeakMemory, measure_peaks
from profiling_agent.profiling.static import ModuleCount, StaticCosts, count
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.profile import ModuleCost, Profile

WARMUP_PASSES = 2


def profile_costs(
    workload: Workload, machine: Machine, deployment: Deployment, *, passes: int = 10
) -> Profile:
    """Static, peak-memory and measured costs in ``2 * passes + 6`` forwards (26 by default).

    ``workload.model`` is used as it is, at the deployment's batch size, threads and device, and
    left as it was: modes, buffers, hooks and random state. Groups, sensitivity and runtimes are
    empty. Raises ``ModelError`` when the model lies on another device.
    """
    start = now()
    model, device = workload.model, torch.device(deployment.device)
    _check_device(model, device)
    inputs = {name: t.to(device) for name, t in workload.example(deployment.batch_size).items()}
    with _as_served(model), threads(deployment.threads):  # kernels, and so memory, depend on them
        static = count(model, inputs)
        peaks = measure_peaks(model, inputs)
        dynamic = measure_modules(
            model, inputs, passes=passes, warmup=WARMUP_PASSES, threads=deployment.threads
        )
    whole = static.module("")
    return Profile(
        workload=workload.record,
        machine=machine,
        deployment=deployment,
        total=dynamic.total,
        sum_of_parts_ms=dynamic.sum_of_parts_ms,
        total_macs=whole.macs,
        num_parameters=whole.num_parameters,
        peak_activation_bytes=peaks.total_bytes,
        modules=_join(static, peaks, dynamic),
        unsupported_operators=static.unsupported_operators,
        not_measured=dynamic.not_measured,
        seconds_spent=now() - start,
    )


def bottlenecks(profile: Profile, n: int = 10) -> tuple[ModuleCost, ...]:
    """The ``n`` modules with the largest self time, largest first; unmeasured ones left out."""
    measured = [module for module in profile.modules if module.self_time is not None]
    return tuple(sorted(measured, key=_self_ms, reverse=True)[:n])


def _self_ms(module: ModuleCost) -> float:
    return module.self_time.median_ms if module.self_time else 0.0


def _join(static: StaticCosts, peaks: PeakMemory, dynamic: DynamicCosts) -> tuple[ModuleCost, ...]:
    return tuple(_join_one(counted, peaks, dynamic) for counted in static.modules)


def untimed(counted: ModuleCount) -> ModuleCost:
    """What is counted of a module, without any time or peak."""
    return ModuleCost(
        **{field.name: getattr(counted, field.name) for field in fields(counted)},
        total=None,
        self_time=None,
        share=None,
        peak_activation_bytes=None,
    )


def _join_one(counted: ModuleCount, peaks: PeakMemory, dynamic: DynamicCosts) -> ModuleCost:
    time = dynamic.modules.get(counted.name)
    return untimed(counted).model_copy(
        update={
            "total": time.total if time else None,
            "self_time": time.self_time if time else None,
            "share": time.self_time.median_ms / dynamic.total.median_ms if time else None,
            "peak_activation_bytes": peaks.modules.get(counted.name),
        }
    )


def _check_device(model: nn.Module, device: torch.device) -> None:
    elsewhere = {str(p.device) for p in model.parameters() if p.device.type != device.type}
    if elsewhere:
        raise ModelError(
            f"The model's weights lie on {sorted(elsewhere)[0]!r}, but it is to be deployed on "
            f"{str(device)!r}; move it with model.to({str(device)!r})."
        )


@contextmanager
def _as_served(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and torch's random state restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
