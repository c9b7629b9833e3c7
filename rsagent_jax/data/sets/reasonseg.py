"""ReasonSeg as `Sample`s, as LISA ships it (dvlab-research/LISA: utils/data_processing.py gives the rules).

    <root>/val/<id>.jpg
    <root>/val/<id>.json                         {"text": [...], "is_sentence": bool, "shapes": [{label, points}]}

<root>/ReasonSeg/val and <root>/reason_seg/ReasonSeg/val are found as well.

A shape's polygon is truncated to whole pixels and drawn filled, with its outline; shapes are drawn from the largest
to the smallest, so that small ones lie on top. labelme's rectangles and circles are drawn as such. "target" is the
mask, a label with "ignore" in it is neither right nor wrong, "flag" is left out. JSON is UTF-8, or cp1252 where it is
not.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from rsagent_jax.data.sets.index import Entry, Inputs, SampleIndex, read_file
from rsagent_jax.data.sets.mask_files import IGNORED, OBJECT
from rsagent_jax.runtime.image_files import read_image
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.types import DataError, Sample
from sam_bridge.file_kinds import HEAD, kind_of

SHAPES = {"polygon": range(1, 1 << 30), "rectangle": (2, 4), "circle": (2,)}  # labelme's, numbers of points
_DRAWN = "a polygon, a rectangle (two opposite corners), a circle (its centre and a point on it)"
_REACH = 4  # a polygon may not reach farther outside its picture than so many of its sides


@dataclasses.dataclass(frozen=True)
class _Entry(Entry):
    annotation: str
    shapes: list[dict]

    def inputs(self) -> Inputs:
        return Inputs(open_path(self.image), json.dumps(self.shapes, sort_keys=True).encode())

    def load(self) -> Sample:
        # LISA reads pictures with OpenCV, which turns them upright.
        image = read_image(self.image, "unpack the data set again", upright=True)
        labels = draw_shapes(self.shapes, *image.shape[:2], self.annotation)
        return Sample(self.id, image, self.query, labels == OBJECT, labels == IGNORED, self.image)


def load_reasonseg(
    root: str | pathlib.Path, split: str = "val", texts: str = "first", limit: int | None = None
) -> SampleIndex:
    """Indexes one split.

    texts: "first", one sample per picture (the benchmark's rule), or "all", one per paraphrase (train has up to five).
    Sample ids read "reasonseg/<split>/<file>/<number of the text>". DataError where files are missing or broken.
    """
    folder = _folder(open_path(root), split)
    entries: list[_Entry] = []
    for path in sorted(_real(folder, "*.json")):
        if limit is not None and len(entries) >= limit:
            break
        record = _read(path)
        for n, text in enumerate(record["text"] if texts == "all" else record["text"][:1]):
            id, image = f"reasonseg/{split}/{path.stem}/{n}", str(path.with_suffix(".jpg"))
            entries.append(_Entry(id, text.strip(), image, str(path), record["shapes"]))
    images, annotations = ({p.stem for p in _real(folder, pattern)} for pattern in ("*.jpg", "*.json"))
    if lost := sorted(images ^ annotations):
        raise DataError(
            f"{folder}: {len(lost)} files lack their other half, such as {lost[:3]}; each <id>.jpg needs its <id>.json:"
            " unpack the data set again"
        )
    return SampleIndex(f"reasonseg/{split}", entries[:limit])


def _real(folder: pathlib.Path, pattern: str) -> Iterator[pathlib.Path]:
    """Without macOS's "._" files, which hold a Finder window's settings and no data."""
    return (path for path in folder.glob(pattern) if not path.name.startswith("._"))


def draw_shapes(shapes: list[dict], height: int, width: int, where: str) -> np.ndarray:
    """u8[height, width] of OBJECT, IGNORED and 0. `where` names the file in a DataError."""
    drawn = [
        (_region(shape, height, width, f"{where}, shape {n} ({shape['label']})"), "ignore" in shape["label"].lower())
        for n, shape in enumerate(shapes)
        if shape["label"].lower() != "flag"
    ]
    labels = np.zeros((height, width), np.uint8)
    # numpy's own order among equals, reversed, as LISA has it
    for i in np.argsort([int(region.sum()) for region, _ in drawn])[::-1]:
        region, ignored = drawn[i]
        labels[region] = IGNORED if ignored else OBJECT
    return labels


def _region(shape: dict, height: int, width: int, where: str) -> np.ndarray:
    """bool[height, width]. DataError where nothing of it lies in the picture."""
    kind, points = shape.get("shape_type") or "polygon", _points(shape["points"], height, width, where)
    if kind not in SHAPES or len(points) not in SHAPES[kind]:
        raise DataError(f"{where} is a {kind} of {len(points)} points; what is drawn: {_DRAWN}")
    if kind == "circle":
        (x, y), (edge_x, edge_y) = points
        rows, columns = np.ogrid[:height, :width]
        region = (columns - x) ** 2 + (rows - y) ** 2 <= (edge_x - x) ** 2 + (edge_y - y) ** 2
    else:
        if kind == "rectangle" and len(points) == 2:
            (x1, y1), (x2, y2) = points[0], points[-1]
            points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        outline, region = points.astype(np.int32)[:, None], np.zeros((height, width), np.uint8)
        cv2.polylines(region, [outline], isClosed=True, color=1, thickness=1)
        cv2.fillPoly(region, [outline], color=1)
        region = region.astype(bool)
    if not region.any():
        raise DataError(f"{where} covers no pixel of the {width} x {height} picture")
    return region


def _points(points: Any, height: int, width: int, where: str) -> np.ndarray:
    """f64[N, 2] in pixels."""
    try:
        array = np.asarray(points, np.float64)
        if array.ndim != 2 or array.shape[1] != 2 or not len(array) or not np.isfinite(array).all():
            raise ValueError("points must be a list of finite [x, y]")
        if array.min() < -_REACH * max(height, width) or array.max() > (1 + _REACH) * max(height, width):
            raise ValueError(f"points lie far outside the {width} x {height} picture")
        if 0 < array.max() <= 1 < min(height, width) and array.min() >= 0 and (array % 1).any():
            raise ValueError("all points lie in 0 … 1, as shares of the sides do; multiply by width and height")
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is malformed: {error}") from None
    return array


def _folder(root: pathlib.Path, split: str) -> pathlib.Path:
    places = [root / below / split for below in ("", "ReasonSeg", "reason_seg/ReasonSeg")]
    for place in places:
        if any(place.glob("*.json")):
            return place
    there = sorted({path.parent.name for place in places for path in place.parent.glob("*/*.json")})
    have = f" There are: {', '.join(there)}." if there else ""
    raise DataError(f"no ReasonSeg split {split!r} under '{root}'. Expected {places[0]}/<id>.jpg with <id>.json.{have}")


def _read(path: pathlib.Path) -> dict[str, Any]:
    data = read_file(path)
    try:
        if b"\0" in data[:HEAD]:
            raise ValueError("UTF-16, or no text at all")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:  # some files were written on Windows
            text = data.decode("cp1252")
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = kind_of(data[:HEAD]) or error
        raise DataError(f"{path} is neither UTF-8 nor cp1252 JSON ({why}); unpack the data set again") from None
    if problem := _problem(record):
        raise DataError(f"{path}: {problem}; this is not a file of ReasonSeg")
    return record


def _problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "not an object"
    texts, shapes = record.get("text"), record.get("shapes")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        return 'text is not a list of sentences, ["…"]'
    if blank := [n for n, text in enumerate(texts, start=1) if not text.strip()]:
        return f"text is not a list of sentences: number {blank[0]} is blank"
    if not isinstance(shapes, list) or not all(isinstance(s, dict) and isinstance(s.get("label"), str) for s in shapes):
        return "shapes is not a list of labelled polygons"
    if not all("points" in s for s in shapes):
        return "a shape has no points"
    return None if isinstance(record.get("is_sentence"), bool) else "is_sentence is not true or false"
