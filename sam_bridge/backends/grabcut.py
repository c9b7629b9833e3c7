"""GrabCut as a promptable segmenter: needs no weights, answers in milliseconds, deterministic.

A prompt becomes a trimap (certain / probable, object / background), one GrabCut iteration cuts it. Pixels outside a box
are certain background, so only the box and a frame around it are looked at: a third of the time, and background
statistics from where they matter. Without a box, a click's object starts as all that is joined to it in about its
colour: from a small disc alone, most of an object counts as background at first, and stays there. The inner part of
what is joined is certain, and again only a frame around it is looked at; otherwise a small object in a large picture is
taken for background now and then. Measured on 120 coloured shapes over photographs at 112 x 112, a click in the middle:
mean IoU 0.40 from the disc, 0.90 with its colour, 0.94 with a certain inner part and a frame; an exact box: 0.81.
"""

import dataclasses

import cv2
import numpy as np

from sam_bridge.backends import Decoded
from sam_bridge.types import SegmentRequest

VERSION = 3  # of what is done with a prompt; masks of one are not those of another
MAX_SIDE = 512  # longer side of the working copy, pixels; larger images are shrunk and the mask enlarged again
ITERATIONS = 1
BOX_MARGIN = 2  # working pixels around a box that may still be object
CORE_RADIUS = 2  # working pixels around a click that are certain
DISC_SHARE = 14  # a click's disc of probable object has radius side / DISC_SHARE
BLUR = 5  # working pixels of the median filter before a click's colour is compared
TOLERANCE = 42  # of 255, in each channel: how far a click's colour reaches
RING = 6  # working pixels around the mask that the score compares it with


@dataclasses.dataclass(frozen=True)
class GrabCutEncoding:
    """The working copy, and the size it came from."""

    pixels: np.ndarray  # u8[h', w', 3]
    smooth: np.ndarray  # u8[h', w', 3], the same after a median filter
    height: int
    width: int
    flat: bool  # one colour: there is nothing to cut along


class GrabCut:
    """Back end. Clicks keep the connected parts they lie on; a box keeps all that was found in it."""

    name = "grabcut"

    def __init__(self):
        cv2.setNumThreads(1)  # parallelism is across calls; OpenCV's own threads would only fight over the cores

    @property
    def identity(self) -> str:
        """Masks depend on OpenCV's own code and on the constants above."""
        constants = (VERSION, MAX_SIDE, ITERATIONS, BOX_MARGIN, CORE_RADIUS, DISC_SHARE, BLUR, TOLERANCE)
        return f"{self.name} opencv {cv2.__version__} {'-'.join(map(str, constants))}"

    def encode(self, image: np.ndarray) -> tuple[GrabCutEncoding, int]:
        """u8[h, w, 3] -> working copy with a longer side of at most MAX_SIDE."""
        height, width = image.shape[:2]
        shrink = min(1.0, MAX_SIDE / max(height, width))
        if shrink < 1.0:
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            pixels = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        else:
            pixels = np.array(image, order="C")  # a copy: the caller may change theirs, or it views a message's bytes
        flat = bool((pixels == pixels[0, 0]).all())
        return GrabCutEncoding(pixels, cv2.medianBlur(pixels, BLUR), height, width, flat), 2 * pixels.nbytes

    def decode(self, encoding: GrabCutEncoding, request: SegmentRequest, logits: np.ndarray | None) -> Decoded:
        """`logits` are the working mask packed to bits, u8[ceil(h' * w' / 8)]."""
        shape, prompt = encoding.pixels.shape[:2], _to_working(request, encoding)
        box, start, core = prompt.box, None, None
        if logits is not None:
            start = np.unpackbits(logits, count=shape[0] * shape[1]).reshape(shape)
        if box is None and (start is not None or prompt.objects):  # no box says how far to look
            start = _changed(prompt, encoding, start)
            core = cv2.erode(start, np.ones((3, 3), np.uint8))
            looked_at = start.copy()
            for x, y in prompt.objects:  # a click on the background of the same colour takes away what is joined to one
                looked_at[y, x] = 1
            if looked_at.any():
                x, y, width, height = cv2.boundingRect(looked_at)
                box = (x, y, x + width, y + height)
        found, score = _cut(encoding, _trimap(prompt, shape, start, core), prompt, _region(box, shape))
        mask = found
        if shape != (encoding.height, encoding.width):
            size = (encoding.width, encoding.height)
            mask = cv2.resize(found.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5
        return Decoded(mask, score, np.packbits(found))


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """The request in whole pixels of the working copy. `box` is half open, margin included; clicks are (x, y)."""

    box: tuple[int, int, int, int] | None
    objects: list[tuple[int, int]]
    backgrounds: list[tuple[int, int]]
    refine: bool


def _to_working(request: SegmentRequest, encoding: GrabCutEncoding) -> _Prompt:
    """Original pixels -> working pixels; pixel i covers [i, i + 1)."""
    rows, columns = encoding.pixels.shape[:2]
    sx, sy = columns / encoding.width, rows / encoding.height
    box = None
    if request.box is not None:
        x0, y0, x1, y1 = request.box
        box = (
            max(0, int(np.floor(max(x0, 0) * sx)) - BOX_MARGIN),
            max(0, int(np.floor(max(y0, 0) * sy)) - BOX_MARGIN),
            min(columns, int(np.ceil(min(x1, encoding.width) * sx)) + BOX_MARGIN),
            min(rows, int(np.ceil(min(y1, encoding.height) * sy)) + BOX_MARGIN),
        )
    clicks = [(min(int(x * sx), columns - 1), min(int(y * sy), rows - 1)) for x, y in request.points]
    objects = [c for c, label in zip(clicks, request.labels, strict=True) if label]
    backgrounds = [c for c, label in zip(clicks, request.labels, strict=True) if not label]
    return _Prompt(box, objects, backgrounds, bool(request.refine_logits_id))


def _trimap(prompt: _Prompt, shape: tuple[int, int], start: np.ndarray | None, core: np.ndarray | None) -> np.ndarray:
    """u8[h', w'] of cv2.GC_*. Later strokes win: mask or colours, discs, certain cores, what a box excludes."""
    trimap = np.full(shape, cv2.GC_PR_BGD if prompt.box is None else cv2.GC_PR_FGD, np.uint8)
    if start is not None:
        trimap[:] = np.where(start, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    if core is not None:
        trimap[core > 0] = cv2.GC_FGD
    radius = _radius(shape)
    strokes = (
        (prompt.objects, radius, cv2.GC_PR_FGD),
        (prompt.backgrounds, radius, cv2.GC_PR_BGD),
        (prompt.objects, CORE_RADIUS, cv2.GC_FGD),
        (prompt.backgrounds, CORE_RADIUS, cv2.GC_BGD),
    )
    for clicks, size, value in strokes:
        for click in clicks:
            cv2.circle(trimap, click, size, value, -1)
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box
        outside = np.ones(shape, bool)
        outside[y0:y1, x0:x1] = False
        trimap[outside] = cv2.GC_BGD
    return trimap


def _radius(shape: tuple[int, int]) -> int:
    return max(CORE_RADIUS, round(min(shape) / DISC_SHARE))


def _changed(prompt: _Prompt, encoding: GrabCutEncoding, mask: np.ndarray | None) -> np.ndarray:
    """u8[h', w'] of 0 and 1: the earlier mask with what is joined to each click in its colour, or without it.

    A click within a disc of the mask's edge mends that edge and is left to the cut: all that is joined in its colour to
    the sliver it lies on would follow, the background as often as not.
    """
    radius = _radius(encoding.smooth.shape[:2])
    for clicks, label in ((prompt.objects, 1), (prompt.backgrounds, 0)):
        for x, y in clicks:
            if mask is None:
                mask = _joined((x, y), encoding) * label
                continue
            framed = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)  # the picture's end is an edge
            apart = max(cv2.distanceTransform(m, cv2.DIST_L2, 5)[y + 1, x + 1] for m in (framed, 1 - framed))
            if apart > radius and mask[y, x] != label:
                mask = mask | _joined((x, y), encoding) if label else mask & ~_joined((x, y), encoding) & 1
    return mask


def _joined(click: tuple[int, int], encoding: GrabCutEncoding) -> np.ndarray:
    """u8[h', w'] of 0 and 1: all that is joined to the click by pixels within TOLERANCE of its colour."""
    height, width = encoding.smooth.shape[:2]
    reached = np.zeros((height + 2, width + 2), np.uint8)  # with the frame that OpenCV wants
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | (1 << 8)  # 4 neighbours; writes 1 into `reached`
    cv2.floodFill(encoding.smooth, reached, click, 0, (TOLERANCE,) * 3, (TOLERANCE,) * 3, flags)
    return reached[1:-1, 1:-1].copy()


def _cut(encoding: GrabCutEncoding, trimap: np.ndarray, prompt: _Prompt, region) -> tuple[np.ndarray, float]:
    """(bool[h', w'], score). Where there is nothing to cut (one colour, no background) the prompt itself, score 0.

    Nothing outside `region` (x0, y0, x1, y1) is looked at or found.
    """
    x0, y0, x1, y1 = region
    pixels, labels = np.ascontiguousarray(encoding.pixels[y0:y1, x0:x1]), trimap[y0:y1, x0:x1].copy()
    guess = (labels & 1).astype(bool)  # GC_FGD and GC_PR_FGD are the odd ones
    if guess.all():  # a box over the whole picture: its border is the best background there is
        labels[[0, -1]] = cv2.GC_PR_BGD
        labels[:, [0, -1]] = cv2.GC_PR_BGD
    object_pixels = int((labels & 1).sum())
    found, score = guess, 0.0
    if not encoding.flat and 0 < object_pixels < labels.size:
        # The generator is per thread and GrabCut's k-means draws from it: without this, masks would depend on which
        # thread of the pool serves a call and on what that thread did before.
        cv2.setRNGSeed(0)
        cv2.grabCut(pixels, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), ITERATIONS, cv2.GC_INIT_WITH_MASK)
        found = _under_clicks((labels & 1).astype(bool), guess, prompt, (x0, y0))
        score = _separation(pixels, found)
    mask = np.zeros(trimap.shape, bool)
    mask[y0:y1, x0:x1] = found
    return mask, score


def _region(box: tuple[int, int, int, int] | None, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box and half its size around it, at least 8 pixels: enough background to learn from. No box: everything."""
    if box is None:
        return 0, 0, shape[1], shape[0]
    x0, y0, x1, y1 = box
    dx, dy = max(8, (x1 - x0) // 2), max(8, (y1 - y0) // 2)
    return max(0, x0 - dx), max(0, y0 - dy), min(shape[1], x1 + dx), min(shape[0], y1 + dy)


def _under_clicks(found: np.ndarray, guess: np.ndarray, prompt: _Prompt, origin: tuple[int, int]) -> np.ndarray:
    """Keeps the connected parts under the object clicks and, when refining, those that touch the earlier mask."""
    if prompt.box is not None or not prompt.objects:
        return found
    _, parts = cv2.connectedComponents(found.astype(np.uint8), connectivity=4)
    wanted = {int(parts[y - origin[1], x - origin[0]]) for x, y in prompt.objects}
    if prompt.refine:
        wanted.update(np.unique(parts[guess]).tolist())
    return np.isin(parts, [part for part in wanted if part])  # part 0 is the background


def _separation(pixels: np.ndarray, mask: np.ndarray) -> float:
    """Score in 0..1: how little the colours inside the mask occur in a ring of RING pixels around it.

    1 - Bhattacharyya coefficient of the two 8 x 8 x 8 colour histograms. Not learnt and not an IoU, but on coloured
    shapes over photographs its rank correlation with the true IoU was 0.93 and 0.95 (two seeds, 300 prompts each).
    """
    ring = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=RING).astype(bool) & ~mask
    if not mask.any() or not ring.any():
        return 0.0
    bins = (pixels >> 5).astype(np.int32)
    bins = bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]
    inside = np.bincount(bins[mask], minlength=512) / mask.sum()
    around = np.bincount(bins[ring], minlength=512) / ring.sum()
    return float(np.clip(1.0 - np.sqrt(inside * around).sum(), 0.0, 1.0))
