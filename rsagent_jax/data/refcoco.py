"""RefCOCO, RefCOCO+ and RefCOCOg as `Sample`s, in the layout of github.com/lichengunc/refer.

    <root>/refcocog/refs(umd).p                  references: which annotation, which sentences, which split
    <root>/refcocog/instances.json               COCO style: images and annotations
    <root>/images/mscoco/images/train2014/       the pictures

Nothing but text is held in memory: pictures and masks are decoded when a sample is asked for. Every problem with the
files is a DataError that names the path and the remedy.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import PIL.Image
from pycocotools import mask as coco_mask

from rsagent_jax.data import unpickle
from rsagent_jax.types import DataError, Sample

IMAGES = pathlib.PurePath("images/mscoco/images/train2014")


@dataclasses.dataclass(frozen=True)
class _Picture:
    path: str
    height: int  # as instances.json says; held against the file when it is read
    width: int


@dataclasses.dataclass(frozen=True)
class _Entry:
    id: str
    query: str
    picture: _Picture
    ann_id: int
    segmentation: list | dict


class RefCocoIndex(Sequence):
    """A lazy, picklable sequence of samples: `len(index)`, `index[i]`, in the order of the reference file.

    `index[i]` raises DataError for a picture or mask that is missing, broken or of another size than stated.
    """

    def __init__(self, name: str, entries: tuple[_Entry, ...]):
        self.name = name  # "refcocog/umd/val"
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> Sample:
        entry = self._entries[i]
        image = read_image(entry.picture.path)
        h, w = entry.picture.height, entry.picture.width
        if image.shape[:2] != (h, w):
            raise DataError(
                f"{entry.picture.path} is {image.shape[1]} x {image.shape[0]} pixels, but its annotations are drawn for"
                f" {w} x {h} (sample {entry.id}): use the original COCO train2014 pictures, not resized or rotated ones"
            )
        mask = decode_segmentation(entry.segmentation, h, w, f"annotation {entry.ann_id} (sample {entry.id})")
        return Sample(id=entry.id, image=image, query=entry.query, gt_mask=mask, path=str(entry.picture.path))

    @property
    def ids(self) -> list[str]:
        """Sample ids in order, without decoding anything."""
        return [entry.id for entry in self._entries]


def load_refcoco(
    root: str | pathlib.Path,
    dataset: str = "refcocog",
    split_by: str = "umd",
    split: str = "val",
    unit: str = "sentence",
    limit: int | None = None,
    raw: bool = False,
) -> RefCocoIndex:
    """Indexes one split.

    unit: "sentence", every sentence of every reference is a sample (LISA's rule); or "reference", only its first one.
    limit: keep the first so many samples. raw: the annotator's own text (`raw`, stripped) for the query, not the
    normalised `sent` (stripped, lower case). Sample ids read "<dataset>/<split_by>/<split>/<ref_id>/<sent_id>".
    Raises DataError where files are missing or broken, or where the split does not exist.
    """
    if unit not in ("sentence", "reference"):
        raise DataError(f"unit must be 'sentence' or 'reference', not {unit!r}")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 (or None for all samples), not {limit}")
    root = pathlib.Path(root).expanduser()
    refs_path, instances_path = _check_layout(root, dataset, split_by)
    refs = _select_split(_read_refs(refs_path), split, refs_path)
    pictures, annotations = _read_instances(instances_path, root / IMAGES)

    name = f"{dataset}/{split_by}/{split}"
    entries: list[_Entry] = []
    for ref in refs:
        if limit is not None and len(entries) >= limit:
            break
        # ref["file_name"] carries an annotation suffix and names no file: the picture comes from its image_id.
        where = f"reference {ref['ref_id']} in {refs_path}"
        picture = _look_up(pictures, ref["image_id"], "image", where, instances_path)
        annotation = _look_up(annotations, ref["ann_id"], "annotation", where, instances_path)
        if annotation["image_id"] != ref["image_id"]:
            raise DataError(
                f"{where} is about image {ref['image_id']}, but its annotation {ref['ann_id']} is on image"
                f" {annotation['image_id']}: {refs_path.name} and {instances_path.name} are not from one download"
            )
        for sentence in ref["sentences"] if unit == "sentence" else ref["sentences"][:1]:
            query = sentence["raw"].strip() if raw else sentence["sent"].strip().lower()
            sample_id = f"{name}/{ref['ref_id']}/{sentence['sent_id']}"
            entries.append(_Entry(sample_id, query, picture, ref["ann_id"], annotation["segmentation"]))
    return RefCocoIndex(name, tuple(entries[:limit]))


def read_image(path: str | pathlib.Path) -> np.ndarray:
    """A picture file -> u8[h, w, 3] RGB, whatever it holds (grey, CMYK, palette). Raises DataError naming the file.

    The EXIF orientation is not applied, on purpose: COCO's annotations are drawn on the pixels as stored.
    """
    try:
        with PIL.Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: unpack all of COCO train2014 (train2014.zip) into its folder") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable picture ({error}): delete it and download it again") from None


def decode_segmentation(segmentation: list | dict, height: int, width: int, where: str) -> np.ndarray:
    """COCO segmentation -> bool[height, width]. `where` names it in the DataError of a malformed one.

    Polygons (a list of [x1, y1, x2, y2, …]) are rasterised one by one and united; a dict is RLE, compressed or not; an
    empty list is an empty mask.
    """
    if not segmentation:
        return np.zeros((height, width), bool)
    try:
        if isinstance(segmentation, dict):
            return _decode_rle(segmentation, height, width)
        polygons = [_checked_polygon(polygon, height, width) for polygon in segmentation]
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DataError(f"the segmentation of {where} is malformed: {error}") from None
    parts = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width))
    # Parts are summed and the sum made binary: overlapping parts would give values above 1.
    return parts.sum(axis=2) > 0


def _checked_polygon(polygon: list, height: int, width: int) -> list[float]:
    points = np.asarray(polygon, np.float64)
    if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all():
        raise ValueError("a polygon must be a flat list of at least 3 finite x, y pairs")
    reach = max(height, width)
    if points.min() < -reach or points.max() > 2 * reach:  # pycocotools reserves memory for the outline's length
        raise ValueError(f"a polygon reaches far outside its {width} x {height} image")
    return points.tolist()


def _decode_rle(rle: dict, height: int, width: int) -> np.ndarray:
    """Not pycocotools: where the counts of a broken RLE end early, it hands back memory that nobody wrote."""
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"RLE of size {list(rle['size'])} on an image of {[height, width]} (rows, columns)")
    counts = rle["counts"] if isinstance(rle["counts"], list) else _uncompress(rle["counts"])
    runs = np.asarray(counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError("RLE counts do not add up to the size of the image")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T.copy()  # runs go down the columns


def _uncompress(text: str | bytes) -> list[int]:
    """COCO's compressed counts: groups of 5 bits, lowest first; from the fourth count on, the change to two before."""
    digits = [c - 48 for c in (text.encode("latin1") if isinstance(text, str) else bytes(text))]
    counts: list[int] = []
    value = shift = 0
    for digit in digits:
        if not 0 <= digit < 64 or shift > 30:
            raise ValueError("RLE counts are not in COCO's compressed form")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:  # more groups follow
            continue
        value -= (digit & 16) << (shift - 4)  # the sign, extended from the top bit of the last group
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("RLE counts end within a number")
    return counts


# ---------------------------------------------------------------------------------------------------- files


def _check_layout(root: pathlib.Path, dataset: str, split_by: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Paths of the reference file and of instances.json; one DataError lists everything that is missing."""
    folder = root / dataset
    refs_path, instances_path = folder / f"refs({split_by}).p", folder / "instances.json"
    expected = (refs_path, instances_path, root / IMAGES)
    if all(path.exists() for path in expected):
        return refs_path, instances_path
    lines = [f"  {'found  ' if path.exists() else 'MISSING'}  {path}" for path in expected]
    others = [path.name[len("refs(") : -len(").p")] for path in sorted(folder.glob("refs(*).p"))]
    hint = f"This folder has split_by = {' or '.join(others)}. " if others and not refs_path.exists() else ""
    raise DataError(
        f"no {dataset} under {root}. Expected:\n" + "\n".join(lines) + f"\n{hint}Get the data as README.md says"
        f" (section Data), or make a stand-in: python -m rsagent_jax.data.synthetic --out={root} --train=200 --val=50"
    )


def _read_refs(path: pathlib.Path) -> list[dict]:
    refs = unpickle.load_data(path)
    kinds = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
    if not isinstance(refs, list) or not refs:
        raise DataError(f"{path} must hold a list of references, not {type(refs).__name__} (or an empty one)")
    for k, ref in enumerate(refs):
        wrong = not isinstance(ref, dict) or [f for f, kind in kinds.items() if not isinstance(ref.get(f), kind)]
        if wrong:
            fields = "a dict" if wrong is True else f"with proper {', '.join(wrong)}"
            raise DataError(f"{path}: reference number {k} is not {fields}: this is not a file of the refer layout")
        for s in ref["sentences"]:
            if not isinstance(s, dict) or not all(isinstance(s.get(f), str) for f in ("sent", "raw")):
                raise DataError(f"{path}: reference {ref['ref_id']} has a sentence without 'sent' and 'raw' text")
            if "sent_id" not in s:
                raise DataError(f"{path}: reference {ref['ref_id']} has a sentence without 'sent_id'")
    return refs


def _select_split(refs: list[dict], split: str, path: pathlib.Path) -> list[dict]:
    """refer's rules: "testA" takes every split with an A in it ("testA", "testAB"), "test" all tests, others exact."""
    if split in ("testA", "testB", "testC"):
        chosen = [ref for ref in refs if split[-1] in ref["split"]]
    elif split == "test":
        chosen = [ref for ref in refs if "test" in ref["split"]]
    else:
        chosen = [ref for ref in refs if ref["split"] == split]
    if not chosen:
        counts = collections.Counter(ref["split"] for ref in refs)
        there = ", ".join(f"{name} ({counts[name]} references)" for name in sorted(counts))
        raise DataError(f"{path} has nothing in split {split!r}. It has: {there}")
    return chosen


def _read_instances(path: pathlib.Path, images: pathlib.Path) -> tuple[dict[int, _Picture], dict[int, dict]]:
    """instances.json -> pictures by image id, annotations by id. Raises DataError."""
    try:
        instances = json.loads(path.read_bytes())
        pictures = {
            image["id"]: _Picture(str(images / image["file_name"]), int(image["height"]), int(image["width"]))
            for image in instances["images"]
        }
        annotations = {a["id"]: {f: a[f] for f in ("image_id", "segmentation")} for a in instances["annotations"]}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a COCO instances file: missing or ill-typed {error}") from None
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise DataError(f"{path} is not valid JSON ({error}): cut short? Download it again") from None
    return pictures, annotations


def _look_up(table: dict, key: int, what: str, where: str, instances_path: pathlib.Path):
    try:
        return table[key]
    except KeyError:
        raise DataError(
            f"{where} names {what} {key}, which {instances_path} does not have: take both files from one download"
        ) from None
