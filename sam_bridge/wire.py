"""Between the dataclasses of types.py and the messages of bridge.proto, and what both ends agree on."""

from types import SimpleNamespace

import grpc
import numpy as np
from google.protobuf.message_factory import GetMessageClass

from sam_bridge import bridge_pb2 as pb
from sam_bridge.backends import Mask, PackedMask, as_pixels
from sam_bridge.frozen import freeze, remember
from sam_bridge.rle import decode_mask, encode_mask
from sam_bridge.types import MAX_IMAGE_BYTES, FailureKind, SegmenterError, SegmentReply, SegmentRequest

PROTOCOL = 2  # both ends must agree; raised when a message changes meaning
REASON_KEY = "sam-bridge-reason"  # trailing metadata of a failed call: a FailureKind or UNKNOWN_IMAGE
UNKNOWN_IMAGE = "unknown_image"
UNAUTHENTICATED = "unauthenticated"
MAX_DETAIL = 500  # characters of an error's detail; gRPC caps headers at 8 KiB
KEEPALIVE_S = 10  # between pings of a client; a side-car that does not answer one for as long is gone
READY = "sam_bridge ready address="  # a side-car prints it on stdout, with its address, once it listens

SERVICE = pb.DESCRIPTOR.services_by_name["SamBridge"]
_MAX_MESSAGE = MAX_IMAGE_BYTES + (1 << 20)  # an image and the fields around it
MESSAGE_OPTIONS = (("grpc.max_send_message_length", _MAX_MESSAGE), ("grpc.max_receive_message_length", _MAX_MESSAGE))


def rpcs(channel: grpc.Channel) -> SimpleNamespace:
    """Of bridge.proto, by name: each takes its message, `timeout` and `metadata`."""
    calls = {}
    for method in SERVICE.methods:
        request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        path = f"/{SERVICE.full_name}/{method.name}"
        calls[method.name] = channel.unary_unary(path, request.SerializeToString, reply.FromString)
    return SimpleNamespace(**calls)


def status_text(detail: str) -> str:
    """What may stand in a gRPC status: short, and no character that a header cannot hold."""
    return detail[:MAX_DETAIL].encode("ascii", "backslashreplace").decode().replace("\0", "\\0")[: 2 * MAX_DETAIL]


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


def mask_to_bytes(mask: Mask, packed: bool) -> bytes:
    """As a SegmentReply holds it: bits, or COCO's RLE."""
    if packed:
        return (mask if isinstance(mask, PackedMask) else PackedMask.of(mask)).bits.tobytes()
    return encode_mask(as_pixels(mask))


def mask_from_bytes(data: bytes, shape: tuple[int, int], packed: bool) -> np.ndarray:
    """bool[h, w], frozen; it keeps the RLE that it came as, so that no record makes it again."""
    if not packed:
        mask = freeze(decode_mask(data, *shape))
        remember(mask, "counts", lambda _: data)
        return mask
    if len(data) != -(-shape[0] * shape[1] // 8):
        raise ValueError(f"{len(data)} bytes are not the bits of {list(shape)}")
    return freeze(PackedMask(np.frombuffer(data, np.uint8), *shape).unpack())


def reply_from_proto(message: pb.SegmentReply, shape: tuple[int, int]) -> SegmentReply:
    """`shape`: (h, w) of the image that was asked about; another one is the tool's fault."""
    if (message.height, message.width) != shape:
        got = (message.height, message.width)
        raise SegmenterError(FailureKind.INTERNAL, f"the mask is {got}, the image {shape}")
    try:
        masks = (mask_from_bytes(data, shape, message.packed) for data in (message.counts, *message.candidates))
        mask, *candidates = masks
    except ValueError as error:
        raise SegmenterError(FailureKind.INTERNAL, f"the reply's mask: {error}") from None
    return SegmentReply(mask, message.score, message.logits_id, dict(message.timings_s), tuple(candidates))
