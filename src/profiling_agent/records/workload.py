"""What is known of a workload once acquisition has seen it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record

SplitName = Literal["calibration", "search", "test"]


class InputSpec(Record):
    """One input of the model's forward; ``shape`` without the batch axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str = Field(description="numpy's name, such as float32 or int64")
    found_by: str = Field(default="data", description="data, configuration or probing")


class Preprocessing(Record):
    """From raw arrays to the model's input: ``(x * scale - mean) / std``, then layout.

    ``layout`` is that of the raw array of one sample: ``hw``, ``hwc``, ``chw`` (images; the model
    gets ``chw``) or ``none`` (passed on as it is). Mean and std are per channel, or empty.
    """

    layout: Literal["none", "hw", "hwc", "chw"] = "none"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    source: str = Field(default="none stated", description="where these values come from")


class WorkloadSource(Record):
    """How a fresh process finds the model and data again; ``model`` None for a live object."""

    model: str | None
    weights: str | None = None
    data: str | None = None
    test_data: str | None = None


class SplitInfo(Record):
    """One split: which samples, proven by a hash of their bytes."""

    name: SplitName
    num_samples: int
    labelled: bool
    sha256: str


class Task(Record):
    """What is asked of the model; ``unit`` is that of ``max_drop``."""

    metric: Literal["accuracy"] = "accuracy"
    unit: str = "points"
    higher_is_better: bool = True
    num_classes: int
    class_names: tuple[str, ...] = ()


class WorkloadRecord(Record):
    """The workload without its tensors."""

    schema_version: Literal[1] = 1
    name: str
    source: WorkloadSource
    num_parameters: int
    weight_bytes: int
    model_sha256: str = Field(description="of the names and values of all weights and buffers")
    inputs: tuple[InputSpec, ...]
    preprocessing: Preprocessing
    task: Task
    splits: tuple[SplitInfo, ...]
    notes: tuple[str, ...] = ()

    def split(self, name: SplitName) -> SplitInfo:
        return next(split for split in self.splits if split.name == name)
