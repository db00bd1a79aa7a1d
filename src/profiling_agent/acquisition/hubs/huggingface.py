"""Hugging Face models, from the hub or a folder, with their image processor or tokenizer.

The head must be a classifier's, for other tasks have no accuracy; they go through a factory of the
user's and a metric. Code from a repository runs only when the user trusts it by name. What is in a
folder or the cache is never fetched again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from profiling_agent.acquisition.hubs.calls import (
    first_sentence,
    import_library,
    quiet,
    reaches_hub,
    seeded,
)
from profiling_agent.acquisition.hubs.found import RANDOM_WEIGHTS, FoundModel
from profiling_agent.acquisition.hubs.heads import readings
from profiling_agent.acquisition.hubs.image_processors import translate
from profiling_agent.acquisition.hubs.imagenet import ids_of
from profiling_agent.acquisition.hubs.text_tokenizers import (
    DEFAULT_MAX_LENGTH,
    ModelTokenizer,
    give_padding,
    is_empty,
    stated_length,
)
from profiling_agent.acquisition.weights import load_weights
from profiling_agent.errors import MissingDependency, ModelError, ProfilingAgentError

T = TypeVar("T")

IMAGE = "AutoModelForImageClassification"
TEXT = "AutoModelForSequenceClassification"
_MARKS = {"ForImageClassification": IMAGE, "ForSequenceClassification": TEXT}
_FILES = {
    "image processor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
}
_UNNAMED = re.compile(r"LABEL_\d+")


def find(name: str, weights: str | None = None, *, trust_remote_code: bool = False) -> FoundModel:
    """The classifier of a local folder, or of a hub repository such as ``owner/name``.

    ``weights`` None takes those of the repository, ``random`` draws them for its configuration, a
    path reads the file. Raises ``ModelError``, ``MissingDependency``.
    """
    transformers = import_library("transformers", "hf")
    place = _Repository(name=_resolve(name), is_trusted=trust_remote_code)
    with place.explaining("configuration (config.json)"):
        config = place.read(transformers.AutoConfig.from_pretrained)
    # timm states the classes in two places and the wrapper around its models takes only one.
    (getattr(config, "model_args", None) or {}).pop("num_classes", None)
    head = _head(transformers, config, place)
    module, notes = _module(getattr(transformers, head), config, place, weights)
    names = _class_names(config)
    known = {"module": module, "class_names": names, "class_ids": ids_of(names)}
    notes = [*notes, *_task_notes(config)]
    if head == TEXT:
        tokenizer, remarks = _tokenizer(transformers, place, module)
        return FoundModel(**known, tokenizer=tokenizer, notes=(*notes, *remarks))
    _check_takes_images(module, place)
    processor = _optional(place, "image processor", transformers.AutoImageProcessor.from_pretrained)
    if processor is None:
        missing = "the model has no image processor: state --resize, --crop, --mean and --std"
        return FoundModel(**known, notes=(*notes, missing))
    with quiet():
        found = translate(processor)
    return FoundModel(
        **known,
        image=found.image,
        normalisation=found.normalisation,
        notes=(*notes, *found.notes),
    )


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """Where the parts of a model are: a folder, or a repository with its cache here."""

    name: str
    is_trusted: bool

    @cached_property
    def is_folder(self) -> bool:
        return Path(self.name).is_dir()

    @cached_property
    def is_within_reach(self) -> bool:
        return not self.is_folder and reaches_hub()

    def read(self, load: Callable[..., T], **options: Any) -> T:
        """What the library loads from here; from the cache, and by network only if that fails."""
        options["trust_remote_code"] = self.is_trusted
        with quiet():
            try:
                return load(self.name, local_files_only=True, **options)
            except (OSError, ValueError):
                if not self.is_within_reach:
                    raise
            return load(self.name, **options)

    @contextmanager
    def explaining(self, part: str) -> Iterator[None]:
        """Turn what the library raises about a part into ``ModelError`` or its kin."""
        try:
            yield
        except ProfilingAgentError:
            raise
        except ImportError as error:
            raise MissingDependency(
                f"'hf:{self.name}' needs a package that is not installed: "
                f"{first_sentence(error)}; install it, or pass a factory 'model.py:factory'."
            ) from error
        except Exception as error:  # whatever the library or the repository's code may raise
            raise ModelError(self._explanation(part, error)) from error

    def _explanation(self, part: str, error: Exception) -> str:
        what = f"'hf:{self.name}'"
        if "trust_remote_code" in str(error):
            return (
                f"{what} brings its own code, which is not run unless you ask; read it, then pass "
                "--trust-remote-code."
            )
        if self.is_folder or self.is_within_reach or not isinstance(error, OSError):
            return (
                f"The {part} of {what} can't be used ({first_sentence(error)}); pass a folder made "
                "by model.save_pretrained, or a factory 'model.py:factory'."
            )
        also = ", --weights FILE, or --weights random" if part == "weights" else ""
        return (
            f"{what} is no folder, the cache of this machine lacks its {part}, and no network is "
            f"reachable; pass a local folder as 'hf:path/to/folder'{also}."
        )


def _resolve(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"'hf:{name}' looks like a folder and there is none; pass 'hf:path/to/folder' with "
            "config.json in it, or a repository as 'hf:owner/name'."
        )
    return name


def _head(transformers: Any, config: Any, place: _Repository) -> str:
    """Which of the two auto classes builds it, by the architecture that the configuration names."""
    stated = tuple(getattr(config, "architectures", None) or ())
    for mark, head in _MARKS.items():
        if any(mark in architecture for architecture in stated):
            return head
    if not stated:
        if type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            return IMAGE
        if type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return TEXT
    kind = stated[0] if stated else getattr(config, "model_type", "model")
    raise ModelError(
        f"'hf:{place.name}' is a {kind!r} and no classifier of images or texts; write a factory "
        "and a metric, and pass 'model.py:factory' and --metric 'metric.py:function'."
    )


def _module(
    auto: Any, config: Any, place: _Repository, weights: str | None
) -> tuple[nn.Module, list[str]]:
    if weights is None:
        with place.explaining("weights"), seeded():
            module, report = place.read(
                auto.from_pretrained,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below, by key and shape
            )
        return module, _loading_notes(report, place)
    with place.explaining("architecture"), seeded(), quiet():
        module = auto.from_config(config, trust_remote_code=place.is_trusted)
    module.float().eval()
    return (module, []) if weights == RANDOM_WEIGHTS else _with_file(module, Path(weights))


def _loading_notes(report: dict[str, Any], place: _Repository) -> list[str]:
    """What didn't fit; ``ModelError`` for tensors of the model that chance has filled."""
    faults = [repr(key) for key in sorted(report.get("missing_keys") or ())]
    mismatched: Any = report.get("mismatched_keys") or ()
    for key, stored, wanted in sorted(mismatched):
        faults.append(f"{key!r} (file {tuple(stored)}, model {tuple(wanted)})")
    if faults:
        raise ModelError(
            f"The weights of 'hf:{place.name}' lack {len(faults)} tensors of the classifier: "
            f"{', '.join(faults[:5])}; train it and save it, or pass --weights FILE."
        )
    unused = sorted(report.get("unexpected_keys") or ())
    if not unused:
        return []
    shown = ", ".join(repr(key) for key in unused[:3])
    return [f"{len(unused)} tensors of the weights have no place in the model ({shown})"]


def _with_file(module: Any, path: Path) -> tuple[nn.Module, list[str]]:
    """Weights by the module's own names, or by those that the library saves under.

    transformers renames parts of old architectures when it loads and names them back when it saves.
    """
    try:
        return module, list(load_weights(module, path))
    except ModelError:
        for state in readings(path):
            renamed = _renamed(module, state)
            if renamed is not None:
                return renamed, []
        raise


def _renamed(module: Any, state: dict[str, Any]) -> nn.Module | None:
    with quiet(), seeded():
        try:
            loaded, report = type(module).from_pretrained(
                None, config=module.config, state_dict=dict(state), output_loading_info=True
            )
        except Exception:  # shapes that don't fit end in several kinds of errors of the library
            return None
    faults = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return None if any(report.get(fault) for fault in faults) else loaded.float()


def _check_takes_images(module: nn.Module, place: _Repository) -> None:
    first = next(iter(inspect.signature(module.forward).parameters), "")
    if first not in ("pixel_values", "inputs"):
        raise ModelError(
            f"'hf:{place.name}' takes {first!r} first and not an image; write a factory and pass "
            "'model.py:factory'."
        )


def _optional(place: _Repository, part: str, load: Callable[..., T]) -> T | None:
    """A part that a model may lack; ``ModelError`` when it is there and damaged."""
    with place.explaining(part):
        try:
            return place.read(load)
        except (OSError, ValueError) as error:
            is_there = any(Path(place.name, file).is_file() for file in _FILES[part])
            if is_there or "trust_remote_code" in str(error):
                raise
            return None


def _tokenizer(
    transformers: Any, place: _Repository, module: nn.Module
) -> tuple[ModelTokenizer | None, list[str]]:
    tokenizer = _optional(place, "tokenizer", transformers.AutoTokenizer.from_pretrained)
    if tokenizer is None or is_empty(tokenizer):
        return None, ["the model has no tokenizer: texts can't be read, only arrays of tokens"]
    notes = list(give_padding(tokenizer, module))
    stated = stated_length(tokenizer, module)
    if stated > DEFAULT_MAX_LENGTH:
        notes.append(
            f"the model takes up to {stated:,} tokens; texts are cut at {DEFAULT_MAX_LENGTH} "
            "unless --max-length says otherwise"
        )
    return ModelTokenizer(tokenizer, module), notes


def _class_names(config: Any) -> tuple[str, ...]:
    """Names by index; () when they are only numbers, as where nobody named the classes."""
    named = {int(index): str(label) for index, label in (config.id2label or {}).items()}
    if sorted(named) != list(range(len(named))):
        return ()
    names = tuple(named[index] for index in range(len(named)))
    return () if all(_UNNAMED.fullmatch(name) for name in names) else names


def _task_notes(config: Any) -> list[str]:
    problem = getattr(config, "problem_type", None)
    if config.num_labels == 1 or problem in ("regression", "multi_label_classification"):
        kind = problem or "regression"
        return [f"the configuration states {kind}: accuracy is not its measure, pass --metric"]
    return []
