"""What labels and outputs mean: the task that the metric, the model and the data make together.

Names in the data are looked up in the user's classes or the model's, labels are read as the metric
takes them, and outputs are classes, of which some or all may be answered, or something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from profiling_agent.acquisition.data import Bundle, Source, as_label, as_target
from profiling_agent.acquisition.formats.classes import ClassList, read_classes
from profiling_agent.acquisition.hubs.found import FoundModel
from profiling_agent.acquisition.metrics import BUILT_IN_METRICS, wants_classes
from profiling_agent.acquisition.splits import LabelReader, check_labels
from profiling_agent.acquisition.workload import Split
from profiling_agent.errors import DataError
from profiling_agent.records.workload import SplitName, Task, WorkloadSource


def classes_of(model: FoundModel, source: WorkloadSource) -> ClassList | None:
    """The classes that names in the data are looked up in: the user's file, or the model's."""
    if source.metric == "agreement":
        return None  # labels are not looked at
    if source.classes is not None:
        return read_classes(Path(source.classes))
    if not model.class_names and not model.class_ids:
        return None
    return ClassList(
        names=model.class_names,
        ids=model.class_ids,
        num_classes=len(model.class_names) or len(model.class_ids),
    )


def label_reader(metric: str, part: Source) -> LabelReader:
    """From a label as the data have it to what the metric takes; notes go to the part."""
    if metric == "agreement":
        return lambda _value: None
    if wants_classes(metric):
        return lambda value: as_label(value, part.notes)
    return as_target


def settle_task(
    model: FoundModel,
    source: WorkloadSource,
    shape: tuple[int, ...],
    bundle: Bundle | None,
    splits: Mapping[SplitName, Split],
) -> tuple[Task, list[str]]:
    """The task of outputs of this shape (without the batch), and notes; ``bundle`` None without
    data. ``DataError`` for labels that the outputs have no class for."""
    metric = source.metric
    gives_classes = wants_classes(metric) or bool(model.class_names)
    num_classes = shape[0] if gives_classes and len(shape) == 1 else None
    if metric == "accuracy" and bundle is not None:
        assert num_classes is not None
        for name, split in splits.items():
            if split.labels is not None or (name != "calibration" and len(splits) > 1):
                check_labels(split, num_classes)
    answers = _answers(source, splits) if source.answers == "present" else ()
    given = _names_in(source, bundle) or model.class_names
    names, notes = _class_names(given, model.class_names, num_classes)
    if answers:
        notes.append(
            f"a prediction may be one of the {len(answers)} classes present among {num_classes}"
        )
    is_ours = metric in BUILT_IN_METRICS
    task = Task(
        metric=source.metric_name,
        unit=source.unit,
        higher_is_better=is_ours or source.higher_is_better,
        num_classes=num_classes,
        output_shape=shape,
        class_names=names,
        answers=answers,
    )
    return task, notes


def _names_in(source: WorkloadSource, bundle: Bundle | None) -> tuple[str, ...]:
    """Class names of the user's file, else of the data."""
    if source.classes is not None:
        return read_classes(Path(source.classes)).names
    if bundle is None or source.metric == "agreement":
        return ()
    return bundle.class_names


def _answers(source: WorkloadSource, splits: Mapping[SplitName, Split]) -> tuple[int, ...]:
    labels = [np.asarray(split.labels) for split in splits.values() if split.labels is not None]
    if source.metric != "accuracy" or not labels:
        raise DataError(
            "Answers can't be limited to the classes present: there are no class labels. Leave "
            "--answers away."
        )
    return tuple(int(label) for label in np.unique(np.concatenate(labels)))


def _class_names(
    names: tuple[str, ...], of_model: tuple[str, ...], num_classes: int | None
) -> tuple[tuple[str, ...], list[str]]:
    """The data's names when there is one for every class, else the model's own."""
    if not names or num_classes is None or len(names) == num_classes:
        return names if num_classes is not None else (), []
    if len(of_model) == num_classes:
        return of_model, []
    return (), [f"{len(names)} class names for {num_classes} classes: left out"]
