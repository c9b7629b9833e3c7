"""Masks once for everybody: RLE in both of its forms, COCO polygons, IoU."""

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from rsagent_jax.types import DataError, Sample
from sam_bridge.rle import decode_mask, encode_mask

POLYGONS, RLE = "[[x1, y1, x2, y2, x3, y3, …], …] in pixels", '{"size": [height, width], "counts": …}'


def decode_segmentation(segmentation: list | dict, height: int, width: int, where: str) -> np.ndarray:
    """COCO segmentation -> bool[height, width]. `where` names it in the DataError of a malformed one.

    Polygons (a list of [x1, y1, x2, y2, …]) are rasterised one by one and united, and must cover a pixel; a dict is
    RLE, compressed or not, and may be empty.
    """
    try:
        if isinstance(segmentation, dict):
            return decode_rle(segmentation, (height, width))
        polygons = _checked_polygons(segmentation, height, width)
    except (ValueError, TypeError, OverflowError) as error:
        form = RLE if isinstance(segmentation, dict) else f"polygons {POLYGONS}, or RLE {RLE}"
        raise DataError(f"the segmentation of {where} is malformed: {error}. The form is {form}") from None
    mask = draw_polygons(polygons, height, width)
    if not mask.any():
        raise DataError(f"the segmentation of {where} covers no pixel of its {width} x {height} image")
    return mask


def draw_polygons(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """[x1, y1, x2, y2, …] each -> bool[height, width], their union by COCO's rule. Nothing is checked."""
    return coco_mask.decode(coco_mask.frPyObjects(polygons, height, width)).any(axis=2)


def _checked_polygons(segmentation: Any, height: int, width: int) -> list[list[float]]:
    """ValueError with what it is instead."""
    if not isinstance(segmentation, list | tuple) or not len(segmentation):
        kind = {str: "text", dict: "an object"}.get(type(segmentation), type(segmentation).__name__)
        raise ValueError("it is empty" if segmentation in (None, []) else f"it is {kind}")
    if all(isinstance(part, int | float) for part in segmentation):
        is_box = " (4 numbers are a box, which is no outline)" if len(segmentation) == 4 else ""
        raise ValueError(f"it is one flat list of numbers{is_box}, where a list of polygons is due")
    if any(isinstance(part, dict) for part in segmentation):
        raise ValueError("it is a list of RLE; one RLE is due, of the union")
    polygons = [_checked_polygon(polygon, height, width) for polygon in segmentation]
    if max(map(max, polygons)) <= 1 < max(height, width):
        raise ValueError("all its coordinates lie in 0 … 1, as shares of the sides do; multiply by width and height")
    return polygons


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


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """bool[h, w] -> COCO's compressed RLE as JSON takes it."""
    return {"size": list(mask.shape), "counts": encode_mask(mask).decode("ascii")}


def decode_rle(rle: dict[str, Any], shape: tuple[int, int] | None = None) -> np.ndarray:
    """COCO RLE, its counts compressed or a list -> bool[h, w]. ValueError with what is wrong with a broken one, or one
    of another `shape` (h, w)."""
    if missing := [key for key in ("size", "counts") if rle.get(key) is None]:
        raise ValueError(f"RLE without {' and '.join(missing)}")
    size = list(rle["size"])
    if shape is not None and size != list(shape):
        swapped = ": width and height are swapped" if size[::-1] == list(shape) else ""
        raise ValueError(f"RLE of size {size} on an image of {list(shape)} (rows, columns){swapped}")
    counts = rle["counts"].encode("latin1") if isinstance(rle["counts"], str) else rle["counts"]
    if not isinstance(counts, bytes):
        runs = np.asarray(counts)
        if runs.dtype.kind not in "iuf" or any(isinstance(run, bool) for run in counts) or (runs % 1).any():
            raise ValueError("RLE counts must be whole numbers, or COCO's compressed text")
    return decode_mask(counts, *size)


def intersection_union(predicted: np.ndarray, target: np.ndarray, ignore: np.ndarray | None = None) -> tuple[int, int]:
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


def iou(predicted: np.ndarray, target: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """`intersection_union` as a share in [0, 1]; 1 where both masks are empty."""
    intersection, union = intersection_union(predicted, target, ignore)
    return intersection / union if union else 1.0


def mask_iou(mask: np.ndarray, sample: Sample) -> float:
    """IoU of `mask` (bool[h, w]) with the sample's ground truth outside its ignore mask."""
    return iou(mask, sample.gt_mask, sample.ignore_mask)
