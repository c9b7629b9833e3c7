"""A segmenter in this process: a back end with its image and logits caches. The server wraps one; tests use it bare."""

import contextlib
import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from sam_bridge.backends import Backend, DeadDevice, Decoded, as_pixels
from sam_bridge.cache import ByteLRU
from sam_bridge.frozen import freeze, remember
from sam_bridge.shrink import ask_shrunk
from sam_bridge.types import About, FailureKind, SegmenterError, SegmentReply, SegmentRequest, check_request

log = logging.getLogger(__name__)

IMAGE_CACHE_BYTES = 512 << 20
LOGITS_CACHE_BYTES = 64 << 20
Encoded = tuple[object, int, int]  # what the back end made of an image, and the image's height and width


class UnknownImage(Exception):
    """The named image was never put, or has been evicted. Never leaves the bridge: the client sends the image again."""


def image_hash(image: np.ndarray) -> str:
    """Hex sha256 of shape and pixels of u8[h, w, 3]; of a frozen picture worked out once."""
    return remember(image, "hash", _hash)


def _hash(image: np.ndarray) -> str:
    digest = hashlib.sha256(f"u8 {image.shape[0]} {image.shape[1]} 3\n".encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def logits_id(key: str, request: SegmentRequest) -> str:
    """Names a mask by how it was made, so a repeated call, even to a restarted side-car, gives the same id."""
    box = None if request.box is None else tuple(map(float, request.box))
    points = tuple(tuple(map(float, point)) for point in request.points)
    recipe = (key, box, points, tuple(map(int, request.labels)), request.refine_logits_id, request.candidates)
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _typed_failures(doing: str, on_dead: Callable[[], None]) -> Iterator[None]:
    """Whatever a back end raises becomes INTERNAL, with its traceback in the log; a dead device UNAVAILABLE."""
    try:
        yield
    except SegmenterError:
        raise
    except DeadDevice as error:
        log.critical("the device is gone, this process must be started anew: %s", error)
        on_dead()
        raise SegmenterError(FailureKind.UNAVAILABLE, f"the side-car's device is gone: {error}") from error
    except Exception as error:
        log.exception("back end failed while %s", doing)
        raise SegmenterError(FailureKind.INTERNAL, f"{type(error).__name__} while {doing}: {error}") from error


class LocalSegmenter:
    """Segmenter. Thread-safe; encodes each image once, also when several threads bring it at the same moment."""

    def __init__(self, backend: Backend, image_bytes: int = IMAGE_CACHE_BYTES, logits_bytes: int = LOGITS_CACHE_BYTES):
        self.backend = backend
        self.images = ByteLRU(image_bytes)
        self.logits = ByteLRU(logits_bytes)
        self.segments = 0  # prompts answered with a mask
        self.on_dead: Callable[[], None] = lambda: None  # told when the back end's device is gone for good
        self._lock = threading.Lock()

    def segment(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        """See types.Segmenter. A picture larger than segmenters look at is shrunk first, see shrink.py."""
        start = time.perf_counter()
        reply = ask_shrunk(image, request, self._ask)
        return dataclasses.replace(reply, timings_s={**reply.timings_s, "total": time.perf_counter() - start})

    def _ask(self, image: np.ndarray, request: SegmentRequest) -> SegmentReply:
        key = image_hash(image)
        encoded, encode_s = self.put(key, image)
        start = time.perf_counter()
        decoded, name = self.decode_known(key, request, encoded)
        mask, *candidates = (freeze(as_pixels(mask)) for mask in (decoded.mask, *decoded.candidates))
        timings = {"decode": time.perf_counter() - start, "encode": encode_s}
        return SegmentReply(mask, decoded.score, name, timings, tuple(candidates))

    def put(self, key: str, image: np.ndarray) -> tuple[Encoded, float]:
        """(encoding, seconds spent or waited for it). `key` must be image_hash(image)."""
        start = time.perf_counter()

        def make() -> tuple[Encoded, int]:
            with _typed_failures(f"encoding an image of {list(image.shape)}", self.on_dead):
                encoding, nbytes = self.backend.encode(image)
            return (encoding, *image.shape[:2]), nbytes

        return self.images.get_or_make(key, make), time.perf_counter() - start

    def decode_known(self, key: str, request: SegmentRequest, encoded: Encoded | None = None) -> tuple[Decoded, str]:
        """What the back end gives for an image that was put before, and the id of its logits. Raises UnknownImage when
        it is neither kept nor given."""
        encoded = encoded or self.images.get(key)
        if encoded is None:
            raise UnknownImage(key)
        encoding, height, width = encoded
        check_request(request, height, width)
        logits = None
        if request.refine_logits_id:
            logits = self.logits.get(f"{key}/{request.refine_logits_id}")
            if logits is None:
                detail = f"refine={request.refine_logits_id!r} names no mask of this image that is still kept"
                raise SegmenterError(FailureKind.UNKNOWN_LOGITS, detail)
        with _typed_failures(f"decoding {request}", self.on_dead):
            decoded = self.backend.decode(encoding, request, logits)
        name = logits_id(key, request)
        self.logits.put(f"{key}/{name}", decoded.logits, decoded.logits.nbytes)
        with self._lock:
            self.segments += 1
        return decoded, name

    @property
    def about(self) -> About:
        """See types.Segmenter."""
        return About(self.backend.name, getattr(self.backend, "identity", self.backend.name))

    @property
    def concurrency(self) -> int:
        """Calls that the back end wants at a time."""
        return getattr(self.backend, "concurrency", 2)

    def counters(self) -> dict[str, float]:
        """What has been done since the start, by name."""
        return {
            "encodes": self.images.made,
            "segments": self.segments,
            "evictions": self.images.evictions,
            "image_bytes": self.images.used_bytes,
            "logits_bytes": self.logits.used_bytes,
            **getattr(self.backend, "counters", dict)(),
        }

    def close(self) -> None:
        """Ends the back end's threads, if it has any."""
        getattr(self.backend, "close", lambda: None)()
