"""Work on host threads, one job per slot, each with a deadline; a job that hangs costs its slot and nobody else."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class _Job:
    work: Callable[[], Any]
    started: float = 0.0  # 0: waits for a thread


class Overdue(Exception):
    """A job did not end within its deadline."""


class Jobs:
    """At most `workers` jobs run at a time, in the order of `submit`. The deadline counts from a job's start.

    Threads are daemons: one that hangs for good does not keep the process alive, and its place is given away.
    """

    def __init__(self, workers: int, deadline_s: float):
        self.workers, self.deadline_s = workers, deadline_s
        self.waiting: collections.deque[int] = collections.deque()
        self.jobs: dict[int, _Job] = {}  # by slot
        self.done: queue.SimpleQueue = queue.SimpleQueue()

    def submit(self, slot: int, work: Callable[[], Any]) -> None:
        self.jobs[slot] = _Job(work)
        self.waiting.append(slot)
        self._start()

    def drop(self, slot: int) -> None:
        """Forgets the slot's job, if it has one; what it returns later is nobody's."""
        if self.jobs.pop(slot, None) is not None and slot in self.waiting:
            self.waiting.remove(slot)
        self._start()

    def take(self, *, wait: bool) -> list[tuple[int, Any, BaseException | None]]:
        """(slot, result, error) of jobs that ended; with `wait`, of at least one if any is left."""
        out = []
        while self.jobs:
            timeout = self._until_overdue() if wait and not out else 0.0
            try:
                slot, job, result, error = self.done.get(timeout=timeout) if timeout else self.done.get_nowait()
            except queue.Empty:
                late = [slot for slot, job in self.jobs.items() if job.started and self._left(job) <= 0]
                for slot in late:
                    del self.jobs[slot]
                    out.append((slot, None, Overdue(f"no answer within {self.deadline_s:g} s")))
                self._start()
                if out or not wait:
                    break
                continue
            if self.jobs.get(slot) is job:  # else it was dropped, or given up as overdue
                del self.jobs[slot]
                out.append((slot, result, error))
            self._start()
        return out

    def _left(self, job: _Job) -> float:
        return job.started + self.deadline_s - time.monotonic()

    def _until_overdue(self) -> float:
        return max(0.001, min((self._left(job) for job in self.jobs.values() if job.started), default=0.001))

    def _start(self) -> None:
        running = sum(job.started > 0 for job in self.jobs.values())
        while self.waiting and running < self.workers:
            slot = self.waiting.popleft()
            job = self.jobs[slot]
            job.started = time.monotonic()
            threading.Thread(target=self._run, args=(slot, job), daemon=True).start()
            running += 1

    def _run(self, slot: int, job: _Job) -> None:
        try:
            result, error = job.work(), None
        except BaseException as e:  # noqa: BLE001 - raised again by whoever takes it
            result, error = None, e
        self.done.put((slot, job, result, error))
