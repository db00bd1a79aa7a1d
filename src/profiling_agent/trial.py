"""One plan carried out and measured: compress, lower, reload, evaluate.

Building happens in a worker (``building.py``), so that a crash, a hang or an empty memory is a
FAILED trial with its reason; measuring happens in the artefact's own process
(``evaluation/probe.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from profiling_agent.acquisition.workload import Workload
from profiling_agent.building import BUILD_TIMEOUT_S, Builder
from profiling_agent.compression.divergence import mean_divergence
from profiling_agent.errors import ProfilingAgentError, StorageError, TrialError
from profiling_agent.evaluation.judge import Judge
from profiling_agent.evaluation.measure import TRIAL, Protocol, Race, race
from profiling_agent.evaluation.predictor import Predictor, ProbeProcess
from profiling_agent.evaluation.screening import SCREEN_SAMPLES, collapsed
from profiling_agent.evaluation.watch import (
    DOUBTED,
    DOUBTED_ORIGINAL,
    ORIGINAL,
    REMEMBERED,
    Slowed,
    Watch,
)
from profiling_agent.machine.clock import now
from profiling_agent.planning.history import relative_latency
from profiling_agent.records.common import Deployment, NotMeasured
from profiling_agent.records.evaluation import Accuracy, BuiltArtefact, Evaluation, Speedup
from profiling_agent.records.plan import Plan
from profiling_agent.records.trial import Trial

MIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The untouched model: how to open it, its answers to the search samples that trials are judged
    on, the split's first (samples, ...), the outputs that they were taken from, where those were
    kept, and the milliseconds of a call, as first measured."""

    open: Callable[[], Predictor]
    search: np.ndarray
    outputs: np.ndarray | None = None
    ms: float | None = None


class TrialRunner:
    """Carries plans out, one after another, against one baseline."""

    def __init__(
        self,
        *,
        builder: Builder,
        workload: Workload,
        baseline: Baseline,
        judge: Judge,
        deployment: Deployment,
        max_drop: float,
        data: Path,
        memory_limit: int | None = None,
    ) -> None:
        self.builder = builder
        self.workload = workload
        self.judge = judge
        self.baseline = baseline
        self.deployment = deployment
        self._max_drop = max_drop
        self._data = data
        self._memory_limit = memory_limit
        self._watch = Watch({ORIGINAL: baseline.ms} if baseline.ms else None)
        self.reference: Reference | None = None

    def run(
        self,
        trial_id: str,
        plan: Plan,
        author: str,
        folder: Path,
        *,
        is_control: bool = False,
        predicted_ms: float | None = None,
        predicted_kl: float | None = None,
        changed: str = "",
        protocol: Protocol = TRIAL,
        deadline: float | None = None,
    ) -> Trial:
        """A trial that is done, screened or failed; never raises for what the plan caused.

        ``deadline`` (on ``now``'s clock) ends a build that hangs and shortens the timing.
        """
        start = now()
        trial = Trial(
            trial_id=trial_id,
            plan=plan,
            author=author,
            is_control=is_control,
            status="failed",
            predicted_ms=predicted_ms,
            predicted_kl=predicted_kl,
            changed=changed,
            isolation=self.builder.isolation,
        )
        try:
            time_left = max(MIN_TIMEOUT_S, deadline - now()) if deadline else BUILD_TIMEOUT_S
            built = self.builder.build(plan, folder, self.deployment, time_left)
            trial = trial.model_copy(update={"achieved": built.achieved})
            trial = self._evaluate(trial, built, folder, protocol, deadline)
        except StorageError:
            raise  # the user's to mend; the run continues from its journal
        except MemoryError:
            trial = trial.model_copy(update={"reason": "out of memory"})
        except Exception as error:  # the one broad except: a plan's fault must not end the run
            kind = "" if isinstance(error, ProfilingAgentError) else f"{type(error).__name__}: "
            reason = (kind + " ".join(str(error).split()))[:1000]
            trial = trial.model_copy(update={"reason": reason})
        finally:
            self.builder.pause()
        return trial.model_copy(update={"seconds": now() - start})

    def open(self, folder: Path, runtime: str) -> ProbeProcess:
        return ProbeProcess.artefact(folder, runtime, self.deployment, self._memory_limit)

    def _evaluate(
        self,
        trial: Trial,
        built: BuiltArtefact,
        folder: Path,
        protocol: Protocol,
        deadline: float | None,
    ) -> Trial:
        self.builder.pause()
        with contextlib.closing(self.open(folder, built.runtime)) as predictor:
            first = self._screen_outputs(predictor)
            reason = None if trial.is_control else self._collapse(self.judge.answers(first))
            if reason is not None:
                return trial.model_copy(update={"status": "screened", "reason": reason})
            accuracy = self._search_accuracy(predictor, first)
            times, slowed = self._raced(trial.trial_id, predictor, protocol, deadline)
            evaluation = evaluation_of(
                trial.trial_id,
                built,
                self.deployment,
                (accuracy,),
                times,
                predictor,
                self.reference,
            )
        return trial.model_copy(
            update={"status": "done", "evaluation": evaluation, "reason": str(slowed)}
        )

    def watch(self, trials: Sequence[Trial], folder: Callable[[str], Path]) -> None:
        """Know a busy machine by the times of the controls among these, from now on, and race plans
        beside the fastest of them too, or the one that others were."""
        controls = [trial for trial in trials if trial.is_control and median_ms(trial) is not None]
        self._watch.add({c.trial_id: ms for c in controls if (ms := median_ms(c)) is not None})
        self.close()
        before = {reference_of(trial) for trial in trials}
        for control in sorted(controls, key=lambda c: (c.trial_id not in before, median_ms(c))):
            relative, place = relative_latency(control), folder(control.trial_id)
            if relative is not None:
                runtime = control.plan.runtime
                opens = partial(self.open, place, runtime)
                self.reference = Reference(control.trial_id, relative, opens)
                break

    @property
    def is_busy(self) -> bool:
        """Whether the last race was slowed by something else."""
        return self._watch.last.is_doubtful

    def close(self) -> None:
        """End the process of the control that plans are raced beside."""
        if self.reference is not None:
            self.reference.close()

    def beside(self, *names: str) -> dict[str, Predictor]:
        """The control that tells a busy machine, for a race of these, unless it is one of them."""
        reference = self.reference
        opened = reference.opened() if reference and reference.name not in names else None
        return {reference.name: opened} if reference and opened else {}

    def race(
        self,
        racers: Mapping[str, Predictor],
        protocol: Protocol,
        *,
        deadline: float | None = None,
        has_time: Callable[[], bool] = lambda: True,
    ) -> tuple[Race, Slowed]:
        """Of artefacts by trial id, and what else is named; again while the machine seems busy.

        ``TrialError`` when one of them fails.
        """
        return self._watch.undisturbed(
            lambda: race(racers, self._data / "calibration", protocol, deadline),
            lambda: has_time() and (deadline is None or now() < deadline),
        )

    def time_again(
        self, trial: Trial, folder: Path, protocol: Protocol, deadline: float | None
    ) -> Trial:
        """A done trial with the times of another race; as it was, where that can't be run or the
        machine was busier still."""
        if trial.evaluation is None or not folder.exists():
            return trial
        self.builder.pause()
        try:
            with contextlib.closing(self.open(folder, trial.plan.runtime)) as predictor:
                times, slowed = self._raced(trial.trial_id, predictor, protocol, deadline)
        except TrialError:
            return trial
        if slowed.beyond >= self._watch.slowed(self._watched_ms(trial)).beyond:
            return trial
        return self._retimed(trial, times, slowed)

    def _watched_ms(self, trial: Trial) -> dict[str, float | None]:
        """What the watched racers took in the trial's race."""
        took = {ORIGINAL: original_ms(trial)}
        if trial.evaluation and trial.evaluation.reference:
            took[trial.evaluation.reference] = trial.evaluation.reference_ms
        return took

    def time_together(
        self,
        trials: Sequence[Trial],
        folder: Callable[[str], Path],
        protocol: Protocol,
        has_time: Callable[[], bool] = lambda: True,
    ) -> list[Trial]:
        """Done trials with times from one race of all of them and the original, run again while the
        machine was busy and there is time.

        ``TrialError`` when that can't be run.
        """
        self.builder.pause()
        racers: dict[str, Predictor] = {ORIGINAL: self.baseline.open()}
        with contextlib.ExitStack() as stack:
            racers |= self.beside(*(trial.trial_id for trial in trials))
            for trial in trials:
                opened = self.open(folder(trial.trial_id), trial.plan.runtime)
                racers[trial.trial_id] = stack.enter_context(contextlib.closing(opened))
            times, slowed = self.race(racers, protocol, has_time=has_time)
        return [self._retimed(trial, times, slowed) for trial in trials]

    def _retimed(self, trial: Trial, times: Race, slowed: Slowed) -> Trial:
        """With the race's times, and why those may be doubted."""
        assert trial.evaluation is not None
        measured = _measured(times, trial.trial_id, self.deployment, self.reference)
        evaluation = trial.evaluation.model_copy(update=measured)
        return trial.model_copy(update={"evaluation": evaluation, "reason": str(slowed)})

    def _raced(
        self, name: str, predictor: Predictor, protocol: Protocol, deadline: float | None
    ) -> tuple[Race, Slowed]:
        """A race against the original, beside the fastest control where there is one."""
        racers, beside = {ORIGINAL: self.baseline.open(), name: predictor}, self.beside(name)
        try:
            return self.race({**beside, **racers}, protocol, deadline=deadline)
        except TrialError:
            if all(each.alive for each in beside.values()):
                raise
        return self.race(racers, protocol, deadline=deadline)  # it was not the trial's fault

    def _screen_outputs(self, predictor: Predictor) -> np.ndarray:
        """Outputs on the first search samples, whole batches, so that the rest can follow."""
        size = self.deployment.batch_size
        stop = min(-(-SCREEN_SAMPLES // size) * size, len(self.baseline.search))
        return predictor.logits(self._data / "search", 0, stop)

    def _collapse(self, ours: np.ndarray) -> str | None:
        some = first_labels(self.workload.splits["search"].labels, len(ours))
        original = self.baseline.search[: len(ours)]
        return collapsed(self.judge, ours, some, original, self._max_drop)

    def _search_accuracy(self, predictor: Predictor, first: np.ndarray) -> Accuracy:
        """Accuracy on as much of the search split as the original was judged on, of which the
        first outputs are known."""
        outputs, stop = first, len(self.baseline.search)
        if len(first) < stop:
            rest = predictor.logits(self._data / "search", len(first), stop)
            outputs = np.concatenate([first, rest])
        labels = first_labels(self.workload.splits["search"].labels, stop)
        ours = self.judge.answers(outputs)
        accuracy = self.judge.score("search", ours, labels, self.baseline.search)
        known = {"divergence": self._divergence(outputs), "noise_divergence": self._noise}
        return accuracy.model_copy(update=known)

    @cached_property
    def _noise(self) -> float | None:
        """The divergence of noise that loses the budget; None without the original's outputs, or
        where the metric isn't of classes."""
        outputs = self.baseline.outputs
        if outputs is None or outputs.ndim != 2 or not self.workload.record.task.has_classes:
            return None
        labels = first_labels(self.workload.splits["search"].labels, len(outputs))
        return self.judge.noise_divergence(outputs, labels, self._max_drop)

    def _divergence(self, outputs: np.ndarray) -> float | None:
        """From the original's outputs, where those were kept."""
        if self.baseline.outputs is None:
            return None
        has_classes = self.workload.record.task.has_classes
        return mean_divergence(self.baseline.outputs, outputs, has_classes=has_classes)


def first_labels(labels: np.ndarray | None, num_samples: int) -> np.ndarray | None:
    """The labels of a split's first samples, when it has any."""
    return None if labels is None else np.asarray(labels[:num_samples])


def evaluation_of(
    name: str,
    built: BuiltArtefact,
    deployment: Deployment,
    accuracy: tuple[Accuracy, ...],
    times: Race,
    predictor: Predictor,
    reference: Reference | None = None,
) -> Evaluation:
    """The record of one artefact from a race in which the original ran too, and maybe the
    ``reference``."""
    memory = predictor.memory_bytes()
    missing = ()
    if memory is None:
        reason = "this system does not tell the peak memory of a process"
        missing = (NotMeasured(what="memory", reason=reason),)
    return Evaluation(
        artefact=name,
        runtime=built.runtime,
        scheme=built.scheme,
        deployment=deployment,
        accuracy=accuracy,
        **_measured(times, name, deployment, reference),
        size_bytes=built.size_bytes,
        weight_bytes=built.weight_bytes,
        memory_bytes=memory,
        not_measured=missing,
    )


def _measured(
    times: Race, name: str, deployment: Deployment, reference: Reference | None
) -> dict[str, Any]:
    """The fields of an evaluation that a race tells."""
    timing = times.timing(name)
    fields: dict[str, Any] = dict.fromkeys(("reference", "reference_ms", "relative"))
    if reference is not None and reference.name in times.blocks:
        over = times.speedup(name, reference.name).estimate if name != reference.name else 1.0
        fields["reference"] = reference.name
        fields["reference_ms"] = times.timing(reference.name).median_ms
        fields["relative"] = reference.relative / over
    return {
        "timing": timing,
        "speedup": Speedup(over=ORIGINAL, ratio=times.speedup(name, ORIGINAL)),
        "throughput_per_s": 1e3 * deployment.batch_size / timing.median_ms,
        "is_relative_kept": False,
        **fields,
    }


def timed_while_busy(trials: Sequence[Trial]) -> list[Trial]:
    """Done trials in whose race the original or the reference took clearly longer than in the
    quietest one of those before and after.

    Which race was quiet is only known when several were run: the first may have been disturbed.
    """
    return [trial for index, trial in enumerate(trials) if _is_slow(trial, _about(trials, index))]


def _about(trials: Sequence[Trial], index: int) -> Sequence[Trial]:
    """As many as make a machine's state usual: it may have become slower, or faster, for good."""
    return trials[max(0, index - REMEMBERED // 2) : index + REMEMBERED // 2 + 1]


def _is_slow(trial: Trial, about: Sequence[Trial]) -> bool:
    took = original_ms(trial)
    others = (ms for each in about if (ms := original_ms(each)) is not None)
    if took is not None and took > DOUBTED_ORIGINAL * min(others):
        return True
    took = _reference_ms(trial)
    same = (
        ms
        for each in about
        if reference_of(each) == reference_of(trial) and (ms := _reference_ms(each)) is not None
    )
    return took is not None and took > DOUBTED * min(same)


class Reference:
    """The control that plans are raced beside, opened when it is first needed, and kept; and its
    latency over the baseline's."""

    def __init__(self, name: str, relative: float, opens: Callable[[], Predictor]) -> None:
        self.name, self.relative, self._opens = name, relative, opens
        self._kept: Predictor | None = None
        self._is_gone = False

    def opened(self) -> Predictor | None:
        """``None`` when it can't be opened any more: races can do without."""
        if self._is_gone or (self._kept is not None and self._kept.alive):
            return self._kept
        if self._kept is not None:
            self._kept.close()
        try:
            self._kept = self._opens()
        except (TrialError, OSError):
            self._kept, self._is_gone = None, True
        return self._kept

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
        self._kept, self._is_gone = None, True


def original_ms(trial: Trial) -> float | None:
    """Milliseconds of the original's call in the trial's race."""
    evaluation = trial.evaluation
    if evaluation is None or evaluation.timing is None or evaluation.speedup is None:
        return None
    return evaluation.timing.median_ms * evaluation.speedup.ratio.estimate


def reference_of(trial: Trial) -> str | None:
    """The id of the control that was in its race."""
    return trial.evaluation.reference if trial.evaluation else None


def _reference_ms(trial: Trial) -> float | None:
    return trial.evaluation.reference_ms if trial.evaluation else None


def median_ms(trial: Trial) -> float | None:
    """Milliseconds of a call, if that was measured."""
    timing = trial.evaluation.timing if trial.evaluation else None
    return None if timing is None else timing.median_ms
