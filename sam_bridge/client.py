"""The segmenter at the other end of a wire: finds the side-car for an image, survives restarts, types every failure."""

import collections
import contextlib
import dataclasses
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import cachetools
import grpc
import numpy as np

from sam_bridge import bridge_pb2 as pb
from sam_bridge import security, wire
from sam_bridge.cache import ByteLRU
from sam_bridge.local import image_hash
from sam_bridge.shrink import ask_shrunk
from sam_bridge.types import About, FailureKind, SegmenterError, SegmentReply, SegmentRequest

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_S = 5.0  # deadline of the first call on a connection
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # between attempts, doubling
PROBE_S = 1.0  # between looks at side-cars that are out
PUTS_PER_CALL = 3  # an image that is gone again right after it was put, this many times: the cache is too small
RECIPES = 65536  # masks whose making is remembered, so that `refine` works after a restart
COUNTS = ("calls", "retries", "rejected", "puts", "remade", "restarts", "ejections", "returns")

# What the status of a failed call means where our server gave no reason: (kind, words about address and details).
_OF_GRPC = {
    grpc.StatusCode.UNAUTHENTICATED: (FailureKind.INTERNAL, "{} refuses us: {}; see token_file"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (FailureKind.TIMEOUT, "{} did not answer in time"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (FailureKind.EXHAUSTED, "{}: {}"),
    grpc.StatusCode.UNIMPLEMENTED: (FailureKind.INTERNAL, "{} is not a sam_bridge side-car: {}"),
}
# Any other is the transport's: a process that died in the middle of a call shows as UNAVAILABLE, UNKNOWN, INTERNAL or
# CANCELLED, as it happens.
_TRANSPORT = (FailureKind.UNAVAILABLE, "{} cannot be reached: {}")
_RETRIED = (FailureKind.UNAVAILABLE, FailureKind.EXHAUSTED)  # what another attempt may mend

# gRPC waits up to two minutes between attempts to connect; a restarted side-car should be found at once.
_CHANNEL_OPTIONS = (
    *wire.MESSAGE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment has no business between us and a side-car
    # A machine that lost its power says nothing: without pings its calls would wait for their deadline.
    ("grpc.keepalive_time_ms", 1000 * wire.KEEPALIVE_S),
    ("grpc.keepalive_timeout_ms", 1000 * wire.KEEPALIVE_S),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


class Slot:
    """One side-car. `name` decides which images are its own and stays when `address` changes after a restart."""

    def __init__(self, name: str, credentials: grpc.ChannelCredentials | None):
        self.name, self.out, self.instance = name, False, ""
        self._credentials = credentials
        self.channel: grpc.Channel | None = None
        self.dial(name)

    def dial(self, address: str) -> None:
        old, self.address = self.channel, address
        if self._credentials is None:
            self.channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self.channel = grpc.secure_channel(address, self._credentials, options=_CHANNEL_OPTIONS)
        self.stub = wire.rpcs(self.channel)
        self.packed = security.is_loopback(address)  # bits cost less than RLE where bytes cost nothing
        self.known = False  # whether Info has confirmed who is there
        if old is not None:
            old.close()


def rank(slots: Sequence[Slot], key: str) -> list[Slot]:
    """Side-cars by preference for an image (rendezvous hashing): losing one moves only its own images.

    Those that are out come last, in the same order.
    """
    by_hash = sorted(slots, key=lambda slot: hashlib.sha256(f"{slot.name} {key}".encode()).digest(), reverse=True)
    return sorted(by_hash, key=lambda slot: slot.out)


class SamClient(contextlib.AbstractContextManager):
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
        token = security.read_token(token_file)
        roots = security.read_secret_file(tls_ca, "certificate") if tls_ca else None
        tls = tls or roots is not None
        if isinstance(addresses, str) or not addresses:
            raise ValueError(f"addresses must be a non-empty list of host:port, got {addresses!r}")
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"addresses must differ, got {list(addresses)}")
        for address in addresses:
            if not security.is_loopback(address) and token and not tls:
                raise ValueError(f"the token would travel to {address} in the clear: give its certificate (tls_ca)")
        credentials = grpc.ssl_channel_credentials(roots) if tls else None
        self.slots = [Slot(address, credentials) for address in addresses]
        self.timeout_s, self.wait_s = timeout_s, wait_s
        self._metadata = ((security.TOKEN_KEY, f"Bearer {token}"),) if token else ()
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None  # looks at the side-cars that are out
        self._counts: collections.Counter[str] = collections.Counter()
        self._recipes = cachetools.LRUCache(RECIPES)  # logits id -> (image's key, request)
        self._puts = ByteLRU(0)  # images on their way; nothing is kept, one call sends for all who ask meanwhile
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
        with self._lock:
            self._recipes[reply.logits_id] = key, request
        return reply

    def info(self) -> list[pb.InfoReply]:
        """Who answers at each address, in order, with counts. Waits up to `wait_s` for each; the connection check."""
        return [self._call(lambda s=slot: [s], lambda s: self._check(s, force=True)) for slot in self.slots]

    @property
    def about(self) -> About:
        """See types.Segmenter. Asks the side-cars where none has answered yet, and raises as `info` does."""
        if self._about is None:
            self.info()
        return self._about

    def counters(self) -> dict[str, float]:
        """Since the start: calls, retries, rejected (queue full), puts, remade masks, restarts of side-cars that were
        noticed, ejections and returns; and `out`, the side-cars that are out now."""
        return {name: self._counts[name] for name in COUNTS} | {"out": sum(slot.out for slot in self.slots)}

    def move(self, name: str, address: str) -> None:
        """The side-car first known as `name` now listens at `address`."""
        with self._lock:
            if not self._closed.is_set():
                next(slot for slot in self.slots if slot.name == name).dial(address)

    def close(self) -> None:
        """Calls under way fail with UNAVAILABLE."""
        with self._lock:
            self._closed.set()
            for slot in self.slots:
                slot.channel.close()
        if self._watcher is not None:
            self._watcher.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _segment(self, key: str, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        message = wire.request_to_proto(key, request)
        self._count("calls")
        reply, put_timings = self._call(lambda: rank(self.slots, key), lambda slot: self._attempt(slot, message, image))
        decoded = wire.reply_from_proto(reply, image.shape[:2])
        timings = collections.Counter(decoded.timings_s)
        timings.update(put_timings, total=sum(put_timings.values()))  # a Counter adds
        return dataclasses.replace(decoded, timings_s=dict(timings))

    def _attempt(self, slot: Slot, message: pb.SegmentRequest, image: np.ndarray) -> tuple[pb.SegmentReply, dict]:
        """One prompt at one side-car, sending the image if it does not have it. Returns the seconds of Put apart."""
        self._check(slot)
        message.packed = slot.packed
        put_timings = collections.Counter(encode=0.0)
        for _ in range(PUTS_PER_CALL):
            try:
                reply = slot.stub.Segment(message, timeout=self.timeout_s, metadata=self._metadata)
                return reply, put_timings
            except grpc.RpcError as error:
                if _reason(error) != wire.UNKNOWN_IMAGE:
                    raise
            put_timings.update(self._put(slot, message.image_hash, image))
        detail = f"forgot the image {PUTS_PER_CALL} times right after it was sent: its cache is too small"
        raise SegmenterError(FailureKind.EXHAUSTED, f"{slot.address} {detail}")

    def _put(self, slot: Slot, key: str, image: np.ndarray) -> dict[str, float]:
        """Seconds by stage. An image that another thread is sending to the same side-car is waited for instead."""
        start, timings = time.perf_counter(), {}

        def send() -> tuple[bool, int]:
            height, width = image.shape[:2]
            put = pb.PutRequest(image_hash=key, height=height, width=width, rgb=image.tobytes())
            self._count("puts")
            timings["encode"] = 0.0  # this call is the one that sends
            timings.update(slot.stub.Put(put, timeout=self.timeout_s, metadata=self._metadata).timings_s)
            return True, 1

        try:
            self._puts.get_or_make(f"{slot.name} {key}", send)
        except Exception:
            if timings:  # if another's failed, our next Segment says so
                raise
        return timings or {"encode": time.perf_counter() - start}

    def _check(self, slot: Slot, force: bool = False) -> pb.InfoReply | None:
        """Asks a new connection who is there. A deadline passed here means that nobody is."""
        if slot.known and not force:
            return None
        stub, timeout_s = slot.stub, min(CONNECT_S, self.wait_s, self.timeout_s)
        try:
            info = stub.Info(pb.InfoRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ConnectionError(f"{slot.address} does not answer") from error
            raise
        if info.protocol != wire.PROTOCOL:
            detail = f"speaks protocol {info.protocol}, we speak {wire.PROTOCOL}: install the same version"
            raise SegmenterError(FailureKind.INTERNAL, f"{slot.address} {detail}")
        with self._lock:
            about = About(info.backend, info.identity)
            self._about = self._about or about
            if about != self._about:
                detail = f"{slot.address} gives other masks ({info.identity}) than before ({self._about.identity})"
                raise SegmenterError(FailureKind.INTERNAL, detail)
            if slot.instance not in ("", info.instance):
                self._count("restarts")
            slot.instance = info.instance
        slot.known = slot.stub is stub  # False if the side-car moved meanwhile
        return info

    def _eject(self, slot: Slot) -> None:
        """Passes it over from now on, until it answers. One side-car alone is never out: there is no other."""
        slot.known = False
        with self._lock:
            if len(self.slots) == 1 or slot.out or self._closed.is_set():
                return
            slot.out = True
            self._count("ejections")
            log.warning("side-car %s is out; its images go to the others", slot.address)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="sam fleet", daemon=True)
                self._watcher.start()

    def _watch(self) -> None:
        while not self._closed.wait(PROBE_S):
            for slot in [slot for slot in self.slots if slot.out]:
                with contextlib.suppress(grpc.RpcError, SegmenterError, ValueError, ConnectionError):
                    self._check(slot, force=True)
                    slot.out = False
                    self._count("returns")
                    log.warning("side-car %s is back", slot.address)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _call(self, candidates: Callable[[], list[Slot]], attempt: Callable[[Slot], T]) -> T:
        """Repeats `attempt` for `wait_s` after its first failure; idempotent calls make that safe."""
        first_failure, pause, tried = None, FIRST_PAUSE_S, set()
        while True:
            slots = candidates()
            slot = next((slot for slot in slots if slot.name not in tried), slots[0])
            try:
                return attempt(slot)
            except (grpc.RpcError, ValueError, ConnectionError) as raised:
                error = self._typed(slot, raised)
                if error.kind not in _RETRIED:
                    raise error from raised
            now = time.monotonic()
            first_failure = first_failure or now
            left = self.wait_s - (now - first_failure)
            if left <= 0 or self._closed.is_set():
                raise SegmenterError(error.kind, f"{error.detail} (gave up after {now - first_failure:.1f} s)")
            self._count("retries")
            if error.kind is FailureKind.UNAVAILABLE:
                self._eject(slot)
                tried.add(slot.name)
                if len(tried) < len(slots):
                    continue  # another side-car, at once
                tried.clear()
            else:
                self._count("rejected")
            # Jitter: 64 trajectories turned away together should not come back together.
            self._closed.wait(min(left, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _typed(self, slot: Slot, raised: Exception) -> SegmenterError:
        """What to raise if no further attempt is made or succeeds."""
        if self._closed.is_set():
            return SegmenterError(FailureKind.UNAVAILABLE, "the client is closed")
        if isinstance(raised, ConnectionError):
            return SegmenterError(FailureKind.UNAVAILABLE, str(raised))
        if isinstance(raised, ValueError):
            if "closed channel" not in str(raised):
                raise raised
            return SegmenterError(FailureKind.UNAVAILABLE, f"{slot.name} is moving")
        detail = raised.details() or ""
        if (reason := _reason(raised)) in tuple(FailureKind):
            return SegmenterError(FailureKind(reason), detail)
        kind, words = _OF_GRPC.get(raised.code(), _TRANSPORT)
        return SegmenterError(kind, words.format(slot.address, detail))

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
