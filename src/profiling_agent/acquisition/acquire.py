"""Acquisition: from what the user names to a workload that every later step can trust.

The model is built and proven by a forward pass, labels are checked against its classes, and the
splits are written once, hashed, and found again by every fresh process.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import Field
from torch import nn

from profiling_agent.acquisition.data import Bundle, Sample, Source, open_data
from profiling_agent.acquisition.demo import (
    DEMO_DATA,
    DEMO_REFERENCE,
    build_demo,
    demo_weights,
    is_demo,
)
from profiling_agent.acquisition.factories import build_model, copy_live, split_reference
from profiling_agent.acquisition.inputs import (
    Resolved,
    random_input,
    resolve_from_data,
    resolve_without_data,
)
from profiling_agent.acquisition.splits import (
    Share,
    check_labels,
    count_duplicates,
    divide,
    open_split,
    stage,
    write_split,
)
from profiling_agent.acquisition.weights import load_weights, settle
from profiling_agent.acquisition.workload import Split, Workload
from profiling_agent.errors import DataError, ModelError, PlanError, StorageError
from profiling_agent.records.base import Record
from profiling_agent.records.store import write_text
from profiling_agent.records.workload import (
    SplitInfo,
    SplitName,
    Task,
    WorkloadRecord,
    WorkloadSource,
)

RECORD_FILE = "workload.json"
SETTINGS_FILE = "acquired.json"
NUM_RANDOM = 8
RANDOM_NOTE = "inputs are random: costs only"


class Acquired(Record):
    """What a folder of splits was made from; equal settings mean nothing is to be done again."""

    schema_version: Literal[1] = 1
    source: WorkloadSource
    seed: int
    max_samples: int
    stamps: dict[str, tuple[int, int]] = Field(description="files to size and time of change (ns)")
    record: str = Field(description="digest of the record written with it")


def acquire(
    model: str | nn.Module,
    data: object | None,
    *,
    weights: str | None = None,
    test_data: object | None = None,
    folder: Path,
    seed: int = 0,
    max_samples: int = 20_000,
) -> Workload:
    """Build the model, understand the data, write the splits to ``folder``, return all of it.

    ``model`` is ``demo:vit``, ``demo:resnet``, ``path/file.py:factory`` or a live module (which is
    copied). ``data`` is an ``.npz`` file, ``path/file.py:factory`` or live data; None means the
    demo's own data for a demo, and otherwise random inputs, good for costs only. A folder made
    from the same references, files and seed is used again. Raises ``ModelError``, ``DataError``,
    ``StorageError``.
    """
    source = describe_source(model, data, weights, test_data)
    module, notes = _build(model, source)
    wanted = Acquired(
        source=source, seed=seed, max_samples=max_samples, stamps=_stamps(source), record=""
    )
    is_live = (data is not None and source.data is None) or (
        test_data is not None and source.test_data is None
    )
    found = None if is_live else _find(folder, wanted, module)
    if found is not None:
        return found
    if source.data == DEMO_REFERENCE:
        data = DEMO_DATA
    with _writing(folder) as staging, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for loaders that shuffle
        if data is None:
            if test_data is not None:
                raise DataError("Test data were given without data; pass both.")
            record, splits = _without_data(module, source, folder, seed, notes)
        else:
            bundle = _open(data, test_data, staging)
            record, splits = _with_data(
                module, source, bundle, folder, seed, max_samples, staging, notes
            )
        write_text(
            folder / SETTINGS_FILE, wanted.model_copy(update={"record": record.digest()}).to_json()
        )
        write_text(folder / RECORD_FILE, record.to_json())
    return Workload(model=module, record=record, splits=splits)


def reopen(folder: Path, model: nn.Module | None = None) -> Workload:
    """The workload that ``acquire`` left in ``folder``; the model is rebuilt unless given.

    Raises ``DataError`` when the folder holds none or its files don't match, ``ModelError`` when
    the model was a live object and is not given.
    """
    try:
        record = WorkloadRecord.read(folder / RECORD_FILE)
    except PlanError as error:
        raise DataError(f"{str(folder)!r} holds no workload: {error}") from None
    if model is None:
        model = load_model(record.source)
    else:
        settle(model)
    names = [spec.name for spec in record.inputs]
    splits: dict[SplitName, Split] = {
        info.name: open_split(info, folder / info.name, names) for info in record.splits
    }
    return Workload(model=model, record=record, splits=splits)


def load_model(source: WorkloadSource) -> nn.Module:
    """The model in eval mode, float32, CPU, as any process can rebuild it; ``ModelError``."""
    if source.model is None:
        raise ModelError(
            "The model was a live object and can't be rebuilt here; pass it again, or give it as "
            "'path/file.py:factory'."
        )
    return _build(source.model, source)[0]


def _build(model: str | nn.Module, source: WorkloadSource) -> tuple[nn.Module, list[str]]:
    weights = source.weights
    if isinstance(model, nn.Module):
        module = copy_live(model)
    elif is_demo(model):
        module = build_demo(model).eval()
        weights = weights or str(demo_weights(model))
    else:
        module = build_model(model)
    notes: list[str] = []
    if weights is not None:
        module.float().cpu()
        notes.extend(load_weights(module, Path(weights)))
    return module, [*notes, *settle(module)]


def describe_source(
    model: str | nn.Module, data: object | None, weights: str | None, test_data: object | None
) -> WorkloadSource:
    """References with absolute paths, so that a process elsewhere finds the same."""
    if not isinstance(model, str | nn.Module):
        raise ModelError(
            f"A {type(model).__name__!r} is not a model; pass an nn.Module, 'demo:vit' or "
            "'path/file.py:factory'."
        )
    reference = _absolute(model) if isinstance(model, str) else None
    if data is None and isinstance(model, str) and is_demo(model):
        data = DEMO_REFERENCE
    described = WorkloadSource(
        model=reference,
        weights=None if weights is None else str(Path(weights).expanduser().resolve()),
        data=_absolute(data),
        test_data=_absolute(test_data),
    )
    is_same = described.data is not None and described.test_data == described.data
    if test_data is not None and (test_data is data or is_same):
        raise DataError("The test data are the data themselves; test samples must be others.")
    return described


def _absolute(reference: object) -> str | None:
    if isinstance(reference, Path):
        reference = str(reference)
    if not isinstance(reference, str):
        return None
    if reference == DEMO_REFERENCE or is_demo(reference):
        return reference
    place = split_reference(reference)
    if place is not None:
        return f"{place[0]}:{place[1]}"
    if reference.endswith(".npz"):
        return str(Path(reference).expanduser().resolve())
    return reference


def _open(data: object, test_data: object | None, staging: Path) -> Bundle:
    bundle = open_data(data, staging / "data")
    if test_data is None:
        return bundle
    test = open_data(test_data, staging / "test")
    if test.preprocessing and test.preprocessing != bundle.preprocessing and bundle.preprocessing:
        raise DataError(
            f"The data state the preprocessing {bundle.preprocessing} and the test data "
            f"{test.preprocessing}; one must hold for both."
        )
    parts = {name: part for name, part in bundle.parts.items() if name != "test"}
    notes = list(bundle.notes)
    if "test" in bundle.parts:
        notes.append("the data's own test part is left out, test data were given")
    chosen = test.parts.get("test") or test.parts.get("all") or next(iter(test.parts.values()))
    return Bundle(
        parts={**parts, "test": chosen},
        preprocessing=bundle.preprocessing or test.preprocessing,
        class_names=bundle.class_names or test.class_names,
        notes=tuple(notes),
    )


def _with_data(
    model: nn.Module,
    source: WorkloadSource,
    bundle: Bundle,
    folder: Path,
    seed: int,
    max_samples: int,
    staging: Path,
    notes: list[str],
) -> tuple[WorkloadRecord, dict[SplitName, Split]]:
    parts = {
        name: stage(part, staging / "streams" / name, max_samples, seed)
        if part.length is None
        else part
        for name, part in bundle.parts.items()
    }
    shares, decisions = divide(parts, seed, max_samples)
    _check_alike(shares)
    resolved, names = resolve_from_data(model, _first_samples(shares), bundle.preprocessing)
    ordered = [spec.name for spec in resolved.inputs]
    splits: dict[SplitName, Split] = {}
    for share in shares:
        info = write_split(share, folder / share.split, names)
        splits[share.split] = open_split(info, folder / share.split, ordered)
        if info.labelled or share.split != "calibration":
            check_labels(splits[share.split], resolved.num_classes)
    class_names, name_notes = _class_names(bundle.class_names, resolved.num_classes)
    notes = [*notes, *bundle.notes, *resolved.notes, *decisions, *_unique_notes(parts), *name_notes]
    if "search" in splits and "test" in splits:
        duplicates = count_duplicates(splits["search"], splits["test"])
        if duplicates:
            notes.append(f"{duplicates} test samples are exact duplicates of search samples")
    return _record(model, source, resolved, splits, class_names, notes), splits


def _without_data(
    model: nn.Module, source: WorkloadSource, folder: Path, seed: int, notes: list[str]
) -> tuple[WorkloadRecord, dict[SplitName, Split]]:
    resolved = resolve_without_data(model)
    spec = resolved.inputs[0]
    values = random_input(model, spec, NUM_RANDOM, seed).numpy()
    samples = Source(
        length=NUM_RANDOM,
        get=lambda index: Sample(inputs={spec.name: values[index]}, label=None),
        stream=lambda: iter(()),
    )
    share = Share(split="calibration", source=samples, indices=np.arange(NUM_RANDOM))
    info = write_split(share, folder / share.split, {spec.name: spec.name})
    splits: dict[SplitName, Split] = {
        "calibration": open_split(info, folder / share.split, [spec.name])
    }
    notes = [*notes, *resolved.notes, RANDOM_NOTE]
    return _record(model, source, resolved, splits, (), notes), splits


def _check_alike(shares: list[Share]) -> None:
    """One preprocessing and one input shape hold for all splits, so their samples must be alike."""
    first = shares[0].source.get(int(shares[0].indices[0])).inputs
    for share in shares:
        inputs = share.source.get(int(share.indices[0])).inputs
        for name, array in inputs.items():
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


def _first_samples(shares: list[Share]) -> list[Mapping[str, np.ndarray]]:
    share = shares[0]
    return [share.source.get(int(index)).inputs for index in share.indices[:2]]


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _record(
    model: nn.Module,
    source: WorkloadSource,
    resolved: Resolved,
    splits: Mapping[SplitName, Split],
    class_names: tuple[str, ...],
    notes: list[str],
) -> WorkloadRecord:
    infos: list[SplitInfo] = [split.info for split in splits.values()]
    stored = [*model.parameters(), *model.buffers()]
    return WorkloadRecord(
        name=_name(model, source),
        source=source,
        num_parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(t.numel() * t.element_size() for t in stored),
        model_sha256=_hash_weights(model),
        inputs=resolved.inputs,
        preprocessing=resolved.preprocessing,
        task=Task(num_classes=resolved.num_classes, class_names=class_names),
        splits=tuple(infos),
        notes=tuple(notes),
    )


def _name(model: nn.Module, source: WorkloadSource) -> str:
    if source.model is None:
        return type(model).__name__
    place = split_reference(source.model)
    return source.model if place is None else f"{place[0].name}:{place[1]}"


def _class_names(names: tuple[str, ...], num_classes: int) -> tuple[tuple[str, ...], list[str]]:
    if not names or len(names) == num_classes:
        return names, []
    return (), [f"{len(names)} class names for {num_classes} classes: left out"]


def _unique_notes(parts: Mapping[str, Source]) -> list[str]:
    return list(dict.fromkeys(note for part in parts.values() for note in part.notes))


def _stamps(source: WorkloadSource) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file named, so that an edited one is read again."""
    stamps: dict[str, tuple[int, int]] = {}
    for reference in (source.model, source.weights, source.data, source.test_data):
        if reference is None:
            continue
        place = split_reference(reference)
        path = DEMO_DATA if reference == DEMO_REFERENCE else place[0] if place else Path(reference)
        if path.is_file():
            status = path.stat()
            stamps[reference] = (status.st_size, status.st_mtime_ns)
    return stamps


def _find(folder: Path, wanted: Acquired, model: nn.Module) -> Workload | None:
    """The workload already in ``folder`` when it is the wanted one and whole, else None."""
    try:
        found = Acquired.read(folder / SETTINGS_FILE)
        workload = reopen(folder, model)
    except (PlanError, DataError):
        return None
    same = found.model_copy(update={"record": ""}) == wanted
    same = same and found.record == workload.record.digest()
    same = same and workload.record.num_parameters == sum(p.numel() for p in model.parameters())
    return workload if same else None


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """A staging folder inside ``folder``, gone at the end; ``StorageError`` when it can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD_FILE).unlink(missing_ok=True)  # not valid again until all is written
        _clear(folder)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    except OSError as error:
        raise _storage_error(folder, error) from None
    try:
        yield staging
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise _storage_error(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Take the old arrays away: overwriting would pull them from under a workload in use."""
    for split in get_args(SplitName):
        for path in (folder / split).glob("*.npy"):
            path.unlink()


def _storage_error(folder: Path, error: Any) -> StorageError:
    return StorageError(
        f"Can't write the data to {str(folder)!r}: {error.strerror or error}. "
        "Free space or pass another folder."
    )
