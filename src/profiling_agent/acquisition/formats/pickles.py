"""Reads pickles that hold arrays and plain containers, and nothing that could run.

A pickle names functions to call while it is loaded. Here a name is never looked up: the three that
numpy's arrays were pickled by stand for code of ours, any other is refused. Not even numpy's own
unpickling runs, which trusts what it is given.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from profiling_agent.errors import DataError

ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
DTYPES = ("u1", "i1", "i2", "i4", "i8", "f4", "f8")


def load_plain_pickle(data: bytes, name: str) -> Any:
    """Containers, numbers, strings (as bytes, when Python 2 wrote them) and numeric arrays.

    Raises ``DataError`` that names what was refused, or that the file is damaged; ``name`` is what
    the message calls it.
    """
    try:
        _check_memo(data)
        return _arrays(_Unpickler(io.BytesIO(data), encoding="bytes").load())
    except _Refused as error:
        raise DataError(
            f"{name!r} is a pickle that wants to call {str(error)!r}, which the published files "
            "never do; it was not loaded, download the archive again."
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{name!r} is damaged ({type(error).__name__}: {error}); download it again."
        ) from None


def _check_memo(data: bytes) -> None:
    """A number of a few bytes makes the unpickler reserve a memo of many gigabytes."""
    for position, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and cast(int, argument) > position:
            raise ValueError(f"the memo's entry {argument} as instruction {position}")


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name in ARRAY_MODULES and global_name == "_reconstruct":
            return _Maker(lambda *_: _Array())
        if module_name == "numpy" and global_name == "ndarray":
            return _Maker(_refuse)  # named as an argument of _reconstruct, never called
        if module_name == "numpy" and global_name == "dtype":
            return _Maker(lambda code, *_: _DType(code))
        raise _Refused(f"{module_name}.{global_name}")


class _Maker:
    """A stand-in for a function: can be called, and has nothing that a pickle could change."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function with a state")


class _DType:
    __slots__ = ("dtype",)

    def __init__(self, code: Any) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if text not in DTYPES:
            raise ValueError(f"an array of {text!r}")
        self.dtype = np.dtype(cast(str, text))

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">"):
            raise ValueError(f"the byte order {order!r}")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    __slots__ = ("array",)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, data = state
        if not isinstance(kind, _DType) or not isinstance(data, bytes):
            raise ValueError("an array that isn't numbers")
        if not all(isinstance(length, int) and length >= 0 for length in shape):
            raise ValueError(f"an array of the shape {shape}")
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise ValueError(f"an array of the shape {shape} in {len(data)} bytes")
        flat = np.frombuffer(data, kind.dtype)
        self.array = flat.reshape(shape, order="F" if is_fortran else "C")


def _refuse(*args: Any) -> Any:
    raise _Refused("numpy.ndarray")


def _arrays(value: Any) -> Any:
    """Stand-ins replaced by their arrays, in dicts of any depth."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict):
        return {key: _arrays(each) for key, each in cast(dict[Any, Any], value).items()}
    return cast(Any, value)
