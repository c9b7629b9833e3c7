"""Call -> original pixels: the part of the image that the policy looks at, and the only conversion between the two.

A view is an axis-aligned crop of the original, turned by quarter turns and resized to a size that Qwen2.5-VL's
processor leaves alone (multiples of `factor` within the pixel limits). The policy speaks pixels of that size.

Continuous coordinates: pixel i covers [i, i + 1). A box is two corners on those edges. A point names a pixel by its
index, so its place is that pixel's centre, index + 0.5; this keeps a click on its pixel under rotation and scaling.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from PIL import Image

from rsagent_jax.types import DataError, ParseError

MIN_ZOOM_SIDE = 16  # original pixels: below this a crop shows nothing new
MAX_ZOOM_ASPECT = 20.0  # far inside the processor's limit of 200
MAX_ASPECT = 200.0  # Qwen2.5-VL's own limit
MAX_PASSES = 16  # of rounding; the excess of a very thin size is about halved by each

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class PixelLimits:
    """Sizes a processor accepts: sides are multiples of `factor` (patch * merge), the area min_pixels..max_pixels."""

    factor: int = 28
    min_pixels: int = 3136
    max_pixels: int = 12_845_056

    def __post_init__(self):
        if not (self.factor >= 1 and 1 <= self.min_pixels <= self.max_pixels and self.factor**2 <= self.max_pixels):
            raise DataError(
                f"pixel limits: need 1 <= min_pixels <= max_pixels and factor^2 <= max_pixels, got factor "
                f"{self.factor}, min_pixels {self.min_pixels}, max_pixels {self.max_pixels}"
            )

    def lowered_to(self, shown: PixelLimits) -> PixelLimits:
        """The processor's own limits for a trajectory shown under `shown`, whose minimum may be lower (see `fit`)."""
        return dataclasses.replace(self, min_pixels=min(self.min_pixels, shown.min_pixels))


def check_shape(h: int, w: int) -> None:
    """DataError for an h x w image that cannot be shown under any limits."""
    if min(h, w) < 1:
        raise DataError(f"image of {h}x{w} pixels (h x w) is empty")
    if max(h, w) / min(h, w) > MAX_ASPECT:
        raise DataError(
            f"image of {h}x{w} pixels (h x w): the longer side is more than {MAX_ASPECT:.0f} times the shorter;"
            " crop it, or cut it into parts"
        )


def round_size(h: int, w: int, limits: PixelLimits) -> tuple[int, int]:
    """Qwen2.5-VL's target size (h', w') of an h x w image; `round` is Python's, half to even, as in Hugging Face.

    The shape is not checked, since a size on the way need not be a picture's own: 29 x 5700 (197:1) is shown as
    28 x 5712 (204:1).
    """
    factor = limits.factor
    h_bar, w_bar = round(h / factor) * factor, round(w / factor) * factor
    if h_bar * w_bar > limits.max_pixels:
        beta = math.sqrt(h * w / limits.max_pixels)
        h_bar = max(factor, math.floor(h / beta / factor) * factor)
        w_bar = max(factor, math.floor(w / beta / factor) * factor)
    elif h_bar * w_bar < limits.min_pixels:
        beta = math.sqrt(limits.min_pixels / (h * w))
        h_bar = math.ceil(h * beta / factor) * factor
        w_bar = math.ceil(w * beta / factor) * factor
    return h_bar, w_bar


def fixed_size(h: int, w: int, limits: PixelLimits) -> tuple[int, int]:
    """Size (h', w') that `round_size` gives and then gives back unchanged. DataError for a shape that cannot be shown.

    One pass is enough for ordinary pictures. A very thin one may need more; were it shown after one pass, the processor
    would resize it again and the policy's pixels would no longer be the view's.
    """
    check_shape(h, w)
    size = (h, w)
    for _ in range(MAX_PASSES):
        rounded = round_size(*size, limits)
        if rounded == size:
            return size
        size = rounded
    raise DataError(f"image of {h}x{w} pixels (h x w) fits no size between the pixel limits {limits}")


def fit(h: int, w: int, limits: PixelLimits) -> PixelLimits:
    """The limits under which an h x w picture is shown: `limits`, with a lower minimum where they leave it no size.

    Of weights whose limits leave little room (the tiny base: min == max, so that only squares fit), less than their
    minimum may be shown: sides are rounded to `factor`, and a quarter of the maximum is low enough for every shape.
    DataError for a picture that cannot be shown at all, see check_shape.
    """
    check_shape(h, w)
    try:
        fixed_size(h, w, limits)
    except DataError:
        return dataclasses.replace(limits, min_pixels=max(1, limits.max_pixels // 4))
    return limits


@dataclasses.dataclass(frozen=True)
class View:
    """One look at the original. Equal views show equal pixels. Sizes are (width, height)."""

    size_original: tuple[int, int]  # (w, h)
    limits: PixelLimits
    region_original: tuple[int, int, int, int]  # the crop, whole pixels, XYXY
    quarter_turns: int = 0  # counter-clockwise, 0..3

    @staticmethod
    def whole(h: int, w: int, limits: PixelLimits) -> View:
        """The view of an h x w image that a trajectory starts with."""
        view = View((w, h), limits, (0, 0, w, h))
        view.size_view  # noqa: B018 -- raises DataError now rather than in the middle of a trajectory
        return view

    @functools.cached_property
    def size_view(self) -> tuple[int, int]:
        """(w', h') of the picture the policy sees."""
        x1, y1, x2, y2 = self.region_original
        w, h = (x2 - x1, y2 - y1) if self.quarter_turns % 2 == 0 else (y2 - y1, x2 - x1)
        h_view, w_view = fixed_size(h, w, self.limits)
        return w_view, h_view

    @functools.cached_property
    def affine_view_original(self) -> np.ndarray:
        """f64[2, 3] with place_view = A @ (x_original, y_original, 1), in continuous coordinates."""
        x1, y1, x2, y2 = self.region_original
        w, h = x2 - x1, y2 - y1
        matrix = np.array([[1.0, 0, -x1], [0, 1, -y1], [0, 0, 1]])
        for _ in range(self.quarter_turns):  # counter-clockwise with y down: (x, y) in a crop w wide to (y, w - x)
            matrix = np.array([[0, 1, 0], [-1, 0, w], [0, 0, 1]]) @ matrix
            w, h = h, w
        return (np.diag([self.size_view[0] / w, self.size_view[1] / h, 1.0]) @ matrix)[:2]

    def to_view(self, points_original: np.ndarray) -> np.ndarray:
        """f64[N, 2] pixel indices of the original -> f64[N, 2] pixel indices of the view."""
        a = self.affine_view_original
        return (np.asarray(points_original, np.float64).reshape(-1, 2) + 0.5) @ a[:, :2].T + a[:, 2] - 0.5

    def to_original(self, points_view: np.ndarray) -> np.ndarray:
        """f64[N, 2] pixel indices of the view -> f64[N, 2] pixel indices of the original; not clipped."""
        a = self.affine_view_original
        return (np.asarray(points_view, np.float64).reshape(-1, 2) + 0.5 - a[:, 2]) @ np.linalg.inv(a[:, :2]).T - 0.5

    def box_to_view(self, box_original: Box) -> Box:
        """Both corners, put in order again: a turn swaps which one is first."""
        return _ordered(self.to_view(np.reshape(box_original, (2, 2)) - 0.5) + 0.5)

    def box_to_original(self, box_view: Box) -> Box:
        """Both corners, put in order again; not clipped."""
        return _ordered(self.to_original(np.reshape(box_view, (2, 2)) - 0.5) + 0.5)

    def clip_points(self, points_view: np.ndarray) -> tuple[np.ndarray, int]:
        """Points moved to the nearest pixel of the view, and how many coordinates were outside."""
        return _clip(np.asarray(points_view, np.float64).reshape(-1, 2), np.array(self.size_view) - 1.0)

    def clip_box(self, box_view: Box) -> tuple[Box, int]:
        """The box in order and cut to the view, and how many coordinates were outside."""
        corners, clipped = _clip(np.reshape(np.asarray(box_view, np.float64), (2, 2)), np.array(self.size_view, float))
        return _ordered(corners), clipped

    def reset(self) -> View:
        """The view of the whole image."""
        w, h = self.size_original
        return View.whole(h, w, self.limits)

    def rotate(self, quarter_turns: int) -> View:
        """Turned further, counter-clockwise."""
        return dataclasses.replace(self, quarter_turns=(self.quarter_turns + quarter_turns) % 4)

    def zoom(self, box_view: Box) -> View | ParseError:
        """The view of that part of this view, grown to whole original pixels; or why it is refused."""
        box_view, _ = self.clip_box(box_view)
        if box_view[0] >= box_view[2] or box_view[1] >= box_view[3]:
            return ParseError("empty_box", "the box has no area inside the view.")
        x1, y1, x2, y2 = self.box_to_original(box_view)
        left, top, right, bottom = self.region_original
        tiny = 1e-6  # rounding of the affine must not grow a box that lies on pixel edges
        x1, y1 = max(left, math.floor(x1 + tiny)), max(top, math.floor(y1 + tiny))
        x2, y2 = min(right, math.ceil(x2 - tiny)), min(bottom, math.ceil(y2 - tiny))
        return self.crop((x1, y1, x2, y2))

    def crop(self, region_original: tuple[int, int, int, int]) -> View | ParseError:
        """The view of that region of the image, turned as this one is; or why it is refused."""
        x1, y1, x2, y2 = region_original
        w, h = x2 - x1, y2 - y1
        if min(w, h) < MIN_ZOOM_SIDE:
            return ParseError("zoom_too_small", f"the box must be at least {MIN_ZOOM_SIDE} image pixels wide and high.")
        if max(w, h) > MAX_ZOOM_ASPECT * min(w, h):
            return ParseError(
                "zoom_too_thin", f"the box must not be longer than {MAX_ZOOM_ASPECT:.0f} times its width."
            )
        view = dataclasses.replace(self, region_original=region_original)
        try:
            view.size_view  # noqa: B018 -- limits so tight that no size fits this shape
        except DataError:
            return ParseError("zoom_too_thin", "the box has a shape that cannot be shown.")
        return view

    def render(self, image: np.ndarray) -> np.ndarray:
        """u8[h, w, 3] -> u8[h', w', 3]. A crop that already has the view's size keeps its very pixels."""
        x1, y1, x2, y2 = self.region_original
        crop = np.ascontiguousarray(np.rot90(image[y1:y2, x1:x2], self.quarter_turns))
        if crop.shape[:2] == self.size_view[::-1]:
            return crop.copy()
        # Pillow's bicubic widens its kernel when it shrinks; Hugging Face's processor uses the same filter
        return np.asarray(Image.fromarray(crop).resize(self.size_view, Image.Resampling.BICUBIC))


def _ordered(corners: np.ndarray) -> Box:
    """Two corners [2, 2] -> x1 <= x2, y1 <= y2."""
    (x1, y1), (x2, y2) = corners.min(0).tolist(), corners.max(0).tolist()
    return x1, y1, x2, y2


def _clip(xy: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, int]:
    return np.clip(xy, 0.0, high), int(np.sum((xy < 0) | (xy > high)))
