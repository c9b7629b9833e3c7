"""COCO segmentations -> masks: polygons, and RLE in both of its forms."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from rsagent_jax.types import DataError


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
