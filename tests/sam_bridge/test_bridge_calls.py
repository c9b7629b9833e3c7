"""Client -> server: the back end's own masks bit for bit, images sent once, every failure typed."""

import concurrent.futures
import dataclasses
import socket
import threading
import time

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from sam_bridge import bridge_pb2 as pb
from sam_bridge import rle, server, wire
from sam_bridge.client import _CHANNEL_OPTIONS
from sam_bridge.local import LocalSegmenter
from sam_bridge.types import FailureKind, SegmenterError, SegmentRequest
from tests.sam_bridge.fakes import BOX, failure, healthy, until

REQUESTS = [
    BOX,
    SegmentRequest(box=(80.3, 15.7, 118.2, 50.1)),
    SegmentRequest(points=((40.2, 50.9),), labels=(1,)),
    SegmentRequest(points=((100.0, 34.0), (40.0, 50.0)), labels=(1, 1)),
    SegmentRequest(points=((100.0, 34.0), (40.0, 50.0)), labels=(1, 0)),
    SegmentRequest(box=(20.0, 30.0, 62.0, 72.0), points=((40.0, 50.0), (24.0, 34.0)), labels=(1, 0)),
]


@given(st.binary(max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_any_bytes_are_a_typed_error_or_what_pycocotools_reads(counts, height, width):
    message = pb.SegmentReply(counts=counts, height=height, width=width)
    try:
        mask = wire.reply_from_proto(message, (height, width)).mask
    except SegmenterError as error:
        assert error.kind is FailureKind.INTERNAL
    else:
        np.testing.assert_array_equal(mask, coco.decode({"size": [height, width], "counts": counts}))


def test_rle_of_a_large_mask():
    """Of small ones: tests/data/sets/test_refcoco.py, against pycocotools."""
    mask = np.zeros((3000, 4000), bool)
    mask[1000:2999, 5:3990] = True
    back = rle.decode_mask(rle.encode_mask(mask), 3000, 4000)
    assert back.dtype == bool and back.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize("counts", [b"", b"4", b"0" * 50, b"\xff\xff\xff", b"`\x80"])
def test_malformed_rle_is_typed(counts):
    for mask in (dict(counts=counts), dict(counts=b"`0", candidates=[counts])):
        message = pb.SegmentReply(height=4, width=4, **mask)
        assert failure(wire.reply_from_proto, message, (4, 4)).kind is FailureKind.INTERNAL


@given(
    st.none() | st.tuples(*[st.floats(allow_nan=False)] * 4),
    st.lists(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False), st.integers(0, 1))),
    st.text(max_size=8),
)
def test_request_round_trip(box, clicks, refine):
    points, labels = tuple((x, y) for x, y, _ in clicks), tuple(label for *_, label in clicks)
    request = SegmentRequest(box, points, labels, refine, candidates=len(clicks) % 2 == 1)
    message = pb.SegmentRequest.FromString(wire.request_to_proto("key", request).SerializeToString())
    assert wire.request_from_proto(message) == request


@pytest.mark.parametrize("request_", REQUESTS)
def test_masks_equal_the_back_ends_own(local, serve, connect, image, request_):
    client = connect(serve(local).address)
    own = LocalSegmenter(local.backend)
    for shown in (image, np.asfortranarray(image), np.ascontiguousarray(image[:, ::-1])):
        theirs, ours = client.segment(shown, request_), own.segment(shown, request_)
        np.testing.assert_array_equal(theirs.mask, ours.mask)
        assert (theirs.score, theirs.logits_id) == (ours.score, ours.logits_id)
        click = SegmentRequest(points=((60.0, 20.0),), labels=(0,), refine_logits_id=theirs.logits_id)
        np.testing.assert_array_equal(client.segment(shown, click).mask, own.segment(shown, click).mask)


def test_all_masks_come_back_when_they_are_asked_for(fake, serve, connect, image):
    client = connect(serve(LocalSegmenter(fake())).address)
    asked, plain = client.segment(image, dataclasses.replace(BOX, candidates=True)), client.segment(image, BOX)
    assert plain.candidates == () and plain.logits_id != asked.logits_id
    for theirs, mask in zip(asked.candidates, (plain.mask, ~plain.mask), strict=True):
        np.testing.assert_array_equal(theirs, mask)


def test_image_is_encoded_once_and_timings_add_up(local, serve, connect, image):
    server = serve(local)
    client = connect(server.address)
    first = client.segment(image, BOX)
    assert set(first.timings_s) == {"queue", "encode", "decode", "rle", "total", "transport"}
    assert first.timings_s["encode"] > 0.0 and all(s >= 0.0 for s in first.timings_s.values())
    for request in REQUESTS:
        assert client.segment(image, request).timings_s["encode"] == 0.0
    connect(server.address).segment(image, BOX)
    (info,) = client.info()
    assert (info.backend, info.encodes, info.segments) == ("grabcut", 1, len(REQUESTS) + 2)


def test_evicted_image_is_sent_again(fake, serve, connect, image):
    local = LocalSegmenter(fake(), image_bytes=image.nbytes)  # room for one
    client = connect(serve(local).address)
    for shown in (image, image[::-1], image):
        assert client.segment(shown, BOX).mask.sum() == 37 * 37
    assert local.images.made == 3 and local.images.evictions == 2


def test_image_that_never_fits_is_one_typed_error(fake, serve, connect, image):
    client = connect(serve(LocalSegmenter(fake(), image_bytes=10)).address)
    error = failure(client.segment, image, BOX)
    assert error.kind is FailureKind.EXHAUSTED and "cache is too small" in error.detail


def test_bad_input_is_typed_on_both_ends(local, serve, connect, image):
    server = serve(local)
    client = connect(server.address)
    empty = SegmentRequest(box=(5.0, 5.0, 5.0, 9.0))
    assert failure(client.segment, image, empty).kind is FailureKind.INVALID_PROMPT
    assert failure(client.segment, image[..., 0], BOX).kind is FailureKind.INVALID_IMAGE
    assert failure(client.segment, image, SegmentRequest(refine_logits_id="x")).kind is FailureKind.UNKNOWN_LOGITS
    # A client that does not check is answered by the server's own checks.
    client.segment(image, BOX)
    slot = client.slots[0]
    key = wire.request_to_proto("", BOX)
    key.image_hash = next(iter(local.images._kept))
    key.box.x0 = float("nan")
    bad_put = pb.PutRequest(image_hash="0" * 64, height=1, width=1, rgb=b"abc")
    short_put = pb.PutRequest(image_hash="0" * 64, height=1 << 30, width=1 << 30, rgb=b"abc")
    for call, message, reason in (
        (slot.stub.Segment, key, "invalid_prompt"),
        (slot.stub.Put, bad_put, "invalid_image"),
        (slot.stub.Put, short_put, "invalid_image"),
        (slot.stub.Segment, pb.SegmentRequest(image_hash="no"), "unknown_image"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(message, timeout=60)
        assert dict(caught.value.trailing_metadata())[wire.REASON_KEY] == reason


def test_back_end_fault_is_internal_and_logged(fake, serve, connect, image, caplog):
    client = connect(serve(LocalSegmenter(fake(fail=ZeroDivisionError("oops")))).address)
    error = failure(client.segment, image, BOX)
    assert error.kind is FailureKind.INTERNAL and "oops" in error.detail and not error.kind.callers_fault
    assert "Traceback" in caplog.text


def test_deadline_is_timeout(fake, serve, connect, image):
    hold = threading.Event()
    client = connect(serve(LocalSegmenter(fake(hold=hold))).address)
    client.info()
    client.timeout_s, start = 0.3, time.monotonic()
    assert failure(client.segment, image, BOX).kind is FailureKind.TIMEOUT
    assert time.monotonic() - start < 20
    hold.set()


def test_full_queue_is_exhausted_and_health_still_answers(fake, serve, connect, image):
    hold = threading.Event()
    backend = fake(hold=hold)
    server = serve(LocalSegmenter(backend), workers=1, queue=1)
    patient, hasty = connect(server.address), connect(server.address)
    hasty.info()
    hasty.wait_s = 0.3
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        busy = [pool.submit(patient.segment, image, BOX) for _ in range(2)]
        until(lambda: server.gate.waiting == 1)
        assert failure(hasty.segment, image, BOX).kind is FailureKind.EXHAUSTED
        assert healthy(server.address)
        hold.set()
        assert all(f.result(60).mask.any() for f in busy)


def test_crowd_larger_than_the_queue_loses_no_call(fake, serve, connect, image):
    client = connect(serve(LocalSegmenter(fake()), workers=1, queue=2).address)
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert all(pool.map(lambda _: client.segment(image, BOX).mask.any(), range(48)))


@pytest.mark.parametrize("listens", [False, True])
def test_dead_or_silent_address_is_one_clear_error_within_wait(connect, image, listens, monkeypatch):
    monkeypatch.setattr("sam_bridge.client.CONNECT_S", 60.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        if listens:  # accepts connections, never speaks
            probe.listen()
        client = connect(address := f"127.0.0.1:{probe.getsockname()[1]}", wait_s=0.5)
        start = time.monotonic()
        error = failure(client.segment, image, BOX)
        assert error.kind is FailureKind.UNAVAILABLE and address in error.detail
        assert 0.4 < time.monotonic() - start < 20  # and not after CONNECT_S, or the deadline of a call


def test_other_protocol_version_is_refused_at_once(fake, serve, connect, image, monkeypatch):
    server = serve(LocalSegmenter(fake()))
    client = connect(server.address)
    with monkeypatch.context() as patch:
        patch.setattr("sam_bridge.wire.PROTOCOL", 99)
        reply = client.slots[0].stub.Info(pb.InfoRequest())
    assert reply.protocol == 99
    monkeypatch.setattr(client.slots[0].stub, "Info", lambda *_, **__: reply)
    error = failure(client.segment, image, BOX)
    assert error.kind is FailureKind.INTERNAL and "protocol 99" in error.detail


def test_closed_client_is_unavailable_at_once(fake, serve, connect, image):
    client = connect(serve(LocalSegmenter(fake())).address)
    client.close()
    assert failure(client.segment, image, BOX).kind is FailureKind.UNAVAILABLE


def test_a_server_bears_its_own_clients_keep_alive_pings(fake, serve, monkeypatch):
    """Both ends' options, a hundred times as quick, on a connection without calls: every ping is answered.

    gRPC ignores an option that it does not know, and then its own limit holds: a ping in five minutes, the third that
    is too early ends the connection (GOAWAY, ENHANCE_YOUR_CALM). A plain socket, since gRPC's client sends one ping a
    second at most.
    """
    option = "grpc.http2.min_ping_interval_without_data_ms"
    quick = [(key, value // 100 if key == option else value) for key, value in server._OPTIONS]
    monkeypatch.setattr(server, "_OPTIONS", quick)
    every_s = dict(_CHANNEL_OPTIONS)["grpc.keepalive_time_ms"] / 1000 / 100
    host, _, port = serve(LocalSegmenter(fake())).address.rpartition(":")

    def frame(kind, flags=0, payload=b""):
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + bytes(4) + payload

    settings, ping, goaway, ack = 4, 6, 7, 1
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings) + frame(settings, ack))
        stream, kinds = connection.makefile("rb"), []
        for number in range(6):
            time.sleep(every_s)  # after the last one was answered: none comes too early at a slow server
            connection.sendall(frame(ping, payload=number.to_bytes(8, "big")))
            while kinds.count((ping, ack)) <= number and (goaway, 0) not in kinds and (head := stream.read(9)):
                kinds.append((head[3], head[4]))
                stream.read(int.from_bytes(head[:3], "big"))
    assert kinds.count((ping, ack)) == 6 and (goaway, 0) not in kinds
