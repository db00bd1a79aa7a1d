"""Where a run keeps its things, and how files are written: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from profiling_agent.errors import StorageError
from profiling_agent.records.journal import Journal


class RunStore:
    """The folder of a run.

    journal.jsonl   every step, appended
    workload.json   profile.json   run.json   report.html   records
    data/           the three splits as arrays
    trials/ID/      artefacts tried
    artefact/       the one handed over
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder / "journal.jsonl")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def profile(self) -> Path:
        return self.folder / "profile.json"

    @property
    def run_record(self) -> Path:
        return self.folder / "run.json"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def artefact(self) -> Path:
        return self.folder / "artefact"

    def trial(self, trial_id: str) -> Path:
        return self.folder / "trials" / trial_id

    def create(self) -> None:
        """Make the folder and prove that it can be written; ``StorageError`` otherwise."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise StorageError(
                f"Can't write to {str(self.folder)!r}: {error.strerror or error}. "
                "Pass another folder with --out."
            ) from None


def write_text(path: Path, text: str) -> None:
    """Write atomically; ``StorageError`` when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"Can't write {str(path)!r}: {error.strerror or error}. Pass another folder with --out."
        ) from None
