"""Between the dataclasses of types.py and the messages of bridge.proto, and what both ends agree on."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco

from sam_bridge import bridge_pb2 as pb
from sam_bridge.prompts import MAX_IMAGE_BYTES
from sam_bridge.types import FailureKind, SegmenterError, SegmentReply, SegmentRequest

PROTOCOL = 2  # both ends must agree; raised when a message changes meaning
REASON_KEY = "sam-bridge-reason"  # trailing metadata of a failed call: a FailureKind or UNKNOWN_IMAGE
UNKNOWN_IMAGE = "unknown_image"
UNAUTHENTICATED = "unauthenticated"
MAX_DETAIL = 500  # characters of an error's detail; gRPC caps headers at 8 KiB
KEEPALIVE_S = 10  # between pings of a client; a side-car that does not answer one for as long is gone
READY = "sam_bridge ready address="  # a side-car prints it on stdout, with its address, once it listens

_STRIP = 128  # columns transposed at a time: they fit into the cache
_MAX_MESSAGE = MAX_IMAGE_BYTES + (1 << 20)  # an image and the fields around it
MESSAGE_OPTIONS = (("grpc.max_send_message_length", _MAX_MESSAGE), ("grpc.max_receive_message_length", _MAX_MESSAGE))


def status_text(detail: str) -> str:
    """What may stand in a gRPC status: short, and no character that a header cannot hold."""
    return detail[:MAX_DETAIL].encode("ascii", "backslashreplace").decode().replace("\0", "\\0")[: 2 * MAX_DETAIL]


def encode_mask(mask: np.ndarray) -> bytes:
    """bool[h, w] -> COCO compressed RLE counts (column-major)."""
    import cv2  # not above: only a side-car encodes masks, and a client need not have OpenCV

    columns = cv2.transpose(np.ascontiguousarray(mask, dtype=bool).view(np.uint8))  # 6 times as fast as numpy's copy
    return coco.encode(columns.T)["counts"]


def decode_mask(counts: bytes, height: int, width: int) -> np.ndarray:
    """COCO compressed RLE counts -> bool[h, w], C order. INTERNAL unless they cover exactly the mask."""
    runs = _runs(counts)
    if (runs < 0).any() or runs.sum() != height * width:
        raise SegmenterError(FailureKind.INTERNAL, f"the reply's RLE does not cover {height} x {width} pixels")
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    columns = np.repeat(values, runs).reshape(width, height)
    mask = np.empty((height, width), bool)
    for left in range(0, width, _STRIP):
        mask[:, left : left + _STRIP] = columns[left : left + _STRIP].T
    return mask


def _runs(counts: bytes) -> np.ndarray:
    """i64[n] lengths of the runs, background first.

    A number is 5 bits a character from 48 on, lowest first, bit 6 says that more follow, and the last one's bit 5 is
    the sign; from the fourth on they are differences to the one before last. pycocotools decodes the same but does not
    check its input: short counts leave memory uninitialised.
    """
    digits = np.frombuffer(counts, np.uint8) - np.uint8(48)  # what is below 48 wraps around, to more than 63
    if not len(digits) or (digits > 63).any() or digits[-1] & 32:
        raise SegmenterError(FailureKind.INTERNAL, "the reply's RLE is malformed")
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    more = ends - starts  # characters after a number's first, of few numbers any
    if more.max() > 6:  # 35 bits: more than any mask needs
        raise SegmenterError(FailureKind.INTERNAL, "the reply's RLE is malformed")
    numbers = (digits[starts] & 31).astype(np.int64)
    for place in range(1, more.max() + 1):
        longer = np.flatnonzero(more >= place)
        numbers[longer] |= (digits[starts[longer] + place] & 31).astype(np.int64) << (5 * place)
    negative = np.flatnonzero(digits[ends] & 16)
    numbers[negative] -= 1 << (5 * (more[negative] + 1))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def request_to_proto(key: str, request: SegmentRequest) -> pb.SegmentRequest:
    """`request` has passed check_request."""
    message = pb.SegmentRequest(image_hash=key, refine=request.refine_logits_id, candidates=request.candidates)
    if request.box is not None:
        message.box.x0, message.box.y0, message.box.x1, message.box.y1 = map(float, request.box)
    for (x, y), label in zip(request.points, request.labels, strict=True):
        message.points.add(x=float(x), y=float(y), label=int(label))
    return message


def request_from_proto(message: pb.SegmentRequest) -> SegmentRequest:
    box = message.box
    return SegmentRequest(
        box=(box.x0, box.y0, box.x1, box.y1) if message.HasField("box") else None,
        points=tuple((p.x, p.y) for p in message.points),
        labels=tuple(p.label for p in message.points),
        refine_logits_id=message.refine,
        candidates=message.candidates,
    )


def reply_from_proto(message: pb.SegmentReply, shape: tuple[int, int]) -> SegmentReply:
    """`shape`: (h, w) of the image that was asked about; another one is the tool's fault."""
    if (message.height, message.width) != shape:
        got = (message.height, message.width)
        raise SegmenterError(FailureKind.INTERNAL, f"the mask is {got}, the image {shape}")
    mask = decode_mask(message.counts, *shape)
    candidates = tuple(decode_mask(counts, *shape) for counts in message.candidates)
    return SegmentReply(mask, message.score, message.logits_id, dict(message.timings_s), candidates)
