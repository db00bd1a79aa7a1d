"""An artefact measured where it is to run."""

from __future__ import annotations

from typing import Any, Literal, TypeGuard

from pydantic import Field, computed_field, model_validator

from profiling_agent.records.base import Record
from profiling_agent.records.common import Deployment, Machine, Timing


class Measurement(Record):
    """Time and memory of an artefact on this machine, and whether it answers as where it was built.

    ``difference`` is the largest absolute difference of its answers to the manifest's check inputs,
    ``largest`` the largest of those answers by magnitude.
    """

    schema_version: Literal[1] = 1
    name: str
    runtime: str
    scheme: str
    machine: Machine
    built_on: Machine | None = Field(description="as the manifest has it")
    deployment: Deployment
    timing: Timing
    throughput_per_s: float
    size_bytes: int
    memory_bytes: int | None = Field(description="None where the system does not tell")
    difference: float
    largest: float

    @computed_field
    @property
    def agrees(self) -> bool:
        """Whether the answers are those of the build, but for how processors round."""
        return self.difference <= AGREEMENT * max(1.0, self.largest)

    @model_validator(mode="before")
    @classmethod
    def _computed_anew(cls, given: Any) -> Any:
        """``agrees`` is written for others to read; what is read of it doesn't count."""
        return {k: v for k, v in given.items() if k != "agrees"} if _is_dict(given) else given


AGREEMENT = 0.02
"""Of the largest answer. Int8 and bf16 round otherwise on other processors, by a step or two."""


def _is_dict(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
