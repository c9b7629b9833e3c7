"""Where to click and what to box for a region: geometry of the simulated user of interactive segmentation."""

from collections.abc import Callable

import cv2
import numpy as np

from rsagent_jax.agent.tools import Segment
from rsagent_jax.agent.views import View

LARGE = 0.25


def prompt_of(view: View, region: np.ndarray, use_box: bool) -> Segment:
    """The box of a region bool[h, w], or a click in the middle of its largest part; whole view pixels."""
    if not use_box:
        return Segment(points=(middle(view, largest_part(region)),), labels=(1,))
    ys, xs = np.nonzero(region)
    x1, y1, x2, y2 = view.box_to_view((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    x1, y1 = np.floor((x1, y1)).tolist()  # outward: a box may have some margin but must not cut
    x2, y2 = np.ceil((x2, y2)).tolist()
    return Segment(box=view.clip_box((x1, y1, x2, y2))[0])


def middle(view: View, region: np.ndarray) -> tuple[float, float]:
    """The whole view pixel nearest to the place of bool[h, w] that is farthest from its border (and the image's)."""
    depth = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(np.argmax(depth)), depth.shape)
    points_view, _ = view.clip_points(np.round(view.to_view(np.array([[x, y]]))))
    return points_view[0, 0].item(), points_view[0, 1].item()


def largest_part(region: np.ndarray) -> np.ndarray:
    """The largest connected part of bool[h, w]; all False when there is none."""
    return _part(region, lambda areas, lefts: np.argmax(areas))


def first_part(region: np.ndarray) -> np.ndarray:
    """Of the connected parts of bool[h, w] that are at least LARGE times the largest one, the leftmost: where several
    things are meant, an order that a picture tells. All False when there is none."""
    return _part(region, lambda areas, lefts: np.argmin(np.where(areas >= LARGE * areas.max(), lefts, np.inf)))


def _part(region: np.ndarray, choose: Callable[[np.ndarray, np.ndarray], np.intp]) -> np.ndarray:
    """The part that `choose` gives by the parts' areas and left edges."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8), connectivity=8)
    if count == 1:
        return np.zeros_like(region)
    return parts == 1 + int(choose(stats[1:, cv2.CC_STAT_AREA], stats[1:, cv2.CC_STAT_LEFT]))
