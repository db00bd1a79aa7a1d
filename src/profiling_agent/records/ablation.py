"""A comparison of planners on one workload: who found what, with how many trials."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record
from profiling_agent.records.common import Interval, Machine
from profiling_agent.records.evaluation import Accuracy, Evaluation
from profiling_agent.records.llm import Guard, LlmSettings, LlmUsage
from profiling_agent.records.trial import RunSettings, Trial
from profiling_agent.records.workload import WorkloadRecord


class AblationSettings(Record):
    """What is compared. ``search`` holds budget, deployment, runtimes and the first seed; its
    ``max_trials`` are those of each arm."""

    search: RunSettings
    planners: tuple[str, ...] = Field(min_length=1)
    models: tuple[LlmSettings, ...] = Field(
        default=(), description="language models, once for each wording of the prompt"
    )
    num_seeds: int = Field(default=2, ge=1, le=100)
    time_s: float = Field(gt=0, description="of the whole comparison")


class Attempt(Record):
    """One of an arm's trials; one that was spent on an answer which did not pass has no trial."""

    number: int
    trial: Trial | None
    measured_as: str | None = Field(description="the trial whose measurement this is")
    is_cached: bool = Field(description="an arm before has the same measurement")
    reason: str = Field(default="", description="why there is no trial")
    holds: bool = Field(
        default=False, description="expected within the budget, by all that was measured"
    )


class Arm(Record):
    """One planner with one seed and, if it asks one, one language model."""

    planner: str
    seed: int
    llm: LlmSettings | None = None
    attempts: tuple[Attempt, ...] = ()
    guards: tuple[Guard, ...] = ()
    usage: LlmUsage | None = Field(default=None, description="None: no language model was asked")
    gains: tuple[float | None, ...] = Field(
        default=(),
        description="how many times better than the original in the objective the best feasible "
        "one was: of the controls, then after each attempt",
    )
    hypervolume: float | None = Field(
        default=None, description="see the record's; of this arm's trials and the controls"
    )
    best_id: str | None = Field(default=None, description="the best one's measured_as, or control")
    over_reference: Interval | None = Field(
        default=None, description="latency of the reference's best over this one's, one race"
    )
    same_as_reference: bool = False
    test: Accuracy | None = Field(default=None, description="of the best one, on the test split")
    ended: str = Field(default="", description="why there are fewer attempts, or none")
    not_compared: str = Field(default="", description="why over_reference or test are missing")


class AblationRecord(Record):
    """The whole comparison: what ``--json`` prints and the table and plot are made of.

    ``hypervolume`` is the share of the square from (original's objective, ``reference_drop``) to
    (0, 0) that the artefacts dominate: 1 would be free and without loss.
    """

    schema_version: Literal[1] = 1
    package_version: str
    machine: Machine
    settings: AblationSettings
    workload: WorkloadRecord
    baseline: Evaluation
    controls: tuple[Trial, ...]
    controls_hypervolume: float
    reference_drop: float
    reference: str = Field(description="the planner that the others are compared with")
    arms: tuple[Arm, ...]
    num_measured: int = Field(description="trials that were really carried out, controls aside")
    seconds: float
    warnings: tuple[str, ...] = ()
