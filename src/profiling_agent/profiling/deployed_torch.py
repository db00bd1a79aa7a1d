"""Operator times of a torch artefact: its own ``graph.py``, timed line by line.

Each line of the forward calls one operator and ends in a comment with the module it was traced in,
so the lines are the operators. A trace function notes the time when a line begins, about a
microsecond each; operators do not overlap, since torch returns from one before it starts the next.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import time
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch

from profiling_agent.deployment.artefact import open_artefact
from profiling_agent.deployment.graph_code import ROOT_COMMENT
from profiling_agent.deployment.torch_runtime import BF16, GRAPH_FILE
from profiling_agent.records.profile import OperatorCost

_WARM_UP_PASSES = 3
_INT8_OPERATOR = "linear_dynamic"


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of the forward: the value it makes, the operator it calls, the module it is of."""

    value: str
    operator: str
    module: str | None


def operator_costs(
    folder: Path,
    manifest: dict[str, Any],
    prepared_inputs: list[np.ndarray],
    threads: int,
    passes: int,
) -> list[OperatorCost]:
    """Milliseconds of each operator of a torch artefact, the median of ``passes`` calls, in order.

    ``prepared_inputs`` are arrays (batch, ...) as ``serve.py`` prepares them. Raises
    ``ArtefactError`` or ``MissingDependency`` when the artefact can't be opened.
    """
    forward = open_artefact(folder, threads).forward  # pyright: ignore[reportAttributeAccessIssue]
    lines = read_lines((folder / GRAPH_FILE).read_text(encoding="utf-8"))
    inputs = [torch.from_numpy(array) for array in prepared_inputs]
    times: dict[int, list[float]] = {number: [] for number in lines}
    with torch.inference_mode():
        for _ in range(_WARM_UP_PASSES):
            forward(*inputs)
        for _ in range(passes):
            for number, milliseconds in _time_lines(forward, inputs, set(lines)).items():
                times[number].append(milliseconds)
    float_precision = "bf16" if manifest["scheme"] == BF16 else "f32"
    return [
        OperatorCost(
            name=line.value,
            type=line.operator,
            precision="i8" if line.operator == _INT8_OPERATOR else float_precision,
            ms=statistics.median(times[number]),
            module=line.module,
        )
        for number, line in lines.items()
    ]


def read_lines(source: str) -> dict[int, _Line]:
    """The lines of ``graph.py``'s forward that call an operator, by their number in the file."""
    (build,) = (s for s in ast.parse(source).body if isinstance(s, ast.FunctionDef))
    bound = {
        statement.targets[0].id: ast.unparse(statement.value)
        for statement in build.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    (forward,) = (s for s in build.body if isinstance(s, ast.FunctionDef))
    comments = {
        token.start[0]: token.string.removeprefix("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines: dict[int, _Line] = {}
    for statement in forward.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            comment = comments.get(statement.lineno)
            lines[statement.lineno] = _Line(
                value=statement.targets[0].id,
                operator=_operator(statement.value, bound),
                module="" if comment == ROOT_COMMENT else comment,
            )
    return lines


def _operator(expression: ast.expr, bound: dict[str, str]) -> str:
    """The operator's name, without the namespace and the overload it is called through."""
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name):
        path = bound[expression.func.id]
        return path.split(".")[3] if path.startswith("torch.ops.") else path.rpartition(".")[2]
    return "size" if ".shape[" in ast.unparse(expression) else "getitem"


def _time_lines(
    forward: Callable[..., torch.Tensor], inputs: list[torch.Tensor], numbers: set[int]
) -> dict[int, float]:
    """Milliseconds from the start of each line to that of the next one in ``numbers``.

    A line that only releases values counts to the operator before it.
    """
    starts: list[tuple[int, int]] = []
    with _tracing(forward.__code__, starts):  # pyright: ignore[reportFunctionMemberAccess]
        forward(*inputs)
    marks = [mark for mark in starts[:-1] if mark[0] in numbers] + starts[-1:]
    return {number: (later - start) / 1e6 for (number, start), (_, later) in pairwise(marks)}


@contextmanager
def _tracing(code: CodeType, starts: list[tuple[int, int]]) -> Iterator[None]:
    """Note line number and nanoseconds whenever a line of ``code`` begins, and when it returns."""
    clock = time.perf_counter_ns

    def on_line(frame: FrameType, _event: str, _value: object) -> Any:
        starts.append((frame.f_lineno, clock()))
        return on_line

    def on_call(frame: FrameType, _event: str, _value: object) -> Any:
        return on_line if frame.f_code is code else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
