"""The story of ``check``: look at a model and its data for a minute before hours are spent on them.

A part of the data is read, sixteen samples are shown with what the model says of them, and whatever
looks wrong is tried against its alternatives. The test split is not looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from profiling_agent.acquisition.acquire import acquire
from profiling_agent.acquisition.inputs import FLOATS_NOTE
from profiling_agent.acquisition.metrics import load_metric
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.weights import TRAINING_NOTE
from profiling_agent.acquisition.workload import Workload, compute_logits
from profiling_agent.checked_samples import NUM_SHOWN, pictures_of, show_samples
from profiling_agent.errors import DataError, StorageError
from profiling_agent.evaluation.alternatives import Alternative, alternatives
from profiling_agent.evaluation.judge import classes, find_judge
from profiling_agent.evaluation.statistics import provable_drop
from profiling_agent.evaluation.suspicions import (
    MIN_JUDGES,
    Remedy,
    commonest_share,
    find_chance,
    find_constant,
    find_doubtful,
    find_few,
    find_floats,
    find_mixed,
    find_not_finite,
    find_order,
    find_preprocessing,
    find_random,
    find_refused,
    find_shift,
    find_slow_data,
    find_subset,
    find_training,
    find_unreadable,
)
from profiling_agent.machine.clock import now, without_collector
from profiling_agent.machine.seeds import derive_seed
from profiling_agent.machine.torch_state import threads
from profiling_agent.preprocessing_trials import is_right, records_of, try_alternatives
from profiling_agent.questions import Ask, ask_preprocessing, suggester
from profiling_agent.records.check import (
    CheckedSample,
    CheckRecord,
    EagerLatency,
    Finding,
    PreprocessingTrial,
)
from profiling_agent.records.common import DEFAULT_DROP, Deployment, Interval, NotMeasured
from profiling_agent.records.store import write_text
from profiling_agent.report.check_view import draw_samples
from profiling_agent.run_defaults import describe_defaults, whole_splits
from profiling_agent.run_state import package_version
from profiling_agent.sampled_split import SampledSplit

MAX_SAMPLES: Final = 1_000
NUM_TWICE: Final = 8
MAX_TRIED: Final = 200
LATENCY_S: Final = 2.0
RECORD_FILE: Final = "check.json"
PICTURE_FILE: Final = "samples.png"
STOCHASTIC: Final = ("DropPath", "StochasticDepth")


def check(
    request: Request,
    *,
    deployment: Deployment | None = None,
    out: Path | None = None,
    seconds: float = 45.0,
    seed: int = 0,
    ask: Ask | None = None,
) -> CheckRecord:
    """Look at sixteen samples, the baseline and everything that could be wrong with it.

    Reads at most 1,000 samples and then spends about ``seconds``. A language model that ``ask``
    reaches may think of normalisations, which are tried as the others are. The folder ``out`` gets
    ``check.json`` and, for images, ``samples.png``. Raises ``ModelError`` and ``DataError`` for
    what ``optimize`` can't take either, except unreadable samples, and ``StorageError``.
    """
    start = now()
    deployment = deployment or Deployment()
    if out is not None:
        _make_folder(out)
    if request.data is None and request.source().data is None:
        raise DataError("Checking needs samples to look at; pass --data.")
    with (
        tempfile.TemporaryDirectory(prefix="profiling-agent-") as name,
        threads(deployment.threads),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(derive_seed(seed, "check"))
        workload = acquire(
            request,
            folder=Path(name) / "data",
            seed=seed,
            max_samples=MAX_SAMPLES,
            max_unreadable=1.0,
            reads_all=False,
            suggest=suggester(ask),
        )
        checkup = _Checkup(request, workload, deployment, seed, now() + seconds, ask)
        checkup.walk()
        record = checkup.record(start)
        if out is None:
            return record
        return _save(record, pictures_of(checkup.samples, checkup.sampled), out)


class _Checkup:
    """One walk over a workload; findings gather as it goes."""

    def __init__(
        self,
        request: Request,
        workload: Workload,
        deployment: Deployment,
        seed: int,
        deadline: float,
        ask: Ask | None,
    ) -> None:
        self.ask = ask
        self.workload, self.deployment, self.seed = workload, deployment, seed
        self.deadline = deadline
        self.task, self.preprocessing = workload.record.task, workload.record.preprocessing
        self.judge = find_judge(self.task, load_metric(request.metric))
        self.sampled = SampledSplit(workload, seed)
        self.findings: list[Finding] = []
        self.not_judged: list[NotMeasured] = []
        self.trials: list[PreprocessingTrial] = []
        self.samples: tuple[CheckedSample, ...] = ()
        self.value: Interval | None = None
        self.chance: float | None = None
        self.latency: EagerLatency | None = None

    @property
    def left(self) -> float:
        return max(0.0, self.deadline - now())

    def walk(self) -> None:
        self._look_at_model()
        self.latency = _time(self.workload, self.deployment.batch_size)
        outputs = self.sampled.outputs_in_time(0.3 * self.left, at_least=NUM_SHOWN)
        self._judge(outputs)
        self._look_at_data()

    # ---- the model

    def _look_at_model(self) -> None:
        notes = self.workload.record.notes
        if TRAINING_NOTE in notes and acts_otherwise_in_training(self.workload.model):
            self.findings.append(find_training(TRAINING_NOTE))
        rows, forward = self.sampled.rows[:NUM_TWICE], self.sampled.forward
        first, again = forward(rows), forward(rows)
        random = find_random(first, again)
        self._add(random)
        if random is None:
            alone = np.concatenate([forward(rows[i : i + 1]) for i in range(len(rows))])
            self._add(find_mixed(alone, first))

    # ---- what it answers

    def _judge(self, outputs: np.ndarray) -> None:
        """The metric, the samples to show, and the label findings."""
        self._add(find_not_finite(outputs))
        finite = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
        labels = self.sampled.labels
        self.samples = show_samples(self.sampled, outputs, labels)
        if not finite.any():
            self._skip("metric", "no output is finite")
            return
        self.sampled.rows, outputs = self.sampled.rows[finite], outputs[finite]
        labels = None if labels is None else labels[finite]
        answers = self.judge.answers(outputs)
        if self.task.metric == "agreement":
            self._skip("metric", "the original agrees with itself; artefacts will be compared")
        else:
            self.value = self.judge.interval(answers, labels)
        self._look_for_refusal(answers, labels)
        if self.task.metric == "accuracy" and labels is not None:
            self._judge_classes(outputs, answers, labels)
            return
        if self.task.num_classes is not None and outputs.ndim == 2:
            self._add(find_constant(classes(outputs, self.task), None, self.task.class_names))
        for what in ("labels", "preprocessing"):
            self._skip(what, f"the metric is {self.task.metric!r}, and only accuracy tells")

    def _look_for_refusal(self, answers: np.ndarray, labels: np.ndarray | None) -> None:
        """What ``optimize`` would refuse; accuracy at chance has findings of its own."""
        doubt = self.judge.doubt(answers)
        try:
            if self.task.metric != "accuracy":
                self.judge.refuse_broken(answers, labels)
        except DataError as error:
            self.findings.append(find_refused(str(error)))
            return
        if doubt is not None:
            self.findings.append(find_doubtful(doubt))

    def _judge_classes(self, outputs: np.ndarray, answers: np.ndarray, labels: np.ndarray) -> None:
        count, names = outputs.shape[1], self.task.class_names
        right, anything = answers == labels, outputs.argmax(axis=1)
        self.chance = commonest_share(labels)
        remedy = self._try_preprocessing(right, labels)
        shift = find_shift(anything, labels, count)
        order = shift or find_order(anything, labels, count, names, derive_seed(self.seed, "order"))
        self._settle(remedy, order)
        self._add(find_constant(answers, labels, names))
        self._add(find_subset(labels, count, len(self.task.answers) or count))
        self._add(find_chance(right, labels))

    def _settle(self, images: Remedy | None, labels: Remedy | NotMeasured | None) -> None:
        """Keep the remedy that explains more; the other is judged when that one is applied."""
        if isinstance(labels, NotMeasured):
            self.not_judged.append(labels)
            labels = None
        remedies = {"preprocessing": images, "labels": labels}
        found = {what: remedy for what, remedy in remedies.items() if remedy is not None}
        best = max(found, key=lambda what: found[what].value, default="")
        for what, remedy in found.items():
            if what == best:
                self.findings.append(remedy.finding)
            else:
                self._skip(what, f"the {best} must be put right first; then check again")

    def _try_preprocessing(self, right: np.ndarray, labels: np.ndarray) -> Remedy | None:
        """Choose the best alternative on some samples, judge it on others."""
        sampled = self.sampled
        sample = sampled.first_input(sampled.rows[:64])
        others = alternatives(self.preprocessing, sample)
        if not others:
            self._skip("preprocessing", "the inputs are not images given as bytes")
            return None
        most = min(MAX_TRIED, len(right) // 2)
        if most < MIN_JUDGES:
            self._skip("preprocessing", f"{len(right)} samples can't tell alternatives apart")
            return None
        others = self._with_asked(others, sample)
        tried = try_alternatives(sampled, others, labels, most=most, seconds=0.6 * self.left)
        if not tried:
            self._skip("preprocessing", f"too little time for {len(others)} alternatives")
            return None
        count = max(len(each) for each in tried.values())
        self.trials = records_of(right[:count], tried)
        last = [other for other in others if len(tried[other]) == count]
        best = max(last, key=lambda other: tried[other].mean())
        if tried[best].mean() <= right[:count].mean():
            return None
        end = count + max(MIN_JUDGES, int(self.left / sampled.sample_s))
        rest = slice(count, min(end, len(right)))
        judged = is_right(sampled, best, sampled.rows[rest], labels[rest])
        return find_preprocessing(best.name, right[rest], judged, best.next_step)

    def _with_asked(self, known: list[Alternative], images: np.ndarray) -> list[Alternative]:
        """With those that a language model thinks of; the time of its answer is not the check's."""
        if self.ask is None:
            return known
        start = now()
        more, notes = ask_preprocessing(self.ask, self.workload.record, images, known)
        self.deadline += now() - start
        for note in notes:
            self._skip("the language model", note)
        return [*known, *more]

    # ---- the data

    def _look_at_data(self) -> None:
        record = self.workload.record
        num_read = sum(split.num_samples for split in record.splits)
        if FLOATS_NOTE in record.notes:
            values = self.sampled.first_input(self.sampled.rows[:64])
            stated = "a mean and std (or a scale)"
            self._add(find_floats(float(values.min()), float(values.max()), stated))
        if record.reading is not None:
            self._add(find_unreadable(record.reading.num_unreadable, num_read))
            assert self.latency is not None
            self._add(find_slow_data(record.reading.samples_per_s, self.latency.samples_per_s))
        if self.task.unit == "points":
            self._add(find_few(self._num_test(), DEFAULT_DROP))
        else:
            self._skip("provable drop", f"it depends on the scores of {self.task.metric!r}")

    def _num_test(self) -> int:
        return max(1, whole_splits(self.workload.record).get("test", 0))

    def record(self, start: float) -> CheckRecord:
        is_points = self.task.unit == "points"
        order = {"problem": 0, "hint": 1}
        return CheckRecord(
            package_version=package_version(),
            workload=self.workload.record,
            deployment=self.deployment,
            seed=self.seed,
            split=self.sampled.name,
            samples=self.samples,
            picture=None,
            value=self.value,
            chance=self.chance,
            latency=self.latency,
            num_test=self._num_test(),
            provable_drop=provable_drop(self._num_test()) if is_points else None,
            defaults=describe_defaults(self.workload.record, self.deployment),
            trials=tuple(self.trials),
            findings=tuple(sorted(self.findings, key=lambda finding: order[finding.level])),
            not_judged=tuple(self.not_judged),
            seconds=now() - start,
        )

    def _add(self, found: Finding | NotMeasured | None) -> None:
        if isinstance(found, Finding):
            self.findings.append(found)
        elif found is not None:
            self.not_judged.append(found)

    def _skip(self, what: str, reason: str) -> None:
        self.not_judged.append(NotMeasured(what=what, reason=reason))


# ---- helpers of the walk


def acts_otherwise_in_training(model: nn.Module) -> bool:
    """Whether some layer is known to do something else in training mode than in eval mode."""
    return any(_acts_otherwise(module) for module in model.modules())


def _acts_otherwise(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout) > 0
    return isinstance(module, _BatchNorm) or type(module).__name__ in STOCHASTIC


@torch.inference_mode()
def _time(workload: Workload, batch_size: int) -> EagerLatency:
    """Median of as many calls as fit into two seconds, three at least, after one to warm up."""
    example = workload.example(batch_size)
    compute_logits(workload.model, example)
    calls: list[float] = []
    start = now()
    with without_collector():
        while len(calls) < 3 or (now() - start < LATENCY_S and len(calls) < 50):
            before = now()
            compute_logits(workload.model, example)
            calls.append(now() - before)
    median = float(np.median(calls))
    return EagerLatency(
        median_ms=1e3 * median, num_calls=len(calls), samples_per_s=batch_size / median
    )


# ---- what is left behind


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(out, error) from None


def _save(record: CheckRecord, pictures: Sequence[np.ndarray], out: Path) -> CheckRecord:
    """Write the record and the picture; the record then names the picture."""
    if pictures and len(pictures) == len(record.samples):
        try:
            (out / PICTURE_FILE).write_bytes(draw_samples(record.samples, pictures))
        except OSError as error:
            raise _storage_error(out, error) from None
        record = record.model_copy(update={"picture": PICTURE_FILE})
    write_text(out / RECORD_FILE, record.to_json())
    return record


def _storage_error(out: Path, error: OSError) -> StorageError:
    return StorageError(
        f"Can't write to {str(out)!r}: {error.strerror or error}. Pass another folder with --out."
    )
