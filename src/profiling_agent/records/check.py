"""What ``check`` saw of a model and its data before anything is spent on them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Interval, NotMeasured
from profiling_agent.records.workload import SplitName, WorkloadRecord

Level = Literal["problem", "hint"]
FindingKind = Literal[
    "chance",
    "preprocessing",
    "shifted labels",
    "class order",
    "training mode",
    "random answers",
    "mixed samples",
    "not finite",
    "unreadable",
    "constant answer",
    "some classes",
    "floats",
    "few samples",
    "slow data",
]


class Finding(Record):
    """Something that looks wrong, the evidence in a sentence, and what to do about it.

    A ``problem`` makes a result meaningless or ``optimize`` refuse; a ``hint`` may be as meant.
    """

    kind: FindingKind
    level: Level
    text: str
    next_step: str


class CheckedSample(Record):
    """One sample with what it is and what the model says; names, or numbers without names.

    ``confidence`` is the softmax of the predicted class, from 0 to 1.
    """

    split: SplitName
    row: int
    true: str | None = None
    predicted: str | None = None
    is_right: bool | None = None
    confidence: float | None = None


class PreprocessingTrial(Record):
    """The percentage right under one preprocessing, on the first samples of those looked at.

    When time is short the worse ones are left behind on fewer samples.
    """

    name: str
    value: float
    num_samples: int
    is_stated: bool = False


class EagerLatency(Record):
    """Median of a few calls of the untouched model, eager fp32, in the checking process."""

    median_ms: float
    num_calls: int
    samples_per_s: float


class Defaults(Record):
    """What ``optimize`` does with this workload when no flag says otherwise.

    ``splits`` are the samples it will have; estimated, when ``check`` read only a part.
    """

    max_drop: float | None = Field(description="None for a metric of the user's: it must be given")
    unit: str
    time_budget_s: float
    max_trials: int
    deployment: Deployment
    runtimes: tuple[str, ...] = Field(description="installed, with their versions")
    missing_runtimes: tuple[str, ...] = Field(description="with the install lines")
    splits: dict[SplitName, int]


class CheckRecord(Record):
    """Everything ``check`` shows; ``--json`` prints it.

    ``value`` is the metric on the samples looked at, in ``metric``'s unit; ``chance`` what always
    answering their commonest class would give.
    """

    schema_version: Literal[1] = 1
    package_version: str
    workload: WorkloadRecord
    deployment: Deployment
    seed: int
    split: SplitName = Field(description="which samples were looked at; not the test split")
    samples: tuple[CheckedSample, ...]
    picture: str | None = Field(description="file of the samples, when they are images")
    value: Interval | None
    chance: float | None
    latency: EagerLatency | None
    num_test: int = Field(description="test samples of the whole data, or as many as are used")
    provable_drop: float | None = Field(description="points, if 2 % of the predictions change")
    defaults: Defaults
    trials: tuple[PreprocessingTrial, ...] = ()
    findings: tuple[Finding, ...] = ()
    not_judged: tuple[NotMeasured, ...] = ()
    seconds: float

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "problem")

    @property
    def has_problems(self) -> bool:
        """Whether something found would spoil a run; the command then exits with 12."""
        return bool(self.problems)
