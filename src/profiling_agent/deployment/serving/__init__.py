"""The ``serve.py`` of artefacts: a part for each runtime, and what all of them end in."""

from __future__ import annotations

import re
from pathlib import Path

_FOLDER = Path(__file__).parent
_SHARED_BEGINS = "# --- the same in every runtime's serve.py "
_SHARED_IMPORT = re.compile(
    r"\nfrom profiling_agent\.deployment\.serving\.common import \(\n(?:    \w+,\n)+\)\n"
)
_USED_BELOW = "  # noqa: F401 - for what follows in serve.py"


def serve_text(runtime: str) -> str:
    """The source of a runtime's ``serve.py``: one file that imports nothing of this package."""
    own = (_FOLDER / f"serve_{runtime}.py").read_text(encoding="utf-8")
    common = (_FOLDER / "common.py").read_text(encoding="utf-8")
    own = _SHARED_IMPORT.sub("", own).replace(_USED_BELOW, "")
    return f"{own.rstrip()}\n\n\n{common[common.index(_SHARED_BEGINS) :]}"
