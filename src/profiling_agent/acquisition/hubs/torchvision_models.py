"""torchvision's classifiers by name, with the transform and the classes of their weights enum."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from profiling_agent.acquisition.hubs.calls import (
    first_sentence,
    import_library,
    is_reachable,
    quiet,
    seeded,
    suggestion,
)
from profiling_agent.acquisition.hubs.found import RANDOM_WEIGHTS, FoundModel
from profiling_agent.acquisition.hubs.heads import last_layer, num_classes_in, readings
from profiling_agent.acquisition.hubs.imagenet import ids_of
from profiling_agent.acquisition.weights import load_weights
from profiling_agent.errors import ModelError
from profiling_agent.records.workload import ImageTransform

# Heads that only training uses; torchvision drops them from its pretrained models, whose weights
# came from TensorFlow and expect inputs of another range, which transform_input sees to.
AUXILIARY_HEADS: Mapping[str, tuple[str, ...]] = {
    "googlenet": ("aux1", "aux2"),
    "inception_v3": ("AuxLogits",),
}


def find(name: str, weights: str | None = None) -> FoundModel:
    """The classifier ``torchvision:name``; its best weights, or ``name.IMAGENET1K_V1`` by tag.

    ``weights`` None takes the pretrained ones, ``random`` draws them, a path reads the file, whose
    number of classes the head then has. Raises ``ModelError``, ``MissingDependency``.
    """
    models = import_library("torchvision", "torchvision").models
    architecture, _, tag = name.partition(".")
    _check_name(models, architecture)
    entry = _weights_entry(models, architecture, tag)
    notes: tuple[str, ...] = ()
    if weights is None:
        module = _pretrained(models, architecture, entry)
    elif weights == RANDOM_WEIGHTS:
        module = _create(models, architecture, **_inference_only(architecture))
    else:
        module, notes = _from_file(models, architecture, Path(weights))
    image, normalisation = _preset(entry)
    categories = tuple(entry.meta.get("categories") or ())
    if len(categories) != _num_classes(module):
        categories = ()
    return FoundModel(
        module=module,
        image=image,
        normalisation=normalisation,
        class_names=categories,
        class_ids=ids_of(categories),
        notes=notes,
    )


def _check_name(models: Any, name: str) -> None:
    classifiers = models.list_models(module=models)
    if name in classifiers:
        return
    if name in models.list_models():
        kind = models.get_model_builder(name).__module__.split(".")[2]
        raise ModelError(
            f"'torchvision:{name}' is from torchvision.models.{kind} and no plain classifier of "
            "images; write a factory and a metric, and pass 'model.py:factory' and --metric "
            "'metric.py:function'."
        )
    raise ModelError(
        f"torchvision has no model {name!r}. {suggestion(name, classifiers)}"
        "torchvision.models.list_models() lists them."
    )


def _weights_entry(models: Any, name: str, tag: str) -> Any:
    entries = models.get_model_weights(name)
    if not tag:
        return entries.DEFAULT
    if tag in entries.__members__:
        return entries[tag]
    raise ModelError(
        f"torchvision has no weights {tag!r} for {name!r}; it has "
        f"{', '.join(repr(each.name) for each in entries)}."
    )


def _create(models: Any, name: str, **options: Any) -> nn.Module:
    with seeded(), quiet():
        return models.get_model(name, weights=None, **options)


def _inference_only(name: str) -> dict[str, Any]:
    if name not in AUXILIARY_HEADS:
        return {}
    return {"aux_logits": False, "transform_input": True, "init_weights": True}


def _pretrained(models: Any, name: str, entry: Any) -> nn.Module:
    file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url))
    if not file.is_file() and not is_reachable(entry.url):
        raise ModelError(
            f"The pretrained weights of 'torchvision:{name}' ({file.name}) are not in the cache of "
            "this machine and no network is reachable; pass --weights FILE, or --weights random "
            "for random ones."
        )
    try:
        with quiet():
            # torch.hub would unpickle anything; get_model below finds the file in its cache.
            entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
            return models.get_model(name, weights=entry, progress=False)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # the download, or a damaged cache
        raise ModelError(
            f"The pretrained weights of 'torchvision:{name}' can't be had "
            f"({first_sentence(error)}); pass --weights FILE, or --weights random for random ones."
        ) from error


def _from_file(models: Any, name: str, path: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The architecture with the weights of the file, its head as wide as theirs."""
    options = _inference_only(name)
    heads = AUXILIARY_HEADS.get(name, ())
    has_auxiliary = bool(heads) and any(_has_part(state, heads[0]) for state in readings(path))
    if has_auxiliary:
        options["aux_logits"] = True
    module = _create(models, name, **options)
    classes = num_classes_in(path, (last_layer(module),))
    notes: list[str] = []
    if classes not in (None, _num_classes(module)):
        module = _create(models, name, num_classes=classes, **options)
        notes.append(f"the head was built for the {classes:,} classes of the weights file")
    notes.extend(load_weights(module, path))
    if has_auxiliary:
        _drop(module, heads)
        notes.append("the auxiliary heads, which only training uses, were left out")
    return module, tuple(notes)


def _has_part(state: Mapping[str, Any], part: str) -> bool:
    return any(key.startswith(f"{part}.") for key in state)


def _drop(module: Any, heads: tuple[str, ...]) -> None:
    module.aux_logits = False
    for head in heads:
        setattr(module, head, None)


def _num_classes(module: nn.Module) -> int:
    layer = module.get_submodule(last_layer(module))
    return int(layer.weight.shape[0])  # pyright: ignore[reportIndexIssue, reportArgumentType]


def _preset(entry: Any) -> tuple[ImageTransform, dict[str, Any]]:
    """The transform of the weights; all classifiers of torchvision have the same kind."""
    preset = entry.transforms()
    side = int(preset.crop_size[0])
    source = f"torchvision's {entry}"
    image = ImageTransform(
        resize=int(preset.resize_size[0]),
        crop=(side, side),
        interpolation=preset.interpolation.value,
        source=source,
    )
    normalisation = {
        "scale": 1 / 255,
        "mean": tuple(float(value) for value in preset.mean),
        "std": tuple(float(value) for value in preset.std),
        "source": source,
    }
    return image, normalisation
