"""What a side-car sets in its process for speed on a CPU, and nothing else: results are the same without it.

`bridge_ms_p50` of `python benchmarks/bridge.py --parts=overhead`, on an idle machine, is what shows whether it pays.
Counted for 7 pictures and 42 prompts of SAM 2.1 tiny with two threads: `keep_freed_memory` takes page faults from 2.5
million to 0.3 to 0.5, and system time from 4 s to 1 to 2.5. With one thread time does not change.
"""

import ctypes
import os

# mallopt's parameters in glibc. One arena for all threads, nothing mapped on its own, up to 256 MB of the heap's end
# kept when freed: otherwise a decode, not being on the main thread, maps its tensors anew every time, page by page.
_MALLOC = {"MALLOC_ARENA_MAX": (-8, 1), "MALLOC_MMAP_MAX_": (-4, 0), "MALLOC_TRIM_THRESHOLD_": (-1, 256 << 20)}


def keep_freed_memory() -> None:
    """For the whole process. What the environment says goes before it; without glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name, (parameter, value) in _MALLOC.items():
            if name not in os.environ:
                mallopt(parameter, value)


def threads_of_each(workers: int) -> int:
    """For each of `workers` that share the cores this process may use: threads beyond the cores only wait for one."""
    return max(1, len(os.sched_getaffinity(0)) // workers)
