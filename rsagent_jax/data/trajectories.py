"""Stored trajectories: ArrayRecord shards that Grain reads at random, one self-contained record per trajectory.

A record is an uncompressed .npz: ids, positions and the sampled mark as the driver made them, the images the policy saw
as PNG, and a JSON header with the id, the IoU and the environment's replay record. Patches are made when read.
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Sequence

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from rsagent_jax.data.packing import Item
from rsagent_jax.data.processor import Processor, image_patches
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.models.qwen25_vl.positions import merged_tokens
from rsagent_jax.types import DataError, Trajectory

STAMP = "collect.json"  # written last: a directory without it is not complete


def encode(trajectory: Trajectory, images: Sequence[np.ndarray], header: dict) -> bytes:
    """`images` u8[h, w, 3] are what the policy was shown, in order, one per grid."""
    if len(images) != len(trajectory.grids):
        raise ValueError(f"{len(images)} images for {len(trajectory.grids)} grids")
    arrays = {"tokens": trajectory.tokens, "positions": trajectory.positions, "sampled": trajectory.sampled}
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        arrays[f"image_{i}"] = np.frombuffer(buffer.getvalue(), np.uint8)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def decode(record: bytes, processor: Processor) -> Item:
    """The training item of a record. DataError when it is broken, or made with another tokenizer or image settings."""
    try:
        with np.load(io.BytesIO(record), allow_pickle=False) as arrays:
            count = sum(name.startswith("image_") for name in arrays.files)
            images = [
                np.asarray(Image.open(io.BytesIO(arrays[f"image_{i}"].tobytes())).convert("RGB")) for i in range(count)
            ]
            tokens, positions, sampled = arrays["tokens"], arrays["positions"], arrays["sampled"]
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(f"a stored trajectory cannot be read ({error}); collect the set again") from error
    patched = [image_patches(image, processor.images) for image in images]
    grids = tuple(grid for _, grid in patched)
    wanted = sum(merged_tokens(grid, processor.images.merge_size) for grid in grids)
    found = int(((tokens == processor.image_id) & ~sampled).sum())
    if found != wanted or tokens.max(initial=0) >= processor.config.text.vocab_size:
        raise DataError(
            f"a stored trajectory has {found} image tokens where its pictures take {wanted}, or ids beyond the"
            " vocabulary: it was collected with another tokenizer or other image settings; collect the set again"
        )
    return Item(
        tokens=tokens,
        positions=positions,
        sampled=sampled,
        logprobs=np.zeros(len(tokens), np.float32),
        patches=np.concatenate([p for p, _ in patched]) if patched else processor.no_patches(),
        grids=grids,
    )


def header(record: bytes) -> dict:
    with np.load(io.BytesIO(record), allow_pickle=False) as arrays:
        return json.loads(arrays["header"].tobytes())


class Writer:
    """Writes one shard. The stamp is written by `close`, so an interrupted set is not taken for a complete one."""

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / STAMP).unlink(missing_ok=True)
        self.directory = directory
        self.records = 0
        self.writer = ArrayRecordWriter(str(directory / "trajectories-00000.array_record"), "group_size:1")

    def write(self, record: bytes) -> None:
        self.writer.write(record)
        self.records += 1

    def close(self, stamp: dict) -> None:
        self.writer.close()
        (self.directory / STAMP).write_text(json.dumps({"records": self.records, **stamp}, indent=2) + "\n")


def open_records(directory: str | pathlib.Path) -> grain.sources.ArrayRecordDataSource:
    """Random access to a stored set; DataError when it is not there or not complete."""
    directory = pathlib.Path(directory)
    if not (directory / STAMP).exists():
        raise DataError(
            f"{directory} holds no complete set of trajectories ({STAMP} is missing);"
            " make one with: python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=DIR"
        )
    try:
        stated = int(read_json(directory / STAMP)["records"])
        source = grain.sources.ArrayRecordDataSource(sorted(map(str, directory.glob("*.array_record"))))
        count = len(source)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise DataError(f"{directory}: the set cannot be read ({error!r}); collect the set again") from error
    if count != stated or stated == 0:
        raise DataError(f"{directory}: {count} trajectories on disk, {STAMP} says {stated}; collect the set again")
    return source
