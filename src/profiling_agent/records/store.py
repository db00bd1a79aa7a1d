"""Where a run keeps its things, and how files are written: whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO

import numpy as np

from profiling_agent.errors import StorageError
from profiling_agent.records.journal import Journal


class RunStore:
    """The folder of a run.

    journal.jsonl   every step, appended
    transcript.jsonl   what a language model was asked and answered
    transcripts/    likewise, a file for each arm of a comparison of planners
    profile.json   run.json   report.html   ablation.json   ablation.html   records
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
    def transcript(self) -> Path:
        return self.folder / "transcript.jsonl"

    @property
    def transcripts(self) -> Path:
        return self.folder / "transcripts"

    @property
    def ablation_record(self) -> Path:
        return self.folder / "ablation.json"

    @property
    def ablation_report(self) -> Path:
        return self.folder / "ablation.html"

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

    @property
    def holds_run(self) -> bool:
        return self.journal.path.exists()

    def _is_foreign(self) -> bool:
        with contextlib.suppress(OSError):  # one that can't be listed fails at writing, in words
            return self.folder.is_dir() and any(self.folder.iterdir()) and not self.holds_run
        return False

    def clear(self) -> None:
        """Throw the run away, and nothing else that may lie in the folder."""
        if not self.holds_run:
            return
        try:
            for folder in (self.data, self.artefact, self.folder / "trials", self.transcripts):
                if folder.exists():
                    shutil.rmtree(folder)
            records = (self.profile, self.run_record, self.report, self.transcript)
            compared = (self.ablation_record, self.ablation_report)
            for file in (*records, *compared, self.journal.path):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"Can't throw away the run in {str(self.folder)!r}: {error}. Pass another --out."
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Keeps a second process out for as long as the block lasts; ``StorageError`` for it."""
        with self.journal.path.open("a") as file:
            _lock(file, self.folder)
            yield

    def trial(self, trial_id: str) -> Path:
        return self.folder / "trials" / trial_id

    def create(self) -> None:
        """Make the folder and prove that it can be written.

        ``StorageError`` when it can't, or when it holds other things than a run: nothing of
        another's is ever written over.
        """
        if self._is_foreign():
            raise StorageError(
                f"{str(self.folder)!r} holds other things than a run. Pass a new folder with --out."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            self.journal.path.touch()  # from now on the folder is known to be a run's
        except OSError as error:
            raise StorageError(
                f"Can't write to {str(self.folder)!r}: {error.strerror or error}. "
                "Pass another folder with --out."
            ) from None


def _lock(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StorageError(
            f"Another process is working in {str(folder)!r}. Wait for it or pass another --out."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; ``StorageError`` when the disk refuses."""
    _write(path, lambda file: file.write(text.encode("utf-8")))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an ``.npy`` file atomically; ``StorageError`` when the disk refuses."""
    _write(path, lambda file: np.save(file, array, allow_pickle=False))


def read_array(path: Path) -> np.ndarray | None:
    """The array of an ``.npy`` file, or ``None`` when there is none that is whole."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                fill(file)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError(
            f"Can't write {str(path)!r}: {error.strerror or error}. Pass another folder with --out."
        ) from None
