"""Acquisition: from what the user names to a workload that every later step can trust.

The model is built and proven by a forward pass, labels are checked against its classes, and the
splits are written once, hashed, and found again by every fresh process.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import nn

from profiling_agent.acquisition.assemble import MAX_UNREADABLE, Assembly
from profiling_agent.acquisition.demo import (
    DEMO_DATA,
    DEMO_REFERENCE,
    build_demo,
    demo_weights,
    is_demo,
)
from profiling_agent.acquisition.factories import build_model, copy_live, split_reference
from profiling_agent.acquisition.formats.references import CIFARS
from profiling_agent.acquisition.hubs.found import (
    RANDOM_WEIGHTS,
    FoundModel,
    find_model,
    is_hub,
)
from profiling_agent.acquisition.inputs import Suggest
from profiling_agent.acquisition.request import (
    Request,
    is_live_data,
)
from profiling_agent.acquisition.splits import (
    open_split,
)
from profiling_agent.acquisition.weights import hash_weights, load_weights, settle
from profiling_agent.acquisition.workload import Split, Workload
from profiling_agent.errors import DataError, ModelError, PlanError, StorageError
from profiling_agent.records.base import Record
from profiling_agent.records.store import write_text
from profiling_agent.records.workload import (
    SplitName,
    WorkloadRecord,
    WorkloadSource,
)

RECORD_FILE = "workload.json"
SETTINGS_FILE = "acquired.json"


class Acquired(Record):
    """What a folder of splits was made from; equal settings mean nothing is to be done again."""

    schema_version: Literal[1] = 1
    source: WorkloadSource
    seed: int
    max_samples: int
    stamps: dict[str, tuple[int, int]] = Field(description="files to size and time of change (ns)")
    record: str = Field(description="digest of the record written with it")


def acquire(
    request: Request,
    *,
    folder: Path,
    seed: int = 0,
    max_samples: int = 20_000,
    max_unreadable: float = MAX_UNREADABLE,
    reads_all: bool = True,
    suggest: Suggest | None = None,
) -> Workload:
    """Build the model, understand the data, write the splits to ``folder``, return all of it.

    Of samples that can't be read ``max_unreadable`` (a share) are left out, more are refused.
    Without ``reads_all`` a stream is only read as far as ``max_samples``. ``suggest`` may name
    further input shapes where none is known and those that are probed fail.
    Without data a demo takes its own, and any other model random inputs, good for costs only. A
    live module is copied. A folder made from the same references, files and seed is used again.
    Raises ``ModelError``, ``DataError``, ``StorageError``, ``MissingDependency``.
    """
    source = request.source()
    model = _find_model(request.model, source)
    wanted = Acquired(
        source=source, seed=seed, max_samples=max_samples, stamps=_stamps(source), record=""
    )
    is_live = is_live_data(request.data) or is_live_data(request.test_data)
    found = None if is_live else _find(folder, wanted, model.module)
    if found is not None:
        return found
    if request.data is None and request.test_data is not None:
        raise DataError("Test data were given without data; pass both.")
    data = DEMO_DATA if source.data == DEMO_REFERENCE else request.data
    with _writing(folder) as staging, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for loaders that shuffle
        work = Assembly(
            model=model,
            source=source,
            folder=folder,
            staging=staging,
            seed=seed,
            suggest=suggest,
        )
        if data is None:
            record, splits = work.without_data()
        else:
            record, splits = work.with_data(
                data, request.test_data, max_samples, max_unreadable, reads_all=reads_all
            )
        write_text(
            folder / SETTINGS_FILE, wanted.model_copy(update={"record": record.digest()}).to_json()
        )
        write_text(folder / RECORD_FILE, record.to_json())
    return Workload(model=model.module, record=record, splits=splits)


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
    return _find_model(source.model, source).module


def _find_model(model: str | nn.Module, source: WorkloadSource) -> FoundModel:
    weights = source.weights
    if isinstance(model, str) and is_hub(model):
        found = find_model(model, weights, trust_remote_code=source.trust_remote_code)
        found.module.eval()  # the libraries hand some out as for training
        weights = None
    elif isinstance(model, nn.Module):
        found = FoundModel(module=copy_live(model))
    elif is_demo(model):
        found = FoundModel(module=build_demo(model).eval())
        weights = weights or str(demo_weights(model))
    else:
        found = FoundModel(module=build_model(model))
    notes = list(found.notes)
    if weights == RANDOM_WEIGHTS:
        notes.append("the weights are those that the model is built with")
    elif weights is not None:
        found.module.float().cpu()
        notes.extend(load_weights(found.module, Path(weights)))
    return replace(found, notes=(*notes, *settle(found.module)))


def _stamps(source: WorkloadSource) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file named, so that an edited one is read again."""
    stamps: dict[str, tuple[int, int]] = {}
    named = (source.model, source.weights, source.data, source.test_data, source.classes)
    for reference in (*named, source.metric):
        if reference is None:
            continue
        place = split_reference(reference)
        path = DEMO_DATA if reference == DEMO_REFERENCE else place[0] if place else _path(reference)
        if path.is_file():
            status = path.stat()
            stamps[reference] = (status.st_size, status.st_mtime_ns)
        elif path.is_dir():
            stamps[reference] = _stamp_folder(path)
    return stamps


def _path(reference: str) -> Path:
    """The path in ``hf:FOLDER``, ``cifar10:FILE`` or a plain path."""
    name, colon, place = reference.partition(":")
    return Path(place if colon and name in ("hf", *CIFARS) else reference)


def _stamp_folder(folder: Path) -> tuple[int, int]:
    """Bytes and the newest change of all files below a folder."""
    size = newest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(os.path.join(parent, name))
            except OSError:  # a link to nowhere is told when its sample is read
                continue
            size, newest = size + status.st_size, max(newest, status.st_mtime_ns)
    return size, newest


def _find(folder: Path, wanted: Acquired, model: nn.Module) -> Workload | None:
    """The workload already in ``folder`` when it is the wanted one and whole, else None."""
    try:
        found = Acquired.read(folder / SETTINGS_FILE)
        workload = reopen(folder, model)
    except (PlanError, DataError):
        return None
    same = found.model_copy(update={"record": ""}) == wanted
    same = same and found.record == workload.record.digest()
    same = same and workload.record.model_sha256 == hash_weights(model)
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
