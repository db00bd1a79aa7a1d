"""Weights from a file into a model, without ever running what is in the file.

Training scripts wrap their weights in many ways (``state_dict``, ``model``, the prefix
``module.`` of DataParallel, ``_orig_mod.`` of torch.compile). All common ones are understood, and
what doesn't fit is named key by key: a silent partial load would look like a bad model later.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from profiling_agent.errors import ModelError

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "ema",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
)
TRAINING_NOTE = "the model was in training mode and was put to eval mode"
PREFIXES = ("module.", "_orig_mod.", "model.")
TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """How well one reading of the file fits the model."""

    wrapper: str
    state: dict[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def num_faults(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)


def load_weights(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Load the file into the model in place; notes on what was found.

    Half-precision weights are cast. Raises ``ModelError`` when the file is missing, damaged, holds
    more than plain tensors, or its keys don't fit.
    """
    content = read_weights(path)
    target = _target_shapes(model)
    fits = [
        _fit(wrapper, variant, target, model)
        for wrapper, state in readings(content, "", 3)
        for variant in variants(state)
    ]
    if not fits:
        raise ModelError(
            f"{str(path)!r} holds no tensors by name; save model.state_dict() and pass that file."
        )
    best = min(fits, key=lambda fit: fit.num_faults)
    if best.num_faults:
        raise ModelError(_misfit_message(path, best))
    floats = {str(t.dtype) for t in best.state.values() if t.is_floating_point()}
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in best.state.items()}, strict=False
    )
    notes = [f"weights were read from the entry {best.wrapper!r}"] if best.wrapper else []
    if floats - {"torch.float32"}:
        kinds = ", ".join(sorted(name.removeprefix("torch.") for name in floats))
        notes.append(f"weights are stored as {kinds} and were cast to float32")
    return tuple(notes)


def settle(model: nn.Module) -> tuple[str, ...]:
    """Put the model to eval mode, float32, CPU, in place; notes on what was changed.

    ``requires_grad`` is kept. Raises ``ModelError`` for NaN or infinite weights and for weights
    without values (meta device).
    """
    notes: list[str] = []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if any(tensor.is_meta for _, tensor in tensors):
        raise ModelError("The model has weights without values (meta device); load them first.")
    if model.training:
        notes.append(TRAINING_NOTE)
    kinds = {str(tensor.dtype) for _, tensor in tensors if tensor.is_floating_point()}
    if kinds - {"torch.float32"}:
        notes.append("the model was cast to float32")
    model.float().cpu().eval()
    _check_finite(model)
    return tuple(notes)


def _check_finite(model: nn.Module) -> None:
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    # A buffer may hold infinities on purpose, as attention masks do.
    bad += [name for name, b in model.named_buffers() if bool(torch.isnan(b).any())]
    if bad:
        shown = ", ".join(repr(name) for name in bad[:5])
        raise ModelError(
            f"{len(bad)} weights of the model have NaN or infinite values ({shown}); "
            "pass the checkpoint of a training that did not diverge."
        )


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, types, shapes and values."""
    digest = hashlib.sha256()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"The weights {str(path)!r} don't exist; check the path after --weights.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    known = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise ModelError(f"Can't tell the format of {str(path)!r}; its name must end in {known}.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{str(path)!r} is damaged or no safetensors file ({error}); save or fetch it again."
        ) from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's making, which is not ours to change
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        if _is_refused_pickle(path, error):
            raise ModelError(
                f"{str(path)!r} holds Python objects and not only plain tensors, so it is not "
                "opened; convert it where you trust it: from safetensors.torch import save_file; "
                "save_file(model.state_dict(), 'weights.safetensors')."
            ) from None
        reason = str(error).partition(". ")[0].partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{str(path)!r} is damaged or no torch file ({reason}); save or fetch it again."
        ) from None


def _is_refused_pickle(path: Path, error: Exception) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
    if "TorchScript" in str(error):
        return True
    return isinstance(error, pickle.UnpicklingError) and (head == b"PK" or head[:1] == b"\x80")


def readings(content: Any, wrapper: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every reading of the file as tensors by name, the most direct first."""
    if not isinstance(content, Mapping):
        return
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if tensors:
        yield wrapper, tensors
    if depth == 0:
        return
    for key in WRAPPERS:
        if key in content:
            yield from readings(content[key], f"{wrapper}.{key}" if wrapper else key, depth - 1)


def variants(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state as it is, then with each common prefix taken off, one after another."""
    yield state
    pending = [state]
    for _ in range(3):
        shorter = [_strip(each, prefix) for each in pending for prefix in PREFIXES]
        pending = [each for each in shorter if each is not None]
        yield from pending
    if any("._orig_mod." in key for key in state):  # torch.compile of an inner module
        yield {key.replace("_orig_mod.", ""): value for key, value in state.items()}


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    # AveragedModel counts its updates beside the module's own keys.
    rest = {key: value for key, value in state.items() if key != "n_averaged"}
    if not rest or not all(key.startswith(prefix) for key in rest):
        return None
    return {key.removeprefix(prefix): value for key, value in rest.items()}


def _target_shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {
        key: value.shape for key, value in model.state_dict().items() if isinstance(value, Tensor)
    }


def _fit(
    wrapper: str, state: dict[str, Tensor], target: dict[str, torch.Size], model: nn.Module
) -> _Fit:
    missing = [key for key in target if key not in state]
    if missing:
        missing = [key for key in missing if not _is_dispensable(key, state, model)]
    return _Fit(
        wrapper=wrapper,
        state=state,
        missing=tuple(missing),
        unexpected=tuple(key for key in state if key not in target),
        mismatched=tuple(
            f"{key} (file {tuple(state[key].shape)}, model {tuple(shape)})"
            for key, shape in target.items()
            if key in state and state[key].shape != shape
        ),
    )


def _is_dispensable(key: str, state: dict[str, Tensor], model: nn.Module) -> bool:
    """Counters that eval mode ignores, and tied weights, which safetensors stores once."""
    if key.endswith("num_batches_tracked"):
        return True
    own = model.state_dict()
    pointer = own[key].data_ptr()
    return pointer != 0 and any(
        other in state and own[other].data_ptr() == pointer for other in own if other != key
    )


def _misfit_message(path: Path, fit: _Fit) -> str:
    kinds = (
        ("missing from the file", fit.missing),
        ("not in the model", fit.unexpected),
        ("of another shape", fit.mismatched),
    )
    parts = [f"{len(keys)} {words}: {_some(keys)}" for words, keys in kinds if keys]
    return (
        f"The weights {str(path)!r} don't fit the model: {'; '.join(parts)}. "
        "Pass weights of this architecture, or a factory that builds theirs."
    )


def _some(keys: tuple[str, ...], limit: int = 5) -> str:
    shown = ", ".join(repr(key) for key in keys[:limit])
    return shown + (", ..." if len(keys) > limit else "")
