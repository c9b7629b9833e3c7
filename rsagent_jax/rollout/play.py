"""Plays samples through a driver for a command that keeps every trajectory: evaluate.py and rsagent_jax.collect."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.failures import UNREADABLE, Failure, Failures, readable_sample
from rsagent_jax.rollout.policy import Task
from rsagent_jax.types import DataError, Sample, Trajectory

READERS = 2  # threads that read the samples to come
AHEAD = 4  # samples that are read before a slot is free for them

# (uid, sample, trajectory, final state) -> why it is not done, None where it is
Keep = Callable[[int, Sample, Trajectory, EnvState], Failure | None]


def play_samples(
    driver: Driver,
    samples: SampleIndex,
    attempts: Sequence[tuple[int, int]],
    keep: Keep,
    keep_unreadable: Callable[[int, int, str], None] | None,
    *,
    total: int,
    label: str,
    give_up_after: int,
) -> Failures:
    """A trajectory for each of `attempts`, (uid, place among the samples); those of one sample stand together.

    keep: is given each as it ends. keep_unreadable: is given (uid, place, why) where the sample cannot be read; None
    stops there. total: attempts that there were before the command was started again, for the progress bar.
    Returns what failed, which is told on the terminal however this ends. DataError where a sample cannot be read, or
    where the segmenter failed `give_up_after` trajectories in a row.
    """
    failed = Failures(give_up_after)
    under_way: dict[int, tuple[int, Sample]] = {}  # by the driver's number of the task
    numbers = itertools.count()
    bar = tqdm(total=total, initial=total - len(attempts), desc=label, unit="trajectory", mininterval=2.0)

    def tasks(pool: concurrent.futures.Executor) -> Iterator[Task]:
        for place, uids, reading in _read_ahead(pool, samples, attempts):
            try:
                sample = reading.result()
            except DataError as error:
                if keep_unreadable is None:
                    raise
                for uid in uids:
                    keep_unreadable(uid, place, str(error))
                    failed.add(UNREADABLE, samples.ids[place], str(error))
                bar.update(len(uids))
                continue
            for uid in uids:
                under_way[next(numbers)] = uid, sample
                yield Task(sample, place, uid)

    pool = concurrent.futures.ThreadPoolExecutor(READERS)
    try:
        for number, trajectory, state in driver.play(tasks(pool)):
            uid, sample = under_way.pop(number)
            failure = keep(uid, sample, trajectory, state)
            bar.update()
            failed.played(sample.id, failure)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        failed.tell()
    return failed


def _read_ahead(pool, samples, attempts) -> Iterator[tuple[int, list[int], concurrent.futures.Future]]:
    """(place, its uids, the sample being read), a few samples ahead."""
    ahead: collections.deque = collections.deque()
    for place, of_sample in itertools.groupby(attempts, key=lambda attempt: attempt[1]):
        ahead.append((place, [uid for uid, _ in of_sample], pool.submit(readable_sample, samples, place)))
        if len(ahead) > AHEAD:
            yield ahead.popleft()
    yield from ahead
