"""What crosses the bridge: requests, replies, typed failures, and the Protocol that all segmenters satisfy.

Coordinates are pixels of the original image, float, XYXY, y down. Arrays are numpy.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Protocol

import numpy as np


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
