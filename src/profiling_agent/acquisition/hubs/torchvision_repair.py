"""Makes torchvision importable beside a torch build that its compiled part doesn't fit.

torchvision's wheels link CUDA; beside a CPU build of torch their library doesn't load, and the
import ends with ``operator torchvision::nms does not exist``, which takes timm and transformers
with it. Declaring the two operators that are named at import time is enough for all that is written
in Python: models, transforms, weights.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # the declarations last as long as this object


def make_torchvision_importable() -> None:
    """Declare torchvision's operators if its own library can't; to be called before its import."""
    if "torchvision" in sys.modules or _declared:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}{_SCHEMA}")
    _declared.append(library)


def _loads(folder: Path) -> bool:
    """Whether torchvision's compiled part fits this torch; loading it twice does no harm."""
    for library in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
