"""Several side-cars: an image stays with its own, one that dies is passed over and comes back, restarts are counted."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import cv2
import numpy as np
import pytest

from sam_bridge.backends import DeadDevice
from sam_bridge.backends.grabcut import GrabCut
from sam_bridge.client import SamClient, rank
from sam_bridge.local import LocalSegmenter, image_hash
from sam_bridge.server import Server
from sam_bridge.types import FailureKind, SegmentRequest
from tests.sam_bridge.fakes import failure, until, waiting

BOX = SegmentRequest(box=(0.0, 0.0, 4.0, 4.0))
IMAGES = [np.full((8, 8, 3), i, np.uint8) for i in range(24)]


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setattr("sam_bridge.client.PROBE_S", 0.05)


def ask(client, images=IMAGES):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        return [reply.mask.sum() for reply in pool.map(lambda image: client.segment(image, BOX), images)]


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(ConnectionError), socket.create_connection((host, int(port))):
        return True
    return False


def test_a_dead_side_car_is_out_and_comes_back(fake, serve, connect):
    backends = [fake() for _ in range(3)]
    servers = [serve(LocalSegmenter(backend)) for backend in backends]
    client = connect(*(server.address for server in servers))
    assert ask(client) == [16] * len(IMAGES)
    assert ask(client) == [16] * len(IMAGES)
    assert sum(b.encoded for b in backends) == len(IMAGES)  # the second round met the encodings of the first
    assert all(b.encoded > 0 for b in backends)
    own = backends[1].encoded
    servers[1].stop(0)
    assert ask(client) == [16] * len(IMAGES)
    assert client.counters()["ejections"] == 1 and client.counters()["out"] == 1
    assert backends[0].encoded + backends[2].encoded == len(IMAGES)  # only its own images moved, and once
    before = client.counters()["retries"]
    assert ask(client) == [16] * len(IMAGES)
    assert client.counters()["retries"] == before  # it is not asked while it is out
    again = fake()
    serve(LocalSegmenter(again), address=servers[1].address)
    until(lambda: client.counters()["returns"] == 1)
    assert ask(client) == [16] * len(IMAGES)
    assert again.encoded == own and client.counters()["out"] == 0
    assert client.counters()["restarts"] == 1  # another process at the same address


def test_losing_a_side_car_moves_only_its_own_images(connect):
    slots = connect("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3").slots
    before, after = ([rank(some, str(i))[0] for i in range(200)] for some in (slots, slots[:2]))
    assert set(before) == set(slots)
    assert all(a is b for a, b in zip(after, before, strict=True) if b is not slots[2])


def test_all_dead_is_one_typed_error_within_wait(fake, serve, connect):
    servers = [serve(LocalSegmenter(fake())) for _ in range(2)]
    client = connect(*(server.address for server in servers))  # which would wait for half a minute
    ask(client, IMAGES[:2])
    for server in servers:
        server.stop(0)
    client.wait_s, start = 0.6, time.monotonic()
    assert failure(client.segment, IMAGES[0], BOX).kind is FailureKind.UNAVAILABLE
    assert 0.4 < time.monotonic() - start < 20


def test_a_remote_one_is_waited_for(fake, serve, connect):
    server = serve(LocalSegmenter(fake()))
    client = connect(server.address, wait_s=20)
    ask(client, IMAGES[:1])
    server.stop(0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.segment, IMAGES[0], BOX)
        time.sleep(0.5)
        assert not call.done()
        serve(LocalSegmenter(fake()), address=server.address)
        assert call.result(60).mask.sum() == 16
    assert client.counters()["restarts"] == 1 and client.counters()["ejections"] == 0


def test_draining_lets_calls_end_and_sends_new_ones_elsewhere(fake, serve, connect):
    hold = threading.Event()
    backends = [fake(hold=hold), fake()]
    first, second = (Server(LocalSegmenter(backend)) for backend in backends)
    client = connect(first.address, second.address)
    mine = next(i for i in IMAGES if rank(client.slots, image_hash(i))[0].address == first.address)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        under_way = pool.submit(client.segment, mine, BOX)
        until(lambda: backends[0].decoded == 1)
        stopping = pool.submit(first.stop, 20)
        until(lambda: not listens(first.address))
        assert pool.submit(client.segment, mine, BOX).result(60).mask.sum() == 16  # by the second
        assert backends[1].decoded == 1 and not under_way.done()
        hold.set()
        assert under_way.result(60).mask.sum() == 16
        stopping.result(60)
    assert backends[0].decoded == 1 and client.counters()["retries"] <= 2
    second.stop(0)


def test_side_cars_that_give_other_masks_are_refused(fake, serve, connect):
    other = fake()
    other.identity = "fake with other weights"
    client = connect(serve(LocalSegmenter(fake())).address, serve(LocalSegmenter(other)).address)
    error = failure(client.info)
    assert error.kind is FailureKind.INTERNAL and "other weights" in error.detail


def test_who_answers_is_said_alike_through_the_bridge_and_without_it(fake, serve, connect):
    for backend in (fake(), GrabCut()):
        local = LocalSegmenter(backend)
        assert connect(serve(local).address).about == local.about  # asked before any mask
    assert local.about.backend == "grabcut" and cv2.__version__ in local.about.identity

    class Other(GrabCut):  # a back end of somebody's own, built upon ours
        name = "other"

    assert LocalSegmenter(Other()).about.identity != local.about.identity


def test_a_dead_device_is_told_and_the_call_goes_elsewhere(fake, serve, connect):
    dying, told = LocalSegmenter(fake(fail=DeadDevice("CUDA error"))), threading.Event()
    dying.on_dead = told.set
    client = connect(serve(dying).address, serve(LocalSegmenter(fake())).address)
    assert ask(client) == [16] * len(IMAGES)  # many: their names, free ports, decide whose they are
    assert told.is_set() and client.counters()["ejections"] >= 1


def test_an_image_on_its_way_is_sent_once_by_a_client(fake, serve, connect, image):
    backend, hold = fake(), threading.Event()
    encode = backend.encode
    backend.encode = lambda sent: (hold.wait(60), encode(sent))[1]
    client = connect(serve(LocalSegmenter(backend), workers=8).address)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client.segment, image, BOX) for _ in range(8)]
        until(lambda: waiting(client._puts) == 7)
        hold.set()
        assert all(call.result(60).mask.sum() == 16 for call in calls)
    assert client.counters()["puts"] == 1 == backend.encoded


@pytest.mark.parametrize("addresses", [(), "127.0.0.1:1", ("127.0.0.1:1", "127.0.0.1:1"), ("nowhere",)])
def test_addresses_that_cannot_be_meant(addresses, connect):
    with pytest.raises(ValueError, match="addresses|host:port"):
        SamClient(addresses)
