"""How this room calls other libraries: quietly, from a fixed seed, never waiting for a network.

Their progress bars and warnings are held back only while they work for us and come back as they
were. Without a network the hubs retry for the better part of a minute per file; so what is on this
machine is asked for first, and the network only once something has answered there.
"""

from __future__ import annotations

import difflib
import http.client
import importlib
import logging
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from profiling_agent.acquisition.hubs.torchvision_repair import make_torchvision_importable
from profiling_agent.errors import MissingDependency

LIBRARY_LOGGERS = ("transformers", "timm", "huggingface_hub")
PATIENCE_S = 10.0
"""How long to wait for a sign of the network."""


def import_library(name: str, extra: str) -> ModuleType:
    """The library, imported without its warnings; ``MissingDependency`` with the install line."""
    make_torchvision_importable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"{name} can't be imported ({first_sentence(error)}); run "
            f"pip install 'profiling-agent[{extra}]'."
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, log lines and progress bars of the libraries, as long as it lasts."""
    loggers = [logging.getLogger(name) for name in LIBRARY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), _without_progress_bars():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    switches = [switch for switch in (_transformers_bars(), _hub_bars()) if switch is not None]
    for off, _ in switches:
        off()
    try:
        yield
    finally:
        for _, on in switches:
            on()


def _transformers_bars():
    """How to switch transformers' bars, which takes the hub's along; None when they are off."""
    try:
        from transformers.utils import logging as bars
    except ImportError:
        return None
    return (bars.disable_progress_bar, bars.enable_progress_bar) if _is_on(bars) else None


def _is_on(bars: ModuleType) -> bool:
    return bool(bars.is_progress_bar_enabled())


def _hub_bars():
    try:
        from huggingface_hub import utils
    except ImportError:
        return None
    if utils.are_progress_bars_disabled():
        return None
    return utils.disable_progress_bars, utils.enable_progress_bars


@contextmanager
def seeded() -> Iterator[None]:
    """Random weights drawn in here are the same in every process; torch's generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def cache_only() -> Iterator[None]:
    """The hub's client reads its cache in here and asks no server."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def reaches_hub() -> bool:
    """Whether the model hub answers, unless its client was told to stay offline."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and is_reachable(constants.ENDPOINT)


def is_reachable(address: str, seconds: float = PATIENCE_S) -> bool:
    """Whether anything answers at the address in time; a server's refusal is an answer."""
    answers: list[bool] = []
    # In a thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(
        target=lambda: answers.append(_answers(address, seconds)), daemon=True
    )
    thread.start()
    thread.join(seconds)
    return answers == [True]


def _answers(address: str, seconds: float) -> bool:
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException):
        return False


def first_sentence(error: BaseException) -> str:
    """The gist of another library's message, which may run over many lines."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line.partition(". ")[0].rstrip(".:") or type(error).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    """``Did you mean ...? `` with the names that come closest, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(each) for each in near)}? " if near else ""
