"""Which format a data reference has, and the reader it goes to."""

from __future__ import annotations

from pathlib import Path

from profiling_agent.acquisition.data import Bundle
from profiling_agent.acquisition.factories import build_data, split_reference
from profiling_agent.acquisition.formats.cifar import open_cifar
from profiling_agent.acquisition.formats.classes import ClassList
from profiling_agent.acquisition.formats.folder import open_folder
from profiling_agent.acquisition.formats.npz import open_npz
from profiling_agent.acquisition.formats.objects import open_object
from profiling_agent.acquisition.formats.table import is_table, open_table
from profiling_agent.errors import DataError

CIFARS = ("cifar10", "cifar100")


def open_data(
    data: object, staging: Path, known: ClassList | None = None, *, has_classes: bool = True
) -> Bundle:
    """Understand a reference or live data; nothing is decoded yet.

    References: ``.npz``; a folder of images; ``cifar10:`` or ``cifar100:`` and the published
    archive; parquet, a saved Hugging Face dataset, ``.csv``, ``.tsv``, ``.jsonl``;
    ``path/file.py:factory``. ``known`` are the model's classes or those of a file, by which names
    become numbers; without ``has_classes`` labels are targets of the user's metric; ``staging`` is
    a folder for arrays unpacked on the way. Raises ``DataError``.
    """
    if isinstance(data, Path):
        data = str(data)
    if not isinstance(data, str):
        return open_object(data, data)
    name, _, place = data.partition(":")
    if name in CIFARS:
        return open_cifar(name, Path(place).expanduser())
    if split_reference(data) is not None:
        made, factory = build_data(data)
        return open_object(made, factory)
    path = Path(data).expanduser()
    if path.suffix == ".npz":
        return open_npz(path, staging)
    if not path.exists():
        raise DataError(f"The data {data!r} don't exist; check the path after --data.")
    if is_table(path):
        return open_table(path, known, has_classes=has_classes)
    if path.is_dir():
        return open_folder(path, known)
    raise DataError(
        f"Can't tell what {data!r} holds; pass an .npz, .parquet, .csv, .tsv or .jsonl file, a "
        "folder of images, cifar10:PATH, cifar100:PATH or path/file.py:factory."
    )
