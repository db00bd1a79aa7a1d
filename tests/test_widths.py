"""Widths timed in the runtime that serves: what is built, how savings are shared, what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from profiling_agent.errors import PlanError
from profiling_agent.records.common import Deployment
from profiling_agent.records.patterns import assign, units_kept
from profiling_agent.records.plan import Plan
from profiling_agent.records.profile import Profile, SensitivityPoint
from profiling_agent.widths import measure_deployed_widths
from record_factory import make_control, make_group, make_profile

WHOLE_MS = 8.0


class FakePredictor:
    """Calls that take as long as its folder says."""

    def __init__(self, milliseconds: float) -> None:
        self._milliseconds = milliseconds

    def prepare(self, split: Path) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...

    def time_block(self, seconds: float, min_calls: int, warmup: int) -> list[float]:
        return [self._milliseconds] * 3


class FakeRunner:
    """Builds nothing: a plan takes off a millisecond for each group that loses a half of it."""

    def __init__(self, profile: Profile, refuses: str = "") -> None:
        self.deployment, self.builder, self.plans = Deployment(), self, list[Plan]()
        self._widths, self._refuses = {g.id: g.width for g in profile.groups}, refuses

    def build(self, plan: Plan, folder: Path, deployment: Deployment) -> None:
        folder.mkdir()
        self.plans.append(plan)
        if any(self._refuses and self._refuses in line.match for line in plan.pruning):
            raise PlanError("it can't be built")

    def pause(self) -> None: ...

    def open(self, folder: Path, runtime: str) -> FakePredictor:
        if folder.name == "c1":
            return FakePredictor(WHOLE_MS)
        lines = assign(self.plans[-1], list(self._widths))
        return FakePredictor(WHOLE_MS - sum(2.0 * line.ratio for line in lines.values()))


def group(name: str, width: int, macs: int) -> Any:
    return make_group(
        name,
        width,
        shape_class=f"mlp/{width}",
        macs_per_unit=macs,
        sensitivity=tuple(
            SensitivityPoint(ratio=r, kl=r, kl_error=0.0, disagreement=0.0, num_images=8)
            for r in (0.25, 0.5)
        ),
    )


PROFILE = make_profile(
    groups=(
        group("mlp:a", 64, 1_000),
        group("mlp:b", 64, 1_000),
        group("mlp:small", 32, 10),
    )
)


def measure(runner: FakeRunner, tmp_path: Path, seconds: float = 60.0) -> Any:
    return measure_deployed_widths(
        runner,  # type: ignore[arg-type]
        PROFILE,
        [make_control("c1", "openvino", "int8-static")],
        tmp_path / "width",
        tmp_path / "split",
        control_folder=lambda trial_id: tmp_path / trial_id,
        seconds=seconds,
        call_s=0.01,
    )


def test_a_shape_is_narrowed_everywhere_at_once_and_the_saving_shared_out(tmp_path: Path) -> None:
    runner = FakeRunner(PROFILE)
    tables, missing = measure(runner, tmp_path)
    assert missing == ()
    assert {(t.runtime, t.scheme) for t in tables} == {("openvino", "int8-static")}
    points = {table.shape_class: {p.width: p.saved for p in table.points} for table in tables}
    assert points["mlp/64"][32] == pytest.approx(2.0 / WHOLE_MS / 2)  # two groups, a half of each
    assert points["mlp/64"][units_kept(64, 0.25)] == pytest.approx(1.0 / WHOLE_MS / 2)
    assert points["mlp/32"][16] == pytest.approx(1.0 / WHOLE_MS)
    first = assign(runner.plans[0], ["mlp:a", "mlp:b", "mlp:small"])
    assert {name: line.ratio for name, line in first.items()} == {"mlp:a": 0.5, "mlp:b": 0.5}
    assert all(plan.repair == "none" for plan in runner.plans)
    assert not (tmp_path / "width").exists()  # thrown away


def test_what_cannot_be_built_or_was_not_reached_is_listed(tmp_path: Path) -> None:
    tables, missing = measure(FakeRunner(PROFILE, refuses="small"), tmp_path)
    assert [table.shape_class for table in tables] == ["mlp/64"]
    assert {entry.reason for entry in missing} == {"it can't be built"}
    tables, missing = measure(FakeRunner(PROFILE), tmp_path, seconds=-1.0)
    assert tables == ()
    assert {entry.reason for entry in missing} == {"the profiling time ran out"}
