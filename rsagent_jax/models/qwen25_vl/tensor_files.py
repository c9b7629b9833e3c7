"""safetensors files: headers first, then only the rows and columns that are asked for, by slices of the library.

A file is an 8-byte little-endian length, a JSON header of that length, and the row-major data to which the header's
offsets point (https://github.com/huggingface/safetensors#format).
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.types import DataError
from sam_bridge.file_kinds import HEAD, kind_of

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
ByteRange = tuple[int, int]  # first and last + 1
BLOCK_ROWS = 128  # read at a time: few enough that a block and its transposed target fit the cache together


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor is: `dtype` as safetensors names it, `offset` in bytes from the start of the file."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + DTYPES[self.dtype].itemsize * math.prod(self.shape)


def find(directory: str | pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """model.safetensors, else the shards that the index names, as transformers looks for them; and the index's map.

    DataError for files that are missing or outside the directory, and for an index without a map.
    """
    directory = pathlib.Path(directory)
    index, files, weight_map = directory / INDEX, [directory / SINGLE], {}
    if not files[0].exists() and index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise DataError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        if bad := [name for name in names if pathlib.PurePath(name).name != name or name in ("", "..")]:
            raise DataError(f"{index} names files outside its directory: {bad}")
        files = [directory / name for name in names]
    if missing := [f.name for f in files if not f.exists()]:
        raise DataError(f"{directory} lacks {', '.join(missing)}; give a Hugging Face directory of Qwen2.5-VL weights")
    return files, weight_map


def safetensors_header(file: pathlib.Path) -> list[Tensor]:
    """Its tensors in the header's order; a name written twice comes twice.

    The library checks the header against the file (lengths, overlaps, holes, shape times dtype) without reading data.
    """
    head = b""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD)
        with safe_open(file, framework="np"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            pairs = json.loads(stream.read(length), object_pairs_hook=list)
    except (SafetensorError, OSError, ValueError) as error:
        kind = head and kind_of(head)
        raise DataError(f"{file} is {kind or f'not a readable safetensors file: {error}'}") from error
    entries = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
    return [Tensor(n, file, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0]) for n, e in entries]


def zero_tail(file: pathlib.Path, tensors: Sequence[Tensor]) -> int:
    """The byte of a file from which on its tensors are zero to the end; the end itself where the last byte is not."""
    first, end = min(t.offset for t in tensors), max(t.end for t in tensors)
    data = np.memmap(file, np.uint8, "r")  # of a file that is whole little is read
    if len(data) < end:  # cut since its header was checked: who reads it says so
        return end
    while end > first:
        start = max(first, end - (1 << 16))
        if (nonzero := np.flatnonzero(data[start:end])).size:
            return start + int(nonzero[-1]) + 1
        end = start
    return first


@contextlib.contextmanager
def opened(tensor: Tensor) -> Iterator[Callable[[ByteRange, ByteRange], Iterator[tuple[slice, np.ndarray]]]]:
    """A function of rows and columns that yields (its place within the rows, block), in the file's dtype.

    The tensor is seen as the matrix [first axis, all others]. Its file is open for its own time only: the library maps
    it into memory, and pages that were read count as the process's own until the map is closed.
    DataError for values that are not finite, and for a file that was cut since its header was checked.
    """
    try:
        with safe_open(tensor.file, framework="np") as file:
            values = file.get_slice(tensor.name)

            def read(rows: ByteRange, cols: ByteRange) -> Iterator[tuple[slice, np.ndarray]]:
                for start in range(*rows, BLOCK_ROWS):
                    stop = min(start + BLOCK_ROWS, rows[1])
                    if len(tensor.shape) == 2:
                        block = values[start:stop, slice(*cols)]
                    else:
                        block = values[start:stop].reshape(stop - start, -1)[:, slice(*cols)]
                    check_finite(block, tensor)
                    yield slice(start - rows[0], stop - rows[0]), block

            yield read
    except (SafetensorError, OSError) as error:
        raise DataError(f"{tensor.file} ends within {tensor.name}: it was cut while it was read ({error})") from error


def check_finite(block: np.ndarray, tensor: Tensor) -> None:
    """Two maxima of the bits, as unsigned and as signed numbers, find what is not below either infinity.

    They make no copy: a small part of what reading costs.
    """
    width = block.itemsize
    plus, minus = np.array([np.inf, -np.inf], block.dtype).view(f"u{width}")
    if block.size and (block.view(f"u{width}").max() >= minus or block.view(f"i{width}").max() >= plus):
        raise DataError(
            f"{tensor.name} in {tensor.file} holds NaN or infinite values; download it again, or take other weights"
        )


def write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """A file of C-contiguous arrays, on the disk when this returns."""
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:  # its own, for a full disk as well
        raise OSError(str(error)) from None
    shutil.copymode(path.parent / "config.json", path)  # the library keeps a new file from everybody else
    with path.open("rb") as file:
        os.fsync(file.fileno())


def publish(partial: pathlib.Path, directory: pathlib.Path, files: list[str]) -> None:
    """Moves finished weights (`files`, and the index if they are several) into place and removes what they replace.

    A reader takes model.safetensors before an index. So at any moment the directory holds the old weights, or the new
    ones, or (for the renames of new shards over old ones of the same names) weights that are refused as incomplete;
    never a mixture that can be read.
    """
    index = directory / INDEX
    if files == [SINGLE]:
        os.replace(partial / SINGLE, directory / SINGLE)
        index.unlink(missing_ok=True)
    else:
        if any((directory / name).exists() for name in files):
            index.unlink(missing_ok=True)
        for name in files:
            os.replace(partial / name, directory / name)
        os.replace(partial / INDEX, index)
        (directory / SINGLE).unlink(missing_ok=True)
    for path in directory.iterdir():
        if SHARD.fullmatch(path.name) and path.name not in files:
            path.unlink()


@contextlib.contextmanager
def partial_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder inside, for files that are not finished; what an interrupted export left there goes first."""
    partial = directory / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
