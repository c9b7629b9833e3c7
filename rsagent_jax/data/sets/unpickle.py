"""Reads a pickle that should hold plain data, without running anything that it asks for.

RefCOCO ships as python-2 pickles on mirrors nobody vouches for, and an ordinary `pickle.load` runs whatever such a file
says. Here a pickle may build None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset and numpy scalars
(as Python numbers). Everything else is a DataError that names what the file wanted to import.
"""

import io
import pickle
import re
import struct
from typing import ClassVar

import numpy as np

from rsagent_jax.types import DataError
from sam_bridge.file_kinds import HEAD, kind_of

# Opcodes that make objects from classes, ask the host program for objects, or reserve memory by a number in the file.
_REFUSED = "OBJ NEWOBJ NEWOBJ_EX EXT1 EXT2 EXT4 PERSID BINPERSID BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER".split()
_REFUSED_CODES = {getattr(pickle, name)[0]: name for name in _REFUSED}


class _Dtype:
    """Stands in for numpy.dtype: one plain number type and its byte order."""

    def __init__(self, name: str, *_flags):
        if not re.fullmatch("[biuf][1248]", str(name)):
            raise DataError(f"holds the numpy dtype {name!r}, only plain numbers are read")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple):
        self.order = {"<": "<", ">": ">", "|": "<"}[state[1]]


def _scalar(dtype: _Dtype, data: bytes | str) -> bool | int | float:
    data = data.encode("latin1") if isinstance(data, str) else data  # python 2 wrote bytes as str
    return np.frombuffer(data, dtype.order + dtype.name, count=1)[0].item()


def _bytes_from_text(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DataError(f"holds text to be encoded as {encoding!r}, only latin1 is how pickles write bytes")
    return text.encode("latin1")


class _NoKey:
    """Hashing a tuple that is nested through the memo, or comparing such frozensets, could take for ever."""

    def __hash__(self):
        raise DataError("holds a dict key or set member that is not a plain value")


class _Tuple(_NoKey, tuple):
    pass


class _Frozenset(_NoKey, frozenset):
    pass


_BUILTINS = {"bytes": lambda: b"", "set": set, "frozenset": _Frozenset}  # protocols below 3 write b"" so
_ALLOWED = {(module, name): make for module in ("builtins", "__builtin__") for name, make in _BUILTINS.items()} | {
    ("_codecs", "encode"): _bytes_from_text,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


def _unhashable(load, kind):
    def load_unhashable(unpickler):
        load(unpickler)
        unpickler.stack[-1] = kind(unpickler.stack[-1])

    return load_unhashable


class _DataUnpickler(pickle._Unpickler):
    """The pure-Python unpickler: the C one reserves gigabytes on a memo index that a file makes up, and its opcodes
    cannot be taken away. It reads about 4 MB/s, a whole RefCOCO in 8 s, once per start; the C one would need 2 s."""

    def find_class(self, module: str, name: str):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise DataError(f"wants to import {module}.{name}, which plain data never does") from None

    def load_build(self):
        if not isinstance(instance := self.stack[-2], _Dtype):
            raise DataError(f"wants to set the state of a {type(instance).__name__}")
        super().load_build()

    dispatch: ClassVar[dict] = {c: load for c, load in pickle._Unpickler.dispatch.items() if c not in _REFUSED_CODES}
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.FROZENSET[0]] = _unhashable(pickle._Unpickler.load_frozenset, _Frozenset)
    for _code in (pickle.TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.TUPLE3[0]):
        dispatch[_code] = _unhashable(dispatch[_code], _Tuple)


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
        why = f"it starts with {data[:24]!r} ({type(error).__name__})"
        if isinstance(error, KeyError) and error.args and error.args[0] in _REFUSED_CODES:
            why = f"it uses the pickle instruction {_REFUSED_CODES[error.args[0]]}, which plain data never does"
        if kind := kind_of(data[:HEAD]):
            why = f"it starts with {data[:24]!r}, so it is {kind}"
        raise DataError(f"{source} is not a readable pickle: {why}. {again}") from None
