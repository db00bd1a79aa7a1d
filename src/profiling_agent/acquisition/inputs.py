"""The input shape resolver: what the model's forward takes, proven by calling it.

From a data sample when there is one; otherwise from what the model states about itself, otherwise
by trying likely shapes. Nothing is believed until forward has run with one and with two samples.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from profiling_agent.acquisition.data import UNNAMED
from profiling_agent.acquisition.preprocess import preprocess
from profiling_agent.acquisition.workload import compute_logits, compute_output
from profiling_agent.errors import DataError, ModelError
from profiling_agent.records.workload import InputSpec, Preprocessing

RULES = ("configuration", "probing")
"""What finds shapes by itself: one of these that forward takes, to no good end, ends the search."""
SIDES = (224, 32, 28, 64, 96, 128, 256, 384)
LENGTHS = (16, 32, 64, 128)
CONFIGURATIONS = ("pretrained_cfg", "default_cfg", "config", "cfg")
FLOATS_NOTE = (
    "the inputs are taken as preprocessed already; the mean, std and scale stated with them are "
    "not applied (state a layout to have them applied)"
)
MAX_CHANNELS = 4
MAX_COMBINED = 4

Layout = Literal["none", "hw", "hwc", "chw"]


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Inputs that forward was seen to take, and how many values came out for a sample."""

    inputs: tuple[InputSpec, ...]
    preprocessing: Preprocessing
    output_shape: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An input that forward did not take, and what it said."""

    spec: InputSpec
    error: str


Suggest = Callable[[nn.Module, Sequence[Tried]], Sequence[InputSpec]]
"""Further inputs to try where the rules' own have all failed."""


# --- with data ---


def resolve_from_data(
    model: nn.Module,
    samples: Sequence[Mapping[str, np.ndarray]],
    stated: Mapping[str, Any],
    *,
    wants_classes: bool = True,
) -> tuple[Resolved, dict[str, str]]:
    """Inputs from one or two raw samples, and the data's names of inputs to the model's.

    ``stated`` is the preprocessing that holds (mean, std, scale, layout, source). Raises
    ``DataError`` when names or the preprocessing don't fit, ``ModelError`` when forward refuses the
    data or, with ``wants_classes``, gives no logits.
    """
    names = match_names(model, list(samples[0]))
    # One sample twice does as well: only the batch's size matters.
    pair = [samples[0], samples[-1]]
    if any(one[k].shape != samples[0][k].shape for one in pair for k in samples[0] if k in one):
        pair = [samples[0], samples[0]]
    raw = {new: np.stack([each[old] for each in pair]) for old, new in names.items()}
    first = next(iter(names.values()))
    preprocessing, notes = settle_preprocessing(raw[first][0], stated)
    failure: Exception | None = None
    specs: tuple[InputSpec, ...] = ()
    for dtypes in _dtype_choices(raw, preprocessing):
        specs = _with_shapes(_specs(raw, dtypes), raw, preprocessing)
        try:
            shape = prove(model, _tensors(raw, specs, preprocessing), wants_classes=wants_classes)
        except ModelError:
            raise
        except Exception as error:  # whatever the user's forward raises
            failure = failure or error
            continue
        resolved = Resolved(
            inputs=specs, preprocessing=preprocessing, output_shape=shape, notes=notes
        )
        return resolved, names
    assert failure is not None
    shapes = ", ".join(f"{spec.name} {(2, *spec.shape)} {spec.dtype}" for spec in specs)
    raise ModelError(
        f"The model's forward fails on the data ({shapes}) with {type(failure).__name__}: "
        f"{_first_line(failure)}. Give data in the shape the model was trained on."
    ) from failure


def match_names(model: nn.Module, names: list[str]) -> dict[str, str]:
    """The data's names of inputs to forward's, in the order of forward's parameters.

    A single input is passed by position and may have any name; several must be forward's own,
    otherwise ``DataError`` names both.
    """
    parameters, takes_any = forward_parameters(model)
    if len(names) == 1:
        fallback = parameters[0] if parameters else "x"
        name = names[0]
        return {name: name if name != UNNAMED and name.isidentifier() else fallback}
    unknown = [name for name in names if name not in parameters]
    if unknown and not takes_any:
        raise DataError(
            f"The data have the inputs {names}, but the model's forward takes {parameters}; give "
            "the data's entries the names of forward's parameters and leave out the others."
        )
    known = [name for name in parameters if name in names]
    return {name: name for name in [*known, *unknown]}


def forward_parameters(model: nn.Module) -> tuple[list[str], bool]:
    """Names of forward's parameters, and whether it takes any keyword."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return [], True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    return [each.name for each in parameters if each.kind in named], takes_any


def settle_preprocessing(
    sample: np.ndarray, stated: Mapping[str, Any]
) -> tuple[Preprocessing, tuple[str, ...]]:
    """Preprocessing of the first input: as stated, completed by what the raw sample shows.

    Bytes with two or three axes are images: their layout is inferred and the scale is 1/255 when
    none is stated. Floats are taken as preprocessed already, unless a layout is stated.
    """
    unknown = sorted(set(stated) - {"mean", "std", "scale", "layout", "source"})
    if unknown:
        raise DataError(
            f"The preprocessing has unknown entries {unknown}; known: mean, std, scale, layout."
        )
    mean, std = _floats(stated.get("mean")), _floats(stated.get("std"))
    layout = stated.get("layout")
    if layout not in (None, "none", "hw", "hwc", "chw"):
        raise DataError(f"The layout {layout!r} is unknown; state 'hw', 'hwc', 'chw' or 'none'.")
    notes: list[str] = []
    if layout is None:
        layout = infer_layout(sample.shape) if sample.dtype == np.uint8 else "none"
    if layout == "none":
        if mean or std or _floats(stated.get("scale")) not in ((), (1.0,)):
            notes.append(FLOATS_NOTE)
        return Preprocessing(layout="none", source="none applied"), tuple(notes)
    scales = _floats(stated.get("scale"))
    scale = scales[0] if scales else 1 / 255 if sample.dtype == np.uint8 else 1.0
    if not mean and not std:
        notes.append(
            f"no mean and std were stated: images are only scaled by {scale:.6g}; if the model was "
            "trained with others, state them with the data"
        )
    channels = _num_channels(sample.shape, layout)
    for name, values in (("mean", mean), ("std", std)):
        if values and len(values) not in (1, channels):
            raise DataError(
                f"{name!r} has {len(values)} values, but the images have {channels} channels."
            )
    if any(value == 0 for value in std) or not np.isfinite([*mean, *std, scale]).all():
        raise DataError(f"The mean {mean}, std {std} and scale must be finite and std not zero.")
    return (
        Preprocessing(
            layout=cast(Layout, layout),
            scale=scale,
            mean=mean,
            std=std,
            source=str(stated.get("source", "stated with the data" if mean or std else "inferred")),
        ),
        tuple(notes),
    )


def infer_layout(shape: tuple[int, ...]) -> str:
    """Layout of a raw image of bytes; ``none`` when it has not two or three axes."""
    if len(shape) == 2:
        return "hw"
    if len(shape) != 3:
        return "none"
    if shape[-1] <= MAX_CHANNELS:
        return "hwc"
    return "chw" if shape[0] <= MAX_CHANNELS or shape[0] < shape[-1] else "hwc"


# --- without data ---


def resolve_without_data(
    model: nn.Module,
    *,
    likely: tuple[int, ...] | None = None,
    wants_classes: bool = True,
    suggest: Suggest | None = None,
) -> Resolved:
    """Inputs from the model's configuration or by probing, proven by forward.

    ``likely`` is the shape that the model's library states, tried first; ``suggest`` is asked when
    nothing else works, and believed as little.

    Raises ``ModelError`` that quotes the model's own last exception when nothing works.
    """
    parameters, _ = forward_parameters(model)
    default = parameters[0] if parameters else "x"
    failure: Exception | None = None
    tried: list[Tried] = []

    def suggested() -> Iterator[InputSpec]:
        yield from suggest(model, tuple(tried)) if suggest is not None else ()

    for spec in itertools.chain(_candidates(model, default, likely), suggested()):
        try:
            values = random_input(model, spec, 2, seed=0)
            shape = prove(model, {spec.name: values}, wants_classes=wants_classes)
        except Exception as error:  # whatever the user's forward raises
            if isinstance(error, ModelError) and spec.found_by in RULES:
                raise
            failure = failure or error
            tried.append(Tried(spec=spec, error=f"{type(error).__name__}: {_first_line(error)}"))
            continue
        note = f"the input shape {spec.shape} was found by {spec.found_by}; pass data to be sure"
        return Resolved(
            inputs=(spec,), preprocessing=Preprocessing(), output_shape=shape, notes=(note,)
        )
    shapes = ", ".join(str(each.spec.shape) for each in tried)
    reason = (
        "it has no convolution, linear or embedding layer to start from"
        if not tried
        else f"tried {shapes}; the first failed with {tried[0].error}"
    )
    raise ModelError(
        f"The model's input shape could not be found: {reason}. Pass data, or give the model a "
        "'default_cfg' with 'input_size'."
    ) from failure


def random_input(model: nn.Module, spec: InputSpec, num_samples: int, seed: int) -> Tensor:
    """Standard normal values, or tokens the model knows when the input is of integers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_samples, *spec.shape)
    if spec.dtype == "float32":
        return torch.randn(shape, generator=generator)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return torch.randint(0, sizes[0] if sizes else 2, shape, generator=generator)


def _candidates(model: nn.Module, name: str, likely: tuple[int, ...] | None) -> Iterator[InputSpec]:
    for shape in [*([likely] if likely else []), *_configured_shapes(model)]:
        yield InputSpec(name=name, shape=shape, dtype="float32", found_by="configuration")
    first = next(
        (
            m
            for m in model.modules()
            if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear | nn.Embedding)
        ),
        None,
    )
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, nn.Conv2d):
        shapes = [(first.in_channels, side, side) for side in SIDES]
    elif isinstance(first, nn.Conv1d):
        shapes = [(first.in_channels, length) for length in (*LENGTHS, 256, 1024)]
    elif isinstance(first, nn.Linear):
        shapes = [(first.in_features,), *_foldings(first.in_features), (16, first.in_features)]
    elif isinstance(first, nn.Embedding):
        shapes = [(length,) for length in LENGTHS]
    dtype = "int64" if isinstance(first, nn.Embedding) else "float32"
    for shape in shapes:
        yield InputSpec(name=name, shape=shape, dtype=dtype, found_by="probing")


def _foldings(features: int) -> Iterator[tuple[int, ...]]:
    """Square images that flatten to so many features."""
    for channels in (1, 3):
        side = round((features / channels) ** 0.5)
        if channels * side * side == features:
            yield (channels, side, side)


def _configured_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    for holder in [getattr(model, name, None) for name in CONFIGURATIONS] + [model]:
        if holder is None:
            continue
        size = _entry(holder, "input_size")
        if isinstance(size, tuple | list) and all(isinstance(each, int) for each in size):
            yield tuple(size)
        side = _entry(holder, "image_size", "img_size")
        channels = _entry(holder, "num_channels", "in_chans", "in_channels")
        sides = (side, side) if isinstance(side, int) else side
        if isinstance(sides, tuple | list) and len(sides) == 2:
            yield (channels if isinstance(channels, int) else 3, *map(int, sides))


def _entry(holder: Any, *names: str) -> Any:
    for name in names:
        value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
        if value is not None:
            return value
    return None


# --- proof ---


@torch.no_grad()  # inference mode would taint what a forward caches, and repair needs gradients
def prove(
    model: nn.Module, inputs: Mapping[str, Tensor], *, wants_classes: bool = True
) -> tuple[int, ...]:
    """Call forward with the first sample and with both of ``inputs``; the shape for one sample.

    The model's own exceptions pass through; ``ModelError`` when the output is not finite floats
    (batch, ...), or with ``wants_classes`` not logits (batch, classes).
    """
    shape: tuple[int, ...] = ()
    for size in (1, 2):
        batch = {name: x[:size] for name, x in inputs.items()}
        logits = compute_logits(model, batch) if wants_classes else compute_output(model, batch)
        found = tuple(logits.shape)
        if wants_classes and (logits.ndim != 2 or found[0] != size or found[1] < 2):
            raise ModelError(
                f"The model's output for {size} samples has the shape {found}; it must be logits "
                "(batch, classes) with at least two classes. For any other task pass a metric of "
                "your own: --metric path/file.py:function."
            )
        if not found or found[0] != size or (shape and found[1:] != shape):
            raise ModelError(
                f"The model's output for {size} samples has the shape {found}; it must be one "
                "tensor (batch, ...) whose other axes are always the same."
            )
        if not logits.is_floating_point() or not bool(torch.isfinite(logits).all()):
            raise ModelError(
                "The model's output on the first samples is not finite floats; check the weights "
                "and the preprocessing."
            )
        shape = found[1:]
    return shape


def _dtype_choices(
    raw: Mapping[str, np.ndarray], preprocessing: Preprocessing
) -> Iterator[dict[str, str]]:
    """Floats stay float32 and bools bool; integers are tokens first, then numbers.

    Up to four inputs of integers are tried in all combinations, more in one way for all.
    """
    known = {
        name: {"f": "float32", "b": "bool"}.get(array.dtype.kind) for name, array in raw.items()
    }
    if preprocessing.layout != "none":
        known[next(iter(raw))] = "float32"
    open_ = [name for name, dtype in known.items() if dtype is None]
    kinds = ("int64", "float32")
    ways = (
        itertools.product(kinds, repeat=len(open_))
        if len(open_) <= MAX_COMBINED
        else ((kind,) * len(open_) for kind in kinds)
    )
    for way in ways:
        chosen = dict(zip(open_, way, strict=True))
        yield {name: dtype or chosen[name] for name, dtype in known.items()}


def _specs(raw: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> tuple[InputSpec, ...]:
    return tuple(
        InputSpec(name=name, shape=array.shape[1:], dtype=dtypes[name])
        for name, array in raw.items()
    )


def _with_shapes(
    specs: Sequence[InputSpec], raw: Mapping[str, np.ndarray], preprocessing: Preprocessing
) -> tuple[InputSpec, ...]:
    """The specs with the shapes that forward sees, which the layout changes."""
    arrays = preprocess(raw, specs, preprocessing)
    return tuple(spec.model_copy(update={"shape": arrays[spec.name].shape[1:]}) for spec in specs)


def _tensors(
    raw: Mapping[str, np.ndarray], specs: Sequence[InputSpec], preprocessing: Preprocessing
) -> dict[str, Tensor]:
    arrays = preprocess(raw, specs, preprocessing)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _num_channels(shape: tuple[int, ...], layout: str) -> int:
    wanted = 2 if layout == "hw" else 3
    if len(shape) != wanted:
        raise DataError(f"The layout {layout!r} does not fit a sample of the shape {shape}.")
    return 1 if layout == "hw" else shape[-1] if layout == "hwc" else shape[0]


def _floats(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    return tuple(float(each) for each in np.asarray(value, dtype=np.float64).reshape(-1))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300].rstrip(".")
