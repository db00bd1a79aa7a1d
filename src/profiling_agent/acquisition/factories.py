"""``path/file.py:name`` to the object behind it: the user's own code, imported once.

The file is loaded under a name of its own, so that two files called ``model.py`` don't meet, and
its folder is on ``sys.path`` meanwhile, so that the imports of its siblings work.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from profiling_agent.errors import DataError, ModelError, UserError


def split_reference(reference: str) -> tuple[Path, str] | None:
    """``path/file.py:name`` as absolute path and name; None when it doesn't have that form."""
    file, colon, name = reference.rpartition(":")
    if not colon or not file.endswith(".py") or not name:
        return None
    return Path(file).expanduser().resolve(), name


def build_model(reference: str) -> nn.Module:
    """The module that ``path/file.py:name`` stands for: a factory, a class or an instance.

    Weights that the factory draws at random are the same in every process. Raises ``ModelError``.
    """
    place = split_reference(reference)
    if place is None:
        raise ModelError(
            f"{reference!r} is not a model reference; pass 'hf:NAME', 'timm:NAME', "
            "'torchvision:NAME', 'path/file.py:factory', 'demo:vit' or 'demo:resnet'."
        )
    found = import_object(*place, ModelError)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ModelError(
            f"{reference!r} is a {type(found).__name__!r}; it must be a function that returns an "
            "nn.Module, a class of that kind, or an instance."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = call(found, reference, ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{reference!r} returned a {type(model).__name__!r}; it must return an nn.Module."
        )
    return model


def copy_live(model: nn.Module) -> nn.Module:
    """A copy of the user's live module, so that theirs stays as it is; ``ModelError`` if none."""
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the user's own __deepcopy__ may raise
        raise ModelError(
            f"The model can't be copied ({type(error).__name__}: {error}); pass "
            "'path/file.py:factory' in place of the live module."
        ) from error


def import_object(path: Path, name: str, kind: type[UserError]) -> Any:
    """The attribute ``name`` of the file; ``kind`` is raised when either is not there."""
    if not path.is_file():
        raise kind(f"The file {str(path)!r} does not exist; check the part before ':{name}'.")
    module = _import_file(path, kind)
    if hasattr(module, name):
        return getattr(module, name)
    public = [key for key in vars(module) if not key.startswith("_")]
    near = difflib.get_close_matches(name, public, n=3, cutoff=0.4) or public[:3]
    hint = f" Did you mean {' or '.join(repr(each) for each in near)}?" if near else ""
    raise kind(f"{str(path)!r} has nothing called {name!r}.{hint}")


def call(factory: Callable[[], Any], reference: str, kind: type[UserError]) -> Any:
    """What the factory returns; ``kind`` quoting its own exception when it raises."""
    try:
        with _on_path(_folder_of(reference)):
            return factory()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise kind(
            f"{reference!r} raised {type(error).__name__}: {error}. It is called without "
            "arguments; make it run alone first."
        ) from error


def _import_file(path: Path, kind: type[UserError]) -> ModuleType:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"profiling_agent_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling of the user's code look it up
    try:
        with _on_path(path.parent):
            spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        sys.modules.pop(name, None)
        raise kind(
            f"Importing {str(path)!r} raised {type(error).__name__}: {error}. "
            "Make the file importable by itself first."
        ) from error
    return module


@contextmanager
def _on_path(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _folder_of(reference: str) -> Path | None:
    place = split_reference(reference)
    return None if place is None else place[0].parent


def build_data(reference: str) -> tuple[Any, Any]:
    """What ``path/file.py:name`` gives, and the object of that name itself (for its attributes).

    Functions and classes are called; anything else is taken as it is. Raises ``DataError``.
    """
    place = split_reference(reference)
    if place is None:
        raise DataError(f"{reference!r} is not a data reference; pass 'path/file.py:factory'.")
    found = import_object(*place, DataError)
    is_factory = isinstance(found, type) or (
        callable(found) and not hasattr(found, "__getitem__") and not hasattr(found, "__iter__")
    )
    return (call(found, reference, DataError) if is_factory else found), found
