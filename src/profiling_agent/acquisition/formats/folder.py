"""A folder of images: what it holds is read from its names, no image is opened.

Understood are ``class/image``, ``split/class/image`` (ImageNet, Imagenette, Tiny ImageNet's train
part), folders around these, and images without classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from profiling_agent.acquisition.data import PART_NAMES, UNNAMED, Bundle, Sample, Source
from profiling_agent.acquisition.formats.classes import ClassList, index_of
from profiling_agent.errors import DataError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp",
    ".gif", ".jp2", ".avif",
)  # fmt: skip
FLAT_NAMES = ("images", "image", "imgs", "img")
"""A folder of this name alone holds the images, it is no class."""
MAX_WRAPPERS = 4


@dataclass
class _Ignored:
    """What was passed over, for the notes."""

    num_hidden: int = 0
    num_others: int = 0
    num_loose: int = 0
    words: list[str] = field(default_factory=list)

    def notes(self) -> tuple[str, ...]:
        counts = (
            (self.num_hidden, "hidden"),
            (self.num_others, "that are no images by their names"),
            (self.num_loose, "images outside of any class"),
        )
        found = [f"{count:,} {what}" for count, what in counts if count]
        listed = (f"files left out: {', '.join(found)}",) if found else ()
        return (*listed, *self.words)


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """One folder's visible content, sorted by name."""

    folders: tuple[str, ...]
    images: tuple[str, ...]


Classes = dict[str, list[str]]
"""Paths of images by the class's folder name; the key "" holds images without classes."""


def open_folder(path: Path, known: ClassList | None = None) -> Bundle:
    """Parts and classes of a folder of images, by file names alone.

    Inputs are paths, labels the index that ``known`` gives the class. Hidden files and those that
    are no images by their names are left out and counted in the notes. Raises ``DataError`` for an
    empty folder, and for classes that can't be told apart (see ``index_of``).
    """
    ignored = _Ignored()
    top = _unwrap(path, ignored)
    splits = _split_folders(top, ignored)
    parts: dict[str, Classes] = {}
    empty: set[str] = set()
    for part, folders in splits.items():
        for folder in folders:
            _merge(parts.setdefault(part, {}), _classes(folder, ignored, empty))
    parts = _labelled_only({part: found for part, found in parts.items() if found}, ignored)
    if not parts:
        raise DataError(_no_images(path, ignored))
    names = {name for found in parts.values() for name in found if name}
    index, names_by_index = _indices(names, empty - names, known, ignored)
    return Bundle(
        parts={part: _source(found, index) for part, found in parts.items()},
        preprocessing={},
        class_names=names_by_index,
        notes=ignored.notes(),
    )


def _indices(
    names: set[str], empty: set[str], known: ClassList | None, ignored: _Ignored
) -> tuple[dict[str, int], tuple[str, ...]]:
    if not names:
        ignored.words.append(
            "the images lie in no class folders and have no labels; a .csv of image_path and label "
            "gives them"
        )
        return {}, () if known is None else known.names
    counted = names
    if empty:
        # An empty folder is a class when it takes all of them to make up the model's classes.
        is_class = known is not None and known.count == len(names | empty)
        counted = names | empty if is_class else names
        ignored.words.append(f"{len(empty):,} folders hold no image")
    index, how = index_of(sorted(counted), known)
    ignored.words.append(how)
    if known is not None and known.names:
        return index, known.names
    count = max(index.values()) + 1
    by_index = {number: name for name, number in index.items()}
    return index, tuple(by_index.get(number, str(number)) for number in range(count))


def _source(found: Classes, index: dict[str, int]) -> Source:
    paths = [path for name in sorted(found) for path in found[name]]
    labels = [index.get(name) for name in sorted(found) for _ in found[name]]

    def get(position: int) -> Sample:
        return Sample(inputs={UNNAMED: Path(paths[position])}, label=labels[position])

    return Source(
        length=len(paths),
        get=get,
        stream=lambda: (get(position) for position in range(len(paths))),
        is_threadsafe=True,
    )


def _unwrap(path: Path, ignored: _Ignored) -> Path:
    """The folder below those that hold one folder of folders, as archives often unpack."""
    for _ in range(MAX_WRAPPERS):
        listing = _list(path, _Ignored())
        if listing.images or len(listing.folders) != 1:
            break
        inner = path / listing.folders[0]
        is_part = listing.folders[0].lower() in PART_NAMES
        if is_part or not _list(inner, _Ignored()).folders:
            break
        path = inner
    return path


def _split_folders(top: Path, ignored: _Ignored) -> dict[str, list[Path]]:
    """Folders by part; the top itself as ``all`` when its folders are classes, or it has none."""
    listing = _list(top, _Ignored())
    named = [name for name in listing.folders if name.lower() in PART_NAMES]
    others = [name for name in listing.folders if name.lower() not in PART_NAMES]
    # A class may be called train: such a folder holds images, beside others that are no parts.
    has_classes = any(_list(top / name, _Ignored()).folders for name in named)
    if not named or (others and not has_classes):
        return {"all": [top]}
    _list(top, ignored)
    ignored.num_loose += len(listing.images)
    if others:
        ignored.words.append(f"folders beside {', '.join(named)} left out: {', '.join(others)}")
    splits: dict[str, list[Path]] = {}
    for name in named:
        splits.setdefault(PART_NAMES[name.lower()], []).append(top / name)
    return splits


def _classes(folder: Path, ignored: _Ignored, empty: set[str]) -> Classes:
    listing = _list(folder, ignored)
    folders = listing.folders
    if len(folders) == 1 and folders[0].lower() in FLAT_NAMES and not listing.images:
        return _classes(folder / folders[0], ignored, empty)
    found: Classes = {}
    for name in folders:
        images = _below(folder / name, ignored)
        if images:
            found[name] = images
        else:
            empty.add(name)
    if found:
        ignored.num_loose += len(listing.images)
        return found
    return {"": [str(folder / name) for name in listing.images]} if listing.images else {}


def _below(folder: Path, ignored: _Ignored, above: frozenset[str] = frozenset()) -> list[str]:
    """All images at any depth, sorted by path; links that lead back up are not followed."""
    place = os.path.realpath(folder)
    if place in above:
        return []
    listing = _list(folder, ignored)
    found = [os.path.join(folder, name) for name in listing.images]
    for name in listing.folders:
        found += _below(folder / name, ignored, above | {place})
    return sorted(found)


def _list(folder: Path, ignored: _Ignored) -> _Listing:
    folders: list[str] = []
    images: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    ignored.num_hidden += not entry.is_dir()
                elif entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    images.append(entry.name)
                else:
                    ignored.num_others += 1
    except OSError as error:
        raise DataError(
            f"The folder {str(folder)!r} can't be listed ({error.strerror}); check the path and "
            "its permissions."
        ) from None
    return _Listing(folders=tuple(sorted(folders)), images=tuple(sorted(images)))


def _merge(into: Classes, found: Classes) -> None:
    for name, paths in found.items():
        into.setdefault(name, []).extend(paths)


def _labelled_only(parts: dict[str, Classes], ignored: _Ignored) -> dict[str, Classes]:
    """Without parts that have no classes while others do, such as ImageNet's test images."""
    bare = [part for part, found in parts.items() if set(found) == {""}]
    if not bare or len(bare) == len(parts):
        return parts
    ignored.words.append(f"parts without class folders left out: {', '.join(bare)}")
    return {part: found for part, found in parts.items() if part not in bare}


def _no_images(path: Path, ignored: _Ignored) -> str:
    seen: Sequence[str] = ignored.notes()
    words = f" ({seen[0]})" if seen else ""
    return (
        f"The folder {str(path)!r} holds no image{words}; give a folder of class/image, or of "
        f"split/class/image, with names ending in {', '.join(IMAGE_SUFFIXES[:5])}, ..."
    )
