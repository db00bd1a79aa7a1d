"""What the import linter can't see: which modules are really loaded by an import."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

HEAVY = ("torch", "torch_pruning", "onnx", "onnxruntime", "onnxscript", "scipy")
ROOMS_WITHOUT_TORCH = ("records", "report", "planning", "llm")


def modules_of(room: str) -> list[str]:
    package = import_module(f"profiling_agent.{room}")
    found = pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")
    return [package.__name__, *sorted(module.name for module in found)]


def loaded_after(imports: list[str]) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh process after these imports."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {imports!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("room", ROOMS_WITHOUT_TORCH)
def test_a_room_of_records_works_without_torch(room: str) -> None:
    loaded = loaded_after(modules_of(room))
    assert not loaded & {"torch", "torch_pruning", "onnx", "onnxruntime"}


def test_the_front_door_is_light() -> None:
    loaded = loaded_after(["profiling_agent"])
    assert not loaded & {*HEAVY, "numpy", "pydantic", "rich", "typer"}
