"""Widths timed in the runtime that serves: what is built, how savings are shared, what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from profiling_agent.errors import PlanError
from profiling_agent.evaluation.measure import Protocol, Race, race
from profiling_agent.evaluation.watch import Slowed
from profiling_agent.profiling.user_cache import user_folder
from profiling_agent.profiling.width_cache import WidthCache
from profiling_agent.records.common import Deployment, Machine
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

    def __init__(self, profile: Profile, refuses: str = "", slowed: float = 1.0) -> None:
        self._slowed = Slowed(factor=slowed)
        self.deployment, self.builder, self.plans = Deployment(), self, list[Plan]()
        self._widths, self._refuses = {g.id: g.width for g in profile.groups}, refuses

    def build(self, plan: Plan, folder: Path, deployment: Deployment, timeout_s: float) -> None:
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

    def beside(self, *names: str) -> dict[str, FakePredictor]:
        return {}

    def race(
        self, racers: Mapping[str, FakePredictor], protocol: Protocol, has_time: Callable[[], bool]
    ) -> tuple[Race, Slowed]:
        return race(racers, Path(), protocol), self._slowed  # type: ignore[arg-type]


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


def measure(
    runner: FakeRunner,
    tmp_path: Path,
    seconds: float = 60.0,
    cache: WidthCache | None = None,
    profile: Profile = PROFILE,
) -> Any:
    return measure_deployed_widths(
        runner,  # type: ignore[arg-type]
        profile,
        [make_control("c1", "openvino", "int8-static")],
        tmp_path / "width",
        control_folder=lambda trial_id: tmp_path / trial_id,
        seconds=seconds,
        call_s=0.01,
        cache=cache,
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


# ---- widths of earlier runs ---------------------------------------------------------------------


def make_cache(folder: Path | None, **changes: Any) -> WidthCache:
    machine: Machine = PROFILE.machine.model_copy(
        update={"versions": {"openvino": changes.pop("version", "1.0")}}
        | {k: v for k, v in changes.items() if k in Machine.model_fields}
    )
    deployment = Deployment(threads=changes.get("threads", 1))
    return WidthCache(folder=folder, machine=machine, deployment=deployment)


def test_the_next_model_of_the_same_shapes_has_its_widths_for_free(tmp_path: Path) -> None:
    first = FakeRunner(PROFILE)
    timed, _ = measure(first, tmp_path, cache=make_cache(tmp_path / "cache"))
    second = FakeRunner(PROFILE)
    again, missing = measure(second, tmp_path, seconds=-1.0, cache=make_cache(tmp_path / "cache"))
    assert missing == ()
    assert first.plans and not second.plans
    assert [t.is_reused for t in timed] == [False, False]
    assert [t.is_reused for t in again] == [True, True]
    assert [t.model_copy(update={"is_reused": False}) for t in again] == list(timed)


def test_milliseconds_are_kept_and_become_shares_of_the_model_at_hand(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    timed, _ = measure(FakeRunner(PROFILE), tmp_path, cache=cache)
    whole = make_control("c1", "openvino", "int8-static").evaluation
    assert whole is not None and whole.timing is not None
    shape = timed[0].shape_class
    found = cache.find("openvino", "int8-static", shape, whole.timing.median_ms * 2)
    assert found is not None
    assert [p.saved for p in found.points] == pytest.approx([p.saved / 2 for p in timed[0].points])


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "2.0"},
        {"processor": "another"},
        {"features": ("sse2",)},
        {"cpu_quota": 1.5},
        {"threads": 2},
    ],
)
def test_another_machine_runtime_or_deployment_shares_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    measure(FakeRunner(PROFILE), tmp_path, cache=make_cache(tmp_path / "cache"))
    runner = FakeRunner(PROFILE)
    tables, _ = measure(runner, tmp_path, cache=make_cache(tmp_path / "cache", **changes))
    assert runner.plans and not any(table.is_reused for table in tables)


def test_a_table_that_is_not_whole_is_not_kept(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    measure(FakeRunner(PROFILE, refuses="small"), tmp_path, cache=cache)
    tables, missing = measure(FakeRunner(PROFILE), tmp_path, seconds=-1.0, cache=cache)
    assert [table.shape_class for table in tables] == ["mlp/64"]
    assert {entry.what for entry in missing} == {"widths of mlp/32 in openvino int8-static"}


def test_what_was_timed_while_the_machine_was_busy_serves_this_run_alone(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache")
    tables, missing = measure(FakeRunner(PROFILE, slowed=2.0), tmp_path, cache=cache)
    assert tables and missing == ()
    again, _ = measure(FakeRunner(PROFILE), tmp_path, seconds=-1.0, cache=cache)
    assert again == ()


def test_an_earlier_profile_of_the_same_model_needs_only_what_was_not_timed_well(
    tmp_path: Path,
) -> None:
    tables, _ = measure(FakeRunner(PROFILE, refuses="small"), tmp_path)
    elsewhere = tables[0].model_copy(update={"scheme": "fp32"})
    whole, earlier = tables[0].model_copy(update={"is_reused": True}), PROFILE
    earlier = earlier.model_copy(update={"deployed_widths": (elsewhere, whole)})
    runner = FakeRunner(PROFILE)
    again, missing = measure(runner, tmp_path, profile=earlier)
    assert missing == () and again[:2] == (elsewhere, whole)
    assert [table.shape_class for table in again[2:]] == ["mlp/32"]
    cut = {line.match for plan in runner.plans for line in plan.pruning}
    assert len(cut) == 1 and "small" in cut.pop()
    busy, _ = measure(FakeRunner(PROFILE, slowed=2.0), tmp_path)
    assert [table.is_provisional for table in busy] == [True, True]
    earlier = PROFILE.model_copy(update={"deployed_widths": busy})
    again, _ = measure(FakeRunner(PROFILE), tmp_path, profile=earlier)
    assert [table.is_provisional for table in again] == [False, False]
    again, missing = measure(FakeRunner(PROFILE), tmp_path, seconds=-1.0, profile=earlier)
    assert set(again) == set(busy) and missing  # better than nothing, and tried again


def test_files_that_are_broken_or_cannot_be_written_cost_time_and_nothing_else(
    tmp_path: Path,
) -> None:
    cache = make_cache(tmp_path / "cache")
    measure(FakeRunner(PROFILE), tmp_path, cache=cache)
    for file in (tmp_path / "cache").iterdir():
        file.write_text("{")
    runner = FakeRunner(PROFILE)
    tables, missing = measure(runner, tmp_path, cache=cache)
    assert runner.plans and missing == () and len(tables) == 2
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", None):  # a file where the folder should be; no folder at all
        tables, missing = measure(FakeRunner(PROFILE), tmp_path, cache=make_cache(folder))
        assert missing == () and len(tables) == 2


def test_a_user_without_a_home_keeps_no_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert user_folder("widths", {}) is None
    assert user_folder("widths", {"PROFILING_AGENT_CACHE": "/a"}) == Path("/a/widths")


def test_where_widths_are_kept() -> None:
    assert user_folder("widths", {"PROFILING_AGENT_CACHE": "off"}) is None
    assert user_folder("widths", {"PROFILING_AGENT_CACHE": "/a"}) == Path("/a/widths")
    assert user_folder("widths", {"XDG_CACHE_HOME": "/c"}) == Path("/c/profiling-agent/widths")
    assert user_folder("widths", {}) == Path.home() / ".cache" / "profiling-agent" / "widths"
