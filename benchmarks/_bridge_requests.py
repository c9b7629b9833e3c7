"""Requests that no honest client sends, for the fuzz test and for benchmarks/bridge.py."""

from collections.abc import Callable

import grpc
from hypothesis import strategies as st

from sam_bridge import bridge_pb2 as pb
from sam_bridge import wire
from sam_bridge.types import FailureKind

SERVICE = "/sam_bridge.v1.SamBridge/"
INFO, PUT, SEGMENT = SERVICE + "Info", SERVICE + "Put", SERVICE + "Segment"
REASONS = {*map(str, FailureKind), wire.UNKNOWN_IMAGE}
GOOD_BOX = pb.Box(x0=22, y0=32, x1=59, y1=69)
# Statuses of gRPC itself, before our code is asked: too large a message, an unknown method.
OF_GRPC = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED}

_numbers = st.floats() | st.sampled_from([0.0, -1.0, 1e308, 127.999, 128.0, float("nan"), float("inf")])
_small = st.floats(-200, 400)
_points = st.lists(st.builds(pb.Point, x=_numbers | _small, y=_numbers | _small, label=st.integers(-3, 3)), max_size=70)
_boxes = st.none() | st.builds(
    pb.Box, x0=_numbers | _small, y0=_numbers | _small, x1=_numbers | _small, y1=_numbers | _small
)
_names = st.text(max_size=80) | st.sampled_from(["", "0" * 64, "../../etc/passwd"])
_sides = st.integers(0, 12) | st.sampled_from([2**31, 2**32 - 1])


def _segment(known: bool, name: str, box, points, refine: str) -> Callable[[str], tuple[str, bytes]]:
    def request(key: str) -> tuple[str, bytes]:
        message = pb.SegmentRequest(image_hash=key if known else name, points=points, refine=refine)
        if box is not None:
            message.box.CopyFrom(box)
        return SEGMENT, message.SerializeToString()

    return request


def _put(name: str, height: int, width: int, rgb: bytes) -> Callable[[str], tuple[str, bytes]]:
    message = pb.PutRequest(image_hash=name, height=height, width=width, rgb=rgb).SerializeToString()
    return lambda key: (PUT, message)


def _truncated(method: str, cut: int, flip: int) -> Callable[[str], tuple[str, bytes]]:
    def request(key: str) -> tuple[str, bytes]:
        message = pb.SegmentRequest(image_hash=key, box=GOOD_BOX, refine="x") if method == SEGMENT else None
        message = message or pb.PutRequest(image_hash=key, height=2, width=2, rgb=bytes(12))
        data = bytearray(message.SerializeToString()[: cut % 90])
        if data:
            data[flip % len(data)] ^= 1 + flip % 255
        return method, bytes(data)

    return request


def fuzzed() -> st.SearchStrategy[Callable[[str], tuple[str, bytes]]]:
    """Functions from the hash of an image that the server knows to (method, bytes)."""
    return st.one_of(
        st.builds(_segment, st.booleans(), _names, _boxes, _points, _names | st.just("")),
        st.builds(_put, _names, _sides, _sides, st.binary(max_size=500)),
        st.builds(_truncated, st.sampled_from([PUT, SEGMENT]), st.integers(0, 200), st.integers(0, 10_000)),
        st.builds(lambda method, data: lambda key: (method, data), st.sampled_from([INFO, PUT, SEGMENT]), st.binary()),
    )


def send(channel: grpc.Channel, method: str, data: bytes, timeout_s: float = 30.0) -> tuple[grpc.StatusCode, str]:
    """(status, reason in the trailing metadata) of raw bytes; OK and "" when they were a good request after all."""
    try:
        channel.unary_unary(method)(data, timeout=timeout_s)
    except grpc.RpcError as error:
        return error.code(), next((v for k, v in error.trailing_metadata() or () if k == wire.REASON_KEY), "")
    return grpc.StatusCode.OK, ""


def typed(code: grpc.StatusCode, reason: str) -> bool:
    """Whether the server knew what was wrong: its reason, or gRPC's own limits; never `internal` and never silence."""
    return code is grpc.StatusCode.OK or code in OF_GRPC or (reason in REASONS and reason != FailureKind.INTERNAL)
