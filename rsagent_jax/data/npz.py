"""Stored records: an uncompressed .npz of arrays and a JSON header, read without Python's parser.

np.load hands every member's header to ast.literal_eval. CPython 3.11 counts the parser's recursion depth for all
threads together (python/cpython issue 106905), so that two reader threads at it can end in a SystemError. What np.save
writes is one fixed form, which a regular expression reads.
"""

import io
import json
import math
import re
import zipfile
import zlib
from typing import Any

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"  # the only version that np.save writes for arrays as plain as ours
_HEADER = re.compile(
    rb"\{'descr': '([<|][bifu][1248])', 'fortran_order': (False|True), 'shape': \(((?:\d{1,12}, ?)*\d{0,12})\), \} *\n"
)


def pack_record(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """The record's bytes; `read_arrays` gives back the arrays, the header as one of them (UTF-8 JSON, u8)."""
    out = io.BytesIO()
    np.savez(out, **(arrays | {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}))
    return out.getvalue()


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """Name -> array (read-only) of every member. ValueError that says what is wrong with a damaged one."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as members:
            return {name.removesuffix(".npy"): _array(name, members.read(name)) for name in members.namelist()}
    # RuntimeError: a flipped bit can say "encrypted"; NotImplementedError, its kind: "compressed in an unknown way"
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"no .npz: {error}") from error


def _array(name: str, data: bytes) -> np.ndarray:
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
    header = _HEADER.fullmatch(data[start:end])
    if not data.startswith(_MAGIC) or header is None:
        raise ValueError(f"{name} has no header as np.save writes it: {data[:100]!r}")
    kind, fortran, shape = header.groups()
    sizes = tuple(int(n) for n in shape.split(b",") if n.strip())
    dtype = np.dtype(kind.decode())
    if len(data) - end != math.prod(sizes) * dtype.itemsize:
        raise ValueError(f"{name} has {len(data) - end} bytes, its header says {dtype}{list(sizes)}")
    return np.frombuffer(data, dtype, offset=end).reshape(sizes, order="F" if fortran == b"True" else "C")
