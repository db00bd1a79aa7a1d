"""One plan carried out and measured, and what the run concluded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record
from profiling_agent.records.common import Budget, Deployment, Evidence, Interval, Machine, Timing
from profiling_agent.records.evaluation import Accuracy, Achieved, Evaluation
from profiling_agent.records.llm import Guard, LlmSettings, LlmUsage
from profiling_agent.records.plan import Plan
from profiling_agent.records.workload import WorkloadRecord

TrialStatus = Literal["done", "screened", "failed"]
VerdictKind = Literal["ACCEPT", "NO_GAIN", "INFEASIBLE"]

EXIT_CODES: dict[VerdictKind, int] = {"ACCEPT": 0, "NO_GAIN": 10, "INFEASIBLE": 11}

EARLIER = ", in an earlier run"
"""Behind the name of a plan's author."""


class Trial(Record):
    """``done`` trials have an evaluation, and a reason where that may be doubted (the machine was
    busy); the others have a reason.

    ``screened``: stopped on a small subset because the accuracy had plainly collapsed;
    ``failed``: crashed, hung, ran out of memory, or could not be lowered.
    """

    schema_version: Literal[1] = 1
    trial_id: str
    plan: Plan
    author: str = Field(
        description="control, solver, llm, llm+solver, uniform, ..., or user; "
        f"with {EARLIER!r} where that run's plan was tried again"
    )
    is_control: bool = False
    status: TrialStatus
    reason: str = ""
    achieved: Achieved | None = None
    evaluation: Evaluation | None = None
    predicted_ms: float | None = None
    predicted_kl: float | None = None
    changed: str = Field(
        default="", description="what guards made of what a language model proposed, and why"
    )
    seconds: float = 0.0
    isolation: Literal["process", "none"] = "process"

    @property
    def is_earlier(self) -> bool:
        """Whether its plan is one that an earlier run ended with."""
        return self.author.endswith(EARLIER)

    @property
    def on_search(self) -> Accuracy | None:
        """Its accuracy on the search split, where that was measured."""
        return self.evaluation.on("search") if self.evaluation else None

    @property
    def label(self) -> str:
        return f"{self.plan.runtime} {self.plan.quantization.scheme}"


class Rejection(Record):
    """A plan that was not carried out, and why, in words that can be acted on."""

    plan: Plan | None
    author: str
    reason: str


class Candidate(Record):
    """A trial nominated for the test split, before the test split is opened."""

    trial_id: str
    predicted_drop: float
    objective_value: float


class Verdict(Record):
    """What the run concluded, with the evidence.

    ``speedup`` compares with the baseline, ``speedup_over_control`` with the best feasible control,
    both for the artefact handed over and from interleaved measurements of the final stage.
    """

    schema_version: Literal[1] = 1
    kind: VerdictKind
    evidence: Evidence | None
    reason: str
    next_step: str
    trial_id: str | None = Field(description="the trial handed over; None for the original")
    best_control_id: str | None
    drop: Interval | None
    drop_upper_bound: float | None
    samples_to_prove: int | None = Field(description="test samples that would prove the drop")
    speedup: Interval | None
    speedup_over_control: Interval | None
    size_ratio: float | None = Field(description="model files over the original's")
    memory_ratio: float | None
    candidates_tested: int


class RunSettings(Record):
    """What the user asked for."""

    budget: Budget
    deployment: Deployment
    planner: str = "solver"
    llm: LlmSettings | None = None
    runtimes: tuple[str, ...] = ("torch", "onnxruntime", "openvino")
    seed: int = Field(default=0, ge=0, lt=2**63)


class RunRecord(Record):
    """A whole run, drawn from its journal: what ``--json`` prints and the report is made of."""

    schema_version: Literal[1] = 1
    package_version: str
    machine: Machine
    settings: RunSettings
    workload: WorkloadRecord
    baseline: Evaluation
    baseline_timing: Timing | None
    trials: tuple[Trial, ...]
    rejections: tuple[Rejection, ...]
    guards: tuple[Guard, ...] = Field(default=(), description="what was done to a model's answers")
    llm: LlmUsage | None = Field(default=None, description="None: no language model was asked")
    candidates: tuple[Candidate, ...]
    pareto: tuple[str, ...] = Field(description="trial ids no other feasible trial beats in both")
    final: tuple[Evaluation, ...] = Field(description="of the final stage, test split included")
    verdict: Verdict | None
    artefact: str | None = Field(description="folder handed over, relative to the run")
    seconds: float
    warnings: tuple[str, ...] = ()

    def trial(self, trial_id: str) -> Trial:
        return next(t for t in self.trials if t.trial_id == trial_id)
