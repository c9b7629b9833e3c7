"""Dynamic batches: whatever waits when the worker is free goes through together. Nothing waits for company."""

import collections
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger(__name__)


class Lane:
    """One thread with a queue for each kind of work, served in turns, so that long work of one kind starves no other.

    `works`: kind -> (function from a list of items to the list of their results, largest batch).
    """

    def __init__(self, name: str, works: Mapping[str, tuple[Callable[[list], list], int]]):
        self.batches: collections.Counter[str] = collections.Counter()  # batches run, by kind
        self.items: collections.Counter[str] = collections.Counter()  # items in them
        self._works = works
        self._queues = {kind: collections.deque() for kind in works}
        self._ready = threading.Condition()
        self._busy = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Items waiting or being worked on."""
        with self._ready:
            return sum(map(len, self._queues.values())) + self._busy

    def call(self, kind: str, item: Any) -> Any:
        """The item's result; raises what its work raised. Blocks; thread-safe."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._ready:
            if self._closed:
                raise RuntimeError("the lane is closed")
            self._queues[kind].append((item, future))
            self._ready.notify()
        return future.result()

    def close(self) -> None:
        """What is under way is finished, what waits fails."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        for queue in self._queues.values():
            while queue:
                queue.popleft()[1].set_exception(RuntimeError("the lane is closed"))
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._ready:
                self._busy = 0
                self._ready.wait_for(lambda: self._closed or any(self._queues.values()))
                if self._closed:
                    return
                kind = next(kind for kind, queue in self._queues.items() if queue)
                queue = self._queues[kind] = self._queues.pop(kind)  # its next turn is after the others'
                batch = [queue.popleft() for _ in range(min(len(queue), self._works[kind][1]))]
                self._busy = len(batch)
            self._work(kind, batch)

    def _work(self, kind: str, batch: list) -> None:
        work = self._works[kind][0]
        try:
            results = work([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 (whatever it is, the caller gets it)
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            log.warning("a batch of %d (%s) failed (%s); each is tried alone", len(batch), kind, error)
            for one in batch:  # a bad item must not take its neighbours along, and less memory may do
                self._work(kind, [one])
            return
        self.batches[kind] += 1
        self.items[kind] += len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
