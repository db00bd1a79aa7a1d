"""Arrays of an ``.npz`` file, memory-mapped."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np

from profiling_agent.acquisition.data import (
    INPUT_KEYS,
    LABEL_KEYS,
    PART_NAMES,
    UNNAMED,
    Bundle,
    array_source,
    plain,
)
from profiling_agent.errors import DataError


def open_npz(path: Path, staging: Path) -> Bundle:
    """Arrays of an ``.npz`` file, unpacked to ``staging`` and memory-mapped."""
    if not path.is_file():
        raise DataError(f"The data {str(path)!r} don't exist; check the path after --data.")
    arrays = _unpack(path, staging)
    settings = {key: arrays.pop(key) for key in ("mean", "std", "scale", "layout") if key in arrays}
    class_names = arrays.pop("class_names", None)
    groups: dict[str, dict[str, np.ndarray]] = {}
    unknown: list[str] = []
    for key, array in arrays.items():
        place = _npz_place(key)
        if place is None:
            unknown.append(key)
        else:
            groups.setdefault(place[0], {})[place[1]] = array
    _add_named_inputs(groups, {key: arrays[key] for key in unknown})
    parts = {
        part: array_source(_inputs_of(group), group.get("y"))
        for part, group in groups.items()
        if _inputs_of(group)
    }
    if not parts:
        raise DataError(
            f"{str(path)!r} has the arrays {sorted(arrays)}; it needs x and y, or x_calibration, "
            "y_calibration, x_search, y_search, x_test, y_test."
        )
    return Bundle(
        parts=parts,
        preprocessing={key: plain(value) for key, value in settings.items()},
        class_names=() if class_names is None else tuple(str(name) for name in class_names),
    )


def _unpack(path: Path, staging: Path) -> dict[str, np.ndarray]:
    staging = staging / path.stem
    staging.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            for position, name in enumerate(names):
                target = staging / f"{position}.npy"
                with archive.open(name) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file)
                arrays[name.removesuffix(".npy")] = _map_array(target, name, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(path)!r} is damaged or no .npz file ({error}).") from None
    return arrays


def _map_array(target: Path, name: str, path: Path) -> np.ndarray:
    with target.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            f"The array {name.removesuffix('.npy')!r} of {str(path)!r} holds Python objects, which "
            "would have to be unpickled; save numbers of one shape."
        )
    # Arrays without elements and scalars can't be mapped.
    small = 0 in shape or not shape
    return np.load(target, mmap_mode=None if small else "r", allow_pickle=False)


def _npz_place(key: str) -> tuple[str, str] | None:
    """The part and the role (x or y) that an array's name tells."""
    name = key.lower()
    for role, words in (("x", INPUT_KEYS), ("y", LABEL_KEYS)):
        if name in words:
            return "all", role
        for part, meant in PART_NAMES.items():
            if any(name in (f"{word}_{part}", f"{part}_{word}") for word in words):
                return meant, role
    return None


def _inputs_of(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {UNNAMED if name == "x" else name: array for name, array in group.items() if name != "y"}


def _add_named_inputs(
    groups: dict[str, dict[str, np.ndarray]], others: dict[str, np.ndarray]
) -> None:
    """Without an ``x``, arrays as long as the labels are inputs by their own names."""
    if not groups and len(others) > 1 and len({len(v) for v in others.values() if v.ndim}) == 1:
        groups["all"] = {key: v for key, v in others.items() if v.ndim}  # inputs without labels
        return
    plain = groups.get("all")
    if plain is None or "x" in plain or "y" not in plain:
        return
    plain.update({key: v for key, v in others.items() if v.ndim and len(v) == len(plain["y"])})
