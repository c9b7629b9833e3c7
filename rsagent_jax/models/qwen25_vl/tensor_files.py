"""safetensors files by byte ranges: headers first, then only the rows and columns that are asked for.

A file is an 8-byte little-endian length, a JSON header of that length, and the row-major data to which the header's
offsets point (https://github.com/huggingface/safetensors#format). Reads go through `pread` into small buffers, not
through a memory map: mapped pages count as resident memory until the kernel takes them back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.types import DataError
from sam_bridge.file_kinds import HEAD, kind_of

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INFINITY = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # bits: all above are NaN; the sign is one bit more
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
BLOCK_BYTES = 16 << 20  # of a file, held at a time
TILE = 128  # side of what is transposed at once: source and target of a tile fit the cache together


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
        return self.offset + size(self.dtype, self.shape)


@dataclasses.dataclass(frozen=True)
class Window:
    """A rectangle of a matrix and where it goes: `target[r, c]` is the element [rows[0] + r, cols[0] + c]."""

    rows: tuple[int, int]
    cols: tuple[int, int]
    target: np.ndarray


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
    step = 4096  # of a file that is whole no more is read
    with file.open("rb") as stream:
        while end > first:
            start = max(first, end - step)
            stream.seek(start)
            data = stream.read(end - start)
            if len(data) < end - start:  # cut since its header was checked: the reader says so
                return max(t.end for t in tensors)
            if kept := len(data.rstrip(b"\0")):
                return start + kept
            end, step = start, BLOCK_BYTES
    return first


class Reader:
    """Reads rectangles of tensors, seen as matrices of `width` columns. Close it, or use it in a `with`.

    A value that is read and is not finite is a DataError with the tensor's name.
    """

    def __init__(self):
        self._stack = contextlib.ExitStack()
        self._files: dict[pathlib.Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def fill(self, tensor: Tensor, width: int, windows: Sequence[Window]) -> None:
        """Copies every window's rectangle into its target, converted to the target's dtype.

        Each byte is read once, however many windows want it. bf16 and fp16 widen exactly; narrower targets get the
        nearest value.
        """
        for rows, cols in _rectangles(windows):
            for start, block in self.blocks(tensor, width, rows, cols):
                for w in windows:
                    top, bottom = max(start, w.rows[0]), min(start + len(block), w.rows[1])
                    left, right = max(cols[0], w.cols[0]), min(cols[1], w.cols[1])
                    if top < bottom and left < right:
                        _convert(
                            block[top - start : bottom - start, left - cols[0] : right - cols[0]],
                            w.target[top - w.rows[0] : bottom - w.rows[0], left - w.cols[0] : right - w.cols[0]],
                        )

    def equal(self, one: Tensor, other: Tensor, width: int, windows: Sequence[Window]) -> bool:
        """Whether two tensors of one shape hold the same values (as fp32) within the windows' rectangles."""
        for rows, cols in _rectangles(windows):
            pairs = zip(self.blocks(one, width, rows, cols), self.blocks(other, width, rows, cols), strict=True)
            for (_, a), (_, b) in pairs:
                if not np.array_equal(a.astype(np.float32), b.astype(np.float32)):
                    return False
        return True

    def blocks(
        self, tensor: Tensor, width: int, rows: tuple[int, int], cols: tuple[int, int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, block) of the rectangle in the file's dtype; a block has at most BLOCK_BYTES, or one row."""
        dtype = DTYPES[tensor.dtype]
        stride, wanted = width * dtype.itemsize, (cols[1] - cols[0]) * dtype.itemsize
        step = max(1, BLOCK_BYTES // max(stride, 1))  # counted in whole rows: one size for every way to shard
        for start in range(rows[0], rows[1], step):
            count = min(step, rows[1] - start)
            data = np.empty(count * wanted, np.uint8)
            first = tensor.offset + start * stride + cols[0] * dtype.itemsize
            file = self._open(tensor.file)
            if wanted == stride:
                read_exactly(file, memoryview(data), first, tensor)
            else:
                view = memoryview(data)
                for i in range(count):
                    read_exactly(file, view[i * wanted : (i + 1) * wanted], first + i * stride, tensor)
            _check_finite(data, tensor)
            yield start, data.view(dtype).reshape(count, -1)

    def _open(self, file: pathlib.Path) -> int:
        if file not in self._files:
            try:
                self._files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from error
            self._stack.callback(os.close, self._files[file])
        return self._files[file]


def read_exactly(file: int, buffer: memoryview, offset: int, tensor: Tensor) -> None:
    """Fills the buffer from a byte offset of an open file."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(file, [buffer[done:]], offset + done)
        except OSError as error:
            raise DataError(f"{tensor.file} cannot be read: {error.strerror}") from error
        if count == 0:
            raise DataError(f"{tensor.file} ends within {tensor.name}: it was cut while it was read")
        done += count


def _check_finite(data: np.ndarray, tensor: Tensor) -> None:
    """Two maxima of the bits, as unsigned and as signed numbers, find what is not below either infinity.

    They make no copy: a small part of what reading costs.
    """
    width, infinity = DTYPES[tensor.dtype].itemsize, INFINITY[tensor.dtype]
    bits = data.view(f"u{width}")
    if bits.size and (bits.max() >= infinity | 1 << 8 * width - 1 or bits.view(f"i{width}").max() >= infinity):
        raise DataError(
            f"{tensor.name} in {tensor.file} holds NaN or infinite values; download it again, or take other weights"
        )


def _rectangles(windows: Sequence[Window]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(rows, cols) of disjoint rectangles that cover what the windows want, and nothing else."""
    cuts = sorted({edge for w in windows for edge in w.rows})
    for top, bottom in itertools.pairwise(cuts):
        spans: list[tuple[int, int]] = []
        for left, right in sorted({w.cols for w in windows if w.rows[0] <= top and bottom <= w.rows[1]}):
            if spans and left <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(right, spans[-1][1]))
            else:
                spans.append((left, right))
        for span in spans:
            yield (top, bottom), span


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    """Copies values, bits untouched where the dtypes agree; numpy's own bf16 loops are half as fast as the shift."""
    bits = {2: np.uint16, 4: np.uint32}
    widen = source.dtype == DTYPES["BF16"] and target.dtype == np.float32
    same = source.dtype == target.dtype
    if widen or same:
        source, target = source.view(bits[source.itemsize]), target.view(bits[target.itemsize])
    step = TILE if target.strides[1] > target.itemsize else max(1, source.shape[1])  # rows stay rows: no need of tiles
    for row in range(0, source.shape[0], TILE):
        for col in range(0, source.shape[1], step):
            tile = source[row : row + TILE, col : col + step]
            if widen:
                tile = tile.astype(np.uint32) << np.uint32(16)
            elif same:
                tile = tile.copy()  # twice as fast: rows a power of two apart share few lines of the cache
            else:
                tile = tile.astype(np.float32)
            target[row : row + TILE, col : col + step] = tile


def write_safetensors(
    path: pathlib.Path, dtype: str, shapes: dict[str, tuple[int, ...]], blocks: Iterable[np.ndarray]
) -> None:
    """A file of tensors whose shapes are known before their values: `blocks` are all values in order, C-contiguous.

    On the disk when this returns; ValueError if the blocks are not as long as the shapes say.
    """
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + size(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned, as safetensors itself writes it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            file.write(memoryview(block.reshape(-1).view(np.uint8)))
        if (written := file.tell() - 8 - len(text)) != end:
            raise ValueError(f"{path}: {written} bytes of data, the header promises {end}")
        file.flush()
        os.fsync(file.fileno())


def write_index(
    path: pathlib.Path, dtype: str, shapes: dict[str, tuple[int, ...]], files: dict[str, list[str]]
) -> None:
    """model.safetensors.index.json: which file holds which tensor, and the bytes of all tensors."""
    total = sum(size(dtype, shape) for shape in shapes.values())
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return DTYPES[dtype].itemsize * math.prod(shape)


def plan(dtype: str, shapes: dict[str, tuple[int, ...]], max_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, in order. A file has at most `max_bytes` of data, or a single tensor."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        count = size(dtype, shape)
        if groups[-1] and held + count > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += count
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


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
