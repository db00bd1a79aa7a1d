"""The process-wide state of torch, changed in one place and put back.

The only file of this room that imports torch: the others are reached from rooms that must not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with ``count`` threads inside torch's operators, then restore."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch, for code that draws from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
