"""Grain pipelines: what a host reads next depends on the seed, the position and the host's share, and on nothing else.

The order is a shuffle of the whole source, anew in each epoch. Threads, or worker processes where threads do not keep
up, only decide who decodes an element, so their number changes nothing. A position is one integer, the number of
elements that all hosts together have taken; starting at it costs nothing, as any element can be reached directly.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
from absl import flags

from rsagent_jax.runtime.processes import Share
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.types import DataError, StorageError

NAMED = 5  # unreadable elements that are named on the terminal, of one start; all are counted


class Unreadable(str):
    """Stands for an element that could not be read, so that the ones after it keep their places: which element of the
    source, and what is wrong with it."""


class Away(Unreadable):
    """One whose storage does not answer: nothing is wrong with the element, so it is not left out."""


@dataclasses.dataclass(eq=False, repr=False)
class Pipeline:
    """`take(n)` gives this host's part of the next `n` elements of an endless, shuffled source."""

    source: Sequence[Any]  # picklable, as `transform` is, where `workers` > 0
    transform: Callable[[Any], Any] = lambda element: element  # an element of `source` -> what is taken
    _: dataclasses.KW_ONLY
    seed: int
    share: Share = dataclasses.field(default_factory=Share)
    threads: int = 4  # elements decoded at a time per process
    workers: int = 0  # processes beside this one; 0 = threads only
    ahead: int = 16  # elements decoded before they are asked for
    # What an element is called in messages, before its index in the source, and its id if the source has ids.
    what: str = "sample"
    unreadable: str = "skip"  # elements that cannot be read are counted and named; stop = the first is a DataError

    def __post_init__(self):
        if not len(self.source):
            raise DataError("a pipeline over no samples: the data set is empty")
        self.read = _Read(self.source, self.transform, self.what)
        self.order = grain.MapDataset.range(len(self.source)).seed(self.seed).shuffle().repeat()
        self.position = 0
        self.skipped = 0  # elements of this host that could not be read
        self.named = 0  # of them, on the terminal
        self._elements: Iterator[Any] | None = None

    def take(self, n: int) -> list[Any]:
        """This host's part of the next `n`: n / share.count elements, less those that cannot be read.

        Those are counted in `skipped`, and the first named on the terminal. DataError if none of the part can be read.
        """
        return [element for element in self.draw(n) if not isinstance(element, Unreadable)]

    def draw(self, n: int, *, needed: bool = True) -> list[Any]:
        """The same with an Unreadable in the place of each that cannot be read: the k-th stands at place
        share.index + k * share.count of the `n`. Without `needed` it is no error if none can be read."""
        PROGRESS.enter_part("reading")
        if self._elements is None:
            mine = self.order[self.position + self.share.index :: self.share.count].map(self.read)
            self._elements = iter(prefetched(mine, self.threads, self.workers, self.ahead))
        count = self.share.of(n, "the number of elements taken")
        taken = [next(self._elements) for _ in range(count)]
        self.position += n
        return self._counted(taken, needed)

    def index_at(self, place: int) -> int:
        """Which element of the source stands at this place of the endless order."""
        return int(self.order[place])

    def read_at(self, places: Sequence[int], *, needed: bool = True) -> list[Any]:
        """This host's part of the elements at these places, with what `draw` has for those that cannot be read.

        Read when asked for and not ahead; the position stays. Hosts may get one more or less than others.
        """
        mine = [self.index_at(place) for place in places[self.share.index :: self.share.count]]
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            return self._counted(list(pool.map(self.read, mine)), needed)

    def _counted(self, taken: list[Any], needed: bool) -> list[Any]:
        """The same; names and counts what could not be read. Errors: `draw`, and StorageError for Away."""
        problems = [element for element in taken if isinstance(element, Unreadable)]
        for problem in problems:
            if isinstance(problem, Away):
                raise StorageError(f"cannot be read now: {problem}")
            if self.unreadable == "stop":
                raise DataError(f"cannot be read: {problem}")
            if self.named < NAMED:
                self.named += 1
                rest = "; what follows is only counted" * (self.named == NAMED)
                print(f"skipped {problem}{rest}", file=sys.stderr)
        self.skipped += len(problems)
        if needed and taken and len(problems) == len(taken):
            raise DataError(f"none of the {len(taken)} samples drawn could be read; the first: {problems[0]}")
        return taken

    def state(self) -> dict[str, int]:
        """The same on every host but for `skipped`."""
        return {"position": self.position, "skipped": self.skipped}

    def restore(self, state: dict[str, int]) -> None:
        self.position, self.skipped = state["position"], state.get("skipped", 0)
        self._elements = None


def prefetched(dataset: grain.MapDataset, threads: int, workers: int, ahead: int) -> grain.IterDataset:
    """The elements in order, decoded by so many threads in this process, or in each of `workers` others where there
    are any, `ahead` of what is asked for."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    elements = dataset.to_iter_dataset(options)
    if not workers:
        return elements
    if not flags.FLAGS.is_parsed():  # Grain's workers read flags, also where a program has none
        flags.FLAGS.mark_as_parsed()
    each = max(1, ahead // workers)
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=each)
    return elements.mp_prefetch(options, worker_init_fn=_end_with_parent)


def _end_with_parent(worker: int, workers: int) -> None:
    """In a worker: it ends when the process that it reads for does, however that ended, and by no signal that comes to
    both of them."""
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _Read:
    """Place in the source -> element, or Unreadable where the user's files are to blame.

    Whatever else goes wrong in a reader is a RuntimeError that names the element: its thread does not say.
    """

    source: Sequence[Any]
    transform: Callable[[Any], Any]
    what: str

    def __call__(self, index: int) -> Any:
        index = int(index)
        try:
            element = self.transform(self.source[index])
            if element is None:  # which grain would leave out in silence, and look for the next without end
                raise TypeError("it is None")
            return element
        except Exception as error:
            ids = getattr(self.source, "ids", None)
            name = f"{self.what} {index}" + (f" ({ids[index]})" if ids else "")
            if isinstance(error, DataError):
                return (Away if isinstance(error, StorageError) else Unreadable)(f"{name}: {error}")
            raise RuntimeError(f"reading {name}: {type(error).__name__}: {error}") from error
