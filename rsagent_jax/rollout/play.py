"""Plays samples for a command that keeps every trajectory: evaluate.py and rsagent_jax.collect.

What could not be played is counted by kind and named, and there is an end where the segmenter stays away.
"""

import collections
import concurrent.futures
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from tqdm import tqdm

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.config.schema import CollectConfig, EvalConfig
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.policy import Task
from rsagent_jax.runtime import preemption
from rsagent_jax.types import DataError, Status, StorageError, Trajectory

Failure = tuple[str, str]  # (kind, which is counted by; why)
UNREADABLE = "unreadable sample"
SHOWN = 3  # of each kind, on the terminal
AWAY = tuple(f"endpoint, {kind}" for kind in ("connection", "timeout", "server"))  # no answer, whatever is asked
READERS = 2  # threads that read the samples to come
AHEAD = 4  # samples that are read before a slot is free for them


def failure_of(state: EnvState) -> Failure | None:
    """Why a trajectory measures nothing: no answer of the segmenter, or no turn to be had. None for another ending."""
    if state.status is Status.POLICY_FAILED:
        return state.failure.kind, state.failure.detail
    if state.status is not Status.ENV_FAILED:
        return None
    return f"segmenter, {state.failure.kind.value}", state.failure.detail


def is_segmenters(kind: str) -> bool:
    """Whether another start can mend it: the tool's failure, not the sample's or the teacher's."""
    return kind.startswith("segmenter, ")


class Failures:
    """Of one start of a command. `give_up_after`: trajectories in a row that the segmenter, or the endpoint of a policy
    or teacher, may fail; 0 = any number."""

    def __init__(self, give_up_after: int):
        self.give_up_after, self.in_a_row = give_up_after, {"segmenter": 0, "endpoint": 0}
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)  # the first few of each kind

    def add(self, kind: str, id: str, why: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(f"{id}: {why}")

    def played(self, id: str, failure: Failure | None, masks: int) -> None:
        """To be told of every trajectory once it is kept. DataError where too many in a row failed; one without a mask
        did not need the segmenter, and says nothing of it."""
        if failure is None:
            self.in_a_row["endpoint"] = 0
            self.in_a_row["segmenter"] *= not masks
            return
        self.add(failure[0], id, failure[1])
        if not is_segmenters(failure[0]) and failure[0] not in AWAY:
            return
        who, what = ("endpoint", "bring it back") if failure[0] in AWAY else ("segmenter", "mend the side-car")
        self.in_a_row[who] += 1
        if self.in_a_row[who] == self.give_up_after:
            raise DataError(
                f"the {who} failed {self.in_a_row[who]} trajectories in a row, the last with: {failure[0]}:"
                f" {failure[1]}. What was done is kept: {what} and run the same command again"
                " (segmenter.give_up_after says how many are borne with)"
            )

    def tell(self) -> None:
        """On the terminal: every kind with its count, and the first few by name."""
        for kind, count in sorted(self.counts.items()):
            print(f"  not done {count}: {kind}")
            for example in self.examples[kind]:
                print(f"    {example}")


def unmeasured(failed: Iterable[str], total: int) -> DataError:
    """What to say when there is no result because of these kinds of failures."""
    counts = Counter(failed)
    said = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    return DataError(
        f"{counts.total()} of {total} samples are not measured ({said}), so there is no result yet. The others are"
        " kept: run the same command again"
    )


def play_samples(
    driver: Driver,
    samples: SampleIndex,
    attempts: Sequence[tuple[int, int]],
    keep: Callable[[Task, Trajectory, EnvState], Failure | None],
    keep_failure: Callable[[int, str, Failure], None],
    config: EvalConfig | CollectConfig,
    total: int,
    label: str,
    leave: bool = True,
) -> Failures:
    """A trajectory for each of `attempts`, (uid, place among the samples); those of one sample stand together.

    keep: is given each as it ends, and says why it is not done, if it is not. keep_failure: is given (uid, id, why)
    where the sample cannot be read, unless data.unreadable stops there. total: attempts that there were before the
    command was started again, for the progress bar. leave: it stays on the terminal when all is done.
    Returns what failed, which is told on the terminal however this ends. DataError where a sample cannot be read, or
    where segmenter.give_up_after trajectories in a row failed for want of the segmenter or the endpoint.
    """
    failed = Failures(config.segmenter.give_up_after)
    preemption.defer()
    # One that goes away stands under another: only a terminal can show that.
    bar = dict(total=total, initial=total - len(attempts), desc=label, unit="trajectory", mininterval=2.0)
    bar = tqdm(**bar, leave=leave, disable=False if leave else None)

    def tasks(pool: concurrent.futures.Executor) -> Iterator[Task]:
        for place, uids, reading in _read_ahead(pool, samples, attempts):
            try:
                sample = reading.result()
            except DataError as error:
                # A bucket that is away says nothing of the sample.
                if config.data.unreadable == "stop" or isinstance(error, StorageError):
                    raise
                for uid in uids:
                    keep_failure(uid, samples.ids[place], (UNREADABLE, str(error)))
                    failed.add(UNREADABLE, samples.ids[place], str(error))
                bar.update(len(uids))
                continue
            yield from (Task(sample, place, uid) for uid in uids)

    pool = concurrent.futures.ThreadPoolExecutor(READERS)
    try:
        for task, trajectory, state in driver.play(tasks(pool)):
            failure = keep(task, trajectory, state)
            bar.update()
            preemption.check()  # before a segmenter that was stopped as well counts as one that is broken
            failed.played(task.sample.id, failure, len(state.masks))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        failed.tell()
    return failed


def _read_ahead(pool, samples, attempts) -> Iterator[tuple[int, list[int], concurrent.futures.Future]]:
    """(place, its uids, the sample being read), a few samples ahead."""
    ahead: collections.deque = collections.deque()
    for place, of_sample in itertools.groupby(attempts, key=lambda attempt: attempt[1]):
        ahead.append((place, [uid for uid, _ in of_sample], pool.submit(samples.__getitem__, place)))
        if len(ahead) > AHEAD:
            yield ahead.popleft()
    yield from ahead
