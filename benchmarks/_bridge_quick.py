"""Back ends of benchmarks/bridge.py: SAM 2 tiny, random weights, an eighth of its resolution, for toy runs
(--backend=benchmarks._bridge_quick:sam2); and one that always has the same mask ready."""

import cv2
import numpy as np

from sam_bridge.backends import RANDOM, Decoded, Options
from sam_bridge.backends.sam2 import Sam2

RESOLUTION = 128


def sam2() -> Sam2:
    return Sam2(Options(checkpoint=RANDOM, threads=1, encode_batch=1, decode_batch=4), RESOLUTION)


def object_mask(height: int = 480, width: int = 640) -> np.ndarray:
    """bool[h, w]: ragged blobs, as trained weights give; random weights give noise with runs of a few pixels."""
    noise = np.random.default_rng(0).standard_normal((height, width)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 25) > 0


class Ready:
    """A call through the bridge to this costs what the bridge costs."""

    name, identity = "ready", "ready"

    def __init__(self):
        self._mask, self._logits = object_mask(), np.zeros((1, 256, 256), np.float32)

    def encode(self, image: np.ndarray) -> tuple[None, int]:
        return None, 1

    def decode(self, encoding, request, logits) -> Decoded:
        return Decoded(self._mask, 0.5, self._logits)


def sam2_alone() -> Sam2:
    """Batching off: masks equal from process to process, bit for bit."""
    return Sam2(Options(checkpoint=RANDOM, threads=1, encode_batch=1, decode_batch=1), RESOLUTION)
