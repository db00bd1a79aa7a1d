"""How many classes a file of weights was trained for, read before the architecture is built.

A library builds its architectures for the 1,000 classes of ImageNet; weights that were fine-tuned
have as many as their task. The shape of the last layer tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from profiling_agent.acquisition import weights as weight_files


def readings(path: Path) -> Iterator[dict[str, Tensor]]:
    """Each way to read the file as tensors by name, wrappers opened and prefixes taken off.

    Raises ``ModelError`` when it is missing, damaged, or holds more than plain tensors.
    """
    content = weight_files.read_weights(path)
    for _, state in weight_files.readings(content, "", 3):
        yield from weight_files.variants(state)


def last_layer(module: nn.Module) -> str:
    """The name of the last linear or convolutional layer, by which a classifier ends."""
    names = [
        name for name, each in module.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)
    ]
    return names[-1] if names else ""


def num_classes_in(path: Path, heads: Sequence[str]) -> int | None:
    """The classes of a layer of one of these names in the file; None when it holds none."""
    for state in readings(path):
        for head in heads:
            for key in (f"{head}.weight", f"{head}.bias"):
                if key in state and state[key].ndim:
                    return int(state[key].shape[0])
    return None
