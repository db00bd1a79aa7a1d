"""Memory that the process holds and does not use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_free_memory() -> None:
    """Give the holes of the C library's heap back to the system; nothing where it has no way to.

    glibc keeps freed blocks of up to 32 MB for later. Activations come and go between results that
    stay, so the holes left behind add up to several times what is in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return None
