"""Anything may arrive at the port: a typed status each time, and the server answers the next good call as before."""

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sam_bridge import bridge_pb2 as pb
from sam_bridge import wire
from sam_bridge.local import image_hash
from sam_bridge.types import FailureKind
from tests.sam_bridge.fakes import BOX, healthy, make_image

KEY = image_hash(make_image())
INFO, PUT, SEGMENT = (f"/sam_bridge.v1.SamBridge/{rpc}" for rpc in ("Info", "Put", "Segment"))
REASONS = {*map(str, FailureKind), wire.UNKNOWN_IMAGE} - {"internal"}
# Statuses of gRPC itself, before our code is asked: too large a message, an unknown method.
OF_GRPC = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED}

numbers = st.floats() | st.floats(-200, 400) | st.sampled_from([0.0, -1.0, 1e308, 127.999, 128.0])
points = st.lists(st.builds(pb.Point, x=numbers, y=numbers, label=st.integers(-3, 3)), max_size=70)
boxes = st.none() | st.builds(pb.Box, x0=numbers, y0=numbers, x1=numbers, y1=numbers)
names = st.text(max_size=80) | st.sampled_from(["", "0" * 64, "../../etc/passwd"])
sides = st.integers(0, 12) | st.sampled_from([2**31, 2**32 - 1])
segments = st.builds(pb.SegmentRequest, image_hash=st.just(KEY) | names, box=boxes, points=points, refine=names)
puts = st.builds(pb.PutRequest, image_hash=names, height=sides, width=sides, rgb=st.binary(max_size=500))
good = {
    SEGMENT: pb.SegmentRequest(image_hash=KEY, box=pb.Box(x0=22, y0=32, x1=59, y1=69), refine="x"),
    PUT: pb.PutRequest(image_hash=KEY, height=2, width=2, rgb=bytes(12)),
}


@st.composite
def damaged(draw) -> tuple[str, bytes]:
    """A good message that is cut short, and one of whose bytes is another."""
    method = draw(st.sampled_from([PUT, SEGMENT]))
    data = bytearray(good[method].SerializeToString())[: draw(st.integers(1, 90))]
    data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
    return method, bytes(data)


requests = st.one_of(
    st.tuples(st.just(SEGMENT), segments.map(pb.SegmentRequest.SerializeToString)),
    st.tuples(st.just(PUT), puts.map(pb.PutRequest.SerializeToString)),
    damaged(),
    st.tuples(st.sampled_from([INFO, PUT, SEGMENT]), st.binary()),
)


def send(channel: grpc.Channel, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """(status, reason in the trailing metadata) of raw bytes; OK and "" when they were a good request after all."""
    try:
        channel.unary_unary(method)(data, timeout=30)
    except grpc.RpcError as error:
        return error.code(), next((v for k, v in error.trailing_metadata() or () if k == wire.REASON_KEY), "")
    return grpc.StatusCode.OK, ""


@pytest.fixture
def target(local, serve, connect, image):
    server = serve(local)
    client = connect(server.address)
    expected = client.segment(image, BOX).mask
    with grpc.insecure_channel(server.address) as channel:
        yield channel, client, expected
        assert healthy(server.address)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request_=requests)
def test_a_typed_status_for_whatever_comes(target, image, request_):
    """The server knew what was wrong, or gRPC did; never `internal` and never silence."""
    channel, client, expected = target
    code, reason = send(channel, *request_)
    assert code is grpc.StatusCode.OK or code in OF_GRPC or reason in REASONS, (code, reason)
    np.testing.assert_array_equal(client.segment(image, BOX).mask, expected)


def test_bytes_that_are_no_message_and_a_message_above_the_limit(target, image):
    channel, client, expected = target
    assert send(channel, SEGMENT, b"\xff\xff\xff") == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_prompt")
    code, _ = send(channel, SEGMENT, bytes(66 << 20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    np.testing.assert_array_equal(client.segment(image, BOX).mask, expected)
