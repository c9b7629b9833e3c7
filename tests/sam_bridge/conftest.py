"""One picture with known shapes, and servers that end with the test. No __init__.py here: the folder's name would hide
the package under test."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from sam_bridge.backends import Decoded, load_backend
from sam_bridge.client import SamClient
from sam_bridge.local import LocalSegmenter
from sam_bridge.server import Server

DISC = (40, 50, 18)  # x, y, radius of the red disc in the picture


def make_picture(height: int = 96, width: int = 128) -> np.ndarray:
    """u8[h, w, 3]: a red disc and a blue square over noisy green hills."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    green = 120 + 40 * np.sin(columns / 15) + 30 * np.cos(rows / 11)
    image = np.stack([green * 0.5, green, green * 0.4], axis=-1) + rng.normal(0, 10, (height, width, 3))
    image = image.clip(0, 255).astype(np.uint8)
    cv2.rectangle(image, (85, 20), (115, 48), (40, 60, 210), -1)
    cv2.circle(image, DISC[:2], DISC[2], (220, 40, 40), -1)
    return image


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return make_picture()


@pytest.fixture(scope="session")
def disc(picture: np.ndarray) -> np.ndarray:
    """bool[h, w] of the red disc."""
    mask = np.zeros(picture.shape[:2], np.uint8)
    cv2.circle(mask, DISC[:2], DISC[2], 1, -1)
    return mask.astype(bool)


@pytest.fixture
def local() -> LocalSegmenter:
    return LocalSegmenter(load_backend("grabcut"))


@pytest.fixture
def serve():
    """serve(segmenter, **options) -> Server, stopped after the test."""
    servers: list[Server] = []

    def start(segmenter: LocalSegmenter, **options) -> Server:
        servers.append(Server(segmenter, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(0)


@pytest.fixture
def connect():
    """connect(*addresses, **options) -> SamClient, closed after the test."""
    clients: list[SamClient] = []

    def start(*addresses: str, **options) -> SamClient:
        clients.append(SamClient(addresses, **options))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


class FakeBackend:
    """Answers the box (or an empty mask); `hold` is waited for in decode; `fail` is raised."""

    name = "fake"

    def __init__(self, hold=None, fail: Exception | None = None):
        self.hold, self.fail, self.encoded, self.decoded = hold, fail, 0, 0

    def encode(self, image):
        self.encoded += 1
        return image.shape[:2], image.nbytes

    def decode(self, encoding, request, logits):
        self.decoded += 1
        if self.hold is not None:
            self.hold.wait(20)
        if self.fail is not None:
            raise self.fail
        mask = np.zeros(encoding, bool)
        if request.box is not None:
            x0, y0, x1, y1 = map(int, request.box)
            mask[y0:y1, x0:x1] = True
        return Decoded(mask, 0.5, np.packbits(mask))


@pytest.fixture
def fake():
    return FakeBackend
