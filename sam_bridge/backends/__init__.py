"""Back ends: how an image is encoded once and how a prompt on it becomes a mask. Found by name through `load`."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, Protocol

import numpy as np

from sam_bridge.types import SegmentRequest

NAMES = ("grabcut", "sam2")


class BackendError(ValueError):
    """The back end named on the command line cannot be had. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """`logits` is whatever the back end wants back when this mask is refined."""

    mask: np.ndarray  # bool[h, w]
    score: float  # 0..1
    logits: np.ndarray


class Backend(Protocol):
    """Thread-safe, stateless between calls (LocalSegmenter keeps encodings and logits). Inputs are already checked."""

    name: str

    def encode(self, image: np.ndarray) -> tuple[Any, int]:
        """u8[h, w, 3] -> (encoding, its bytes)."""
        ...

    def decode(self, encoding: Any, request: SegmentRequest, logits: np.ndarray | None) -> Decoded:
        """`logits`: of the mask that `request.refine` names, else None. Same arguments, same mask."""
        ...


def load(name: str) -> Backend:
    """A built-in name, or `module:factory` for one of your own (the factory takes no arguments)."""
    if name == "grabcut":
        from sam_bridge.backends.grabcut import GrabCut

        return GrabCut()
    if name == "sam2":
        raise BackendError("the sam2 back end comes with the full side-car and is not part of this build; use grabcut")
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BackendError(f"unknown back end {name!r}; options: {', '.join(NAMES)}, or module:factory")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise BackendError(f"back end {name!r} cannot be imported: {error}") from error
