"""The side-cars a client knows: how each is dialled, and which one an image belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import grpc

from sam_bridge import bridge_pb2_grpc, wire

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


def rank(slots: Sequence[Slot], key: str) -> list[Slot]:
    """Side-cars by preference for an image (rendezvous hashing): losing one moves only its own images.

    Those that are out come last, in the same order.
    """
    by_hash = sorted(slots, key=lambda slot: hashlib.sha256(f"{slot.name} {key}".encode()).digest(), reverse=True)
    return sorted(by_hash, key=lambda slot: slot.out)
