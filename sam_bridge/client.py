"""The segmenter at the other end of a wire: finds the side-car for an image, survives restarts, types every failure."""

from __future__ import annotations

import collections
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc
import numpy as np

from sam_bridge import bridge_pb2 as pb
from sam_bridge import security, wire
from sam_bridge.fleet import Fleet, Slot, rank
from sam_bridge.local import image_hash
from sam_bridge.shrink import ask_shrunk
from sam_bridge.types import About, FailureKind, SegmenterError, SegmentReply, SegmentRequest

T = TypeVar("T")

CONNECT_S = 5.0  # deadline of the first call on a connection
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between attempts, doubling
PUTS_PER_CALL = 3  # an image that is gone again right after it was put, this many times: the cache is too small
RECIPES = 65536  # masks whose making is remembered, so that `refine` works after a restart


class _Retry(Exception):
    """An attempt failed in a way that another attempt may mend."""

    def __init__(self, error: SegmenterError):
        super().__init__(str(error))
        self.error = error


class SamClient:
    """Segmenter over one or several side-cars; thread-safe. An image's calls meet the side-car that has its encoding.

    `timeout_s`: deadline of one rpc, then TIMEOUT. `wait_s`: how long an unreachable or overloaded side-car is tried
    again, counted from the first failure of a call, then UNAVAILABLE or EXHAUSTED. With several addresses an
    unreachable one is passed over for the next, until it answers again. `tls`: encrypt; `tls_ca`: a PEM file of the
    certificates to trust (implies `tls`; else the system's). `token_file`: see security.py.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_s: float = 30.0,
        wait_s: float = 30.0,
        token_file: str = "",
        tls_ca: str = "",
        tls: bool = False,
    ):
        """ValueError for addresses or files that cannot be used, or a token that would travel in the clear."""
        token, roots = security.read_token(token_file), security.read_certificates(tls_ca)
        self.timeout_s, self.wait_s = timeout_s, wait_s
        self._fleet = Fleet(addresses, roots, tls or roots is not None, token)
        self._lock = threading.Lock()
        self._recipes: collections.OrderedDict[str, tuple[str, SegmentRequest]] = collections.OrderedDict()
        self._puts: dict[tuple[str, str], threading.Event] = {}  # images on their way: (slot name, key)
        self._counts: collections.Counter[str] = collections.Counter()
        self._about: About | None = None  # the first side-car that answered; the others must give the same masks

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        """See types.Segmenter. `timings_s` gains `transport`: what the caller waited beyond the side-car's own work.

        A picture larger than segmenters look at is shrunk first, see shrink.py.
        """
        start = time.perf_counter()
        reply = ask_shrunk(image, request, self._ask)
        total = time.perf_counter() - start
        served = reply.timings_s.get("total", 0.0)
        return dataclasses.replace(reply, timings_s={**reply.timings_s, "total": total, "transport": total - served})

    def _ask(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        """About the picture as it is sent; a mask to refine that a side-car has forgotten is made again first."""
        key = image_hash(image)
        try:
            reply = self._segment(key, image, request)
        except SegmenterError as error:
            if error.kind is not FailureKind.UNKNOWN_LOGITS or not self._remake(key, image, request.refine_logits_id):
                raise
            reply = self._segment(key, image, request)
        self._remember(key, reply.logits_id, request)
        return reply

    def info(self) -> list[pb.InfoReply]:
        """Who answers at each address, in order, with counts. Waits up to `wait_s` for each; the connection check."""
        return [self._call(lambda s=slot: [s], lambda s: self._check(s, force=True)) for slot in self._fleet.slots]

    @property
    def about(self) -> About:
        """See types.Segmenter. Asks the side-cars where none has answered yet, and raises as `info` does."""
        if self._about is None:
            self.info()
        return self._about

    def counters(self) -> dict[str, float]:
        """Since the start: calls, retries, rejected (queue full), puts, remade masks, restarts of side-cars that were
        noticed, ejections and returns; and `out`, the side-cars that are out now."""
        names = ("calls", "retries", "rejected", "puts", "remade", "restarts")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
        fleet = self._fleet
        return counts | {
            "ejections": fleet.ejections,
            "returns": fleet.returns,
            "out": sum(slot.out for slot in fleet.slots),
        }

    def move(self, name: str, address: str) -> None:
        """The side-car first known as `name` now listens at `address`."""
        self._fleet.move(name, address)

    def close(self) -> None:
        """Calls under way fail with UNAVAILABLE."""
        self._fleet.close()

    def __enter__(self) -> SamClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _segment(self, key: str, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        message = wire.request_to_proto(key, request)
        self._count("calls")
        slots = self._fleet.slots
        reply, put_timings = self._call(lambda: rank(slots, key), lambda slot: self._attempt(slot, message, image))
        decoded = wire.reply_from_proto(reply, image.shape[:2])
        timings = dict(decoded.timings_s)
        for stage, seconds in put_timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        timings["total"] = timings.get("total", 0.0) + sum(put_timings.values())
        return dataclasses.replace(decoded, timings_s=timings)

    def _attempt(self, slot: Slot, message: pb.SegmentRequest, image: np.ndarray) -> tuple[pb.SegmentReply, dict]:
        """One prompt at one side-car, sending the image if it does not have it. Returns the seconds of Put apart."""
        self._check(slot)
        put_timings = {"encode": 0.0}
        for _ in range(PUTS_PER_CALL):
            try:
                reply = slot.stub.Segment(message, timeout=self.timeout_s, metadata=self._fleet.metadata)
                return reply, put_timings
            except grpc.RpcError as error:
                if _reason(error) != wire.UNKNOWN_IMAGE:
                    raise
            for stage, seconds in self._put(slot, message.image_hash, image).items():
                put_timings[stage] = put_timings.get(stage, 0.0) + seconds
        detail = (
            f"{slot.address} forgot the image {PUTS_PER_CALL} times right after it was sent: its cache is too small"
        )
        raise SegmenterError(FailureKind.EXHAUSTED, detail)

    def _put(self, slot: Slot, key: str, image: np.ndarray) -> dict[str, float]:
        """Seconds by stage. An image that another thread is sending to the same side-car is waited for instead."""
        with self._lock:
            flight = self._puts.get((slot.name, key))
            leader = flight is None
            if leader:
                flight = self._puts[slot.name, key] = threading.Event()
        if not leader:
            start = time.perf_counter()
            flight.wait(self.timeout_s)  # if it failed, our next Segment says so
            return {"encode": time.perf_counter() - start}
        try:
            height, width = image.shape[:2]
            put = pb.PutRequest(image_hash=key, height=height, width=width, rgb=image.tobytes())
            self._count("puts")
            return dict(slot.stub.Put(put, timeout=self.timeout_s, metadata=self._fleet.metadata).timings_s)
        finally:
            with self._lock:
                del self._puts[slot.name, key]
            flight.set()

    def _check(self, slot: Slot, force: bool = False) -> pb.InfoReply | None:
        """Asks a new connection who is there. A deadline passed here means that nobody is."""
        if slot.known and not force:
            return None
        stub, timeout_s = slot.stub, min(CONNECT_S, self.wait_s, self.timeout_s)
        try:
            info = stub.Info(pb.InfoRequest(), timeout=timeout_s, metadata=self._fleet.metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _Retry(SegmenterError(FailureKind.UNAVAILABLE, f"{slot.address} does not answer")) from error
            raise
        if info.protocol != wire.PROTOCOL:
            detail = (
                f"{slot.address} speaks protocol {info.protocol}, we speak {wire.PROTOCOL}: install the same version"
            )
            raise SegmenterError(FailureKind.INTERNAL, detail)
        with self._lock:
            about = About(info.backend, info.identity)
            self._about = self._about or about
            if about != self._about:
                detail = f"{slot.address} gives other masks ({info.identity}) than before ({self._about.identity})"
                raise SegmenterError(FailureKind.INTERNAL, detail)
            if slot.instance not in ("", info.instance):
                self._counts["restarts"] += 1
            slot.instance = info.instance
        slot.known = slot.stub is stub  # False if the side-car moved meanwhile
        return info

    def _answers(self, slot: Slot) -> bool:
        try:
            self._check(slot, force=True)
        except (grpc.RpcError, SegmenterError, ValueError, _Retry):
            return False
        return True

    def _call(self, candidates: Callable[[], list[Slot]], attempt: Callable[[Slot], T]) -> T:
        """Repeats `attempt` for `wait_s` after its first failure; idempotent calls make that safe."""
        first_failure, pause, tried = None, FIRST_PAUSE_S, set()
        while True:
            slots = candidates()
            slot = next((slot for slot in slots if slot.name not in tried), slots[0])
            try:
                return attempt(slot)
            except (grpc.RpcError, ValueError, _Retry) as raised:
                error = self._retryable(slot, raised)
            now = time.monotonic()
            first_failure = first_failure or now
            left = self.wait_s - (now - first_failure)
            if left <= 0 or self._fleet.closed.is_set():
                raise SegmenterError(error.kind, f"{error.detail} (gave up after {now - first_failure:.1f} s)")
            self._count("retries")
            if error.kind is FailureKind.UNAVAILABLE:
                self._fleet.eject(slot, self._answers)
                tried.add(slot.name)
                if len(tried) < len(slots):
                    continue  # another side-car, at once
                tried.clear()
            else:
                self._count("rejected")
            # Jitter: 64 trajectories turned away together should not come back together.
            self._fleet.closed.wait(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _retryable(self, slot: Slot, raised: Exception) -> SegmenterError:
        """What to raise if no further attempt succeeds. Raises at once what another attempt cannot mend."""
        if isinstance(raised, _Retry):
            return raised.error
        if self._fleet.closed.is_set():
            return SegmenterError(FailureKind.UNAVAILABLE, "the client is closed")
        if isinstance(raised, ValueError):
            if "closed channel" not in str(raised):
                raise raised
            return SegmenterError(FailureKind.UNAVAILABLE, f"{slot.name} is moving")
        error, retry = _typed(slot.address, raised)
        if not retry:
            raise error from raised
        return error

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

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
        if recipe_key != key:
            return False
        self._count("remade")
        return self._ask(image, recipe).logits_id == logits_id


def _reason(error: grpc.RpcError) -> str:
    """What a side-car said about its failure; "" when the failure is the transport's."""
    return next((value for name, value in error.trailing_metadata() or () if name == wire.REASON_KEY), "")


def _typed(address: str, error: grpc.RpcError) -> tuple[SegmenterError, bool]:
    """(typed error, whether to try again)."""
    code, detail, reason = error.code(), error.details() or "", _reason(error)
    if reason in tuple(FailureKind):
        kind = FailureKind(reason)
        return SegmenterError(kind, detail), kind in (FailureKind.EXHAUSTED, FailureKind.UNAVAILABLE)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return SegmenterError(FailureKind.INTERNAL, f"{address} refuses us: {detail}; see token_file"), False
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return SegmenterError(FailureKind.TIMEOUT, f"{address} did not answer in time"), False
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return SegmenterError(FailureKind.EXHAUSTED, f"{address}: {detail}"), True
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return SegmenterError(FailureKind.INTERNAL, f"{address} is not a sam_bridge side-car: {detail}"), False
    # Our server gives its reason with every failure, so this is the transport: a process that died in the middle of a
    # call shows as UNAVAILABLE, UNKNOWN, INTERNAL or CANCELLED, as it happens.
    return SegmenterError(FailureKind.UNAVAILABLE, f"{address} cannot be reached: {detail}"), True
