"""Measure an artefact on the machine it is to run on; needs its runtime and numpy, not torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from profiling_agent.deployment.opened import check_artefact, check_inputs_of, read_manifest
from profiling_agent.errors import ArtefactError, TrialError
from profiling_agent.evaluation.predictor import ProbeProcess
from profiling_agent.machine.clock import summarise
from profiling_agent.machine.processor import describe_machine
from profiling_agent.records.common import Deployment, Machine
from profiling_agent.records.measurement import Measurement

NUM_BLOCKS, BLOCK_S, MIN_CALLS, WARM_UP = 12, 0.25, 3, 3


def measure(
    artefact: Path, *, batch_size: int | None = None, threads: int | None = None
) -> Measurement:
    """Latency, memory and the answers to the check inputs of an artefact's manifest.

    Batch size and threads are those it was measured for unless given. Raises ``ArtefactError`` when
    it can't be opened or run here, and ``MissingDependency`` with the install line.
    """
    built = check_artefact(artefact)
    manifest = read_manifest(artefact)
    meant = Deployment.model_validate(manifest["deployment"])
    fixed = manifest["batch_size"]
    if fixed is not None and batch_size not in (None, fixed):
        raise ArtefactError(
            f"The artefact takes batches of {fixed} alone. Leave --batch-size away, or build it "
            f"for {batch_size}."
        )
    deployment = Deployment(
        batch_size=batch_size or fixed or meant.batch_size, threads=threads or meant.threads
    )
    check = check_inputs_of(artefact)
    try:
        with contextlib.closing(
            ProbeProcess.artefact(artefact, built.runtime, deployment)
        ) as predictor:
            answers = np.array(predictor.check(artefact))
            predictor.time_block(BLOCK_S, MIN_CALLS, WARM_UP)
            timing = summarise(
                [predictor.time_block(BLOCK_S, MIN_CALLS, WARM_UP) for _ in range(NUM_BLOCKS)]
            )
            memory = predictor.memory_bytes()
    except TrialError as error:
        raise ArtefactError(f"The artefact {str(artefact)!r} fails here: {error}") from None
    return Measurement(
        name=str(manifest["name"]),
        runtime=built.runtime,
        scheme=built.scheme,
        machine=describe_machine(),
        built_on=_machine(manifest.get("machine")),
        deployment=deployment,
        timing=timing,
        throughput_per_s=1e3 * deployment.batch_size / timing.median_ms,
        size_bytes=built.size_bytes,
        memory_bytes=memory,
        difference=float(np.abs(answers - np.array(check.answers)).max()),
        largest=check.largest,
    )


def _machine(stored: object) -> Machine | None:
    try:
        return Machine.model_validate(stored)
    except ValidationError:
        return None
