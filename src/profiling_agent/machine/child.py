"""A child process that answers JSON lines; a crash, a hang and a memory glutton become words.

Started afresh (``python -m``) and never forked: a fork after a torch operation hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from profiling_agent.errors import TrialError

POLL_S = 0.25
OBITUARY_S = 5.0
LAST_WORDS = 2000


class Child:
    """One warm process; ``ask`` sends a request and waits for its answer.

    ``memory_limit`` is in bytes of resident memory; a child above it is killed.
    """

    def __init__(self, module: str, *, memory_limit: int | None = None) -> None:
        self._module = module
        self._memory_limit = memory_limit
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._buffer = b""
        self._paused = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            start_new_session=True,  # Ctrl-C goes to the parent, which closes its children
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer's fields; ``TrialError`` for a refusal, a death, a hang or too much memory."""
        self.resume()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, OSError, ValueError):
            raise TrialError(self._obituary()) from None
        line = self._read_line(time.monotonic() + timeout_s, timeout_s)
        try:
            answer = json.loads(line)
            succeeded = answer.pop("ok")
        except (ValueError, KeyError, TypeError, AttributeError):
            self._kill()  # nobody knows which request its next line would answer
            shown = line[:100].decode(errors="replace")
            raise TrialError(f"The process printed {shown!r} in place of an answer.") from None
        if not succeeded:
            raise TrialError(answer["error"])
        return answer

    def _read_line(self, deadline: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], POLL_S)
            if ready:
                chunk = os.read(descriptor, 1 << 20)
                if not chunk:
                    raise TrialError(self._obituary())
                self._buffer += chunk
            if b"\n" not in self._buffer:
                self._check_limits(deadline, timeout_s)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _check_limits(self, deadline: float, timeout_s: float) -> None:
        used = resident_bytes(self._process.pid)
        if self._memory_limit is not None and used is not None and used > self._memory_limit:
            self._kill()
            raise TrialError(
                f"The process used {used / 2**30:.1f} GiB of memory, more than the "
                f"{self._memory_limit / 2**30:.1f} GiB it may."
            )
        if time.monotonic() > deadline:
            self._kill()
            raise TrialError(f"No answer within {timeout_s:.0f} s; the process was ended.")

    def _obituary(self) -> str:
        try:
            code = self._process.wait(OBITUARY_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return "The process closed its output without an answer and was ended."
        words = self._last_words()
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
            return f"The process was ended by {name}{hint}.{words}"
        return f"The process ended with exit code {code}.{words}"

    def _last_words(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            self._stderr.seek(0)
            lines = self._stderr.read()[-LAST_WORDS:].decode(errors="replace").strip().splitlines()
            if lines:
                return f" Its last words: {lines[-1][:300]}"
        return ""

    def pause(self) -> None:
        """Stop the process, threads and all, until ``resume`` or the next ``ask``."""
        if not self._paused and self.alive:
            os.kill(self._process.pid, signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self.alive:
                os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the process; safe to call twice."""
        self.resume()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process") and self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
                self._process.wait()


def die_with_parent() -> None:
    """Called by the child: a parent that is killed takes a stopped child along (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """The parent's, with this package importable even when it was never installed."""
    environment = dict(os.environ)
    source = str(Path(__file__).resolve().parents[2])
    paths = environment.get("PYTHONPATH", "")
    if source not in paths.split(os.pathsep):
        environment["PYTHONPATH"] = f"{source}{os.pathsep}{paths}" if paths else source
    return environment


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process, or ``None`` where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
