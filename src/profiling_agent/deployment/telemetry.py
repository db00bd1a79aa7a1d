"""What keeps openvino and nncf from reporting their use; imports nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "openvino_telemetry"


@contextmanager
def no_telemetry() -> Iterator[None]:
    """Import openvino and nncf without the package through which they report their use.

    Both go on without it, as where it isn't installed. Every import of them belongs in here, that
    of an openvino artefact's ``serve.py`` too: what this version writes sees to it by itself, what
    an older one wrote does not.
    """
    before = {name: module for name, module in sys.modules.items() if name == PACKAGE}
    sys.modules[PACKAGE] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        sys.modules.pop(PACKAGE, None)
        sys.modules.update(before)
