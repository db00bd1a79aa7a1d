"""Seeds: one number from the user becomes independent streams, each named by its purpose.

Handing the same seed to everything would couple the draws of unrelated parts; a running counter
would make results depend on the order of calls.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed for one purpose; the same on every machine and in every process.

    >>> derive_seed(0, "splits") == derive_seed(0, "splits") != derive_seed(0, "bootstrap")
    True
    """
    text = repr((int(seed), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A numpy generator for one purpose."""
    return np.random.default_rng(derive_seed(seed, *purpose))
