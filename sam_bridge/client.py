"""The segmenter at the other end of a wire: finds the side-car for an image, survives restarts, types every failure."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
import numpy as np

from sam_bridge import bridge_pb2 as pb
from sam_bridge import bridge_pb2_grpc, wire
from sam_bridge.local import image_hash
from sam_bridge.prompts import check_image, check_request
from sam_bridge.types import FailureKind, SegmenterError, SegmentReply, SegmentRequest

T = TypeVar("T")

CONNECT_S = 5.0  # deadline of the first call on a connection
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between attempts, doubling
PUTS_PER_CALL = 3  # an image that is gone again right after it was put, this many times: the cache is too small
RECIPES = 65536  # masks whose making is remembered, so that `refine` works after a restart

# gRPC waits up to two minutes between attempts to connect; a restarted side-car should be found at once.
_CHANNEL_OPTIONS = (
    *wire.MESSAGE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment has no business between us and loopback
)


class _Slot:
    """One side-car. `name` decides which images are its own and stays when `address` changes after a restart."""

    def __init__(self, name: str):
        self.name = name
        self.channel: grpc.Channel | None = None
        self.dial(name)

    def dial(self, address: str) -> None:
        old, self.address = self.channel, address
        self.channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self.stub = bridge_pb2_grpc.SamBridgeStub(self.channel)
        self.known = False  # whether Info has confirmed who is there
        if old is not None:
            old.close()


class _Retry(Exception):
    """An attempt failed in a way that another attempt may mend."""

    def __init__(self, error: SegmenterError):
        super().__init__(str(error))
        self.error = error


class SamClient:
    """Segmenter over one or several side-cars; thread-safe. An image's calls meet the side-car that has its encoding.

    `timeout_s`: deadline of one rpc, then TIMEOUT. `wait_s`: how long an unreachable or overloaded side-car is tried
    again, counted from the first failure of a call, then UNAVAILABLE or EXHAUSTED. With several addresses an
    unreachable one is passed over for the next.
    """

    def __init__(self, addresses: Sequence[str], *, timeout_s: float = 30.0, wait_s: float = 30.0):
        if isinstance(addresses, str) or not addresses:
            raise ValueError(f"addresses must be a non-empty list of host:port, got {addresses!r}")
        for address in addresses:
            wire.is_loopback(address)  # raises ValueError unless it is host:port
        self.timeout_s, self.wait_s = timeout_s, wait_s
        self._slots = [_Slot(address) for address in addresses]
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._recipes: collections.OrderedDict[str, tuple[str, SegmentRequest]] = collections.OrderedDict()

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        """See types.Segmenter. `timings_s` gains `transport`: what the caller waited beyond the side-car's own work."""
        start = time.perf_counter()
        check_image(image)
        check_request(request, *image.shape[:2])
        key = image_hash(image)
        try:
            reply = self._segment(key, image, request)
        except SegmenterError as error:
            if error.kind is not FailureKind.UNKNOWN_LOGITS or not self._remake(key, image, request.refine):
                raise
            reply = self._segment(key, image, request)
        self._remember(key, reply.logits_id, request)
        total = time.perf_counter() - start
        served = reply.timings_s.get("total", 0.0)
        return dataclasses.replace(reply, timings_s={**reply.timings_s, "total": total, "transport": total - served})

    def info(self) -> list[pb.InfoReply]:
        """Who answers at each address, in order, with counts. Waits up to `wait_s` for each; the connection check."""
        return [self._call([slot], lambda s: self._check(s, force=True)) for slot in self._slots]

    def move(self, name: str, address: str) -> None:
        """The side-car first known as `name` now listens at `address`."""
        with self._lock:
            if not self._closed.is_set():
                next(slot for slot in self._slots if slot.name == name).dial(address)

    def close(self) -> None:
        """Calls under way fail with UNAVAILABLE."""
        with self._lock:
            self._closed.set()
            for slot in self._slots:
                slot.channel.close()

    def __enter__(self) -> SamClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _segment(self, key: str, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        message = wire.request_to_proto(key, request)
        reply, put_timings = self._call(rank(self._slots, key), lambda slot: self._attempt(slot, message, image))
        decoded = wire.reply_from_proto(reply, image.shape[:2])
        timings = dict(decoded.timings_s)
        for stage, seconds in put_timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        timings["total"] = timings.get("total", 0.0) + sum(put_timings.values())
        return dataclasses.replace(decoded, timings_s=timings)

    def _attempt(self, slot: _Slot, message: pb.SegmentRequest, image: np.ndarray) -> tuple[pb.SegmentReply, dict]:
        """One prompt at one side-car, sending the image if it does not have it. Returns the seconds of Put apart."""
        self._check(slot)
        put_timings = {"encode": 0.0}
        for _ in range(PUTS_PER_CALL):
            try:
                return slot.stub.Segment(message, timeout=self.timeout_s), put_timings
            except grpc.RpcError as error:
                if _reason(error) != wire.UNKNOWN_IMAGE:
                    raise
            height, width = image.shape[:2]
            put = pb.PutRequest(image_hash=message.image_hash, height=height, width=width, rgb=image.tobytes())
            for stage, seconds in slot.stub.Put(put, timeout=self.timeout_s).timings_s.items():
                put_timings[stage] = put_timings.get(stage, 0.0) + seconds
        detail = (
            f"{slot.address} forgot the image {PUTS_PER_CALL} times right after it was sent: its cache is too small"
        )
        raise SegmenterError(FailureKind.EXHAUSTED, detail)

    def _check(self, slot: _Slot, force: bool = False) -> pb.InfoReply | None:
        """Asks a new connection who is there. A deadline passed here means that nobody is."""
        if slot.known and not force:
            return None
        stub = slot.stub
        try:
            info = stub.Info(pb.InfoRequest(), timeout=min(CONNECT_S, self.wait_s, self.timeout_s))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _Retry(SegmenterError(FailureKind.UNAVAILABLE, f"{slot.address} does not answer")) from error
            raise
        if info.protocol != wire.PROTOCOL:
            detail = (
                f"{slot.address} speaks protocol {info.protocol}, we speak {wire.PROTOCOL}: install the same version"
            )
            raise SegmenterError(FailureKind.INTERNAL, detail)
        slot.known = slot.stub is stub  # False if the side-car moved meanwhile
        return info

    def _call(self, slots: list[_Slot], attempt: Callable[[_Slot], T]) -> T:
        """Repeats `attempt` for `wait_s` after its first failure; idempotent calls make that safe."""
        first_failure, pause, turn = None, FIRST_PAUSE_S, 0
        while True:
            slot = slots[turn % len(slots)]
            try:
                return attempt(slot)
            except (grpc.RpcError, ValueError, _Retry) as raised:
                error = self._retryable(slot, raised)
            now = time.monotonic()
            first_failure = first_failure or now
            left = self.wait_s - (now - first_failure)
            if left <= 0 or self._closed.is_set():
                raise SegmenterError(error.kind, f"{error.detail} (gave up after {now - first_failure:.1f} s)")
            if error.kind is FailureKind.UNAVAILABLE:
                slot.known = False
                turn += 1
            # Jitter: 64 trajectories turned away together should not come back together.
            self._closed.wait(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _retryable(self, slot: _Slot, raised: Exception) -> SegmenterError:
        """What to raise if no further attempt succeeds. Raises at once what another attempt cannot mend."""
        if isinstance(raised, _Retry):
            return raised.error
        if self._closed.is_set():
            return SegmenterError(FailureKind.UNAVAILABLE, "the client is closed")
        if isinstance(raised, ValueError):
            if "closed channel" not in str(raised):
                raise raised
            return SegmenterError(FailureKind.UNAVAILABLE, f"{slot.name} is moving")
        error, retry = _typed(slot.address, raised)
        if not retry:
            raise error from raised
        return error

    def _remember(self, key: str, logits_id: str, request: SegmentRequest) -> None:
        with self._lock:
            self._recipes[logits_id] = (key, request)
            self._recipes.move_to_end(logits_id)
            if len(self._recipes) > RECIPES:
                self._recipes.popitem(last=False)

    def _remake(self, key: str, image: np.ndarray, logits_id: str) -> bool:
        """Makes a mask again that a restarted side-car has forgotten, so its death is not blamed on the caller.

        Ids name how a mask is made, so the remade mask has the id that was asked for.
        """
        with self._lock:
            recipe_key, recipe = self._recipes.get(logits_id, ("", None))
        return recipe_key == key and self.segment(image, recipe).logits_id == logits_id


def rank(slots: Sequence[_Slot], key: str) -> list[_Slot]:
    """Side-cars by preference for an image (rendezvous hashing): losing one moves only its own images."""
    return sorted(slots, key=lambda slot: hashlib.sha256(f"{slot.name} {key}".encode()).digest(), reverse=True)


def _reason(error: grpc.RpcError) -> str:
    """What a side-car said about its failure; "" when the failure is the transport's."""
    return next((value for name, value in error.trailing_metadata() or () if name == wire.REASON_KEY), "")


def _typed(address: str, error: grpc.RpcError) -> tuple[SegmenterError, bool]:
    """(typed error, whether to try again)."""
    code, detail, reason = error.code(), error.details() or "", _reason(error)
    if reason in tuple(FailureKind):
        kind = FailureKind(reason)
        return SegmenterError(kind, detail), kind in (FailureKind.EXHAUSTED, FailureKind.UNAVAILABLE)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return SegmenterError(FailureKind.TIMEOUT, f"{address} did not answer in time"), False
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return SegmenterError(FailureKind.EXHAUSTED, f"{address}: {detail}"), True
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return SegmenterError(FailureKind.INTERNAL, f"{address} is not a sam_bridge side-car: {detail}"), False
    # Our server gives its reason with every failure, so this is the transport: a process that died in the middle of a
    # call shows as UNAVAILABLE, UNKNOWN, INTERNAL or CANCELLED, as it happens.
    return SegmenterError(FailureKind.UNAVAILABLE, f"{address} cannot be reached: {detail}"), True
