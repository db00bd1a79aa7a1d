"""The profile: static and measured costs per module and per prunable group, and sensitivity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Machine, NotMeasured
from profiling_agent.records.workload import WorkloadRecord

GroupKind = Literal["channels", "mlp", "heads"]


class Spread(Record):
    """A time in milliseconds per forward: median and the quartiles around it."""

    median_ms: float
    low_ms: float
    high_ms: float
    num_passes: int


class ModuleCost(Record):
    """What one module costs in one forward at the deployment's batch size.

    ``macs`` counts multiply-accumulates of the module and, for a container, of all inside it;
    ``self_macs`` only what it computes itself (functional attention, say). Times are eager fp32.
    """

    name: str = Field(description="dotted name; empty for the whole model")
    type: str
    num_calls: int
    macs: int
    self_macs: int
    num_parameters: int
    weight_bytes: int
    output_bytes: int
    total: Spread | None = Field(description="time of the module with everything inside it")
    self_time: Spread | None = Field(description="time not spent in child modules")
    share: float | None = Field(description="self time over the whole forward, 0 to 1")
    peak_activation_bytes: int | None = Field(
        description="highest live activation memory while it runs"
    )


class WidthPoint(Record):
    """Whole-model milliseconds saved when one group of this shape has ``width`` units left."""

    width: int
    saved_ms: float
    low_ms: float
    high_ms: float


class SharePoint(Record):
    """Share of an artefact's time saved when one group of a shape has ``width`` units left.

    With its 95 % interval; negative where the narrower model was slower.
    """

    width: int
    saved: float
    low: float
    high: float


class DeployedWidths(Record):
    """Time against width of one shape, in a runtime and scheme, from whole artefacts that raced."""

    runtime: str
    scheme: str
    shape_class: str
    points: tuple[SharePoint, ...]
    is_reused: bool = Field(default=False, description="timed by an earlier run on this machine")
    is_provisional: bool = Field(
        default=False,
        description="timed while the machine was busy, or not in full; the next run does it again",
    )


class SensitivityPoint(Record):
    """Mean divergence KL(original || pruned) of the output distributions, after repair."""

    ratio: float
    kl: float
    kl_error: float = Field(description="standard error over the images")
    disagreement: float = Field(description="share of images whose top class changed, 0 to 1")
    num_images: int


class GroupCost(Record):
    """Coupled layers that are pruned together, as one unit of decision.

    ``macs_per_unit`` and ``parameters_per_unit`` are what one unit costs across the whole group.
    """

    id: str = Field(description="kind and root, such as heads:blocks.9.attn.qkv")
    kind: GroupKind
    root: str
    width: int = Field(description="number of units (channels, neurons or heads)")
    members: tuple[str, ...]
    macs_per_unit: int
    parameters_per_unit: int
    self_ms: float | None = Field(description="measured self time of the member layers, eager fp32")
    shape_class: str = Field(description="groups of one class cost the same and share a table")
    widths: tuple[WidthPoint, ...] = ()
    sensitivity: tuple[SensitivityPoint, ...] = ()


class FrozenGroup(Record):
    """Layers that can't be pruned, with the reason."""

    id: str
    reason: str


class LayerQuantization(Record):
    """What int8 does to one layer alone: divergence of the outputs, and eager times if measured."""

    name: str
    scheme: Literal["int8-dynamic", "int8-static"] = "int8-dynamic"
    kl: float
    kl_error: float
    float_ms: float | None
    int8_ms: float | None


class RuntimeSchemes(Record):
    """The schemes a runtime offers on this processor, and its version."""

    runtime: str
    version: str | None
    schemes: tuple[str, ...]
    reason: str = Field(default="", description="why there is none")
    refused: tuple[NotMeasured, ...] = Field(
        default=(), description="schemes it has but not on this processor, with the reason"
    )


class OperatorCost(Record):
    """One operator of a deployed graph, as its runtime runs it after its own fusions."""

    name: str
    type: str = Field(description="the runtime's word, such as Convolution or MatMul")
    precision: str | None = Field(description="what it computes in, such as f32 or i8")
    ms: float = Field(description="median time per call, at the deployment's batch size")
    module: str | None = Field(
        description="dotted name of the module it came from, empty for the model itself; None when "
        "the runtime's graph does not tell"
    )


class DeployedProfile(Record):
    """Where an artefact's time goes, according to the runtime that executes it.

    ``total_ms`` is the median of whole calls while nothing is profiled; the operators' times are
    the runtime's own, in other calls, and may add up to more. ``unmapped_ms`` is the time of
    operators whose module is not known.
    """

    runtime: str
    scheme: str
    deployment: Deployment
    total_ms: float
    unmapped_ms: float
    operators: tuple[OperatorCost, ...]

    def module_ms(self) -> dict[str, float]:
        """Milliseconds by module, of the operators that could be mapped."""
        times: dict[str, float] = {}
        for operator in self.operators:
            if operator.module is not None:
                times[operator.module] = times.get(operator.module, 0.0) + operator.ms
        return times


class Profile(Record):
    """Everything a planner may know before the first trial."""

    schema_version: Literal[1] = 1
    workload: WorkloadRecord
    machine: Machine
    deployment: Deployment
    total: Spread | None
    sum_of_parts_ms: float | None = Field(description="sum of all self times; compare with total")
    total_macs: int
    num_parameters: int
    peak_activation_bytes: int | None
    modules: tuple[ModuleCost, ...]
    groups: tuple[GroupCost, ...] = ()
    frozen: tuple[FrozenGroup, ...] = ()
    layers: tuple[LayerQuantization, ...] = ()
    runtimes: tuple[RuntimeSchemes, ...] = ()
    deployed: tuple[DeployedProfile, ...] = ()
    deployed_widths: tuple[DeployedWidths, ...] = ()
    unsupported_operators: tuple[str, ...] = ()
    not_measured: tuple[NotMeasured, ...] = ()
    seconds_spent: float = 0.0
    reused_from: str | None = Field(
        default=None,
        description="when an earlier run on this machine took it, in UTC; None when this one did",
    )

    def group(self, group_id: str) -> GroupCost:
        return next(group for group in self.groups if group.id == group_id)

    def schemes(self, runtime: str) -> tuple[str, ...]:
        return next((r.schemes for r in self.runtimes if r.runtime == runtime), ())

    def refused(self, runtime: str) -> tuple[NotMeasured, ...]:
        """The schemes that a runtime has but not on this processor, with the reason for each."""
        return next((r.refused for r in self.runtimes if r.runtime == runtime), ())
