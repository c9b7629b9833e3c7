"""What crosses the bridge: requests, replies, typed failures, the Protocol that all segmenters satisfy; and what a
well-formed image and prompt are, checked by the client before it sends and again where they are used.

Coordinates are pixels of the original image, float, XYXY, y down. Arrays are numpy.
"""

import dataclasses
import enum
import math
from typing import NoReturn, Protocol

import numpy as np

MAX_IMAGE_BYTES = 64 << 20  # of a picture on the wire; about 4700 x 4700 pixels
MAX_PIXELS = 1 << 28  # of a picture before it is shrunk (shrink.py): 268 megapixels
MAX_POINTS = 64


@dataclasses.dataclass(frozen=True)
class SegmentRequest:
    """One prompt on one image. At least a box, a point, or `refine_logits_id`."""

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()  # 1 object, 0 background; as many as points
    refine_logits_id: str = ""  # logits id of an earlier reply on the same image; "" = none
    candidates: bool = False  # all masks that the back end has for the prompt are wanted (SAM 2: three), not one


@dataclasses.dataclass(frozen=True)
class SegmentReply:
    """One mask. `timings_s` holds seconds by stage: queue, encode, decode, rle, total (client side adds transport)."""

    mask: np.ndarray  # bool[h, w]
    score: float  # the segmenter's own estimate of IoU, 0..1
    logits_id: str = ""
    timings_s: dict[str, float] = dataclasses.field(default_factory=dict)
    # bool[h, w] each, `mask` among them, in the back end's order; () unless asked for, and where it has only one
    candidates: tuple[np.ndarray, ...] = ()


class FailureKind(enum.StrEnum):
    """Why no mask came back. The first three are the caller's doing, the others the tool's."""

    INVALID_PROMPT = "invalid_prompt"  # NaN, box without area, no prompt, labels != points
    UNKNOWN_LOGITS = "unknown_logits"  # `refine` names nothing that is still kept
    INVALID_IMAGE = "invalid_image"
    UNAVAILABLE = "unavailable"  # cannot be reached, or died
    TIMEOUT = "timeout"
    EXHAUSTED = "exhausted"  # the queue is full
    INTERNAL = "internal"

    @property
    def callers_fault(self) -> bool:
        """True when another call with better arguments can succeed; False when the tool is broken."""
        return self in (FailureKind.INVALID_PROMPT, FailureKind.UNKNOWN_LOGITS)


class SegmenterError(Exception):
    """A failed call: `kind` can be counted, `detail` is for people."""

    def __init__(self, kind: FailureKind, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class About:
    """Who answers. Equal where masks are equal."""

    backend: str  # its own name, whatever a config calls it
    identity: str  # model, checksum of the weights, settings


class Segmenter(Protocol):
    """Satisfied by every back end and by the client, so callers cannot tell a local one from a remote one.

    Thread-safe. Raises SegmenterError and nothing else.
    """

    @property
    def about(self) -> About:
        """Who answers, as it says itself."""
        ...

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        """`image` u8[h, w, 3] RGB. The expensive encoding of an image is done once and kept under its content hash."""
        ...


def check_pixels(image: np.ndarray) -> None:
    """Requires u8[h, w, 3] with at least one pixel and at most MAX_PIXELS."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        _refuse(f"image must be u8[h, w, 3] RGB, got {what}", FailureKind.INVALID_IMAGE)
    if image.size == 0:
        _refuse(f"image has no pixels: {list(image.shape)}", FailureKind.INVALID_IMAGE)
    if image.shape[0] * image.shape[1] > MAX_PIXELS:
        size, limit = f"{image.shape[1]} x {image.shape[0]}", f"{MAX_PIXELS / 1e6:.0f} megapixels"
        _refuse(f"image of {size} pixels is above the limit of {limit}: shrink it", FailureKind.INVALID_IMAGE)


def check_image(image: np.ndarray) -> None:
    """Requires what is sent: check_pixels, and at most MAX_IMAGE_BYTES."""
    check_pixels(image)
    if image.nbytes > MAX_IMAGE_BYTES:
        size, limit = f"{image.nbytes >> 20} MiB", f"{MAX_IMAGE_BYTES >> 20} MiB"
        _refuse(f"image of {size} is above the limit of {limit}", FailureKind.INVALID_IMAGE)


def check_request(request: SegmentRequest, height: int, width: int) -> None:
    """Raises INVALID_PROMPT unless the prompt is finite, touches the image and says what the object is."""
    if len(request.points) != len(request.labels):
        _refuse(f"{len(request.points)} points but {len(request.labels)} labels")
    if len(request.points) > MAX_POINTS:
        _refuse(f"{len(request.points)} points, at most {MAX_POINTS}")
    if request.box is None and not request.points and not request.refine_logits_id:
        _refuse("no prompt: give a box, a point, or a mask to refine")
    refine = request.refine_logits_id
    if not isinstance(refine, str) or not refine.isascii() or len(refine) > 64:
        _refuse(f"refine must be a logits id of an earlier reply, got {refine!r:.80}")
    if any(label not in (0, 1) for label in request.labels):
        _refuse(f"labels must be 0 or 1, got {list(request.labels)}")
    if request.box is None and not request.refine_logits_id and 1 not in request.labels:
        _refuse("background points alone name no object: add a box or a point with label 1")
    if request.box is not None:
        _check_box(request.box, height, width)
    for point in request.points:
        x, y = _numbers(point, 2, "point")
        if not (0 <= x <= width and 0 <= y <= height):
            _refuse(f"point ({x:g}, {y:g}) is outside the image of {width} x {height} pixels")


def _check_box(box: tuple[float, ...], height: int, width: int) -> None:
    x0, y0, x1, y1 = _numbers(box, 4, "box")
    text = f"box ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
    if x0 >= x1 or y0 >= y1:
        _refuse(f"{text} has no area: x0 < x1 and y0 < y1 are needed")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        _refuse(f"{text} is outside the image of {width} x {height} pixels")


def _numbers(values: tuple[float, ...], count: int, name: str) -> list[float]:
    try:
        numbers = [float(v) for v in values if not isinstance(v, str)]  # a back end would not take "5" for 5
    except (TypeError, ValueError):
        _refuse(f"{name} {values!r} is not {count} numbers")
    if len(numbers) != count or not all(math.isfinite(v) for v in numbers):
        _refuse(f"{name} {values!r} is not {count} finite numbers")
    return numbers


def _refuse(detail: str, kind: FailureKind = FailureKind.INVALID_PROMPT) -> NoReturn:
    raise SegmenterError(kind, detail)
