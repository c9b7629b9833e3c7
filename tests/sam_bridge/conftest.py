"""One picture with known shapes, and servers that end with the test; see fakes.py. No __init__.py here: the folder's
name would hide the package under test."""

import contextlib

import cv2
import numpy as np
import pytest

from sam_bridge.backends import load_backend
from sam_bridge.client import SamClient
from sam_bridge.local import LocalSegmenter
from sam_bridge.server import Server
from tests.sam_bridge.fakes import DISC, FakeBackend, make_image


@pytest.fixture(scope="session")
def image() -> np.ndarray:
    return make_image()


@pytest.fixture(scope="session")
def disc(image: np.ndarray) -> np.ndarray:
    """bool[h, w] of the red disc."""
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.circle(mask, DISC[:2], DISC[2], 1, -1)
    return mask.astype(bool)


@pytest.fixture
def local() -> LocalSegmenter:
    return LocalSegmenter(load_backend("grabcut"))


@pytest.fixture
def serve():
    """serve(segmenter, **options) -> Server, stopped after the test."""
    with contextlib.ExitStack() as stack:

        def start(segmenter: LocalSegmenter, **options) -> Server:
            server = Server(segmenter, **options)
            stack.callback(server.stop, 0)
            return server

        yield start


@pytest.fixture
def connect():
    """connect(*addresses, **options) -> SamClient, closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *addresses, **options: stack.enter_context(SamClient(addresses, **options))


@pytest.fixture
def fake():
    return FakeBackend
