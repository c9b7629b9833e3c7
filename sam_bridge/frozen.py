"""Arrays that nobody can write to any more, and what was worked out about them: a picture's hash, a mask's RLE.

A picture is asked about in every turn of many trajectories, and its hash would take longer than the rest of a call.
Nothing is remembered of an array that somebody could still change.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

# id of a frozen array that lives -> (itself, its layout, what is known of it by name)
_KNOWN: dict[int, tuple[weakref.ref, dict[str, Any], dict[str, Any]]] = {}


def freeze(array: np.ndarray) -> np.ndarray:
    """The array itself if it was made here, else a copy in C order whose memory is an immutable `bytes`."""
    if _facts(array) is not None:
        return array
    # numpy's own flag is no promise: its owner may set it back, and earlier views write on. Of `bytes` none can be had.
    frozen = np.ndarray(array.shape, array.dtype, buffer=array.tobytes())
    name = id(frozen)
    _KNOWN[name] = weakref.ref(frozen, lambda _: _KNOWN.pop(name, None)), frozen.__array_interface__, {}
    return frozen


def remember(array: np.ndarray, what: str, work: Callable[[np.ndarray], T]) -> T:
    """`work(array)`, done once for a frozen array and every time for another."""
    facts = _facts(array)
    if facts is None:
        return work(array)
    if what not in facts:
        facts[what] = work(array)
    return facts[what]


def _facts(array: np.ndarray) -> dict[str, Any] | None:
    """What is known of a frozen array; None for another, and for one whose shape or dtype was set to something else."""
    reference, layout, facts = _KNOWN.get(id(array), (lambda: None, None, None))
    return facts if reference() is array and array.__array_interface__ == layout else None
