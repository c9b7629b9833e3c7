"""Pictures larger than a segmenter looks at: shrunk before they are hashed, sent and encoded, masks enlarged again.

SAM 2 stretches every picture to 1024 x 1024 and GrabCut works on 512 pixels, so a photograph of 24 megapixels loses
nothing that they would see. Client and LocalSegmenter both go through `ask_shrunk`, so their masks are the same; what
is behind it (caches, wire, server, back ends) knows the shrunk picture only.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from sam_bridge.frozen import freeze, remember
from sam_bridge.types import SegmentReply, SegmentRequest, check_image, check_pixels, check_request

LARGEST_AS_IT_IS = 4096 * 4096  # pixels: up to here a picture is not touched
SHRUNK = 2048 * 2048  # pixels of what larger ones are shrunk to, twice what SAM 2 looks at in each direction

Ask = Callable[[np.ndarray, SegmentRequest], SegmentReply]


def ask_shrunk(image: np.ndarray, request: SegmentRequest, ask: Ask) -> SegmentReply:
    """`ask` about u8[h, w, 3], or about a smaller copy of it; the reply's masks are bool[h, w] either way.

    Raises INVALID_IMAGE and INVALID_PROMPT in terms of the caller's own picture.
    """
    check_pixels(image)
    height, width = image.shape[:2]
    check_request(request, height, width)
    sent = shrink(image)
    if sent is image:
        check_image(image)
        return ask(image, request)
    reply = ask(sent, scale(request, (height, width), sent.shape[:2]))
    enlarged = [freeze(enlarge(mask, height, width)) for mask in (reply.mask, *reply.candidates)]
    return dataclasses.replace(reply, mask=enlarged[0], candidates=tuple(enlarged[1:]))


def shrink(image: np.ndarray) -> np.ndarray:
    """u8[h, w, 3] -> the same array up to LARGEST_AS_IT_IS pixels, else one of its shape with about SHRUNK pixels."""
    height, width = image.shape[:2]
    if height * width <= LARGEST_AS_IT_IS:
        return image
    return remember(image, "shrunk", _shrunk)


def _shrunk(image: np.ndarray) -> np.ndarray:
    import PIL.Image  # not above: few clients meet such a picture

    height, width = image.shape[:2]
    factor = (SHRUNK / (height * width)) ** 0.5
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # bilinear in Pillow is a tent over all the pixels that shrink into one: no aliasing
    return freeze(np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BILINEAR)))


def scale(request: SegmentRequest, original: tuple[int, int], shrunk: tuple[int, int]) -> SegmentRequest:
    """The prompt in pixels of the shrunk picture; sizes are (h, w). A place on an edge stays on that edge."""

    def scaled(places: tuple[float, ...]) -> tuple[float, ...]:  # x, y, …
        return tuple(float(v) * shrunk[1 - i % 2] / original[1 - i % 2] for i, v in enumerate(places))

    box = request.box and scaled(request.box)
    return dataclasses.replace(request, box=box, points=tuple(map(scaled, request.points)))


def enlarge(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool[h', w'] -> bool[height, width], smooth along its edge: bilinear, then more than half."""
    import PIL.Image

    levels = PIL.Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(levels.resize((width, height), PIL.Image.Resampling.BILINEAR)) > 127
