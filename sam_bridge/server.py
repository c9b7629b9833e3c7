"""The gRPC server around a LocalSegmenter: bounded work, bounded queue, bounded memory, every failure typed."""

import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import google.protobuf.message
import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sam_bridge import bridge_pb2 as pb
from sam_bridge import wire
from sam_bridge.local import LocalSegmenter, UnknownImage, image_hash
from sam_bridge.security import SetupError, TokenCheck, check_address, server_credentials
from sam_bridge.telemetry import BridgeMetrics
from sam_bridge.types import FailureKind, SegmenterError, check_image

log = logging.getLogger(__name__)

QUEUE = 128  # calls that may wait for a worker: twice the 64 trajectories of a step
SPARE_THREADS = 4  # answer Info, health and refusals while all workers and the queue are busy
SLOW_S = 10.0  # a call that takes longer is a line in the log

_OPTIONS = (
    *wire.MESSAGE_OPTIONS,
    # Without so_reuseport=0 a second server would share the port in silence and get half of the calls.
    ("grpc.so_reuseport", 0),
    # Clients ping every wire.KEEPALIVE_S, also while nothing is under way; gRPC's own limit would hang up on them.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000 * wire.KEEPALIVE_S // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # And a client that is gone without a word gives its place back.
    ("grpc.keepalive_time_ms", 6 * 1000 * wire.KEEPALIVE_S),
    ("grpc.keepalive_timeout_ms", 1000 * wire.KEEPALIVE_S),
)

_CODES = {
    FailureKind.INVALID_PROMPT: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.INVALID_IMAGE: grpc.StatusCode.INVALID_ARGUMENT,
    FailureKind.UNKNOWN_LOGITS: grpc.StatusCode.FAILED_PRECONDITION,
    FailureKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    FailureKind.TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    FailureKind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FailureKind.INTERNAL: grpc.StatusCode.INTERNAL,
}
# A policy's bad prompts and a full queue are daily bread; the log is for what somebody should look at.
_EXPECTED = (FailureKind.INVALID_PROMPT, FailureKind.INVALID_IMAGE, FailureKind.UNKNOWN_LOGITS, FailureKind.EXHAUSTED)


class Gate:
    """Lets `workers` calls work and `queue` calls wait; one more is refused at once."""

    def __init__(self, workers: int, queue: int):
        self.waiting = 0  # calls in the queue now
        self._free, self._queue = workers, queue
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def enter(self, context: grpc.ServicerContext) -> Iterator[float]:
        """Yields the seconds waited. A caller that gave up while waiting costs no work."""
        start = time.perf_counter()
        with self._changed:
            if not self._free and self.waiting >= self._queue:
                raise SegmenterError(FailureKind.EXHAUSTED, f"the queue is full: {self._queue} calls are waiting")
            self.waiting += 1
            free = self._changed.wait_for(lambda: self._free, context.time_remaining())
            self.waiting -= 1
            if not free:
                raise SegmenterError(FailureKind.TIMEOUT, "the deadline passed while waiting for a worker")
            self._free -= 1
        try:
            if not context.is_active():
                raise SegmenterError(FailureKind.TIMEOUT, "the caller gave up while waiting for a worker")
            yield time.perf_counter() - start
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify()


class Server:
    """A running server. `address` holds the port that was bound.

    The rpcs of bridge.proto are all idempotent, so a client may repeat any of them.
    """

    def __init__(
        self,
        segmenter: LocalSegmenter,
        address: str = "127.0.0.1:0",
        *,
        workers: int = 2,
        queue: int = QUEUE,
        token: str = "",
        tls_cert: str = "",
        tls_key: str = "",
        insecure: bool = False,
    ):
        """`workers` calls are worked on at a time, `queue` may wait. `tls_cert`, `tls_key`: PEM files.

        Raises SetupError for an address in use, malformed, or off this machine without TLS and a token (unless
        `insecure`), and for files that cannot be used.
        """
        credentials = server_credentials(tls_cert, tls_key)
        check_address(address, token=token, tls=credentials is not None, insecure=insecure)
        self._segmenter, self._instance = segmenter, uuid.uuid4().hex[:16]
        threads = workers + queue + SPARE_THREADS
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="sam_bridge")
        self.gate = Gate(workers, queue)
        self.metrics = BridgeMetrics(lambda: {**segmenter.counters(), "waiting": self.gate.waiting})
        refused = lambda: self.metrics.called("any", wire.UNAUTHENTICATED, {})  # noqa: E731
        self._server = grpc.server(
            self._pool,
            interceptors=[TokenCheck(token, refused)] if token else [],
            options=_OPTIONS,
            maximum_concurrent_rpcs=2 * threads,
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", wire.SERVICE.full_name):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise SetupError(f"cannot listen on {address}: {error}") from error
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._server.start()

    def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives those under way `grace_s` seconds, then cancels them."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _handlers(self) -> grpc.GenericRpcHandler:
        """From bytes to bytes, so that bytes that are no message get a typed status, too."""

        def handler(rpc: str, kind: type, work: Callable) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(
                lambda data, context: self._answer(rpc, context, lambda: work(kind.FromString(data), context))
            )

        rpcs = (("Info", pb.InfoRequest, self._info), ("Put", pb.PutRequest, self._put))
        rpcs += (("Segment", pb.SegmentRequest, self._segment),)
        return grpc.method_handlers_generic_handler(wire.SERVICE.full_name, {rpc[0]: handler(*rpc) for rpc in rpcs})

    def _info(self, request: pb.InfoRequest, context: grpc.ServicerContext) -> pb.InfoReply:
        counts = self._segmenter.counters()
        done = {name: int(counts[name]) for name in ("encodes", "segments", "image_bytes", "evictions")}
        about = dataclasses.asdict(self._segmenter.about)
        return pb.InfoReply(protocol=wire.PROTOCOL, instance=self._instance, **about, **done)

    def _put(self, request: pb.PutRequest, context: grpc.ServicerContext) -> pb.PutReply:
        shape = (request.height, request.width, 3)
        if len(request.rgb) != request.height * request.width * 3:
            detail = f"{len(request.rgb)} bytes are not u8{list(shape)}"
            raise SegmenterError(FailureKind.INVALID_IMAGE, detail)
        image = np.frombuffer(request.rgb, np.uint8).reshape(shape)
        check_image(image)
        if request.image_hash in self._segmenter.images:  # another client was faster
            return pb.PutReply(timings_s={"queue": 0.0, "encode": 0.0})
        with self.gate.enter(context) as queue_s:
            if image_hash(image) != request.image_hash:
                raise SegmenterError(FailureKind.INVALID_IMAGE, "image_hash is not the hash of these pixels")
            _, encode_s = self._segmenter.put(request.image_hash, image)
        return pb.PutReply(timings_s={"queue": queue_s, "encode": encode_s})

    def _segment(self, request: pb.SegmentRequest, context: grpc.ServicerContext) -> pb.SegmentReply:
        start = time.perf_counter()
        if request.image_hash not in self._segmenter.images:  # said before the queue, not after it
            raise UnknownImage(request.image_hash)
        with self.gate.enter(context) as queue_s:
            decode_start = time.perf_counter()
            decoded, name = self._segmenter.decode_known(request.image_hash, wire.request_from_proto(request))
            rle_start = time.perf_counter()
            counts, *candidates = (
                wire.mask_to_bytes(mask, request.packed) for mask in (decoded.mask, *decoded.candidates)
            )
        now = time.perf_counter()
        stages = {"queue": queue_s, "decode": rle_start - decode_start, "rle": now - rle_start, "total": now - start}
        height, width = decoded.mask.shape
        return pb.SegmentReply(
            height=height,
            width=width,
            counts=counts,
            score=decoded.score,
            logits_id=name,
            timings_s=stages,
            candidates=candidates,
            packed=request.packed,
        )

    def _answer(self, rpc: str, context: grpc.ServicerContext, work: Callable[[], Any]) -> bytes:
        """The reply that `work` makes; a failure becomes a status with its reason in the trailing metadata."""
        start, code = time.perf_counter(), None
        try:
            reply = work()
        except UnknownImage as error:
            code, reason, detail = grpc.StatusCode.NOT_FOUND, wire.UNKNOWN_IMAGE, f"put image {error} first"
        except google.protobuf.message.DecodeError as error:
            reason, detail = FailureKind.INVALID_PROMPT, f"the bytes are no such message: {error}"
        except SegmenterError as error:
            reason, detail = error.kind, error.detail
        except Exception as error:
            log.exception("a call failed for no reason we know")
            reason, detail = FailureKind.INTERNAL, f"{type(error).__name__}: {error}"
        else:
            seconds = time.perf_counter() - start
            if rpc != "Info":
                self.metrics.called(rpc, "ok", {**reply.timings_s, "total": seconds})
            if seconds > SLOW_S:
                fields = {"rpc": rpc, "seconds": round(seconds, 3), "peer": context.peer()}
                log.warning("%s took %.1f s", rpc, seconds, extra={"fields": fields})
            return reply.SerializeToString()
        self.metrics.called(rpc, reason, {"total": time.perf_counter() - start})
        if reason != wire.UNKNOWN_IMAGE:
            fields = {"rpc": rpc, "reason": reason, "detail": detail[: wire.MAX_DETAIL], "peer": context.peer()}
            level = logging.DEBUG if reason in _EXPECTED else logging.WARNING
            log.log(level, "%s failed: %s", rpc, detail, extra={"fields": fields})
        context.set_trailing_metadata(((wire.REASON_KEY, reason),))
        context.abort(code or _CODES[reason], wire.status_text(detail))
