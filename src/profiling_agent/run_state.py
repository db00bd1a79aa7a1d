"""What a run's journal says, read back: the state to continue from and the record to show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from pydantic import ValidationError

from profiling_agent.errors import PlanError, StorageError
from profiling_agent.machine.processor import describe_machine
from profiling_agent.planning.history import pareto
from profiling_agent.records.common import Machine
from profiling_agent.records.evaluation import Evaluation
from profiling_agent.records.llm import Guard, LlmUsage
from profiling_agent.records.profile import Profile
from profiling_agent.records.store import RunStore, write_text
from profiling_agent.records.trial import (
    Candidate,
    Rejection,
    RunRecord,
    RunSettings,
    Trial,
    Verdict,
)
from profiling_agent.records.workload import WorkloadRecord, WorkloadSource
from profiling_agent.report.html import render_html


@dataclass(kw_only=True)
class RunState:
    """What the journal says so far."""

    settings: RunSettings | None = None
    workload: WorkloadRecord | None = None
    machine: Machine | None = None
    baseline: Evaluation | None = None
    profile_path: str | None = None
    controls_timed: bool = False
    """Whether the controls have their times from one race."""
    trials: list[Trial] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    llm: LlmUsage | None = None
    candidates: list[Candidate] | None = None
    final_facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    verdict: Verdict | None = None
    artefact: str | None = None

    def keep(self, trial: Trial) -> None:
        """Add a trial; one that was timed again takes its own place."""
        for index, known in enumerate(self.trials):
            if known.trial_id == trial.trial_id:
                self.trials[index] = trial
                return
        self.trials.append(trial)


def refuse_others(store: RunStore, settings: RunSettings, source: WorkloadSource) -> None:
    """``StorageError`` for a folder whose run was asked something else.

    To be called before acquisition, which writes the splits that the run stands on.
    """
    state = read_state(store)
    if state.baseline is None or state.workload is None:
        return
    if state.settings != settings or state.workload.source != source:
        what = "settings" if state.settings != settings else "model, weights or data"
        raise StorageError(
            f"{str(store.folder)!r} holds a run with other {what}. Pass another --out, or "
            "--restart to throw that run away."
        )


def resume(store: RunStore, settings: RunSettings, workload: WorkloadRecord) -> RunState:
    """The state that the journal holds; a new journal begins with settings, data and machine.

    ``StorageError`` when the weights or the data have changed since, or the machine is another.
    """
    state = read_state(store)
    machine = describe_machine()
    if state.baseline is None:  # nothing was measured that other settings could spoil
        state = RunState(settings=settings, workload=workload, machine=machine)
        store.journal.append("begin", _beginning(settings, workload, machine))
        return state
    if not workload.same_as(state.workload):
        raise StorageError(
            f"{str(store.folder)!r} holds a run with other weights or data of the same name. Pass "
            "another --out, or --restart to throw that run away."
        )
    known = state.machine
    if state.verdict is None and (known is None or not known.same_hardware(machine)):
        raise StorageError(
            f"The run in {str(store.folder)!r} was begun on another machine; its times don't hold "
            "here. Pass another --out, or --restart."
        )
    return state


def _beginning(settings: RunSettings, workload: WorkloadRecord, machine: Machine) -> dict[str, Any]:
    parts = {"settings": settings, "workload": workload, "machine": machine}
    return {name: part.model_dump(mode="json") for name, part in parts.items()}


def read_state(store: RunStore) -> RunState:
    """Everything a journal says; events of an unknown kind are passed over.

    ``PlanError`` when an event can't be read, as after a change of the package's records.
    """
    state = RunState()

    def begin(data: Any) -> None:
        state.settings = RunSettings.model_validate(data["settings"])
        state.workload = WorkloadRecord.model_validate(data["workload"])
        state.machine = Machine.model_validate(data["machine"])

    def finals(data: Any) -> None:
        state.final_facts[data["evaluation"]["artefact"]] = data

    def verdict(data: Any) -> None:
        state.verdict = Verdict.model_validate(data["verdict"])
        state.artefact = data["artefact"]

    readers: dict[str, Callable[[Any], None]] = {
        "begin": begin,
        "baseline": lambda d: setattr(state, "baseline", Evaluation.model_validate(d)),
        "profile": lambda d: setattr(state, "profile_path", d["path"]),
        "controls-timed": lambda _: setattr(state, "controls_timed", True),
        "candidates": lambda d: setattr(
            state, "candidates", [Candidate.model_validate(item) for item in d]
        ),
        "trial": lambda d: state.keep(Trial.model_validate(d)),
        "rejection": lambda d: state.rejections.append(Rejection.model_validate(d)),
        "guard": lambda d: state.guards.append(Guard.model_validate(d)),
        "llm": lambda d: setattr(state, "llm", LlmUsage.model_validate(d)),
        "warning": lambda d: state.warnings.append(str(d)),
        "final": finals,
        "verdict": verdict,
    }
    for kind, data in store.journal.events():
        try:
            readers.get(kind, lambda _data: None)(data)
        except (ValidationError, KeyError, TypeError):
            raise PlanError(
                f"The event {kind!r} in {str(store.journal.path)!r} can't be read by this version. "
                "Pass another --out, or --restart to throw that run away."
            ) from None
    return state


def is_finished(store: RunStore) -> bool:
    """Whether the folder holds a run that reached its verdict: nobody is asked anything then."""
    with contextlib.suppress(OSError):  # one that can't be read fails at writing, in words
        return store.holds_run and read_state(store).verdict is not None
    return False


def draw_record(store: RunStore, state: RunState) -> RunRecord:
    """The run's record, from its journal alone."""
    assert state.settings is not None and state.baseline is not None
    assert state.workload is not None and state.machine is not None
    return RunRecord(
        package_version=package_version(),
        machine=state.machine,
        settings=state.settings,
        workload=state.workload,
        baseline=state.baseline,
        baseline_timing=state.baseline.timing,
        trials=tuple(state.trials),
        rejections=tuple(state.rejections),
        guards=tuple(state.guards),
        llm=state.llm,
        candidates=tuple(state.candidates or ()),
        pareto=tuple(t.trial_id for t in pareto(state.trials, state.settings.budget)),
        final=tuple(
            Evaluation.model_validate(facts["evaluation"]) for facts in state.final_facts.values()
        ),
        verdict=state.verdict,
        artefact=state.artefact,
        seconds=store.journal.spent(),
        warnings=tuple(state.warnings),
    )


def package_version() -> str:
    """The installed version, or the word for a source tree that never was installed."""
    try:
        return metadata.version("profiling-agent")
    except metadata.PackageNotFoundError:
        return "not installed"


def save_record(store: RunStore, record: RunRecord) -> None:
    """Write ``run.json`` and ``report.html``."""
    write_text(store.run_record, record.to_json())
    profile = Profile.read(store.profile) if store.profile.exists() else None
    write_text(store.report, render_html(record, profile))
