"""Opens the segmenter that the config names; a side-car that cannot be had is the user's to mend, in one line."""

import contextlib
from collections.abc import Iterator

from rsagent_jax.config.rules import SECURITY, SIDE_CAR
from rsagent_jax.config.schema import SegmenterConfig
from rsagent_jax.types import DataError
from sam_bridge import spawn
from sam_bridge.backends import BackendError, Options
from sam_bridge.types import Segmenter, SegmenterError


@contextlib.contextmanager
def open_segmenter(config: SegmenterConfig) -> Iterator[Segmenter]:
    """For as long as the block lasts. DataError when it cannot be opened."""
    with contextlib.ExitStack() as stack:
        try:
            options = Options(**{name: getattr(config, name) for name in SIDE_CAR})
            more = {name: getattr(config, name) for name in ("timeout_s", "wait_s", *SECURITY)}
            opened = spawn.spawn_segmenter(config.mode, config.backend, config.addresses, options=options, **more)
            segmenter = stack.enter_context(opened)
        except (SegmenterError, BackendError, ValueError, OSError) as error:
            raise DataError(f"segmenter ({config.mode}, {config.backend}): {error}") from error
        yield segmenter


def counters(segmenter: Segmenter) -> dict[str, float]:
    """What the bridge has counted since it was opened, for metrics: `segmenter/restarts`, `segmenter/ejections`, …

    Empty for a segmenter that counts nothing.
    """
    return {f"segmenter/{name}": value for name, value in getattr(segmenter, "counters", dict)().items()}
