"""From an opened model and opened data to splits on disk: the middle of acquisition.

Every question that the data leave open is settled here, once, and said in a note: how images and
texts are read, what normalisation holds, which samples serve what, what the labels mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from profiling_agent.acquisition.data import Bundle, Sample, Source
from profiling_agent.acquisition.factories import split_reference
from profiling_agent.acquisition.formats.references import open_data
from profiling_agent.acquisition.hubs.found import FoundModel, local_folder
from profiling_agent.acquisition.inputs import (
    Resolved,
    Suggest,
    random_input,
    resolve_from_data,
    resolve_without_data,
)
from profiling_agent.acquisition.metrics import wants_classes
from profiling_agent.acquisition.readers import (
    check_transform_flags,
    choose_reader,
    likely_shape,
    stated_normalisation,
    with_transform,
)
from profiling_agent.acquisition.refusals import (
    check_alike,
    check_shared,
    check_stream,
    check_unreadable,
    first_samples,
)
from profiling_agent.acquisition.splits import (
    Share,
    Written,
    divide,
    open_split,
    stage,
    write_split,
)
from profiling_agent.acquisition.tasks import classes_of, label_reader, settle_task
from profiling_agent.acquisition.weights import hash_weights
from profiling_agent.acquisition.workload import Split
from profiling_agent.errors import DataError
from profiling_agent.machine.threads import default_threads
from profiling_agent.records.workload import (
    Reading,
    SplitInfo,
    SplitName,
    Task,
    WorkloadRecord,
    WorkloadSource,
)

NUM_RANDOM = 8
RANDOM_NOTE = "inputs are random: costs only"
MAX_UNREADABLE = 0.01
"""Share of the samples that may be unreadable; they are left out, and said."""


class Assembly:
    """One walk from the model and the data to the splits on disk and their record."""

    def __init__(
        self,
        *,
        model: FoundModel,
        source: WorkloadSource,
        folder: Path,
        staging: Path,
        seed: int,
        suggest: Suggest | None = None,
    ) -> None:
        self.suggest = suggest
        self.model, self.source, self.folder = model, source, folder
        self.staging, self.seed = staging, seed
        self.notes: list[str] = list(model.notes)
        self.wants_classes = wants_classes(source.metric)

    def with_data(
        self,
        data: object,
        test_data: object | None,
        max_samples: int,
        max_unreadable: float,
        *,
        reads_all: bool = True,
    ) -> tuple[WorkloadRecord, dict[SplitName, Split]]:
        bundle = self._open(data, test_data)
        self.notes += bundle.notes
        reader, notes = choose_reader(self.model, self.source, bundle, self.suggest)
        self.notes += notes
        parts = {
            name: stage(
                part,
                self.staging / "streams" / name,
                max_samples,
                self.seed,
                reader,
                reads_all=reads_all,
            )
            if part.length is None
            else part
            for name, part in bundle.parts.items()
        }
        for part in parts.values():
            check_stream(part, max_unreadable)
        division = divide(parts, self.seed, max_samples)
        shares = division.shares
        metric = self.source.metric
        firsts = [
            first_samples(share, reader, label_reader(metric, share.source)) for share in shares
        ]
        check_alike(shares, firsts)
        check_transform_flags(self.source.overrides, firsts[0][0], reader)
        stated = stated_normalisation(self.model, self.source, bundle)
        resolved, names = resolve_from_data(
            self.model.module, firsts[0], stated, wants_classes=self.wants_classes
        )
        ordered = [spec.name for spec in resolved.inputs]
        written: list[Written] = []
        splits: dict[SplitName, Split] = {}
        for share in shares:
            label_of = label_reader(metric, share.source)
            done = write_split(share, self.folder / share.split, names, reader, label_of)
            check_unreadable(share, done, max_unreadable)
            written.append(done)
            splits[share.split] = open_split(done.info, self.folder / share.split, ordered)
        resolved = with_transform(resolved, reader)
        task = self._task(resolved, bundle, splits)
        self.notes += [*resolved.notes, *division.notes, *_unique_notes(parts), *reader.notes]
        self.notes += [*_lost_notes(written), *check_shared(shares, splits)]
        record = self._record(resolved, splits, task, _reading(shares, written))
        return record.model_copy(update={"available": division.available}), splits

    def without_data(self) -> tuple[WorkloadRecord, dict[SplitName, Split]]:
        model = self.model.module
        likely = likely_shape(self.model.image)
        resolved = resolve_without_data(
            model, likely=likely, wants_classes=self.wants_classes, suggest=self.suggest
        )
        spec = resolved.inputs[0]
        values = random_input(model, spec, NUM_RANDOM, self.seed).numpy()
        samples = Source(
            length=NUM_RANDOM,
            get=lambda index: Sample(inputs={spec.name: values[index]}, label=None),
            stream=lambda: iter(()),
        )
        share = Share(split="calibration", source=samples, indices=np.arange(NUM_RANDOM))
        info = write_split(share, self.folder / share.split, {spec.name: spec.name}).info
        splits: dict[SplitName, Split] = {
            "calibration": open_split(info, self.folder / share.split, [spec.name])
        }
        self.notes += [*resolved.notes, RANDOM_NOTE]
        task = self._task(resolved, None, splits)
        return self._record(resolved, splits, task, None), splits

    def _open(self, data: object, test_data: object | None) -> Bundle:
        known, has_classes = classes_of(self.model, self.source), self.wants_classes
        bundle = open_data(data, self.staging / "data", known, has_classes=has_classes)
        if test_data is None:
            return bundle
        test = open_data(test_data, self.staging / "test", known, has_classes=has_classes)
        return _with_test(bundle, test)

    def _task(
        self, resolved: Resolved, bundle: Bundle | None, splits: Mapping[SplitName, Split]
    ) -> Task:
        shape = resolved.output_shape
        task, notes = settle_task(self.model, self.source, shape, bundle, splits)
        self.notes += notes
        return task

    def _record(
        self,
        resolved: Resolved,
        splits: Mapping[SplitName, Split],
        task: Task,
        reading: Reading | None,
    ) -> WorkloadRecord:
        model = self.model.module
        infos: list[SplitInfo] = [split.info for split in splits.values()]
        stored = [*model.parameters(), *model.buffers()]
        raw = next(iter(splits.values())).inputs
        inputs = (
            spec.model_copy(update={"raw_dtype": str(raw[spec.name].dtype)})
            for spec in resolved.inputs
        )
        return WorkloadRecord(
            name=_name(model, self.source),
            source=self.source,
            num_parameters=sum(p.numel() for p in model.parameters()),
            weight_bytes=sum(t.numel() * t.element_size() for t in stored),
            model_sha256=hash_weights(model),
            inputs=tuple(inputs),
            preprocessing=resolved.preprocessing,
            task=task,
            splits=tuple(infos),
            reading=reading,
            notes=tuple(dict.fromkeys(self.notes)),
        )


def _with_test(bundle: Bundle, test: Bundle) -> Bundle:
    if test.preprocessing and test.preprocessing != bundle.preprocessing and bundle.preprocessing:
        raise DataError(
            f"The data state the preprocessing {bundle.preprocessing} and the test data "
            f"{test.preprocessing}; one must hold for both."
        )
    parts = {name: part for name, part in bundle.parts.items() if name != "test"}
    notes = list(bundle.notes)
    if "test" in bundle.parts:
        notes.append("the data's own test part is left out, test data were given")
    name = next(name for name in ("test", "all", "search", *test.parts) if name in test.parts)
    chosen = test.parts[name]
    if len(test.parts) > 1:
        notes.append(f"of the test data the part {name!r} is taken")
    return Bundle(
        parts={**parts, "test": chosen},
        preprocessing=bundle.preprocessing or test.preprocessing,
        class_names=bundle.class_names or test.class_names,
        notes=(*notes, *(note for note in test.notes if note not in notes)),
    )


def _reading(shares: Sequence[Share], written: Sequence[Written]) -> Reading:
    """What reading took; for a stream that is its one pass, and not the copy of what it gave."""
    streams = {id(share.source): share.source for share in shares if share.source.is_read}
    num_samples = sum(source.length or 0 for source in streams.values())
    seconds = sum(source.seconds for source in streams.values())
    unreadable = sum(source.num_unreadable for source in streams.values())
    for share, each in zip(shares, written, strict=True):
        if not share.source.is_read:
            num_samples, seconds = num_samples + each.info.num_samples, seconds + each.seconds
            unreadable += len(each.unreadable)
    is_threaded = any(share.source.is_threadsafe for share in shares)
    return Reading(
        samples_per_s=num_samples / max(1e-9, seconds),
        num_workers=default_threads() if is_threaded else 1,
        num_unreadable=unreadable,
    )


def _lost_notes(written: Sequence[Written]) -> list[str]:
    lost = [reason for each in written for reason in each.unreadable]
    if not lost:
        return []
    return [f"{len(lost)} samples can't be read and are left out (the first: {lost[0]})"]


def _name(model: nn.Module, source: WorkloadSource) -> str:
    if source.model is None:
        return type(model).__name__
    place = split_reference(source.model)
    if place is not None:
        return f"{place[0].name}:{place[1]}"
    folder = local_folder(source.model)
    return source.model if folder is None else f"hf:{folder.name}"


def _unique_notes(parts: Mapping[str, Source]) -> list[str]:
    return list(dict.fromkeys(note for part in parts.values() for note in part.notes))
