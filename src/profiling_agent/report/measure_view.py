"""A measurement on a target machine, in a terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from profiling_agent.records.measurement import Measurement
from profiling_agent.report.wording import DASH, in_megabytes, in_ms, printable, significant


def render_measurement(measured: Measurement) -> RenderableType:
    """Time, memory, and whether it answers as it did where it was built."""
    interval, timing = measured.timing.interval_ms, measured.timing
    agreement = "the same as where it was built" if measured.agrees else "NOT as it was built"
    rows = [
        ("artefact", f"{printable(measured.name)} ({measured.runtime} {measured.scheme})"),
        ("machine", printable(measured.machine.processor)),
        ("built on", _built_on(measured)),
        (
            "deployment",
            f"batch size {measured.deployment.batch_size}, threads {measured.deployment.threads}",
        ),
        (
            "latency",
            f"{in_ms(timing.median_ms)} "
            f"[{significant(interval.low)}, {significant(interval.high)}], "
            f"p90 {in_ms(timing.p90_ms)}",
        ),
        ("throughput", f"{measured.throughput_per_s:,.0f} samples/s"),
        ("model files", in_megabytes(measured.size_bytes)),
        ("peak memory", in_megabytes(measured.memory_bytes) if measured.memory_bytes else DASH),
        (
            "answers",
            f"{agreement} (largest difference {significant(measured.difference)} "
            f"where the largest is {significant(measured.largest)})",
        ),
    ]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, value)
    return table


def _built_on(measured: Measurement) -> str:
    if measured.built_on is None:
        return DASH
    same = measured.machine.same_hardware(measured.built_on)
    return "this kind of machine" if same else printable(measured.built_on.processor)
