"""Values that several records share: intervals, timings, machines, budgets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record

Objective = Literal["latency", "throughput", "size", "memory"]
RuntimeName = Literal["torch", "onnxruntime", "openvino"]
Evidence = Literal["proven", "measured"]


class Interval(Record):
    """An estimate with its two-sided interval, in the unit of the field that holds it."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95
    num_samples: int


class NotMeasured(Record):
    """Something that was asked for and could not be measured, with the reason."""

    what: str
    reason: str


class Machine(Record):
    """The processor and software that a measurement holds for."""

    processor: str
    architecture: str
    num_cores: int
    cpu_quota: float | None = Field(description="cores granted by the cgroup; None when unlimited")
    features: tuple[str, ...] = Field(description="instruction sets that matter here")
    memory_bytes: int
    system: str
    versions: dict[str, str] = Field(description="python, torch and the runtimes found")

    def same_hardware(self, other: Machine) -> bool:
        """Whether times measured on one hold for the other."""
        mine = (self.processor, self.architecture, self.num_cores, self.cpu_quota, self.features)
        theirs = (
            other.processor,
            other.architecture,
            other.num_cores,
            other.cpu_quota,
            other.features,
        )
        return mine == theirs


class Deployment(Record):
    """How the artefact will be used; every time and every accuracy is measured this way."""

    batch_size: int = Field(default=1, ge=1, le=4096)
    threads: int = Field(default=1, ge=1, le=1024)
    device: Literal["cpu"] = "cpu"


DEFAULT_DROP = 0.5
"""Points that may be lost when nobody says."""


class Budget(Record):
    """What may be lost, what is wanted, what may be spent."""

    max_drop: float = Field(description="in the unit of the metric; points for accuracy")
    unit: str = Field(default="points", description="of max_drop; empty for a metric without one")
    objective: Objective = "latency"
    time_s: float = Field(default=900.0, gt=0)
    max_trials: int = Field(default=12, ge=0, le=10_000)
    evidence: Evidence = "measured"


class Timing(Record):
    """Latency of one call at the deployment's batch size, from alternating blocks.

    ``interval`` is the bootstrap interval of the median over blocks.
    """

    median_ms: float
    p90_ms: float
    interval_ms: Interval
    num_calls: int
    num_blocks: int
