"""Profiles of earlier runs: which run they serve, and what is kept at all."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from profiling_agent import run_profile
from profiling_agent.profiling import profile_cache
from profiling_agent.profiling.profile_cache import (
    ControlLatency,
    KeptProfile,
    ProfileCache,
    architecture,
)
from profiling_agent.records.common import Budget, Deployment
from profiling_agent.records.evaluation import Speedup
from profiling_agent.records.profile import DeployedProfile, DeployedWidths, Profile, SharePoint
from profiling_agent.records.store import RunStore
from profiling_agent.report.live import SilentProgress
from profiling_agent.run_profile import is_quiet, take_profile, undisturbed
from profiling_agent.run_state import RunState
from record_factory import (
    make_control,
    make_evaluation,
    make_interval,
    make_profile,
    make_split,
    make_spread,
    make_timing,
    make_workload,
)

SECONDS = 60.0


class Net(nn.Module):
    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(slope)
        self.scale = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) * self.scale


def make_cache(folder: Path | None, **changes: Any) -> ProfileCache:
    profile = make_profile()
    record = make_workload(**changes.get("record", {}))
    fields: dict[str, Any] = {
        "folder": folder,
        "workload": SimpleNamespace(record=record, model=changes.get("model", Net())),
        "machine": profile.machine.model_copy(update=changes.get("machine", {})),
        "deployment": changes.get("deployment", Deployment()),
    }
    return ProfileCache(**fields)


def kept(**fields: Any) -> KeptProfile:
    return KeptProfile(seconds=SECONDS, profile=make_profile(**fields))


TABLE = DeployedWidths(
    runtime="openvino",
    scheme="int8-static",
    shape_class="mlp/64",
    points=(SharePoint(width=32, saved=0.1, low=0.09, high=0.11),),
)


def test_a_later_run_on_the_same_model_and_data_has_the_profile(tmp_path: Path) -> None:
    make_cache(tmp_path).keep(kept(deployed_widths=(TABLE,), seconds_spent=50.0))
    name = "under another name"
    found = make_cache(tmp_path, record={"name": name}).find(SECONDS)
    assert found is not None and found.seconds == SECONDS
    profile = found.profile
    assert profile.workload.name == name
    assert profile.reused_from is not None and profile.reused_from.endswith(" UTC")
    assert profile.seconds_spent == 0.0
    assert [table.is_reused for table in profile.deployed_widths] == [True]
    same = {"workload", "reused_from", "seconds_spent", "deployed_widths"}
    assert profile.model_dump(exclude=same) == make_profile().model_dump(exclude=same)
    make_cache(tmp_path).keep(found)
    again = make_cache(tmp_path).find(SECONDS)
    assert again is not None and again.profile.reused_from == profile.reused_from


def test_a_profile_with_less_time_does_not_serve_one_with_more(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    assert cache.find(SECONDS) is None
    cache.keep(kept())
    assert cache.find(2 * SECONDS) is None
    assert cache.find(SECONDS / 2) is not None
    cache.keep(KeptProfile(seconds=SECONDS / 2, profile=make_profile()))  # a shorter run's
    assert cache.find(SECONDS) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"record": {"model_sha256": "f" * 64}},
        {"record": {"splits": tuple(make_split(n, 77) for n in ("calibration", "search", "test"))}},
        {"model": Net(slope=0.2)},
        {"machine": {"processor": "another"}},
        {"machine": {"versions": {"openvino": "0.1"}}},
        {"machine": {"cpu_quota": 1.5}},
        {"deployment": Deployment(batch_size=8)},
    ],
)
def test_another_model_data_machine_or_deployment_does_not(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    make_cache(tmp_path).keep(kept())
    assert make_cache(tmp_path).find(SECONDS) is not None
    assert make_cache(tmp_path, **changes).find(SECONDS) is None


def test_files_that_are_broken_or_cannot_be_written_cost_time_and_nothing_else(
    tmp_path: Path,
) -> None:
    cache = make_cache(tmp_path)
    cache.keep(kept())
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-20])
    assert cache.find(SECONDS) is None
    for folder in (file, None):  # a file where the folder should be; no folder at all
        make_cache(folder).keep(kept())
        assert make_cache(folder).find(SECONDS) is None


def test_the_oldest_profiles_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "MOST_KEPT", 2)
    models = [Net(slope) for slope in (0.1, 0.2, 0.3)]
    for age, model in enumerate(models):
        make_cache(tmp_path, model=model).keep(kept())
        for file in tmp_path.iterdir():  # as if time had passed
            before = file.stat().st_mtime
            os.utime(file, (before - 10 * (age + 1), before - 10 * (age + 1)))
    served = [make_cache(tmp_path, model=model).find(SECONDS) for model in models]
    assert [found is not None for found in served] == [False, True, True]


def test_a_model_is_the_same_by_its_modules_attributes_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = architecture(Net())
    assert architecture(Net().eval()) == same
    assert architecture(Net(slope=0.2)) != same
    changed = Net()
    changed.scale = 3.0
    assert architecture(changed) != same
    assert architecture(nn.Sequential(Net())) != same

    def from_file(body: str) -> nn.Module:
        file = tmp_path / f"model{len(list(tmp_path.iterdir()))}.py"
        head = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n"
        file.write_text(f"{head}        return {body}\n")
        spec = importlib.util.spec_from_file_location("user_model", file)
        assert spec is not None and spec.loader is not None
        monkeypatch.setitem(sys.modules, "user_model", importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules["user_model"])
        return sys.modules["user_model"].Net()

    first = architecture(from_file("x"))
    assert architecture(from_file("-x")) != first
    assert architecture(from_file("x")) == first

    typed: dict[str, Any] = {"__name__": "typed"}
    exec("from torch import nn\nclass Typed(nn.Module): pass", typed)
    assert architecture(typed["Typed"]()) is None
    make_cache(tmp_path / "cache", model=typed["Typed"]()).keep(kept())
    assert not (tmp_path / "cache").exists()


def test_a_model_is_another_when_what_its_class_inherits_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(body: str, activation: str) -> str | None:
        name = f"base_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(
            "import torch\nfrom torch import nn\n"
            f"class Base(nn.Module):\n    def forward(self, x):\n        return {body}\n"
            "class Small(Base):\n    activation = None\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        model = importlib.import_module(name).Small()
        model.act = getattr(torch, activation)
        return architecture(model)

    first = made("x", "relu")
    assert first is not None and made("x", "relu") == first
    assert made("-x", "relu") != first
    assert made("x", "tanh") != first


class Builder:
    """Counts the profiles it takes."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def profile(self, deployment: Deployment, seconds: float) -> Profile:
        self.taken.append(seconds)
        return make_profile(groups=(), deployment=deployment)

    def pause(self) -> None: ...


class Recorder(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def run_in(folder: Path, *, time_s: float = 300.0, left: float = 200.0) -> Any:
    """A run that has measured its controls."""
    store = RunStore(folder)
    store.create()
    profile = make_profile()
    anchors: list[Any] = []
    return SimpleNamespace(
        store=store,
        state=RunState(),
        runner=SimpleNamespace(builder=Builder()),
        workload=SimpleNamespace(record=make_workload(), model=Net()),
        machine=profile.machine,
        deployment=Deployment(),
        budget=Budget(max_drop=0.5, time_s=time_s),
        left=left,
        reserve=lambda: 20.0,
        usual_trial_s=lambda: 5.0,
        call_s=lambda: 4e-3,
        progress=Recorder(),
        memory_limit=None,
        anchor=anchors.append,
        anchors=anchors,
    )


def test_a_second_run_takes_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROFILING_AGENT_CACHE", str(tmp_path / "cache"))
    busy, first, second = (run_in(tmp_path / name) for name in ("busy", "first", "second"))
    for run, relative in ((first, 0.3), (second, 0.31)):
        evaluation = make_evaluation("c1", reference="c1", relative=relative)
        run.state.trials = [make_control("c1", "openvino", "fp32", evaluation=evaluation)]
    busy.call_s = lambda: 1e-3  # and the profile says 4 ms
    taken = [take_profile(each) for each in (busy, first, second)]
    assert [each.runner.builder.taken for each in (busy, first, second)] == [[60.0], [60.0], []]
    assert taken[0] == taken[1] and taken[2] is not None
    assert taken[2].reused_from is not None and taken[2].reused_from in second.progress.said[0]
    known = (ControlLatency(runtime="openvino", scheme="fp32", relative=0.3),)
    assert second.anchors == [known] and first.anchors == []
    assert Profile.read(second.store.profile) == taken[2]
    assert second.state.profile_path == second.store.profile.name
    longer = run_in(tmp_path / "longer", time_s=600.0)
    assert take_profile(longer) is not None and longer.runner.builder.taken == [120.0]
    third = run_in(tmp_path / "third", left=21.0)  # no time for one of its own
    assert take_profile(third) is not None and third.runner.builder.taken == []
    assert third.anchors == [()], "the longer run's profile took the place, without controls"
    monkeypatch.setenv("PROFILING_AGENT_CACHE", "off")
    anew = run_in(tmp_path / "anew")
    assert take_profile(anew) is not None and anew.runner.builder.taken == [60.0]


def bench(original_ms: float = 4.0) -> Any:
    control = make_control("c1", "openvino", "int8-static")
    evaluation = make_evaluation(
        "c1",
        runtime="openvino",
        timing=make_timing(1.0),
        speedup=Speedup(over="baseline", ratio=make_interval(original_ms)),
    )
    trials = [control.model_copy(update={"evaluation": evaluation})]
    return SimpleNamespace(
        state=SimpleNamespace(trials=trials),
        call_s=lambda: 4e-3,
    )


def timed(operators_ms: float = 1.0, whole_ms: float = 4.0) -> Profile:
    return make_profile(
        total=make_spread(whole_ms), deployed=(operators("int8-static", operators_ms),)
    )


def operators(scheme: str, total_ms: float = 1.0) -> DeployedProfile:
    return DeployedProfile(
        runtime="openvino",
        scheme=scheme,
        deployment=Deployment(),
        total_ms=total_ms,
        unmapped_ms=0.0,
        operators=(),
    )


def test_operators_are_timed_of_what_has_none_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROFILING_AGENT_CACHE", str(tmp_path / "cache"))
    asked: list[str] = []

    def profile_artefact(folder: Path, *_: Any, **__: Any) -> DeployedProfile:
        asked.append(folder.name)
        return operators({"c1": "int8-static", "c2": "fp32", "c3": "int8-dynamic"}[folder.name])

    monkeypatch.setattr(run_profile, "profile_artefact", profile_artefact)
    schemes = ["int8-static", "fp32", "int8-dynamic"]
    first, second = run_in(tmp_path / "first"), run_in(tmp_path / "second")
    for run, offered in ((first, schemes[:2]), (second, schemes)):
        run.state.trials = [
            make_control(f"c{n}", "openvino", scheme) for n, scheme in enumerate(offered, start=1)
        ]
        profile = take_profile(run)
        assert profile is not None
        assert {deployed.scheme for deployed in profile.deployed} == set(offered)
    assert sorted(asked) == ["c1", "c2", "c3"]


def test_what_was_timed_while_the_machine_was_busy_is_not_kept() -> None:
    assert is_quiet(bench(), timed())
    assert not is_quiet(bench(), timed(whole_ms=6.0))
    assert not is_quiet(bench(original_ms=2.0), timed())  # the first race of it had been slow
    assert is_quiet(bench(), make_profile(total=None))
    assert undisturbed(bench(), timed().deployed) == timed().deployed
    assert undisturbed(bench(), timed(operators_ms=1.5).deployed) == ()
