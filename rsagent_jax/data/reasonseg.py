"""ReasonSeg as `Sample`s, as LISA ships it (dvlab-research/LISA: utils/data_processing.py gives the rules).

    <root>/val/<id>.jpg
    <root>/val/<id>.json                         {"text": [...], "is_sentence": bool, "shapes": [{label, points}]}

<root>/ReasonSeg/val and <root>/reason_seg/ReasonSeg/val are found as well.

A shape's polygon is truncated to whole pixels and drawn filled, with its outline; shapes are drawn from the largest
to the smallest, so that small ones lie on top. "target" is the mask, a label with "ignore" in it is neither right nor
wrong, "flag" is left out. JSON is UTF-8, or cp1252 where it is not.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import cv2
import numpy as np

from rsagent_jax.data.index import Inputs, SampleIndex, picture_key
from rsagent_jax.image_files import read_image
from rsagent_jax.types import DataError, Sample

TEXTS = ("first", "all")
_REACH = 4  # a polygon may not reach farther outside its picture than so many of its sides


@dataclasses.dataclass(frozen=True)
class _Entry:
    id: str
    query: str
    picture: str
    annotation: str
    shapes: list[dict]

    @property
    def picture_key(self) -> str:
        return picture_key(self.picture)

    def inputs(self) -> Inputs:
        return Inputs(pathlib.Path(self.picture), json.dumps(self.shapes, sort_keys=True).encode())


def load_reasonseg(
    root: str | pathlib.Path, split: str = "val", texts: str = "first", limit: int | None = None
) -> SampleIndex:
    """Indexes one split.

    texts: "first", one sample per picture (the benchmark's rule), or "all", one per paraphrase (train has up to five).
    Sample ids read "reasonseg/<split>/<file>/<number of the text>". DataError where files are missing or broken.
    """
    if texts not in TEXTS:
        raise DataError(f"texts must be 'first' or 'all', not {texts!r}")
    folder = _folder(pathlib.Path(root).expanduser(), split)
    entries: list[_Entry] = []
    for path in sorted(folder.glob("*.json")):
        if limit is not None and len(entries) >= limit:
            break
        record = _read(path)
        picture = path.with_suffix(".jpg")
        for n, text in enumerate(record["text"] if texts == "all" else record["text"][:1]):
            query = text.strip()
            id = f"reasonseg/{split}/{path.stem}/{n}"
            entries.append(_Entry(id, query, str(picture), str(path), record["shapes"]))
    pictures, annotations = ({p.stem for p in folder.glob(pattern)} for pattern in ("*.jpg", "*.json"))
    if lost := sorted(pictures ^ annotations):
        raise DataError(
            f"{folder}: {len(lost)} files lack their other half, such as {lost[:3]}; each <id>.jpg needs its <id>.json:"
            " unpack the data set again"
        )
    return SampleIndex(f"reasonseg/{split}", entries[:limit], _load)


def _load(entry: _Entry) -> Sample:
    # LISA reads pictures with OpenCV, which turns them upright.
    image = read_image(entry.picture, "unpack the data set again", upright=True)
    labels = draw_shapes(entry.shapes, *image.shape[:2], entry.annotation)
    return Sample(entry.id, image, entry.query, labels == 1, labels == 255, entry.picture)


def draw_shapes(shapes: list[dict], height: int, width: int, where: str) -> np.ndarray:
    """u8[height, width]: 1 target, 255 ignored, 0 neither. `where` names the file in a DataError."""
    drawn = []
    for number, shape in enumerate(shapes):
        label = shape["label"].lower()
        if label == "flag":
            continue
        points = _points(shape["points"], height, width, f"{where}, shape {number} ({shape['label']})")
        region = np.zeros((height, width), np.uint8)
        cv2.polylines(region, [points], isClosed=True, color=1, thickness=1)
        cv2.fillPoly(region, [points], color=1)
        drawn.append((region.astype(bool), 255 if "ignore" in label else 1))
    labels = np.zeros((height, width), np.uint8)
    # numpy's own order among equals, reversed, as LISA has it
    for i in np.argsort([int(region.sum()) for region, _ in drawn])[::-1]:
        region, value = drawn[int(i)]
        labels[region] = value
    return labels


def _points(points: Any, height: int, width: int, where: str) -> np.ndarray:
    """i32[N, 1, 2], truncated."""
    try:
        array = np.asarray(points, np.float64)
        if array.ndim != 2 or array.shape[1] != 2 or not len(array) or not np.isfinite(array).all():
            raise ValueError("points must be a list of finite [x, y]")
        if array.min() < -_REACH * max(height, width) or array.max() > (1 + _REACH) * max(height, width):
            raise ValueError(f"points lie far outside the {width} x {height} picture")
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is malformed: {error}") from None
    return array.astype(np.int32)[:, None]


def _folder(root: pathlib.Path, split: str) -> pathlib.Path:
    places = [root / below / split for below in ("", "ReasonSeg", "reason_seg/ReasonSeg")]
    found = next((place for place in places if place.is_dir() and any(place.glob("*.json"))), None)
    if found is None:
        there = sorted({p.parent.name for place in places for p in place.parent.glob("*/*.json")})
        have = f" There are: {', '.join(there)}." if there else ""
        raise DataError(
            f"no ReasonSeg split {split!r} under {root}. Expected {places[0]}/<id>.jpg with <id>.json.{have}"
        )
    return found


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:  # some files were written on Windows
            text = data.decode("cp1252")
        record = json.loads(text)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is neither UTF-8 nor cp1252 JSON ({error}); unpack the data set again") from None
    problem = _problem(record)
    if problem:
        raise DataError(f"{path}: {problem}; this is not a file of ReasonSeg")
    return record


def _problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "not an object"
    texts, shapes = record.get("text"), record.get("shapes")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        return "text is not a list of sentences"
    if not isinstance(shapes, list) or not all(isinstance(s, dict) and isinstance(s.get("label"), str) for s in shapes):
        return "shapes is not a list of labelled polygons"
    if not all("points" in s for s in shapes):
        return "a shape has no points"
    if not isinstance(record.get("is_sentence"), bool):
        return "is_sentence is not true or false"
    return None
