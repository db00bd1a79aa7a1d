"""timm's models by name, with the evaluation transform of their pretrained configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from profiling_agent.acquisition.hubs.calls import (
    cache_only,
    first_sentence,
    import_library,
    quiet,
    reaches_hub,
    seeded,
    suggestion,
)
from profiling_agent.acquisition.hubs.found import RANDOM_WEIGHTS, FoundModel
from profiling_agent.acquisition.hubs.heads import last_layer, num_classes_in
from profiling_agent.acquisition.hubs.imagenet import imagenet_classes
from profiling_agent.acquisition.weights import load_weights
from profiling_agent.errors import ModelError
from profiling_agent.records.workload import ImageTransform

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def find(name: str, weights: str | None = None) -> FoundModel:
    """The classifier ``timm:name`` (a tag may follow: ``resnet50.a1_in1k``).

    ``weights`` None takes the pretrained ones, ``random`` draws them, a path reads the file, whose
    number of classes the head then has. Raises ``ModelError``, ``MissingDependency``.
    """
    timm = import_library("timm", "timm")
    if ":" not in name:  # hf-hub: and local-dir: are timm's own ways to name a place
        _check_name(timm, name, with_weights=weights is None)
    if weights is None:
        module, notes = _create(timm, name, pretrained=True), ()
    elif weights == RANDOM_WEIGHTS:
        module, notes = _create(timm, name), ()
    else:
        module, notes = _from_file(timm, name, Path(weights))
    if not getattr(module, "num_classes", 0):
        raise ModelError(
            f"'timm:{name}' has no classifier: its output are features; write a factory that adds "
            "one and pass 'model.py:factory'."
        )
    config = timm.data.resolve_model_data_config(module)
    image, normalisation, remarks = data_transform(config)
    names, ids = _classes(timm, module)
    return FoundModel(
        module=module,
        image=image,
        normalisation=normalisation,
        class_names=names,
        class_ids=ids,
        notes=(*notes, *remarks),
    )


def data_transform(
    config: Mapping[str, Any],
) -> tuple[ImageTransform, dict[str, Any], tuple[str, ...]]:
    """timm's data configuration as a transform of Pillow images and the arithmetic after it.

    As ``timm.data.create_transform(**config, is_training=False)`` does it; the notes name what
    can't be repeated exactly.
    """
    channels, height, width = config["input_size"]
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    mode = config.get("crop_mode", "center")
    keeps_ratio = mode == "center" and height == width
    stated = config["interpolation"]
    source = "timm's pretrained configuration"
    notes = []
    if not keeps_ratio and mode != "squash":
        notes.append(
            f"timm's crop mode {mode!r} at {height} x {width} is replaced by a resize that changes "
            "the aspect ratio; accuracies may differ from timm's"
        )
    image = ImageTransform(
        mode="L" if channels == 1 else "RGB",
        resize=scaled[0] if keeps_ratio else scaled,
        crop=(height, width),
        interpolation=stated if stated in INTERPOLATIONS else "bilinear",
        source=source,
    )
    normalisation = {
        "scale": 1 / 255,
        "mean": tuple(float(value) for value in config["mean"]),
        "std": tuple(float(value) for value in config["std"]),
        "source": source,
    }
    return image, normalisation, tuple(notes)


def _check_name(timm: Any, name: str, *, with_weights: bool) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        known = timm.list_models()
        raise ModelError(
            f"timm has no model {name!r}. {suggestion(architecture, known)}timm.list_models() "
            f"lists its {len(known):,} architectures."
        )
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(
            f"timm has no weights {tag!r} for {architecture!r}; it has "
            f"{', '.join(repr(each) for each in tags) or 'none'}."
        )
    if with_weights and not timm.is_model_pretrained(name):
        raise ModelError(
            f"timm has no pretrained weights for {name!r}; pass --weights FILE, or --weights "
            "random for random ones."
        )


def _create(timm: Any, name: str, **options: Any) -> nn.Module:
    """The module; from the cache of this machine if that has what is needed, else by network."""

    def create() -> nn.Module:
        with seeded(), quiet():
            return timm.create_model(name, **options)

    try:
        with cache_only():
            return create()
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        if not isinstance(error, OSError) and not _needs_network(name, options):
            raise _not_built(timm, name, error) from error
    if not reaches_hub():
        raise ModelError(
            f"The pretrained weights of 'timm:{name}' are not in the cache of this machine and "
            "no network is reachable; pass --weights FILE, or --weights random for random ones."
        )
    try:
        return create()
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise _not_built(timm, name, error) from error


def _needs_network(name: str, options: Mapping[str, Any]) -> bool:
    return bool(options.get("pretrained")) or ":" in name


def _not_built(timm: Any, name: str, error: Exception) -> ModelError:
    return ModelError(
        f"timm can't give {name!r} ({first_sentence(error)}); pass another name, or --weights FILE "
        "or --weights random."
    )


def _from_file(timm: Any, name: str, path: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The architecture with the weights of the file, its head as wide as theirs."""
    module = _create(timm, name)
    classes = num_classes_in(path, _heads(module))
    notes: list[str] = []
    if classes not in (None, getattr(module, "num_classes", None)):
        module = _create(timm, name, num_classes=classes)
        notes.append(f"the head was built for the {classes:,} classes of the weights file")
    return module, (*notes, *load_weights(module, path))


def _heads(module: nn.Module) -> tuple[str, ...]:
    """The names that the classifier's layer may have."""
    stated = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
    stated = (stated,) if isinstance(stated, str) else tuple(stated)
    return stated or (last_layer(module),)


def _classes(timm: Any, module: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and ids: those in the configuration, else those of the part of ImageNet it is for."""
    config = module.pretrained_cfg
    names = tuple(str(name) for name in config.get("label_names") or ())
    if len(names) == module.num_classes:
        return names, ()
    # The file's head may be of another task than the configuration's.
    if module.num_classes != (config.get("num_classes") or module.num_classes):
        return (), ()
    subset = timm.data.infer_imagenet_subset(module)
    if subset is None:
        return (), ()
    ids, names = imagenet_classes(subset)
    return names, ids
