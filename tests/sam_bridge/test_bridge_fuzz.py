"""Anything may arrive at the port: a typed status each time, and the server answers the next good call as before."""

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from benchmarks._bridge_requests import SEGMENT, fuzzed, send, typed
from sam_bridge.local import image_hash
from tests.sam_bridge.fakes import BOX, healthy


@pytest.fixture
def target(local, serve, connect, image):
    server = serve(local)
    client = connect(server.address)
    expected = client.segment(image, BOX).mask
    with grpc.insecure_channel(server.address) as channel:
        yield channel, client, expected
        assert healthy(server.address)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request_=fuzzed())
def test_a_typed_status_for_whatever_comes(target, image, request_):
    channel, client, expected = target
    code, reason = send(channel, *request_(image_hash(image)))
    assert typed(code, reason), (code, reason)
    np.testing.assert_array_equal(client.segment(image, BOX).mask, expected)


def test_bytes_that_are_no_message_and_a_message_above_the_limit(target, image):
    channel, client, expected = target
    assert send(channel, SEGMENT, b"\xff\xff\xff") == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_prompt")
    code, _ = send(channel, SEGMENT, bytes(66 << 20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    np.testing.assert_array_equal(client.segment(image, BOX).mask, expected)
