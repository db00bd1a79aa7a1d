"""``init``: a model, data and settings to start from, which work as they are."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from profiling_agent.errors import StorageError
from profiling_agent.records.store import write_text

TEMPLATES: Final = ("model.py", "data.py", "profiling-agent.toml")


def write_project(folder: Path) -> list[Path]:
    """Write ``model.py``, ``data.py`` and ``profiling-agent.toml``, commented; their paths.

    ``StorageError`` when one of them is already there (nothing is written then) or the folder
    can't be written.
    """
    paths = [folder / name for name in TEMPLATES]
    for path in paths:
        if path.exists() or path.is_symlink():
            raise StorageError(
                f"{str(path)!r} is already there and is not written over. Pass another folder, or "
                "move the file away."
            )
    for path in paths:
        write_text(path, read_template(path.name))
    return paths


def read_template(name: str) -> str:
    """The text of one of ``TEMPLATES`` as it is shipped."""
    place = resources.files("profiling_agent") / "templates" / name
    return place.read_text(encoding="utf-8")
