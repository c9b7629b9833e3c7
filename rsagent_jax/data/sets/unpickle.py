"""Reads a pickle that should hold plain data, without running anything that it asks for.

RefCOCO ships as python-2 pickles on mirrors nobody vouches for, and an ordinary `pickle.load` runs whatever such a file
says. Here a pickle may build None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset and numpy scalars
(as Python numbers). Everything else is a DataError that names what the file wanted to import.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import struct
from typing import ClassVar

import numpy as np

from rsagent_jax.types import DataError
from sam_bridge.file_kinds import HEAD, kind_of

# Opcodes that make objects from classes, ask the host program for objects, or reserve memory by a number in the file.
_REFUSED = {
    "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "BYTEARRAY8", "NEXT_BUFFER",
    "READONLY_BUFFER",
}  # fmt: skip
_REFUSED_CODES = {getattr(pickle, name)[0]: name for name in _REFUSED}
_KEY_TYPES = {str, int, float, bool, bytes, type(None)}
_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}


class _Dtype:
    """Stands in for numpy.dtype: knows one plain number type and its byte order."""

    def __init__(self, name: str, *_flags):
        if name not in _DTYPES:
            raise DataError(f"holds the numpy dtype {name!r}, only plain numbers are read")
        self.name, self.order = name, "<"

    def set_state(self, state: tuple):
        self.order = {"<": "<", ">": ">", "|": "<"}[state[1]]

    def number(self, data: bytes | str) -> bool | int | float:
        data = data.encode("latin1") if isinstance(data, str) else data  # python 2 wrote bytes as str
        return np.frombuffer(data, np.dtype(self.order + self.name), count=1)[0].item()


def _scalar(dtype: _Dtype, data: bytes | str) -> bool | int | float:
    if not isinstance(dtype, _Dtype):
        raise DataError("holds a numpy scalar without a dtype")
    return dtype.number(data)


def _bytes_from_text(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DataError(f"holds text to be encoded as {encoding!r}, only latin1 is how pickles write bytes")
    return text.encode("latin1")


def _hashable(values) -> list:
    """Sets hold plain values only: hashing a tuple nested through the memo could take for ever."""
    values = list(values)
    if not all(type(v) in _KEY_TYPES for v in values):
        raise DataError("holds a dict key or set member that is not a plain value")
    return values


_ALLOWED = {
    ("_codecs", "encode"): _bytes_from_text,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}
for _module in ("builtins", "__builtin__"):
    _ALLOWED[_module, "bytes"] = lambda: b""  # how protocols below 3 write b""
    _ALLOWED[_module, "set"] = lambda values=(): set(_hashable(values))
    _ALLOWED[_module, "frozenset"] = lambda values=(): frozenset(_hashable(values))


class _DataUnpickler(pickle._Unpickler):
    """The pure-Python unpickler: the C one reserves gigabytes on a memo index that a file makes up, and its opcodes
    cannot be taken away. It reads about 4 MB/s, a whole RefCOCO in 8 s, once per start; the C one would need 2 s."""

    def find_class(self, module: str, name: str):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(f"wants to import {module}.{name}, which plain data never does") from None

    def load_build(self):
        state, instance = self.stack.pop(), self.stack[-1]
        if not isinstance(instance, _Dtype):
            raise DataError(f"wants to set the state of a {type(instance).__name__}")
        instance.set_state(state)

    def load_setitem(self):
        _hashable(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        _hashable(self.stack[::2])  # the stack above the last mark
        super().load_setitems()

    def load_dict(self):
        _hashable(self.stack[::2])
        super().load_dict()

    def load_additems(self):
        _hashable(self.stack)
        super().load_additems()

    def load_frozenset(self):
        _hashable(self.stack)
        super().load_frozenset()

    dispatch: ClassVar[dict] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in _REFUSED_CODES
    }
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset


def loads_data(data: bytes, source: str) -> object:
    """Pickle bytes -> plain data. `source` names the file in messages. Raises DataError, and nothing else."""
    again = "Download it again from a source you trust."
    try:
        # latin1: python-2 pickles hold byte strings, and this maps every byte to a character.
        return _DataUnpickler(io.BytesIO(data), encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{source} is refused: it {error}. Nothing of it was run. {again}") from None
    except Exception as error:  # noqa: BLE001 bytes that are no pickle can raise nearly anything
        if isinstance(error, (EOFError, struct.error)) or "exhausted before end of frame" in str(error):
            raise DataError(f"{source} is cut short: it ends after {len(data)} bytes in mid-record. {again}") from None
        code = error.args[0] if isinstance(error, KeyError) and error.args else None
        if code in _REFUSED_CODES:
            why = f"it uses the pickle instruction {_REFUSED_CODES[code]}, which plain data never does"
        else:
            why = f"it starts with {data[:24]!r} ({type(error).__name__})"
        if kind := kind_of(data[:HEAD]):
            why = f"it starts with {data[:24]!r}, so it is {kind}"
        raise DataError(f"{source} is not a readable pickle: {why}. {again}") from None


def load_data(path: pathlib.Path) -> object:
    """Reads a file with `loads_data`. Raises DataError, also where the file is missing or unreadable."""
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return loads_data(data, str(path))
