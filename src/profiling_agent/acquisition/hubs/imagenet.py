"""The 1,000 classes of ImageNet by their WordNet ids, which its folders are named by."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from profiling_agent.acquisition.hubs.calls import import_library

NUM_CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")


def imagenet_classes(subset: str = "imagenet-1k") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids and names by index, as timm has them; empty when it isn't installed."""
    if importlib.util.find_spec("timm") is None:
        return (), ()
    info = import_library("timm.data", "timm").ImageNetInfo(subset)
    return tuple(info.label_names()), tuple(info.label_descriptions())


def ids_of(names: Sequence[str]) -> tuple[str, ...]:
    """The WordNet ids of these classes: themselves, or ImageNet's when they are its 1,000 in order.

    Names differ in a few places from list to list, so nine of ten must agree.
    """
    if names and all(_WORDNET_ID.fullmatch(name) for name in names):
        return tuple(names)
    if len(names) != NUM_CLASSES:
        return ()
    ids, known = imagenet_classes()
    pairs = zip(names, known, strict=True) if known else ()
    num_same = sum(bool(_words(ours) & _words(theirs)) for ours, theirs in pairs)
    return ids if num_same >= 0.9 * NUM_CLASSES else ()


def _words(name: str) -> set[str]:
    return {part.strip().lower().replace("_", " ") for part in name.split(",")}
