"""SAM 2 tiny, random weights, an eighth of its resolution, for toy runs: --backend=benchmarks._bridge_quick:sam2."""

from __future__ import annotations

from sam_bridge.backends import RANDOM, Options
from sam_bridge.backends.sam2 import Sam2

RESOLUTION = 128


def sam2() -> Sam2:
    return Sam2(Options(checkpoint=RANDOM, threads=1, encode_batch=1, decode_batch=4), RESOLUTION)


def sam2_alone() -> Sam2:
    """Batching off: masks equal from process to process, bit for bit."""
    return Sam2(Options(checkpoint=RANDOM, threads=1, encode_batch=1, decode_batch=1), RESOLUTION)
