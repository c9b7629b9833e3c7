"""Mask -> observation: a mask drawn on the original image, small enough for the history pool."""

from collections.abc import Sequence

import cv2
import numpy as np

TINT = (30, 144, 255)  # rare in photographs, so that it does not pass for a part of the object
OUTLINE = (255, 255, 0)
POSITIVE = (0, 255, 0)
NEGATIVE = (255, 0, 0)
ALPHA = 0.5


def overlay_size(h: int, w: int, size: int) -> tuple[int, int]:
    """(rows, columns) of the overlay of an h x w image: its aspect, the longer side `size` pixels."""
    scale = size / max(h, w)
    return max(1, round(h * scale)), max(1, round(w * scale))


def draw_overlay(
    image: np.ndarray,
    mask: np.ndarray,
    size: int,
    points_original: Sequence[Sequence[float]] = (),
    labels: Sequence[int] = (),
    box_original: Sequence[float] | None = None,
) -> np.ndarray:
    """u8[h, w, 3] and bool[h, w] -> u8[a, b, 3] with max(a, b) == size and the aspect of the image.

    Small images are enlarged as well: every overlay of a set then costs about the same number of tokens. Always the
    whole original, whatever view the call was made in. Prompts of the call: green = object, red = background, yellow
    box.
    """
    h, w = mask.shape
    fit, shrinks = overlay_size(h, w, size)[::-1], size < max(h, w)
    overlay = cv2.resize(image, fit, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    # share of each small pixel that the mask covers: a thin mask fades but does not vanish
    cover = cv2.resize(mask.astype(np.float32), fit, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    alpha = ALPHA * cover[..., None]
    overlay = np.round(overlay * (1 - alpha) + np.array(TINT, np.float32) * alpha).astype(np.uint8)
    inside = (cover >= 0.5).astype(np.uint8)
    overlay[cv2.dilate(inside, np.ones((3, 3), np.uint8)) > inside] = OUTLINE

    radius = max(2, size // 96)
    to_fit = np.array(fit) / (w, h)
    for point, label in zip(points_original, labels, strict=True):
        x, y = np.floor((np.asarray(point, float) + 0.5) * to_fit).astype(int).tolist()
        cv2.circle(overlay, (x, y), radius + 1, (255, 255, 255), -1)
        cv2.circle(overlay, (x, y), radius, POSITIVE if label == 1 else NEGATIVE, -1)
    if box_original is not None:
        x1, y1, x2, y2 = np.round(np.asarray(box_original, float) * np.tile(to_fit, 2)).astype(int).tolist()
        cv2.rectangle(overlay, (x1, y1), (max(x1, x2 - 1), max(y1, y2 - 1)), OUTLINE, 1)
    return overlay
