"""What the tests of the bridge share: a picture with known shapes, back ends without a model, and small helpers."""

import time
from collections.abc import Callable

import cv2
import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sam_bridge.backends import Decoded
from sam_bridge.cache import ByteLRU
from sam_bridge.types import SegmenterError, SegmentRequest

DISC = (40, 50, 18)  # x, y, radius of the red disc in the picture
BOX = SegmentRequest(box=(22.0, 32.0, 59.0, 69.0))  # tight around it


def make_image(height: int = 96, width: int = 128) -> np.ndarray:
    """u8[h, w, 3]: a red disc and a blue square over noisy green hills."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    green = 120 + 40 * np.sin(columns / 15) + 30 * np.cos(rows / 11)
    image = np.stack([green * 0.5, green, green * 0.4], axis=-1) + rng.normal(0, 10, (height, width, 3))
    image = image.clip(0, 255).astype(np.uint8)
    cv2.rectangle(image, (85, 20), (115, 48), (40, 60, 210), -1)
    cv2.circle(image, DISC[:2], DISC[2], (220, 40, 40), -1)
    return image


class FakeBackend:
    """Answers the box (or an empty mask), and its complement as the other candidate; `hold` is waited for in decode;
    `fail` is raised."""

    name = "fake"

    def __init__(self, hold=None, fail: Exception | None = None):
        self.hold, self.fail, self.encoded, self.decoded = hold, fail, 0, 0

    def encode(self, image):
        self.encoded += 1
        self.seen = image.shape
        return image.shape[:2], image.nbytes

    def decode(self, encoding, request, logits):
        self.decoded += 1
        if self.hold is not None:
            self.hold.wait(60)
        if self.fail is not None:
            raise self.fail
        mask = np.zeros(encoding, bool)
        if request.box is not None:
            x0, y0, x1, y1 = map(int, request.box)
            mask[y0:y1, x0:x1] = True
        return Decoded(mask, 0.5, np.packbits(mask), (mask, ~mask) if request.candidates else ())


class Slow(FakeBackend):
    """Takes half a second for each pixel that a box is wider than one, and says on stdout that it begins."""

    def decode(self, encoding, request, logits):
        print("at work", flush=True)
        time.sleep((request.box[2] - 1) / 2)
        return super().decode(encoding, request, logits)


def failure(call: Callable, *args) -> SegmenterError:
    """What the call raises."""
    with pytest.raises(SegmenterError) as caught:
        call(*args)
    return caught.value


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def waiting(cache: ByteLRU) -> int:
    """Calls that wait for what another one makes."""
    return sum(len(flight._condition._waiters) for flight in list(cache._making.values()))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def healthy(address: str, service: str = "") -> bool:
    """What the standard health service says, without a token."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
    return reply.status == health_pb2.HealthCheckResponse.SERVING
