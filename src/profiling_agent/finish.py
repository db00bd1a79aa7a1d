"""The end of a run: the test split is opened, a verdict is reached, an artefact handed over."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.acquisition.workload import Workload
from profiling_agent.beside import OPENING_S, Beside
from profiling_agent.deployment.opened import check_artefact
from profiling_agent.errors import ArtefactError, BudgetError, ModelError, StorageError, TrialError
from profiling_agent.evaluation.judge import Judge
from profiling_agent.evaluation.measure import FINAL, Protocol, Race
from profiling_agent.evaluation.predictor import Predictor
from profiling_agent.planning.decide import (
    Final,
    best_control,
    conclude,
    nominate,
    proof_level,
    ranked_controls,
    within_budget,
)
from profiling_agent.planning.history import relative_latency
from profiling_agent.records.common import Budget, Interval, NotMeasured
from profiling_agent.records.evaluation import Accuracy, BuiltArtefact, Evaluation
from profiling_agent.records.store import RunStore, read_array, write_array
from profiling_agent.records.trial import Candidate, RunSettings, Trial, Verdict
from profiling_agent.records.workload import SplitName
from profiling_agent.report.live import quiet
from profiling_agent.run_state import RunState
from profiling_agent.trial import evaluation_of

RACE_SHARE = 0.1
"""Of the time budget, at most, for the race that the headline is taken from."""
NOT_RACED = NotMeasured(
    what="latency, speed-up and memory", reason="only artefacts within the budget are raced"
)


def final_protocol(time_budget_s: float, call_s: float) -> Protocol:
    """The last race: up to 24 blocks of each, fewer when the whole budget is short."""
    protocol = FINAL.suited_to(call_s)
    per_round = protocol.seconds(call_s, 3) / protocol.num_blocks
    num_blocks = int(RACE_SHARE * time_budget_s / per_round)
    return replace(protocol, num_blocks=max(8, min(FINAL.num_blocks, num_blocks)))


def final_seconds(
    trials: Sequence[Trial],
    budget: Budget,
    num_calls: int,
    original_call_s: float,
    num_artefacts: int,
    beside_s: float = 0.0,
) -> float:
    """What the final stage is expected to take: the leaders beside each other (``beside_s``),
    accuracy on the test split (``num_calls`` batches) of the original and of so many artefacts (a
    control and two candidates), by the speed of the best control, and a race and a quarter."""
    control = best_control(trials, budget)
    artefact_call_s = original_call_s * ((relative_latency(control) if control else None) or 0.6)
    racers = min(3, 1 + num_artefacts)
    protocol = final_protocol(budget.time_s, original_call_s)
    race_s = protocol.seconds(original_call_s, racers) + OPENING_S
    accuracy_s = num_calls * (original_call_s + num_artefacts * artefact_call_s)
    return min(0.6 * budget.time_s, accuracy_s + 1.25 * race_s + beside_s)


def answers_of_original(
    predictor: Predictor, judge: Judge, data: Path, split: SplitName, stop: int | None = None
) -> np.ndarray:
    """What the untouched model answers (samples, ...), to the first ``stop`` samples or to all;
    ``ModelError`` when its forward fails."""
    with forward_of_original(split):
        return judge.answers(predictor.logits(data / split, 0, stop))


@contextlib.contextmanager
def forward_of_original(split: SplitName) -> Iterator[None]:
    """``ModelError``, with what to do, when the untouched model's forward fails on a split."""
    try:
        yield
    except TrialError as error:
        raise ModelError(
            f"The untouched model fails on the {split} data: {error} Run it by hand on one batch "
            "of that size."
        ) from None


class Finish:
    """Walks from the trials to the verdict; what the journal already holds is not done again."""

    def __init__(
        self,
        *,
        store: RunStore,
        settings: RunSettings,
        workload: Workload,
        state: RunState,
        beside: Beside,
    ) -> None:
        self.store, self.workload, self.state = store, workload, state
        self.beside, self.runner, self.judge = beside, beside.runner, beside.runner.judge
        self.progress, self.warn = beside.progress, beside.warn
        self.budget, self.deployment = settings.budget, settings.deployment
        self.call_s = beside.call_s
        self.protocol = final_protocol(self.budget.time_s, self.call_s)

    def walk(self, candidates: Sequence[Candidate]) -> None:
        """Look at the candidates on the test split, one after the other, and hand over."""
        level = proof_level(len(candidates))
        self.progress.stage("test split", "the original")
        try:
            self.original = self._original()
        except BudgetError as error:
            self._end_without_test(error)
            return
        baseline = self.state.baseline
        assert baseline is not None
        control = self._control()
        tested: list[Final] = []
        verdict: Verdict | None = None
        for candidate in candidates:
            final = self._look(self._trial(candidate.trial_id), level)
            if final is None:
                continue
            if within_budget(final, self.budget):
                control, final = self._race(final, control)
            tested.append(final)
            verdict = conclude(tested, control, baseline, self.budget, self.state.trials)
            if verdict.kind == "ACCEPT":
                break
        if verdict is None or verdict.kind != "ACCEPT":
            if control is not None and control.evaluation.speedup is None:
                _, control = self._race(control, None)
            verdict = conclude(tested, control, baseline, self.budget, self.state.trials)
        self._hand_over(verdict)

    def _end_without_test(self, error: BudgetError) -> None:
        """The metric fails on the original's own test answers: nothing can be accepted."""
        baseline = self.state.baseline
        assert baseline is not None
        verdict = conclude([], None, baseline, self.budget, self.state.trials)
        reason = f"The test split can't be judged, so the original stays: {error}"
        step = "Mend the metric, and start again with another --out."
        self._hand_over(verdict.model_copy(update={"reason": reason, "next_step": step}))

    def nominate(self) -> list[Candidate]:
        """Journal the candidates, before the test split is opened."""
        if self.state.candidates is None:
            num_test = self.workload.record.split("test").num_samples
            trials = self.beside.ranked(self.state.trials, num_test, self._has_time_to_race)
            self.state.candidates = nominate(trials, self.budget, num_test)
            dumped = [candidate.model_dump(mode="json") for candidate in self.state.candidates]
            self.store.journal.append("candidates", dumped)
        return self.state.candidates

    def _has_time_to_race(self, seconds: float) -> bool:
        """So long, so that the control and a candidate still fit into the time budget."""
        num_test = self.workload.record.split("test").num_samples
        num_calls = -(-num_test // self.deployment.batch_size)
        rest = final_seconds(self.state.trials, self.budget, num_calls, self.call_s, 2)
        return self.store.journal.clock() + seconds + rest < self.budget.time_s

    def _trial(self, trial_id: str) -> Trial:
        return next(trial for trial in self.state.trials if trial.trial_id == trial_id)

    def _original(self) -> np.ndarray:
        path = self.store.data / "baseline_test.npy"
        predicted = read_array(path)
        if predicted is None:
            predictor = self.runner.baseline.open()
            with quiet(self.progress):
                predicted = answers_of_original(predictor, self.judge, self.store.data, "test")
            predictor.pause()
            write_array(path, predicted)
        baseline = self.state.baseline
        assert baseline is not None
        if baseline.on("test") is None:
            labels = self.workload.splits["test"].labels
            accuracy = self.judge.score("test", predicted, labels, None)
            parts = (*baseline.accuracy, accuracy)
            self.state.baseline = baseline.model_copy(update={"accuracy": parts})
            self.store.journal.append("baseline", self.state.baseline)
        return predicted

    def _control(self) -> Final | None:
        """The best control that is within the budget on the test split too."""
        ranked = ranked_controls(self.state.trials, self.budget)
        level = proof_level(max(len(ranked), len(self.state.candidates or ())))
        for trial in ranked:
            final = self._look(trial, level)
            if final is not None and within_budget(final, self.budget):
                return final
        return None

    def _look(self, trial: Trial, level: float) -> Final | None:
        """A trial's accuracy on the test split; ``None`` when it fails there.

        ``level`` is that of its bound, corrected for how many are looked at.
        """
        known = self.state.final_facts.get(trial.trial_id)
        if known is None:
            self.progress.stage("test split", trial.trial_id)
            try:
                with quiet(self.progress):
                    known = self._look_now(trial, level)
            except (TrialError, ArtefactError, BudgetError) as error:
                self.warn(f"{trial.trial_id} failed on the test split: {error}")
                return None
            self._keep(trial.trial_id, known)
        return _final_of(trial, known)

    def _look_now(self, trial: Trial, level: float) -> dict[str, Any]:
        built, labels = self._built(trial), self.workload.splits["test"].labels
        with contextlib.closing(self._open(trial, built)) as predictor:
            ours = self.judge.answers(predictor.logits(self.store.data / "test"))
        drop = self.judge.drop(ours, labels, self.original, level=level)
        accuracy = self.judge.accuracy("test", ours, labels, self.original, drop)
        needed = drop.samples_to_prove(self.budget.max_drop)
        evaluation = self._unraced(trial, built, accuracy)
        return _facts(evaluation, None, needed)

    def _unraced(self, trial: Trial, built: BuiltArtefact, accuracy: Accuracy) -> Evaluation:
        return Evaluation(
            artefact=trial.trial_id,
            runtime=built.runtime,
            scheme=built.scheme,
            deployment=self.deployment,
            accuracy=(accuracy,),
            timing=None,
            speedup=None,
            throughput_per_s=None,
            size_bytes=built.size_bytes,
            weight_bytes=built.weight_bytes,
            memory_bytes=None,
            not_measured=(NOT_RACED,),
        )

    def _race(self, final: Final, control: Final | None) -> tuple[Final | None, Final]:
        """Baseline, control and candidate in one interleaved race; both come back with times."""
        if final.evaluation.speedup is not None:
            return control, final
        self.progress.stage("final race", final.trial.trial_id)
        try:
            with quiet(self.progress):
                return self._race_now(final, control)
        except (TrialError, ArtefactError) as error:
            self.warn(f"{final.trial.trial_id} failed in the final race: {error}")
            return control, final

    def _race_now(self, final: Final, control: Final | None) -> tuple[Final | None, Final]:
        racers: dict[str, Predictor] = {"baseline": self.runner.baseline.open()}
        with contextlib.ExitStack() as stack:
            for entry in (control, final):
                if entry is not None:
                    opened = self._open(entry.trial, self._built(entry.trial))
                    racers[entry.trial.trial_id] = stack.enter_context(contextlib.closing(opened))
            times, slowed = self.runner.race(racers, self.protocol, has_time=self._has_time)
            if slowed.is_doubtful:
                self.warn(f"In the final race {slowed}.")
            self._retime_baseline(times)
            timed: list[Final] = []
            for entry in (control, final):
                if entry is None:
                    continue
                name = entry.trial.trial_id
                evaluation = evaluation_of(
                    name,
                    self._built(entry.trial),
                    self.deployment,
                    entry.evaluation.accuracy,
                    times,
                    racers[name],
                    self.runner.reference,
                )
                rival = control.trial.trial_id if control is not None else None
                over = times.speedup(name, rival) if rival not in (None, name) else None
                facts = _facts(evaluation, over, entry.samples_to_prove)
                self._keep(name, facts)
                timed.append(_final_of(entry.trial, facts))
        return (timed[0] if control is not None else None), timed[-1]

    def _has_time(self) -> bool:
        """For another race within the time budget, and one of a candidate after this."""
        race_s = self.protocol.seconds(self.call_s, 3) + OPENING_S
        return self.store.journal.clock() + 2 * race_s < self.budget.time_s

    def _retime_baseline(self, times: Race) -> None:
        """What is shown beside the final times must come from the same race."""
        baseline = self.state.baseline
        assert baseline is not None
        timing = times.timing("baseline")
        throughput = 1e3 * self.deployment.batch_size / timing.median_ms
        update = {"timing": timing, "throughput_per_s": throughput}
        self.state.baseline = baseline.model_copy(update=update)
        self.store.journal.append("baseline", self.state.baseline)

    def _built(self, trial: Trial) -> BuiltArtefact:
        return check_artefact(self.store.trial(trial.trial_id))

    def _open(self, trial: Trial, built: BuiltArtefact) -> Predictor:
        return self.runner.open(self.store.trial(trial.trial_id), built.runtime)

    def _keep(self, trial_id: str, facts: dict[str, Any]) -> None:
        self.state.final_facts[trial_id] = facts
        self.store.journal.append("final", facts)

    def _hand_over(self, verdict: Verdict) -> None:
        if verdict.trial_id is not None:
            copy_artefact(self.store.trial(verdict.trial_id), self.store.artefact)
            self.state.artefact = self.store.artefact.name
        self.state.verdict = verdict
        self.store.journal.append(
            "verdict",
            {"verdict": verdict.model_dump(mode="json"), "artefact": self.state.artefact},
        )


def _facts(
    evaluation: Evaluation, over_control: Interval | None, needed: int | None
) -> dict[str, Any]:
    return {
        "evaluation": evaluation.model_dump(mode="json"),
        "over_control": over_control.model_dump(mode="json") if over_control else None,
        "samples_to_prove": needed,
    }


def _final_of(trial: Trial, facts: dict[str, Any]) -> Final:
    over = facts["over_control"]
    return Final(
        trial=trial,
        evaluation=Evaluation.model_validate(facts["evaluation"]),
        over_control=Interval.model_validate(over) if over else None,
        samples_to_prove=facts["samples_to_prove"],
    )


def copy_artefact(source: Path, target: Path) -> None:
    """Copy a trial's artefact into place, whole or not at all; ``StorageError`` otherwise."""
    draft = target.with_name(f".{target.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StorageError(
            f"Can't write the artefact to {str(target)!r}: {error}. Free space and start again: "
            "the run continues from its journal."
        ) from None
