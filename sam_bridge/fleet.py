"""The side-cars a client knows: which one an image belongs to, which are out, and when they may come back."""

from __future__ import annotations

import collections
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence

import grpc

from sam_bridge import bridge_pb2_grpc, security, wire

log = logging.getLogger(__name__)

COUNTS = ("calls", "retries", "rejected", "puts", "remade", "restarts", "ejections", "returns")
PROBE_S = 1.0  # between looks at side-cars that are out

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
        self.stub = bridge_pb2_grpc.SamBridgeStub(self.channel)
        self.known = False  # whether Info has confirmed who is there
        if old is not None:
            old.close()


class Fleet:
    """Thread-safe. With several side-cars one that cannot be reached is out until it answers again."""

    def __init__(self, addresses: Sequence[str], root_certificates: bytes | None, tls: bool, token: str):
        """ValueError for an address that is malformed, or that would see the token in the clear."""
        if isinstance(addresses, str) or not addresses:
            raise ValueError(f"addresses must be a non-empty list of host:port, got {addresses!r}")
        if len(set(addresses)) < len(addresses):
            raise ValueError(f"addresses must differ, got {list(addresses)}")
        for address in addresses:
            if not wire.is_loopback(address) and token and not tls:
                raise ValueError(f"the token would travel to {address} in the clear: give its certificate (tls_ca)")
        credentials = grpc.ssl_channel_credentials(root_certificates) if tls else None
        self.slots = [Slot(address, credentials) for address in addresses]
        self.metadata = security.metadata(token)
        self.closed = threading.Event()
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.RLock()
        self._watcher: threading.Thread | None = None

    def count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def counters(self) -> dict[str, float]:
        """See SamClient.counters."""
        return {name: self._counts[name] for name in COUNTS} | {"out": sum(slot.out for slot in self.slots)}

    def eject(self, slot: Slot, answers: Callable[[Slot], bool]) -> None:
        """Passes it over from now on, until `answers(slot)`. One side-car alone is never out: there is no other."""
        slot.known = False
        with self._lock:
            if len(self.slots) == 1 or slot.out or self.closed.is_set():
                return
            slot.out = True
            self.count("ejections")
            log.warning("side-car %s is out; its images go to the others", slot.address)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, args=(answers,), name="sam fleet", daemon=True)
                self._watcher.start()

    def move(self, name: str, address: str) -> None:
        with self._lock:
            if not self.closed.is_set():
                next(slot for slot in self.slots if slot.name == name).dial(address)

    def close(self) -> None:
        with self._lock:
            self.closed.set()
            for slot in self.slots:
                slot.channel.close()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self, answers: Callable[[Slot], bool]) -> None:
        while not self.closed.wait(PROBE_S):
            for slot in [slot for slot in self.slots if slot.out]:
                if answers(slot):
                    slot.out = False
                    self.count("returns")
                    log.warning("side-car %s is back", slot.address)


def rank(slots: Sequence[Slot], key: str) -> list[Slot]:
    """Side-cars by preference for an image (rendezvous hashing): losing one moves only its own images.

    Those that are out come last, in the same order.
    """
    by_hash = sorted(slots, key=lambda slot: hashlib.sha256(f"{slot.name} {key}".encode()).digest(), reverse=True)
    return sorted(by_hash, key=lambda slot: slot.out)
