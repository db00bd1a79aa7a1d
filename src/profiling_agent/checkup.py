"""The story of ``check``: look at a model and its data for a minute before hours are spent on them.

A part of the data is read, sixteen samples are shown with what the model says of them, and whatever
looks wrong is tried against its alternatives. The test split is not looked at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from profiling_agent.acquisition.preprocess import preprocess
from profiling_agent.acquisition.request import Request
from profiling_agent.acquisition.splits import thinned
from profiling_agent.acquisition.weights import TRAINING_NOTE
from profiling_agent.acquisition.workload import Split, Workload, compute_logits
from profiling_agent.deployment.runtimes import INSTALL_LINES, RUNTIMES
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
    percent,
)
from profiling_agent.machine.clock import now, without_collector
from profiling_agent.machine.seeds import derive_seed, generator
from profiling_agent.machine.torch_state import threads
from profiling_agent.questions import Ask, ask_preprocessing, suggester
from profiling_agent.records.check import (
    CheckedSample,
    CheckRecord,
    Defaults,
    EagerLatency,
    Finding,
    PreprocessingTrial,
)
from profiling_agent.records.common import DEFAULT_DROP, Budget, Deployment, Interval, NotMeasured
from profiling_agent.records.store import write_text
from profiling_agent.records.workload import Preprocessing, SplitName, WorkloadRecord
from profiling_agent.report.check_view import draw_samples
from profiling_agent.run_state import package_version

MAX_SAMPLES: Final = 1_000
MAX_SAMPLES_OF_A_RUN: Final = 20_000
NUM_SHOWN: Final = 16
BATCH: Final = 16
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
        return _save(record, checkup.pictures(), out)


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
        self.split_name: SplitName = _split_to_look_at(workload)
        self.split: Split = workload.splits[self.split_name]
        # A split may be sorted by class, so that its beginning says nothing.
        self.rows = generator(seed, "check rows").permutation(self.split.info.num_samples)
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
        outputs = self._outputs_in_time(0.3 * self.left)
        self._judge(outputs)
        self._look_at_data()

    # ---- the model

    def _look_at_model(self) -> None:
        notes = self.workload.record.notes
        if TRAINING_NOTE in notes and acts_otherwise_in_training(self.workload.model):
            self.findings.append(find_training(TRAINING_NOTE))
        rows = self.rows[:NUM_TWICE]
        first, again = self._forward(rows), self._forward(rows)
        random = find_random(first, again)
        self._add(random)
        if random is None:
            alone = np.concatenate([self._forward(rows[i : i + 1]) for i in range(len(rows))])
            self._add(find_mixed(alone, first))

    def _forward(
        self, rows: np.ndarray, preprocessing: Preprocessing | None = None, reverses: bool = False
    ) -> np.ndarray:
        """Outputs (rows, ...) of samples, perhaps preprocessed otherwise."""
        raw = {name: np.asarray(array[rows]) for name, array in self.split.inputs.items()}
        specs = self.workload.record.inputs
        stated = preprocessing or self.preprocessing
        if reverses:
            name = specs[0].name
            raw[name] = np.flip(raw[name], axis=1 if stated.layout == "chw" else -1)
        arrays = preprocess(raw, specs, stated)
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return compute_logits(self.workload.model, tensors).float().numpy()

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), BATCH):
            yield rows[start : start + BATCH]

    def _outputs_in_time(self, seconds: float) -> np.ndarray:
        """Outputs of as many rows as the time allows; sets ``rows`` to these."""
        start, outputs, count = now(), [], 0
        for batch in self._batches(self.rows):
            outputs.append(self._forward(batch))
            count += len(batch)
            if now() - start > seconds and count >= NUM_SHOWN:
                break
        self.rows = self.rows[:count]
        self.sample_s = (now() - start) / count
        return np.concatenate(outputs)

    # ---- what it answers

    def _judge(self, outputs: np.ndarray) -> None:
        """The metric, the samples to show, and the label findings."""
        self._add(find_not_finite(outputs))
        finite = np.isfinite(outputs).reshape(len(outputs), -1).all(axis=1)
        labels = None if self.split.labels is None else np.asarray(self.split.labels)[self.rows]
        self.samples = self._shown(outputs, labels)
        if not finite.any():
            self._skip("metric", "no output is finite")
            return
        self.rows, outputs = self.rows[finite], outputs[finite]
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
        sample = np.asarray(self.split.inputs[self.workload.record.inputs[0].name][self.rows[:64]])
        others = alternatives(self.preprocessing, sample)
        if not others:
            self._skip("preprocessing", "the inputs are not images given as bytes")
            return None
        most = min(MAX_TRIED, len(right) // 2)
        if most < MIN_JUDGES:
            self._skip("preprocessing", f"{len(right)} samples can't tell alternatives apart")
            return None
        others = self._with_asked(others, sample)
        tried = self._tried(others, labels, most)
        if not tried:
            self._skip("preprocessing", f"too little time for {len(others)} alternatives")
            return None
        count = max(len(each) for each in tried.values())
        self._note_trials(right[:count], tried)
        last = [other for other in others if len(tried[other]) == count]
        best = max(last, key=lambda other: tried[other].mean())
        if tried[best].mean() <= right[:count].mean():
            return None
        end = count + max(MIN_JUDGES, int(self.left / self.sample_s))
        rest = slice(count, min(end, len(right)))
        judged = self._right(best, self.rows[rest], labels[rest])
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

    def _tried(
        self, others: Sequence[Alternative], labels: np.ndarray, most: int
    ) -> dict[Alternative, np.ndarray]:
        """Whether each is right on the first rows, ``most`` of them where time allows.

        Otherwise few at first, and whenever their number doubles, only the better half goes on.
        """
        seconds, start = 0.6 * self.left, now()
        is_cheap = len(others) * most * self.sample_s < seconds
        tried = {other: np.zeros(0, dtype=bool) for other in others}
        left, size = list(others), most if is_cheap else min(BATCH, most)
        while True:
            done = len(tried[left[0]])
            if now() - start + len(left) * (size - done) * self.sample_s > seconds:
                break
            for other in left:
                more = self._right(other, self.rows[done:size], labels[done:size])
                tried[other] = np.concatenate([tried[other], more])
            if size == most or len(left) == 1:
                break
            left = sorted(left, key=lambda other: -tried[other].mean())[: (len(left) + 1) // 2]
            size = min(2 * size, most)
        return tried if len(tried[left[0]]) else {}

    def _note_trials(self, right: np.ndarray, tried: Mapping[Alternative, np.ndarray]) -> None:
        stated = PreprocessingTrial(
            name="as stated", value=percent(right), num_samples=len(right), is_stated=True
        )
        self.trials = [stated]
        for other, each in tried.items():
            self.trials.append(
                PreprocessingTrial(name=other.name, value=percent(each), num_samples=len(each))
            )

    def _right(self, other: Alternative, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        outputs = np.concatenate(
            [
                self._forward(batch, other.preprocessing, other.reverses)
                for batch in self._batches(rows)
            ]
        )
        return classes(np.nan_to_num(outputs), self.task) == labels

    def _shown(self, outputs: np.ndarray, labels: np.ndarray | None) -> tuple[CheckedSample, ...]:
        has_classes = self.task.num_classes is not None and outputs.ndim == 2
        has_labels = labels is not None and labels.ndim == 1 and self.task.metric == "accuracy"
        answers = classes(np.nan_to_num(outputs), self.task) if has_classes else None
        samples: list[CheckedSample] = []
        for i, row in enumerate(self.rows[:NUM_SHOWN]):
            answer = None if answers is None else int(answers[i])
            true = int(labels[i]) if has_labels and labels is not None else None
            samples.append(
                CheckedSample(
                    split=self.split_name,
                    row=int(row),
                    true=self._name(true),
                    predicted=self._name(answer),
                    is_right=None if answer is None or true is None else answer == true,
                    confidence=None if answer is None else confidence(outputs[i], answer),
                )
            )
        return tuple(samples)

    def _name(self, index: int | None) -> str | None:
        if index is None:
            return None
        return self.task.class_names[index] if self.task.class_names else str(index)

    # ---- the data

    def _look_at_data(self) -> None:
        record = self.workload.record
        num_read = sum(split.num_samples for split in record.splits)
        if FLOATS_NOTE in record.notes:
            values = np.asarray(self.split.inputs[record.inputs[0].name][self.rows[:64]])
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

    def pictures(self) -> list[np.ndarray]:
        """The samples shown as bytes (h, w) or (h, w, 3); empty when they are no images."""
        array = self.split.inputs[self.workload.record.inputs[0].name]
        drawn = [as_picture(np.asarray(array[s.row]), self.preprocessing) for s in self.samples]
        return [each for each in drawn if each is not None]

    def record(self, start: float) -> CheckRecord:
        is_points = self.task.unit == "points"
        order = {"problem": 0, "hint": 1}
        return CheckRecord(
            package_version=package_version(),
            workload=self.workload.record,
            deployment=self.deployment,
            seed=self.seed,
            split=self.split_name,
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


def _split_to_look_at(workload: Workload) -> SplitName:
    """Search, where there is one: test is opened once, at the end of a run."""
    names: tuple[SplitName, ...] = ("search", "calibration", "test")
    return next(name for name in names if name in workload.splits)


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


def confidence(logits: np.ndarray, answer: int) -> float | None:
    """Softmax of the answer, from logits (classes,); None when they are not finite."""
    if not np.isfinite(logits).all():
        return None
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return float(shifted[answer] / shifted.sum())


def as_picture(raw: np.ndarray, preprocessing: Preprocessing) -> np.ndarray | None:
    """One raw sample as bytes (h, w) or (h, w, 3) in RGB; None when it is no image.

    Floats prepared by the user are stretched from their least to their largest value.
    """
    layout = preprocessing.layout
    if layout == "none":
        if raw.ndim != 3 or raw.shape[0] not in (1, 3) or raw.dtype.kind != "f":
            return None
        layout = "chw"
    image = np.moveaxis(raw, 0, -1) if layout == "chw" else raw
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = (255 * (image - low) / max(high - low, 1e-12)).astype(np.uint8)
    if image.ndim == 3:
        image = image[..., 0] if image.shape[-1] in (1, 2) else image[..., :3]
    if image.ndim == 3 and preprocessing.image is not None and preprocessing.image.mode == "BGR":
        image = image[..., ::-1]
    return np.ascontiguousarray(image)


def whole_splits(record: WorkloadRecord) -> dict[SplitName, int]:
    """Samples that ``optimize`` will have in each split, damaged ones aside."""
    return thinned(record.available, MAX_SAMPLES_OF_A_RUN)


def describe_defaults(record: WorkloadRecord, deployment: Deployment) -> Defaults:
    """What ``optimize`` would use without flags; the deployment is the one asked for."""
    budget = Budget(max_drop=DEFAULT_DROP, unit=record.task.unit)
    has_default = record.task.unit == "points"
    versions = {name: runtime.version() for name, runtime in RUNTIMES.items()}
    return Defaults(
        max_drop=budget.max_drop if has_default else None,
        unit=budget.unit,
        time_budget_s=budget.time_s,
        max_trials=budget.max_trials,
        deployment=deployment,
        runtimes=tuple(f"{name} {version}" for name, version in versions.items() if version),
        missing_runtimes=tuple(
            f"{name}: {INSTALL_LINES[name]}" for name, version in versions.items() if not version
        ),
        splits=whole_splits(record),
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
