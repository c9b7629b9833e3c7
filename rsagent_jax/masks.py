"""COCO segmentations -> masks: polygons, and RLE in both of its forms."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from rsagent_jax.types import DataError, Sample

POLYGONS, RLE = "[[x1, y1, x2, y2, x3, y3, …], …] in pixels", '{"size": [height, width], "counts": …}'


def decode_segmentation(segmentation: list | dict, height: int, width: int, where: str) -> np.ndarray:
    """COCO segmentation -> bool[height, width]. `where` names it in the DataError of a malformed one.

    Polygons (a list of [x1, y1, x2, y2, …]) are rasterised one by one and united, and must cover a pixel; a dict is
    RLE, compressed or not, and may be empty.
    """
    try:
        if isinstance(segmentation, dict):
            return _decode_rle(segmentation, height, width)
        polygons = _checked_polygons(segmentation, height, width)
    except (ValueError, TypeError, OverflowError) as error:
        form = RLE if isinstance(segmentation, dict) else f"polygons {POLYGONS}, or RLE {RLE}"
        raise DataError(f"the segmentation of {where} is malformed: {error}. The form is {form}") from None
    parts = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width))
    # Parts are summed and the sum made binary: overlapping parts would give values above 1.
    mask = parts.sum(axis=2) > 0
    if not mask.any():
        raise DataError(f"the segmentation of {where} covers no pixel of its {width} x {height} image")
    return mask


def _checked_polygons(segmentation: Any, height: int, width: int) -> list[list[float]]:
    """ValueError with what it is instead."""
    if not isinstance(segmentation, list | tuple) or not len(segmentation):
        raise ValueError("it is empty" if segmentation in (None, []) else f"it is {_kind(segmentation)}")
    if all(isinstance(part, int | float) for part in segmentation):
        is_box = " (4 numbers are a box, which is no outline)" if len(segmentation) == 4 else ""
        raise ValueError(f"it is one flat list of numbers{is_box}, where a list of polygons is due")
    if any(isinstance(part, dict) for part in segmentation):
        raise ValueError("it is a list of RLE; one RLE is due, of the union")
    polygons = [_checked_polygon(polygon, height, width) for polygon in segmentation]
    if max(map(max, polygons)) <= 1 < max(height, width):
        raise ValueError("all its coordinates lie in 0 … 1, as shares of the sides do; multiply by width and height")
    return polygons


def _kind(value: Any) -> str:
    return {str: "text", dict: "an object"}.get(type(value), type(value).__name__)


def _checked_polygon(polygon: list, height: int, width: int) -> list[float]:
    if isinstance(polygon, list | tuple) and any(isinstance(point, list | tuple) for point in polygon):
        raise ValueError("a polygon is a list of pairs, where a flat list is due")
    points = np.asarray(polygon, np.float64)
    if points.ndim == 1 and points.size == 4:
        raise ValueError("a polygon has 4 numbers: a box is no outline")
    if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all():
        raise ValueError("a polygon must be a flat list of at least 3 finite x, y pairs")
    reach = max(height, width)
    if points.min() < -reach or points.max() > 2 * reach:  # pycocotools reserves memory for the outline's length
        raise ValueError(f"a polygon reaches far outside its {width} x {height} image")
    return points.tolist()


def _decode_rle(rle: dict, height: int, width: int) -> np.ndarray:
    """Not pycocotools: where the counts of a broken RLE end early, it hands back memory that nobody wrote."""
    if missing := [key for key in ("size", "counts") if rle.get(key) is None]:
        raise ValueError(f"RLE without {' and '.join(missing)}")
    size, counts = list(rle["size"]), rle["counts"]
    if size != [height, width]:
        swapped = ": width and height are swapped" if size == [width, height] else ""
        raise ValueError(f"RLE of size {size} on an image of {[height, width]} (rows, columns){swapped}")
    if isinstance(counts, str | bytes):
        counts = _uncompress(counts)
    runs = np.asarray(counts)
    if runs.dtype.kind not in "iuf" or any(isinstance(run, bool) for run in counts) or (runs != np.round(runs)).any():
        raise ValueError("RLE counts must be whole numbers, or COCO's compressed text")
    if runs.ndim != 1 or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError("RLE counts do not add up to the size of the image")
    runs = runs.astype(np.int64)
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(width, height).T.copy()  # runs go down the columns


def _uncompress(text: str | bytes) -> list[int]:
    """COCO's compressed counts: groups of 5 bits, lowest first; from the fourth count on, the change to two before."""
    digits = [c - 48 for c in (text.encode("latin1") if isinstance(text, str) else bytes(text))]
    counts: list[int] = []
    value = shift = 0
    for digit in digits:
        if not 0 <= digit < 64 or shift > 30:
            raise ValueError(
                "RLE counts are neither COCO's compressed text (bytes are stored as counts.decode()) nor a list"
            )
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


def intersection_union(predicted: np.ndarray, target: np.ndarray, ignore: np.ndarray | None) -> tuple[int, int]:
    """Number of pixels in both masks and in either, outside `ignore`. Masks are bool[h, w] in original pixels.

    Raises ValueError if a mask is not bool or the shapes differ: masks are compared at original resolution only.
    """
    for mask in (predicted, target) if ignore is None else (predicted, target, ignore):
        if mask.dtype != bool or mask.shape != target.shape:
            raise ValueError(f"masks must be bool{list(target.shape)}, got {mask.dtype}{list(mask.shape)}")
    if ignore is not None:
        predicted, target = predicted & ~ignore, target & ~ignore
    intersection = int(np.count_nonzero(predicted & target))
    return intersection, int(np.count_nonzero(predicted)) + int(np.count_nonzero(target)) - intersection


def mask_iou(mask: np.ndarray, sample: Sample) -> float:
    """IoU in [0, 1] of `mask` (bool[h, w]) with the ground truth outside the ignore mask; 1 where both are empty."""
    intersection, union = intersection_union(mask, sample.gt_mask, sample.ignore_mask)
    return intersection / union if union else 1.0
