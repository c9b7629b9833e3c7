"""A user's own data: a folder of pictures, and one JSON object per line.

    <root>/train.jsonl                           one line per question; <split>.jsonl for every split
    {"image": "photos/a.jpg", "query": "the mug on the left", "mask": "masks/a.png"}

    image         path, relative to <root>                                                    required
    query         what is to be segmented                                                     required
    mask          a picture as large as the image: what is not black is the object; null: nothing is meant, or
    segmentation  COCO's polygons [[x1, y1, x2, y2, …], …] or RLE {"size": [h, w], "counts": …}
    ignore        a picture like mask: what is not black is neither right nor wrong           optional
    id            unique in the file; else the number of the line                             optional

Pictures are turned upright by their EXIF orientation, as every viewer shows them; masks belong to that.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from rsagent_jax.data.coco_masks import decode_segmentation
from rsagent_jax.data.index import Inputs, SampleIndex, picture_key
from rsagent_jax.data.mask_files import IGNORED, OBJECT, read_mask
from rsagent_jax.image_files import read_image
from rsagent_jax.types import DataError, Sample

_KEYS = ("image", "query", "mask", "segmentation", "ignore", "id")
_LISTED = 5  # so many problems stand in the message


@dataclasses.dataclass(frozen=True)
class _Entry:
    id: str
    query: str
    picture: str
    mask: str | None
    segmentation: Any
    ignore: str | None
    line: str  # where it stands, for messages

    @property
    def picture_key(self) -> str:
        return picture_key(self.picture)

    def inputs(self) -> Inputs:
        if self.mask is not None:
            target = pathlib.Path(self.mask)
        else:
            target = json.dumps(self.segmentation, sort_keys=True).encode() if self.segmentation else b""
        return Inputs(pathlib.Path(self.picture), target, pathlib.Path(self.ignore) if self.ignore else b"")


def load_folder(root: str | pathlib.Path, split: str = "train", limit: int | None = None) -> SampleIndex:
    """Indexes <root>/<split>.jsonl. Sample ids read "folder/<split>/<id>". One DataError lists all bad lines."""
    root = pathlib.Path(root).expanduser()
    path = root / f"{split}.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        there = ", ".join(sorted(p.name for p in root.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"cannot read {path} ({error.strerror or error}); {root} has: {there}") from None
    entries: list[_Entry] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(entries) >= limit:
            break
        if line.strip():
            try:
                entries.append(_entry(line, root, f"{path}, line {number}", f"folder/{split}", number))
            except ValueError as error:  # of JSON, of UTF-8, or ours
                problems.append(f"line {number}: {error}")
    if problems:
        more = f"\n  … and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise DataError(f"{path}: {len(problems)} bad lines:\n  " + "\n  ".join(problems[:_LISTED]) + more)
    return SampleIndex(f"folder/{split}", entries, _load)


def _entry(line: bytes, root: pathlib.Path, where: str, name: str, number: int) -> _Entry:
    """Raises ValueError with what is wrong."""
    record = json.loads(line.decode("utf-8-sig"))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(set(record) - set(_KEYS)):
        raise ValueError(f"unknown field {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    for key in ("image", "query"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ValueError(f"{key} must be text")
    if ("mask" in record) == ("segmentation" in record):
        raise ValueError("there must be either mask or segmentation (mask: null where nothing is meant)")
    for key in ("mask", "ignore"):
        if not isinstance(record.get(key), str | None):
            raise ValueError(f"{key} must be the path of a picture")
    if "segmentation" in record and not isinstance(record["segmentation"], list | dict):
        raise ValueError("segmentation must be polygons or RLE")
    paths = {key: str(root / record[key]) if record.get(key) else None for key in ("image", "mask", "ignore")}
    id = f"{name}/{record.get('id', number)}"
    segmentation = record.get("segmentation")
    return _Entry(id, record["query"].strip(), paths["image"], paths["mask"], segmentation, paths["ignore"], where)


def _load(entry: _Entry) -> Sample:
    image = read_image(entry.picture, _remedy(entry), upright=True)
    h, w = image.shape[:2]
    ignore = None
    if entry.mask is not None:
        labels = _labels(entry.mask, h, w, entry)
        mask, border = labels == OBJECT, labels == IGNORED
        ignore = border if border.any() else None
    else:
        mask = decode_segmentation(entry.segmentation or [], h, w, f"{entry.line} (sample {entry.id})")
    if entry.ignore is not None:
        named = _labels(entry.ignore, h, w, entry) != 0
        ignore = named if ignore is None else named | ignore
    return Sample(entry.id, image, entry.query, mask, ignore, entry.picture)


def _labels(path: str, height: int, width: int, entry: _Entry) -> np.ndarray:
    labels = read_mask(path, path, _remedy(entry))
    if labels.shape != (height, width):
        raise DataError(
            f"{path} is {labels.shape[1]} x {labels.shape[0]} pixels, its image {entry.picture} {width} x {height}"
            f" ({entry.line}): a mask is as large as its image, turned upright"
        )
    return labels


def _remedy(entry: _Entry) -> str:
    return f"it is named in {entry.line}"
