"""From an opened model and opened data to splits on disk: the middle of acquisition.

Every question that the data leave open is settled here, once, and said in a note: how images and
texts are read, what normalisation holds, which samples serve what, what the labels mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from profiling_agent.acquisition.data import (
    Bundle,
    Sample,
    Source,
    UnreadableSample,
    as_label,
    as_target,
)
from profiling_agent.acquisition.factories import split_reference
from profiling_agent.acquisition.formats.classes import ClassList, read_classes
from profiling_agent.acquisition.formats.references import open_data
from profiling_agent.acquisition.hubs.found import FoundModel, local_folder
from profiling_agent.acquisition.inputs import (
    Resolved,
    Suggest,
    random_input,
    resolve_from_data,
    resolve_without_data,
)
from profiling_agent.acquisition.metrics import BUILT_IN_METRICS
from profiling_agent.acquisition.reading import (
    Reader,
    is_image,
    is_text,
    output_size,
    read_one,
    settle_length,
    with_overrides,
)
from profiling_agent.acquisition.splits import (
    LabelReader,
    Share,
    Written,
    check_labels,
    count_duplicates,
    divide,
    open_split,
    stage,
    write_split,
)
from profiling_agent.acquisition.workload import Split
from profiling_agent.errors import DataError, ModelError
from profiling_agent.machine.threads import default_threads
from profiling_agent.records.workload import (
    ImageMode,
    ImageTransform,
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
MAX_SHARED = 0.01
"""Share of the test samples, given by themselves, that may also be search samples."""
NUM_LOOKED_AT = 8
TRANSFORM_KEYS = ("mode", "resize", "crop", "interpolation")


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
        self.wants_classes = source.metric in BUILT_IN_METRICS

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
        reader = self._reader(bundle)
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
            _check_stream(part, max_unreadable)
        division = divide(parts, self.seed, max_samples)
        shares = division.shares
        firsts = [
            _first_samples(share, reader, self._label_reader(share.source)) for share in shares
        ]
        _check_alike(shares, firsts)
        self._check_flags(firsts[0][0], reader)
        stated = self._stated(bundle)
        resolved, names = resolve_from_data(
            self.model.module, firsts[0], stated, wants_classes=self.wants_classes
        )
        ordered = [spec.name for spec in resolved.inputs]
        written: list[Written] = []
        splits: dict[SplitName, Split] = {}
        for share in shares:
            label_of = self._label_reader(share.source)
            done = write_split(share, self.folder / share.split, names, reader, label_of)
            _check_unreadable(share, done, max_unreadable)
            written.append(done)
            splits[share.split] = open_split(done.info, self.folder / share.split, ordered)
        resolved = self._with_transform(resolved, reader)
        task = self._task(resolved, bundle, splits)
        self.notes += [*resolved.notes, *division.notes, *_unique_notes(parts), *reader.notes]
        self.notes += _notes_on_splits(shares, splits, written)
        record = self._record(resolved, splits, task, _reading(shares, written))
        return record.model_copy(update={"available": division.available}), splits

    def _check_flags(self, first: Mapping[str, np.ndarray], reader: Reader) -> None:
        """``DataError`` when the user asked for what can't be done to these data."""
        asked = [key for key in TRANSFORM_KEYS if getattr(self.source.overrides, key) is not None]
        if not asked or reader.applied:
            return
        array = next(iter(first.values()))
        size = output_size(reader.image)
        if array.dtype == np.uint8 and array.ndim >= 2 and array.shape[:2] == size:
            return  # they have what was asked for
        flags = " and ".join(f"--{key}" for key in asked)
        raise DataError(
            f"{flags} can't be applied: it acts on image files and on bytes (height, width, "
            f"channels), and these samples are {array.dtype} {array.shape}. Leave it away, or do "
            "it where the data are made."
        )

    def without_data(self) -> tuple[WorkloadRecord, dict[SplitName, Split]]:
        model = self.model.module
        likely = self._likely_shape()
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
        known, has_classes = self._classes(), self.wants_classes
        bundle = open_data(data, self.staging / "data", known, has_classes=has_classes)
        if test_data is None:
            return bundle
        test = open_data(test_data, self.staging / "test", known, has_classes=has_classes)
        return _with_test(bundle, test)

    def _classes(self) -> ClassList | None:
        """The classes that names in the data are looked up in: the user's file, or the model's."""
        if self.source.metric == "agreement":
            return None  # labels are not looked at
        if self.source.classes is not None:
            return read_classes(Path(self.source.classes))
        if not self.model.class_names and not self.model.class_ids:
            return None
        return ClassList(
            names=self.model.class_names,
            ids=self.model.class_ids,
            num_classes=len(self.model.class_names) or len(self.model.class_ids),
        )

    def _reader(self, bundle: Bundle) -> Reader:
        first, model = _first_input(bundle), self.model
        length = 0
        if model.tokenizer is not None and (first is None or _has_text(bundle)):
            sources = list(bundle.parts.values())
            length, words = settle_length(model.tokenizer, sources, self.source.max_length)
            self.notes.append(words)
        overrides = self.source.overrides
        changes = {key: getattr(overrides, key) for key in TRANSFORM_KEYS}
        transform = None if bundle.preprocessing else model.image
        sized = overrides.resize is not None or overrides.crop is not None
        if transform is None and first is not None and is_image(first) and not sized:
            transform = self._own_transform(bundle)
        if any(value is not None for value in changes.values()):
            base = transform or ImageTransform(mode=_mode_for(model.module, bundle), source="")
            transform = with_overrides(base, changes)
        return Reader(
            image=transform,
            transforms_arrays=transform is not None,
            tokenizer=model.tokenizer,
            length=length,
        )

    def _own_transform(self, bundle: Bundle) -> ImageTransform | None:
        """For a model that states nothing: images as they are if they have one size that its
        forward takes, else at the size that is found by its configuration or by probing."""
        plain = ImageTransform(mode=_mode_for(self.model.module, bundle), source="as they are")
        inputs = list(itertools.islice(_inputs_of(bundle, Reader(image=plain)), NUM_LOOKED_AT))
        if len({next(iter(each.values())).shape for each in inputs}) == 1:
            with contextlib.suppress(ModelError):
                stated = self._stated(bundle)
                resolve_from_data(
                    self.model.module, inputs, stated, wants_classes=self.wants_classes
                )
                return plain
        return self._probed_transform(plain.mode)

    def _probed_transform(self, mode: ImageMode) -> ImageTransform | None:
        resolved = resolve_without_data(
            self.model.module, wants_classes=self.wants_classes, suggest=self.suggest
        )
        shape = resolved.inputs[0].shape
        if len(shape) != 3:
            return None
        size = (shape[1], shape[2])
        how = f"the model's input size, found by {resolved.inputs[0].found_by}"
        self.notes.append(
            f"images are resized and cropped to {size[0]}x{size[1]} ({how}); state --resize and "
            "--crop to have another"
        )
        return ImageTransform(mode=mode, resize=min(size), crop=size, source=how)

    def _likely_shape(self) -> tuple[int, ...] | None:
        size = output_size(self.model.image)
        if self.model.image is None or size is None:
            return None
        return (1 if self.model.image.mode == "L" else 3, *size)

    def _stated(self, bundle: Bundle) -> dict[str, Any]:
        """The normalisation that holds: the user's, else the data's, else the model's."""
        overrides = self.source.overrides
        asked = {
            key: value
            for key in ("mean", "std", "scale")
            if (value := getattr(overrides, key)) is not None
        }
        stated = dict(bundle.preprocessing or self.model.normalisation)
        if not asked:
            return stated
        return {**stated, **asked, "source": "asked for by the user"}

    def _with_transform(self, resolved: Resolved, reader: Reader) -> Resolved:
        """The record of the transform that images really went through."""
        if not reader.applied or resolved.preprocessing.layout == "none":
            return resolved
        preprocessing = resolved.preprocessing.model_copy(update={"image": reader.applied[0]})
        return replace(resolved, preprocessing=preprocessing)

    def _label_reader(self, source: Source) -> LabelReader:
        if self.source.metric == "agreement":
            return lambda _value: None
        if self.wants_classes:
            return lambda value: as_label(value, source.notes)
        return as_target

    def _task(
        self, resolved: Resolved, bundle: Bundle | None, splits: Mapping[SplitName, Split]
    ) -> Task:
        metric, shape = self.source.metric, resolved.output_shape
        gives_classes = self.wants_classes or bool(self.model.class_names)
        num_classes = shape[0] if gives_classes and len(shape) == 1 else None
        if metric == "accuracy" and bundle is not None:
            assert num_classes is not None
            for name, split in splits.items():
                if split.labels is not None or (name != "calibration" and len(splits) > 1):
                    check_labels(split, num_classes)
        answers = self._answers(splits) if self.source.answers == "present" else ()
        given = self._names_in(bundle) or self.model.class_names
        names, notes = _class_names(given, self.model.class_names, num_classes)
        self.notes += notes
        if answers:
            self.notes.append(
                f"a prediction may be one of the {len(answers)} classes present among {num_classes}"
            )
        is_ours = metric in BUILT_IN_METRICS
        return Task(
            metric=self.source.metric_name,
            unit=self.source.unit,
            higher_is_better=is_ours or self.source.higher_is_better,
            num_classes=num_classes,
            output_shape=shape,
            class_names=names,
            answers=answers,
        )

    def _names_in(self, bundle: Bundle | None) -> tuple[str, ...]:
        """Class names of the user's file, else of the data."""
        if self.source.classes is not None:
            return read_classes(Path(self.source.classes)).names
        if bundle is None or self.source.metric == "agreement":
            return ()
        return bundle.class_names

    def _answers(self, splits: Mapping[SplitName, Split]) -> tuple[int, ...]:
        labels = [np.asarray(split.labels) for split in splits.values() if split.labels is not None]
        if self.source.metric != "accuracy" or not labels:
            raise DataError(
                "Answers can't be limited to the classes present: there are no class labels. Leave "
                "--answers away."
            )
        return tuple(int(label) for label in np.unique(np.concatenate(labels)))

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


def _first_input(bundle: Bundle) -> Any:
    """The first raw input of the data, to see of what kind they are; None for a stream."""
    for sample in _samples_of(bundle):
        return next(iter(sample.inputs.values()))
    return None


def _has_text(bundle: Bundle) -> bool:
    first = next(_samples_of(bundle), None)
    return first is not None and any(is_text(value) for value in first.inputs.values())


def _samples_of(bundle: Bundle) -> Iterator[Sample]:
    """Samples of every part whose length is known, those that can't be read left out."""
    for part in bundle.parts.values():
        for index in range(part.length or 0):
            with contextlib.suppress(UnreadableSample):
                yield part.get(index)


def _inputs_of(bundle: Bundle, reader: Reader) -> Iterator[dict[str, np.ndarray]]:
    for sample in _samples_of(bundle):
        with contextlib.suppress(UnreadableSample):
            yield reader.read(sample).inputs


def _mode_for(model: nn.Module, bundle: Bundle) -> ImageMode:
    """Grey or colour as the model's first convolution takes it, else as the first image is."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels in (1, 3):
        return "L" if first.in_channels == 1 else "RGB"
    image = _first_input(bundle)
    return "L" if getattr(image, "mode", "RGB") in ("1", "L", "LA") else "RGB"


def _check_unreadable(share: Share, written: Written, limit: float) -> None:
    count, total = len(written.unreadable), len(share.indices)
    if count > limit * total:
        raise DataError(
            f"{count} of {total} {share.split} samples can't be read (the first: "
            f"{written.unreadable[0]}) Repair or remove them."
        )


def _check_stream(part: Source, limit: float) -> None:
    total = (part.length or 0) + part.num_unreadable
    if part.num_unreadable > limit * total:
        raise DataError(
            f"{part.num_unreadable} of {total} samples of a stream can't be read "
            f"({part.notes[-1]}); repair or remove them."
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


def _notes_on_splits(
    shares: Sequence[Share], splits: Mapping[SplitName, Split], written: Sequence[Written]
) -> Iterator[str]:
    """Also refuses a test set that was given and is in truth the search samples."""
    lost = [reason for each in written for reason in each.unreadable]
    if lost:
        yield f"{len(lost)} samples can't be read and are left out (the first: {lost[0]})"
    if "search" not in splits or "test" not in splits:
        return
    duplicates = count_duplicates(splits["search"], splits["test"])
    total = splits["test"].info.num_samples
    sources = {share.split: share.source for share in shares}
    if duplicates > MAX_SHARED * total and sources["search"] is not sources["test"]:
        raise DataError(
            f"{duplicates} of {total} test samples are search samples too; what was looked at in "
            "the search proves nothing. Give other test data."
        )
    if duplicates:
        yield f"{duplicates} test samples are exact duplicates of search samples"


def _check_alike(
    shares: Sequence[Share], firsts: Sequence[Sequence[Mapping[str, np.ndarray]]]
) -> None:
    """One preprocessing and one input shape hold for all splits, so their samples must be alike."""
    first = firsts[0][0]
    for share, samples in zip(shares, firsts, strict=True):
        for name, array in samples[0].items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise DataError(
                    f"The first {share.split} sample has NaN values; remove or repair it."
                )
            known = first.get(name)
            if known is None or (known.shape, known.dtype) != (array.shape, array.dtype):
                was = "no such input" if known is None else f"{known.dtype} {known.shape}"
                raise DataError(
                    f"The {share.split} samples have {name or 'inputs'} as {array.dtype} "
                    f"{array.shape}, the {shares[0].split} samples {was}; prepare both alike."
                )


def _first_samples(
    share: Share, reader: Reader, label_of: LabelReader
) -> list[Mapping[str, np.ndarray]]:
    """Inputs of up to two samples of a share that can be read, their labels looked at."""
    samples: list[Mapping[str, np.ndarray]] = []
    reason = "there are none"
    for index in share.indices:
        try:
            sample = read_one(share.source, int(index), reader)
        except UnreadableSample as error:
            reason = str(error)
            continue
        label_of(sample.label)
        samples.append(sample.inputs)
        if len(samples) == 2:
            break
    if not samples:
        raise DataError(
            f"None of the {len(share.indices)} {share.split} samples can be read: {reason}"
        )
    return samples


def _class_names(
    names: tuple[str, ...], of_model: tuple[str, ...], num_classes: int | None
) -> tuple[tuple[str, ...], list[str]]:
    """The data's names when there is one for every class, else the model's own."""
    if not names or num_classes is None or len(names) == num_classes:
        return names if num_classes is not None else (), []
    if len(of_model) == num_classes:
        return of_model, []
    return (), [f"{len(names)} class names for {num_classes} classes: left out"]


def hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
