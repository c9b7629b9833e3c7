"""A user's own data: a folder of pictures, and one JSON object per line.

    <root>/train.jsonl                           one line per question; <split>.jsonl for every split
    {"image": "photos/a.jpg", "query": "the mug on the left", "mask": "masks/a.png"}

    image         path, relative to <root>                                                    required
    query         what is to be segmented                                                     required
    mask          a picture as large as the image, see data/sets/mask_files.py; null: nothing is meant, or
    segmentation  COCO's polygons [[x1, y1, x2, y2, …], …] or RLE {"size": [h, w], "counts": …}
    ignore        a picture like mask: its object is neither right nor wrong                  optional
    id            unique in the file; null or none: the number of the line                    optional

Pictures are turned upright by their EXIF orientation, as every viewer shows them; masks belong to that.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np

from rsagent_jax.data.sets.index import Entry, Inputs, SampleIndex
from rsagent_jax.data.sets.mask_files import IGNORED, OBJECT, read_mask
from rsagent_jax.masks import POLYGONS, RLE, decode_segmentation
from rsagent_jax.runtime.image_files import read_image
from rsagent_jax.runtime.paths import is_remote, open_path, read_bytes
from rsagent_jax.types import DataError, Sample
from sam_bridge.file_kinds import HEAD, kind_of

_KEYS = ("image", "query", "mask", "segmentation", "ignore", "id")
_FORM = 'the form is one JSON object per line: {"image": "a.jpg", "query": "the mug", "mask": "m.png"}'
_LISTED = 5  # so many problems stand in the message


@dataclasses.dataclass(frozen=True)
class _Entry(Entry):
    mask: str | None
    segmentation: Any
    ignore: str | None
    line: str  # where it stands, for messages

    def inputs(self) -> Inputs:
        if self.mask is not None:
            target = open_path(self.mask)
        else:
            target = json.dumps(self.segmentation, sort_keys=True).encode() if self.segmentation else b""
        return Inputs(open_path(self.image), target, open_path(self.ignore) if self.ignore else b"")

    def load(self) -> Sample:
        image = read_image(self.image, f"it is named in {self.line}", upright=True)
        h, w = image.shape[:2]
        mask, ignore = np.zeros((h, w), bool), np.zeros((h, w), bool)  # nothing is meant
        if self.mask is not None:
            labels = self._labels(self.mask, h, w)
            mask, ignore = labels == OBJECT, labels == IGNORED
        elif self.segmentation is not None:
            mask = decode_segmentation(self.segmentation, h, w, f"{self.line} (sample {self.id})")
        if self.ignore is not None:
            ignore |= self._labels(self.ignore, h, w) != 0
        return Sample(self.id, image, self.query, mask, ignore if ignore.any() or self.ignore else None, self.image)

    def _labels(self, path: str, height: int, width: int) -> np.ndarray:
        labels = read_mask(path, path, f"it is named in {self.line}")
        if labels.shape != (height, width):
            raise DataError(
                f"{path} is {labels.shape[1]} x {labels.shape[0]} pixels, its image {self.image} {width} x {height}"
                f" ({self.line}): a mask is as large as its image, turned upright"
            )
        return labels


def load_folder(root: str | pathlib.Path, split: str = "train", limit: int | None = None) -> SampleIndex:
    """Indexes <root>/<split>.jsonl. Sample ids read "folder/<split>/<id>". One DataError lists all bad lines."""
    if split.endswith(".jsonl"):
        raise DataError(f"data.split is the file's name without .jsonl, not {split!r}")
    root = open_path(root)
    path = root / f"{split}.jsonl"
    try:
        data = read_bytes(path)
    except OSError as error:
        if not root.exists():
            raise DataError(f"there is no {root}: give data.root, the folder in which {path.name} lies") from None
        there = ", ".join(sorted(p.name for p in root.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"cannot read {path} ({error.strerror or error}); {root} has: {there}") from None
    if kind := kind_of(data[:HEAD]) or ("UTF-16: save it as UTF-8" if b"\0" in data[:HEAD] else None):
        raise DataError(f"{path} holds no records: {kind}")
    entries: list[_Entry] = []
    problems: list[str] = []
    lines_of: dict[str, int] = {}  # sample id -> its line
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", data), start=1):
        if limit is not None and len(entries) >= limit:
            break
        if line.strip():
            try:
                entry = _entry(line, root, f"{path}, line {number}", f"folder/{split}", number)
                if (first := lines_of.setdefault(entry.id, number)) != number:
                    raise ValueError(
                        f"its id {entry.id.split('/')[-1]!r} is that of line {first}; a line without an id"
                        " has its number for one; every id must be unique"
                    )
                entries.append(entry)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
    if problems:
        _refuse_other_json(path, data)
        more = f"\n  … and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        text = f"{path}: {len(problems)} bad lines:\n  " + "\n  ".join(problems[:_LISTED]) + more
        raise DataError(f"{text}\n{_FORM}")
    return SampleIndex(f"folder/{split}", entries)


def _refuse_other_json(path: pathlib.Path, data: bytes) -> None:
    """DataError for a file that is JSON as a whole, where its lines are no records."""
    try:
        is_array = isinstance(json.loads(data), list)
    except (ValueError, RecursionError):
        return
    if is_array or b"\n" in data.strip():
        raise DataError(f"{path} holds one JSON {'array' if is_array else 'object over several lines'}; {_FORM}")


def _parse(line: bytes) -> dict[str, Any]:
    """Raises ValueError with what is wrong."""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}: save the file as UTF-8") from None
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        hints = {"{'": "JSON takes double quotes", "#": "JSON has no comments", "//": "JSON has no comments"}
        hint = next((hint for start, hint in hints.items() if text.startswith(start)), None)
        hint = hint or ("no comma after it" if text.endswith(",") else f"{error.msg} at character {error.pos + 1}")
        raise ValueError(f"not one JSON object ({hint})") from None
    except RecursionError:
        raise ValueError("not one JSON object (nested too deep)") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)} stands twice")
    return fields


def _entry(line: bytes, root: pathlib.Path, where: str, name: str, number: int) -> _Entry:
    """Raises ValueError with what is wrong."""
    record = _parse(line)
    if unknown := sorted(set(record) - set(_KEYS)):
        raise ValueError(f"unknown field {', '.join(unknown)}; known are {', '.join(_KEYS)}")
    query = record.get("query")
    if not isinstance(query, str) or not query.strip():
        raise ValueError("query must be text, not blank")
    for key, value in record.items():
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{key} holds half a character (a lone surrogate)")
    if ("mask" in record) == ("segmentation" in record):
        raise ValueError("there must be either mask or segmentation (mask: null where nothing is meant)")
    if "segmentation" in record and not (isinstance(record["segmentation"], list | dict) and record["segmentation"]):
        raise ValueError(f"segmentation must be polygons {POLYGONS} or RLE {RLE}; mask: null where nothing is meant")
    paths = {key: _path(root, key, record.get(key)) for key in ("image", "mask", "ignore")}
    id = record.get("id")
    if not isinstance(id, str | int | None) or isinstance(id, bool) or id == "":
        raise ValueError("id must be text or a whole number; null, or no id, for the number of the line")
    id = f"{name}/{number if id is None else id}"
    return _Entry(id, query.strip(), paths["image"], paths["mask"], record.get("segmentation"), paths["ignore"], where)


def _path(root: pathlib.Path, key: str, value: Any) -> str | None:
    if value is None and key != "image":
        return None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be text, the path of a picture" + ", or null for none" * (key != "image"))
    if "\0" in value or ("://" in value and not is_remote(value)) or value.startswith("data:"):
        raise ValueError(f"{key} must be the path of a file on this machine or in a bucket")
    return value if is_remote(value) else str(root / value)
