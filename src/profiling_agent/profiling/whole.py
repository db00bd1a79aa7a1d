"""The whole profile: costs of modules and groups, widths, sensitivity, runtimes."""

from __future__ import annotations

from collections.abc import Mapping

from profiling_agent.acquisition.workload import Workload
from profiling_agent.compression.compress import Compressor
from profiling_agent.deployment.lowered import plain_linears, product_layers
from profiling_agent.deployment.runtimes import available
from profiling_agent.machine.clock import now
from profiling_agent.machine.torch_state import threads
from profiling_agent.profiling.group_costs import describe_group, levels
from profiling_agent.profiling.latency_tables import measure_widths
from profiling_agent.profiling.profile import profile_costs, untimed
from profiling_agent.profiling.sensitivity import (
    Divergence,
    StaticInt8,
    affordable_images,
    calibration_inputs,
    group_sensitivity,
    layer_sensitivity,
)
from profiling_agent.profiling.static import count
from profiling_agent.records.common import Deployment, Machine, NotMeasured
from profiling_agent.records.profile import GroupCost, LayerQuantization, Profile, WidthPoint

WIDTHS_SHARE, LAYERS_SHARE, STATIC_SHARE = 0.3, 0.2, 0.25


def profile_workload(
    workload: Workload,
    machine: Machine,
    deployment: Deployment,
    *,
    seconds: float = 120.0,
    compressor: Compressor | None = None,
    with_widths: bool = True,
    with_sensitivity: bool = True,
) -> Profile:
    """Everything a planner may know, in about ``seconds`` (costs are always measured in full).

    What the time did not reach is listed in ``not_measured``. The model is left as it was. Without
    real data sensitivity means nothing; leave it out then.
    """
    start = now()
    compressor = compressor or Compressor(workload)
    profile = profile_costs(workload, machine, deployment)
    modules = {module.name: module for module in profile.modules}
    discovery = compressor.discovery
    if compressor.model is not workload.model:  # layers that were written out have no times
        counted = count(compressor.model, workload.example(deployment.batch_size))
        modules = {module.name: untimed(module) for module in counted.modules} | modules
    costs = [describe_group(compressor.model, group, modules) for group in discovery.groups]
    missing = list(profile.not_measured)
    layers: list[LayerQuantization] = []
    with threads(deployment.threads):
        if with_widths:
            tables = measure_widths(
                compressor.model,
                workload.example(deployment.batch_size),
                discovery.groups,
                costs,
                deadline=now() + WIDTHS_SHARE * seconds,
            )
            costs = _with_tables(costs, tables, missing)
        if with_sensitivity:
            kinds = {s for offer in available(machine) for s in offer.schemes}
            costs, layers = _sensitivities(
                compressor, deployment, costs, missing, start + seconds, "int8-static" in kinds
            )
    return profile.model_copy(
        update={
            "groups": tuple(costs),
            "frozen": discovery.frozen,
            "layers": tuple(layers),
            "runtimes": available(machine),
            "not_measured": tuple(missing),
            "seconds_spent": now() - start,
        }
    )


def _with_tables(
    costs: list[GroupCost],
    tables: Mapping[str, tuple[WidthPoint, ...]],
    missing: list[NotMeasured],
) -> list[GroupCost]:
    for name in sorted({cost.shape_class for cost in costs} - set(tables)):
        missing.append(NotMeasured(what=f"widths of {name}", reason="the profiling time ran out"))
    return [cost.model_copy(update={"widths": tables.get(cost.shape_class, ())}) for cost in costs]


def _sensitivities(
    compressor: Compressor,
    deployment: Deployment,
    costs: list[GroupCost],
    missing: list[NotMeasured],
    deadline: float,
    with_static: bool,
) -> tuple[list[GroupCost], list[LayerQuantization]]:
    model = compressor.model
    linears = list(plain_linears(model))
    products = list(product_layers(model)) if with_static else []
    _ = compressor.moments if costs else None  # gathered before the clock is asked
    num_evaluations = sum(len(levels(cost)) for cost in costs) + len(linears) + len(products)
    left = max(1.0, deadline - now())
    images = affordable_images(compressor, num_evaluations, left)
    divergence = Divergence(
        model,
        calibration_inputs(compressor, images),
        has_classes=compressor.workload.record.task.has_classes,
    )
    layers: list[LayerQuantization] = []
    example = compressor.workload.example(deployment.batch_size)
    for name in linears:
        if now() > deadline - (1 - LAYERS_SHARE) * left:
            missing.append(NotMeasured(what=f"int8 of {name}", reason="profiling time ran out"))
        else:
            layers.append(layer_sensitivity(model, example, name, divergence))
    if products:
        ends = min(deadline, now() + STATIC_SHARE * left)
        layers += _static_layers(compressor, products, divergence, images, ends, missing)
    measured: dict[str, GroupCost] = {}
    for cost in sorted(costs, key=lambda c: -c.macs_per_unit * c.width):
        if now() > deadline:
            reason = "the profiling time ran out; this group will not be pruned"
            missing.append(NotMeasured(what=f"sensitivity of {cost.id}", reason=reason))
            measured[cost.id] = cost
            continue
        points = group_sensitivity(compressor, divergence, cost)
        measured[cost.id] = cost.model_copy(update={"sensitivity": points})
    return [measured[cost.id] for cost in costs], layers


def _static_layers(
    compressor: Compressor,
    names: list[str],
    divergence: Divergence,
    images: int,
    deadline: float,
    missing: list[NotMeasured],
) -> list[LayerQuantization]:
    """Static int8 of single layers, those with the largest error of their own first."""
    static = StaticInt8(compressor.model, names, calibration_inputs(compressor, images))
    layers: list[LayerQuantization] = []
    for name in static.worst_first():
        if now() > deadline:
            reason = "the profiling time ran out; layers with larger errors were measured"
            missing.append(NotMeasured(what=f"static int8 of {name}", reason=reason))
        else:
            layers.append(static.sensitivity(name, divergence))
    return layers
