"""The gRPC server around a LocalSegmenter: bounded work, bounded queue, bounded memory, every failure typed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sam_bridge import bridge_pb2 as pb
from sam_bridge import bridge_pb2_grpc, wire
from sam_bridge.local import LocalSegmenter, UnknownImage, image_hash
from sam_bridge.prompts import check_image
from sam_bridge.types import FailureKind, SegmenterError

log = logging.getLogger(__name__)
T = TypeVar("T")

QUEUE = 128  # calls that may wait for a worker: twice the 64 trajectories of a step
SPARE_THREADS = 4  # answer Info, health and refusals while all workers and the queue are busy
STOP_GRACE_S = 2.0

_CODES = {
    FailureKind.INVALID_PROMPT: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.INVALID_IMAGE: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.UNKNOWN_LOGITS: grpc.StatusCode.FAILED_PRECONDITION,
    FailureKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    FailureKind.TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    FailureKind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FailureKind.INTERNAL: grpc.StatusCode.INTERNAL,
}


class AddressError(ValueError):
    """The server cannot listen there. The message says why and what to do."""


class Gate:
    """Lets `workers` calls work and `queue` calls wait; one more is refused at once."""

    def __init__(self, workers: int, queue: int):
        self._workers = threading.Semaphore(workers)
        self._places = threading.Semaphore(workers + queue)
        self._limit = queue
        self.waiting = 0  # calls in the queue now; a hint, not synchronised with what happens next
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def enter(self, context: grpc.ServicerContext) -> Iterator[float]:
        """Yields the seconds waited. A caller that gave up while waiting costs no work."""
        if not self._places.acquire(blocking=False):
            raise SegmenterError(FailureKind.EXHAUSTED, f"the queue is full: {self._limit} calls are waiting")
        try:
            start = time.perf_counter()
            if not self._wait(context.time_remaining()):
                raise SegmenterError(FailureKind.TIMEOUT, "the deadline passed while waiting for a worker")
            try:
                if not context.is_active():
                    raise SegmenterError(FailureKind.TIMEOUT, "the caller gave up while waiting for a worker")
                yield time.perf_counter() - start
            finally:
                self._workers.release()
        finally:
            self._places.release()

    def _wait(self, timeout_s: float | None) -> bool:
        with self._lock:
            self.waiting += 1
        try:
            return self._workers.acquire(timeout=timeout_s)
        finally:
            with self._lock:
                self.waiting -= 1


class Servicer(bridge_pb2_grpc.SamBridgeServicer):
    """The rpcs of bridge.proto. All are idempotent, so a client may repeat any of them."""

    def __init__(self, segmenter: LocalSegmenter, gate: Gate):
        self._segmenter = segmenter
        self._gate = gate

    def Info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:
        images = self._segmenter.images
        return pb.InfoReply(
            protocol=wire.PROTOCOL,
            backend=self._segmenter.backend.name,
            encodes=images.made,
            segments=self._segmenter.segments,
            image_bytes=images.used_bytes,
            evictions=images.evictions,
        )

    def Put(self, request: pb.PutRequest, context: grpc.ServicerContext) -> pb.PutReply:
        return _answer(context, lambda: self._put(request, context))

    def Segment(self, request: pb.SegmentRequest, context: grpc.ServicerContext) -> pb.SegmentReply:
        return _answer(context, lambda: self._segment(request, context))

    def _put(self, request: pb.PutRequest, context: grpc.ServicerContext) -> pb.PutReply:
        shape = (request.height, request.width, 3)
        if len(request.rgb) != request.height * request.width * 3:
            detail = f"{len(request.rgb)} bytes are not u8{list(shape)}"
            raise SegmenterError(FailureKind.INVALID_IMAGE, detail)
        image = np.frombuffer(request.rgb, np.uint8).reshape(shape)
        check_image(image)
        if request.image_hash in self._segmenter.images:  # another client was faster
            return pb.PutReply(timings_s={"queue": 0.0, "encode": 0.0})
        with self._gate.enter(context) as queue_s:
            if image_hash(image) != request.image_hash:
                raise SegmenterError(FailureKind.INVALID_IMAGE, "image_hash is not the hash of these pixels")
            _, encode_s = self._segmenter.put(request.image_hash, image)
        return pb.PutReply(timings_s={"queue": queue_s, "encode": encode_s})

    def _segment(self, request: pb.SegmentRequest, context: grpc.ServicerContext) -> pb.SegmentReply:
        start = time.perf_counter()
        if request.image_hash not in self._segmenter.images:  # said before the queue, not after it
            raise UnknownImage(request.image_hash)
        with self._gate.enter(context) as queue_s:
            reply = self._segmenter.segment_known(request.image_hash, wire.request_from_proto(request))
            rle_start = time.perf_counter()
            counts = wire.encode_mask(reply.mask)
        now = time.perf_counter()
        timings = {**reply.timings_s, "queue": queue_s, "rle": now - rle_start, "total": now - start}
        height, width = reply.mask.shape
        return pb.SegmentReply(
            height=height, width=width, counts=counts, score=reply.score, logits_id=reply.logits_id, timings_s=timings
        )


def _answer(context: grpc.ServicerContext, work: Callable[[], T]) -> T:
    """Runs `work`; a failure becomes a status with its reason in the trailing metadata."""
    try:
        return work()
    except UnknownImage as error:
        code, reason, detail = grpc.StatusCode.NOT_FOUND, wire.UNKNOWN_IMAGE, f"put image {error} first"
    except SegmenterError as error:
        code, reason, detail = _CODES[error.kind], error.kind.value, error.detail
    except Exception as error:
        log.exception("a call failed for no reason we know")
        code, reason = grpc.StatusCode.INTERNAL, FailureKind.INTERNAL.value
        detail = f"{type(error).__name__}: {error}"
    context.set_trailing_metadata(((wire.REASON_KEY, reason),))
    context.abort(code, detail[: wire.MAX_DETAIL])


class Server:
    """A running server. `address` holds the port that was bound."""

    def __init__(
        self,
        segmenter: LocalSegmenter,
        address: str = "127.0.0.1:0",
        *,
        workers: int = 2,
        queue: int = QUEUE,
        insecure: bool = False,
    ):
        """Raises AddressError for an address in use, malformed, or off this machine without `insecure`."""
        _check_address(address, insecure)
        threads = workers + queue + SPARE_THREADS
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="sam_bridge")
        # Without so_reuseport=0 a second server would share the port in silence and get half of the calls.
        options = (*wire.MESSAGE_OPTIONS, ("grpc.so_reuseport", 0))
        self._server = grpc.server(self._pool, options=options, maximum_concurrent_rpcs=2 * threads)
        self.gate = Gate(workers, queue)
        servicer = Servicer(segmenter, self.gate)
        bridge_pb2_grpc.add_SamBridgeServicer_to_server(servicer, self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", pb.DESCRIPTOR.services_by_name["SamBridge"].full_name):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressError(f"cannot listen on {address}: {error}") from error
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._server.start()

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Refuses new calls, gives those under way `grace_s` seconds, then cancels them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _check_address(address: str, insecure: bool) -> None:
    try:
        loopback = wire.is_loopback(address)
    except ValueError as error:
        raise AddressError(str(error)) from error
    if not loopback and not insecure:
        raise AddressError(
            f"{address} can be reached from other machines and the bridge has no authentication;"
            " listen on 127.0.0.1, or pass --insecure on a trusted network"
        )
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:  # gRPC's own error does not say why; a plain socket does
        family, kind, proto, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        hint = "; is another side-car running? Pick another --address" if error.errno == errno.EADDRINUSE else ""
        raise AddressError(f"cannot listen on {address}: {error.strerror}{hint}") from error
