"""A model found by name, with what its library knows of how it wants to be fed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from profiling_agent.records.workload import ImageTransform

HUBS = ("hf", "timm", "torchvision")
RANDOM_WEIGHTS = "random"
"""The value of --weights that asks for a random initialisation."""


class Tokenizer(Protocol):
    """Texts to token arrays, by the model's own tokenizer.

    ``limit`` tokens are what model and tokenizer bear, ``max_length`` what is used unasked.
    """

    limit: int
    max_length: int

    def count(self, text: str | tuple[str, str]) -> int:
        """Tokens of a text, special ones included, before any truncation."""
        ...

    def encode(self, text: str | tuple[str, str], length: int) -> dict[str, np.ndarray]:
        """Arrays int64 (length,), padded or truncated, by the names that forward takes."""
        ...


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """The module with its weights, and what its library states about inputs and classes.

    ``image`` and ``normalisation`` (keys mean, std, scale, source) are None and empty when nothing
    is stated. ``class_ids`` are what folders may be named by (ImageNet's wnids), by index.
    """

    module: nn.Module
    image: ImageTransform | None = None
    normalisation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    class_names: tuple[str, ...] = ()
    class_ids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_hub(reference: str) -> bool:
    """Whether a reference names a model of a library: ``hf:``, ``timm:``, ``torchvision:``."""
    hub, colon, name = reference.partition(":")
    return bool(colon and name) and hub in HUBS


def local_folder(reference: str) -> Path | None:
    """The absolute folder of ``hf:path/to/folder``; None for anything that is no folder here."""
    hub, _, name = reference.partition(":")
    folder = Path(name).expanduser()
    return folder.resolve() if hub == "hf" and folder.is_dir() else None


def find_model(
    reference: str, weights: str | None = None, *, trust_remote_code: bool = False
) -> FoundModel:
    """The model a hub reference names, in eval mode or not; weights None takes the pretrained ones,
    ``random`` draws them from a fixed seed, a path reads them from the file.

    Raises ``ModelError`` for unknown names, weights that can't be had or don't fit, and tasks that
    are no classification; ``MissingDependency`` when the library is not installed.
    """
    hub, _, name = reference.partition(":")
    if hub == "hf":
        from profiling_agent.acquisition.hubs.huggingface import find

        return find(name, weights, trust_remote_code=trust_remote_code)
    if hub == "timm":
        from profiling_agent.acquisition.hubs.timm_models import find
    else:
        from profiling_agent.acquisition.hubs.torchvision_models import find
    return find(name, weights)
