"""COCO's run-length masks in both of its forms: bool[h, w] <-> compressed counts or a list of runs."""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco

from sam_bridge.frozen import remember

_STRIP = 128  # columns transposed at a time: they fit into the cache


def encode_mask(mask: np.ndarray) -> bytes:
    """bool[h, w] -> COCO compressed RLE counts (column-major); of a frozen mask made once."""
    return remember(mask, "counts", _encode)


def _encode(mask: np.ndarray) -> bytes:
    import cv2  # not above: a client that only decodes need not have OpenCV

    columns = cv2.transpose(np.ascontiguousarray(mask, dtype=bool).view(np.uint8))  # 6 times as fast as numpy's copy
    return coco.encode(columns.T)["counts"]


def decode_mask(counts: bytes | Sequence[int], height: int, width: int) -> np.ndarray:
    """COCO RLE counts, compressed or as `mask_runs` gives them -> bool[h, w], C order.

    ValueError unless they cover exactly the mask: pycocotools does not check, and short counts make it hand back memory
    that nobody wrote.
    """
    runs = mask_runs(counts) if isinstance(counts, bytes) else np.asarray(counts)
    if runs.ndim != 1 or (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError("RLE counts do not add up to the size of the image")
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    columns = np.repeat(values, runs.astype(np.int64)).reshape(width, height)
    mask = np.empty((height, width), bool)
    for left in range(0, width, _STRIP):
        mask[:, left : left + _STRIP] = columns[left : left + _STRIP].T
    return mask


def mask_runs(counts: bytes) -> np.ndarray:
    """Compressed counts -> i64[n] lengths of the runs, background first. ValueError where they are none.

    A number is 5 bits a character from 48 on, lowest first, bit 6 says that more follow, and the last one's bit 5 is
    the sign; from the fourth on they are differences to the one before last.
    """
    malformed = ValueError(
        "RLE counts are neither COCO's compressed text (bytes are stored as counts.decode()) nor a list"
    )
    digits = np.frombuffer(counts, np.uint8) - np.uint8(48)  # what is below 48 wraps around, to more than 63
    if not len(digits) or (digits > 63).any():
        raise malformed
    if digits[-1] & 32:
        raise ValueError("RLE counts end within a number")
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    more = ends - starts  # characters after a number's first, of few numbers any
    if more.max() > 6:  # 35 bits: more than any mask needs
        raise malformed
    numbers = (digits[starts] & 31).astype(np.int64)
    for place in range(1, more.max() + 1):
        longer = np.flatnonzero(more >= place)
        numbers[longer] |= (digits[starts[longer] + place] & 31).astype(np.int64) << (5 * place)
    negative = np.flatnonzero(digits[ends] & 16)
    numbers[negative] -= 1 << (5 * (more[negative] + 1))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
