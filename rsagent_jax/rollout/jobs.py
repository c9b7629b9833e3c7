"""Work on host threads, one job per slot, each with a deadline; a job that hangs costs its slot and nobody else."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from rsagent_jax.runtime import preemption


class Overdue(Exception):
    """A job did not end within its deadline."""


@dataclasses.dataclass
class _Job:
    work: Callable[[], Any]
    deadline: float | None = None  # on the monotonic clock; None: waits for a thread
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)

    def run(self) -> None:
        try:
            self.future.set_result(self.work())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever takes it
            self.future.set_exception(error)


class Jobs:
    """At most `workers` jobs run at a time, in the order of `submit`. The deadline counts from a job's start.

    Threads are daemons: one that hangs for good does not keep the process alive, and its place is given away.
    """

    def __init__(self, workers: int, deadline_s: float):
        self.workers, self.deadline_s = workers, deadline_s
        self.jobs: dict[int, _Job] = {}  # by slot, in the order of `submit`

    def submit(self, slot: int, work: Callable[[], Any]) -> None:
        self.jobs[slot] = _Job(work)
        self._start()

    def running(self, slot: int) -> Callable[[], Any] | None:
        """Work for another `submit`: to wait for what the slot's job gives. None if it has not started."""
        job = self.jobs[slot]
        return None if job.deadline is None else job.future.result

    def drop(self, *slots: int) -> None:
        """Forgets the slots' jobs, where they have one; what such a job returns later is nobody's."""
        for slot in slots:
            self.jobs.pop(slot, None)
        self._start()

    def take(self, *, wait: bool) -> list[tuple[int, Any]]:
        """(slot, result or Overdue) of jobs that ended. With `wait` one is waited for, but no longer than POLL_S: the
        caller looks at what else there is to do. Raises what a job raised."""
        ended = []
        running = [job for job in self.jobs.values() if job.deadline is not None]
        if wait and running:
            timeout = max(0.0, min(job.deadline for job in running) - time.monotonic())
            timeout = min(timeout, preemption.POLL_S)
            concurrent.futures.wait([job.future for job in running], timeout, concurrent.futures.FIRST_COMPLETED)
        for slot, job in list(self.jobs.items()):
            if job.future.done():
                ended.append((slot, self.jobs.pop(slot).future.result()))
            elif job.deadline is not None and job.deadline <= time.monotonic():
                ended.append((slot, Overdue(f"no answer within {self.deadline_s:g} s")))
                del self.jobs[slot]
        self._start()
        return ended

    def _start(self) -> None:
        waiting = [job for job in self.jobs.values() if job.deadline is None]
        for job in waiting[: self.workers - len(self.jobs) + len(waiting)]:
            job.deadline = time.monotonic() + self.deadline_s
            threading.Thread(target=job.run, daemon=True).start()
