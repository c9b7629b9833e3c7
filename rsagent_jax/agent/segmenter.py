"""Opens the segmenter that the config names; a side-car that cannot be had is the user's to mend, in one line."""

import contextlib
import threading
from collections.abc import Iterator

from rsagent_jax.config.rules import SECURITY, SIDE_CAR
from rsagent_jax.config.schema import SegmenterConfig
from rsagent_jax.types import DataError
from sam_bridge import spawn
from sam_bridge.backends import BackendError, Options
from sam_bridge.types import FailureKind, Segmenter, SegmenterError

PATIENCE_S = 1.0  # before somebody is told that a side-car is waited for


@contextlib.contextmanager
def open_segmenter(config: SegmenterConfig) -> Iterator[Segmenter]:
    """For as long as the block lasts. DataError when it cannot be opened."""
    with contextlib.ExitStack() as stack:
        try:
            options = Options(**{name: getattr(config, name) for name in SIDE_CAR})
            more = {name: getattr(config, name) for name in ("timeout_s", "wait_s", *SECURITY)}
            opened = spawn.spawn_segmenter(config.mode, config.backend, config.addresses, options=options, **more)
            with _told_of_waiting(config):
                segmenter = stack.enter_context(opened)
        except (SegmenterError, BackendError, ValueError, OSError) as error:
            if config.mode != "connect":
                raise DataError(f"segmenter ({config.mode}, {config.backend}): {error}") from error
            away = getattr(error, "kind", None) is FailureKind.UNAVAILABLE
            start = f"python -m sam_bridge --backend=sam2 --checkpoint=FILE.pt --address={config.addresses[0]}"
            remedy = f"; start one: {start} (docs/sidecar.md)" if away else ""
            raise DataError(f"segmenter (connect): {error}{remedy}") from error
        yield segmenter


@contextlib.contextmanager
def _told_of_waiting(config: SegmenterConfig) -> Iterator[None]:
    """Says so where side-cars that should run do not answer at once."""
    said = f"waiting up to {config.wait_s:.0f} s for the side-car at {', '.join(config.addresses)}"
    timer = threading.Timer(PATIENCE_S, lambda: print(said, flush=True))
    if config.mode == "connect":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def counters(segmenter: Segmenter) -> dict[str, float]:
    """What the bridge has counted since it was opened, for metrics: `segmenter/restarts`, `segmenter/ejections`, …

    Empty for a segmenter that counts nothing.
    """
    return {f"segmenter/{name}": value for name, value in getattr(segmenter, "counters", dict)().items()}
