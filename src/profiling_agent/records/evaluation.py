"""What was measured on a reloaded artefact."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Interval, NotMeasured, Timing
from profiling_agent.records.workload import SplitName


class Accuracy(Record):
    """The metric on one split, at the deployment's batch size and threads.

    ``drop`` is what was lost against the baseline on the same samples, with its interval, in points
    or in the metric's own unit; positive is a loss, whichever direction is better. ``upper_bound``
    is its one-sided 95 % bound. ``divergence`` is known far better than the drop, of the same
    samples: all of them tell of it, not only those whose answer changed. ``noise_divergence`` is
    the same for all trials of a run.
    """

    split: SplitName
    num_samples: int
    value: float = Field(description="the metric: percent for accuracy and agreement")
    drop: Interval | None
    upper_bound: float | None
    agreement: float | None = Field(description="share of predictions equal to the baseline's")
    divergence: float | None = Field(
        default=None,
        description="mean divergence of the outputs from the baseline's, in nats, where the "
        "logits' scale is left out of account",
    )
    noise_divergence: float | None = Field(
        default=None,
        description="divergence, in nats, of random noise on the baseline's logits that would lose "
        "the accuracy budget",
    )


class Speedup(Record):
    """Ratio of two latencies from one interleaved measurement; above 1 is faster."""

    over: str = Field(description="what it is compared with: baseline, or a trial id")
    ratio: Interval


class Evaluation(Record):
    """Costs and accuracy of one artefact, as reloaded from disk in its own process."""

    schema_version: Literal[1] = 1
    artefact: str = Field(description="trial id, or baseline")
    runtime: str
    scheme: str
    deployment: Deployment
    accuracy: tuple[Accuracy, ...]
    timing: Timing | None
    speedup: Speedup | None
    reference: str | None = Field(
        default=None, description="the control that was in the same race to tell a busy machine"
    )
    reference_ms: float | None = Field(default=None, description="median of a call of that")
    relative: float | None = Field(
        default=None,
        description="latency over the baseline's by way of the reference: over that in this race, "
        "times what that was seen to take; artefacts differ less from race to race than eager mode",
    )
    is_relative_kept: bool = Field(
        default=False,
        description="of a control: relative follows from its place among the others in the race of "
        "an earlier run, with the profile of which this one started",
    )
    throughput_per_s: float | None = Field(description="samples a second at that batch size")
    size_bytes: int | None = Field(description="bytes of the model files")
    weight_bytes: int | None
    memory_bytes: int | None = Field(
        description="peak anonymous memory less that of an empty process with the runtime loaded"
    )
    not_measured: tuple[NotMeasured, ...] = ()

    def on(self, split: SplitName) -> Accuracy | None:
        return next((a for a in self.accuracy if a.split == split), None)


class Achieved(Record):
    """What was really done to the model, counted on the result and never echoed from the plan."""

    num_parameters: int
    original_parameters: int
    macs: int | None
    original_macs: int | None
    kept: dict[str, tuple[int, ...]] = Field(description="group id to the indices of kept units")
    widths: dict[str, tuple[int, int]] = Field(description="group id to (before, after)")
    num_int8_layers: int
    float_layers: tuple[str, ...] = ()
    num_int8_operators: int | None = Field(
        default=None, description="products and convolutions in int8, counted by the runtime"
    )
    num_products: int | None = Field(default=None, description="all products and convolutions")


class BuiltArtefact(Record):
    """The manifest's core: what lies in an artefact folder."""

    schema_version: Literal[1] = 1
    runtime: str
    scheme: str
    model_files: tuple[str, ...] = Field(description="relative names; their bytes are the size")
    size_bytes: int
    weight_bytes: int
    achieved: Achieved
    parity: float | None = Field(
        description="largest absolute difference of logits to the module lowered, None if inexact"
    )
    seconds: float
    kind: Literal["artefact", "eager"] = "artefact"
