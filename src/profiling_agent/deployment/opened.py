"""Artefacts as anyone may open them: their manifests and their check inputs, without torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from profiling_agent.errors import ArtefactError, MissingDependency
from profiling_agent.records.base import Record, describe_faults
from profiling_agent.records.evaluation import BuiltArtefact

MANIFEST, SERVE = "manifest.json", "serve.py"
PACKAGES = {
    "torch": ("torch", "numpy"),
    "onnxruntime": ("onnxruntime", "numpy"),
    "openvino": ("openvino", "numpy"),
}
MAX_VALUES = 1000


class CheckRange(Record):
    """What one input is drawn from: its shape and numpy type, lowest and highest value."""

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float


class CheckInputs(Record):
    """Inputs that can be made again anywhere, and what the artefact answered when it was built.

    They are drawn uniformly, with a fixed seed, between the lowest and the highest value of the
    inputs the model was traced with: nothing of the user's data is in them. ``answers`` are the
    first ``MAX_VALUES`` values of the outputs, ``largest`` the largest of all by magnitude.
    """

    seed: int = 0
    inputs: dict[str, CheckRange]
    answers: tuple[float, ...] = ()
    largest: float = 0.0

    @classmethod
    def like(cls, arrays: Mapping[str, np.ndarray]) -> CheckInputs:
        """Inputs of the same shapes, types and ranges."""
        ranges = {
            name: CheckRange(
                shape=array.shape,
                dtype=str(array.dtype),
                low=float(array.min()) if array.size else 0.0,
                high=float(array.max()) if array.size else 0.0,
            )
            for name, array in arrays.items()
        }
        return cls(inputs=ranges)

    def draw(self, batch_size: int | None = None) -> tuple[np.ndarray, ...]:
        """The inputs in order, (batch, ...); the size at which they were answered by default."""
        generator = np.random.default_rng(self.seed)
        drawn: list[np.ndarray] = []
        for spec in self.inputs.values():
            rows = spec.shape[0]
            if np.issubdtype(np.dtype(spec.dtype), np.floating):
                values = generator.uniform(spec.low, spec.high, spec.shape)
            else:
                values = generator.integers(
                    int(spec.low), int(spec.high), spec.shape, endpoint=True
                )
            order = np.arange(rows if batch_size is None else batch_size) % rows
            drawn.append(np.ascontiguousarray(values.astype(spec.dtype)[order]))
        return tuple(drawn)

    def answered_by(self, served: Any) -> CheckInputs:
        """With the answers of an artefact's ``Model``."""
        answers = np.asarray(served.run(feed_of(served, self.draw())), dtype=np.float64)
        return self.model_copy(
            update={
                "answers": tuple(answers.ravel()[:MAX_VALUES].tolist()),
                "largest": float(np.abs(answers).max()) if answers.size else 0.0,
            }
        )


def feed_of(served: Any, arrays: tuple[np.ndarray, ...]) -> Any:
    """Prepared inputs in the form that an artefact's ``Model.run`` takes."""
    names = getattr(served, "names", None)
    if names is not None:
        return dict(zip(names, arrays, strict=True))
    import torch

    return tuple(torch.from_numpy(array) for array in arrays)


def check_artefact(folder: Path) -> BuiltArtefact:
    """What the manifest says was built, once all files and the runtime are known to be there.

    Raises ``ArtefactError`` or ``MissingDependency``.
    """
    built = read_built(folder)
    runtime = built.runtime
    for package in PACKAGES.get(runtime, ()):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(
                f"The artefact {str(folder)!r} needs {package}. Install with: pip install {package}"
            )
    for name in (SERVE, *built.model_files):
        if not (folder / name).is_file():
            raise ArtefactError(
                f"The artefact {str(folder)!r} has no {name!r}. Copy the whole folder again."
            )
    return built


def read_built(folder: Path) -> BuiltArtefact:
    """The part of the manifest that says what was built; ``ArtefactError`` when it is damaged."""
    try:
        return BuiltArtefact.model_validate(read_manifest(folder)["built"])
    except ValidationError as error:
        raise ArtefactError(
            f"The manifest in {str(folder)!r} is damaged: {describe_faults(error)}. Build the "
            "artefact again."
        ) from None


def read_manifest(folder: Path) -> dict[str, Any]:
    """``manifest.json`` as a dict, or ``ArtefactError``."""
    if not folder.is_dir():
        raise ArtefactError(f"There is no folder {str(folder)!r}. Pass an artefact's folder.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{str(folder)!r} is not an artefact: its {MANIFEST!r} can't be read ({error}). Pass a "
            "folder that holds one."
        ) from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != 1 or not isinstance(manifest.get("built"), dict):
        raise ArtefactError(
            f"The manifest in {str(folder)!r} has schema {version!r} and this version reads 1. "
            "Build the artefact again."
        )
    return manifest


def check_inputs_of(folder: Path) -> CheckInputs:
    """The check inputs in an artefact's manifest; ``ArtefactError`` when there are none."""
    try:
        return CheckInputs.model_validate(read_manifest(folder).get("check"))
    except ValidationError:
        raise ArtefactError(
            f"The manifest in {str(folder)!r} holds no check inputs. Build the artefact again."
        ) from None
