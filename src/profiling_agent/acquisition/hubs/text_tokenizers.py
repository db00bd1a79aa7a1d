"""A Hugging Face tokenizer as acquisition wants it: one text to arrays of one length."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import numpy as np
from torch import nn

DEFAULT_MAX_LENGTH = 512
_UNLIMITED = 1_000_000
"""Tokenizers that know no limit state 1e30."""


class ModelTokenizer:
    """Texts, or pairs of them, to the arrays that the model's forward takes, by name.

    ``max_length`` is what tokenizer and model both bear, and never above 512 unless the caller
    asks ``encode`` for more. Safe in threads.
    """

    def __init__(self, tokenizer: Any, module: nn.Module) -> None:
        self.limit = stated_length(tokenizer, module)
        self.max_length = min(self.limit, DEFAULT_MAX_LENGTH)
        self._tokenizer = tokenizer
        taken = list(inspect.signature(module.forward).parameters)
        self._names = [name for name in taken if name in tokenizer.model_input_names]
        self._lock = threading.Lock()  # padding and truncation are a state of the fast tokenizers

    def count(self, text: str | tuple[str, str]) -> int:
        """Tokens of a text, special ones included, before any truncation."""
        with self._lock:
            encoded = self._tokenizer(*_parts(text), truncation=False, verbose=False)
        return len(encoded["input_ids"])

    def encode(self, text: str | tuple[str, str], length: int) -> dict[str, np.ndarray]:
        """Arrays int64 (length,), padded or truncated, by the names that forward takes.

        The longer text of a pair is truncated first.
        """
        with self._lock:
            encoded = self._tokenizer(
                *_parts(text),
                padding="max_length",
                truncation=True,
                max_length=length,
                return_attention_mask=True,
                verbose=False,
            )
        return {
            name: np.asarray(encoded[name], np.int64) for name in self._names if name in encoded
        }


def stated_length(tokenizer: Any, module: nn.Module) -> int:
    """The tokens that tokenizer and model both bear; 512 when neither states a limit."""
    stated = int(min(tokenizer.model_max_length or _UNLIMITED, _UNLIMITED))
    positions = _num_positions(module)
    limit = min(stated, positions or _UNLIMITED)
    return DEFAULT_MAX_LENGTH if limit >= _UNLIMITED else limit


def is_empty(tokenizer: Any) -> bool:
    """Whether it was made up from the configuration alone: it knows special tokens and no more."""
    return len(tokenizer) <= len(set(tokenizer.all_special_tokens))


def give_padding(tokenizer: Any, module: Any) -> tuple[str, ...]:
    """Settle a token to pad by, in tokenizer and configuration; batches need the same one in both.

    Decoders that were trained without padding use the token that ends a text, as is usual.
    """
    config = module.config
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        return ("the tokenizer has no token to pad by, so texts must be of one length",)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
        return (f"texts are padded by {tokenizer.pad_token!r}, as the configuration names none",)
    return ()


def _num_positions(module: Any) -> int | None:
    """What the configuration states, less the rows that RoBERTa and its kin leave unused.

    They count positions from the padding index on, so that 514 embeddings serve 512 tokens.
    """
    stated = getattr(module.config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:  # relative positions state none or -1
        return None
    for name, each in module.named_modules():
        is_positions = name.endswith("position_embeddings") and isinstance(each, nn.Embedding)
        if is_positions and each.padding_idx is not None:
            return min(stated, each.num_embeddings) - each.padding_idx - 1
    return stated


def _parts(text: str | tuple[str, str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else tuple(text)
