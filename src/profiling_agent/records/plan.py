"""A plan: what to prune, what to quantize, for which runtime, how to repair.

The only thing planners produce and the only thing compression takes. ``docs/plan-format.md`` is
its specification for people.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from profiling_agent.records.base import Record
from profiling_agent.records.common import RuntimeName

Importance = Literal["magnitude", "variance", "taylor", "obs"]
Repair = Literal["none", "mean-shift", "least-squares", "sequential"]

MAX_PATTERN_LENGTH = 200


class PruningLine(Record):
    """Prune ``ratio`` of the units of every group whose id matches the pattern in full."""

    match: str = Field(min_length=1, max_length=MAX_PATTERN_LENGTH)
    ratio: float = Field(ge=0.0, lt=1.0)
    importance: Importance = "obs"
    why: str = Field(default="", max_length=2000)


class Quantization(Record):
    """A scheme of the plan's runtime; layers matching a ``keep_float`` pattern stay float."""

    scheme: str = Field(default="fp32", max_length=40)
    keep_float: tuple[str, ...] = Field(default=(), max_length=1000)
    why: str = Field(default="", max_length=2000)

    @property
    def is_static(self) -> bool:
        """Whether the ranges of activations are fixed beforehand, from calibration samples."""
        return self.scheme.startswith("int8-static")


class Plan(Record):
    """One complete proposal. The first matching pruning line wins.

    >>> Plan(runtime="torch", quantization=Quantization(scheme="int8-dynamic")).plan_id
    '19a94f4f72f6b330'
    """

    schema_version: Literal[1] = 1
    seed: int = Field(default=0, ge=0, lt=2**63)
    runtime: RuntimeName
    pruning: tuple[PruningLine, ...] = Field(default=(), max_length=1000)
    quantization: Quantization = Quantization()
    repair: Repair = "least-squares"
    why: str = Field(default="", max_length=4000)

    @property
    def plan_id(self) -> str:
        """Hash of what the plan does; the reasons given don't enter."""
        bare = self.model_copy(
            update={
                "why": "",
                "pruning": tuple(line.model_copy(update={"why": ""}) for line in self.pruning),
                "quantization": self.quantization.model_copy(update={"why": ""}),
            }
        )
        return bare.digest()
