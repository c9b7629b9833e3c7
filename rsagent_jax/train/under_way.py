"""A step that a signal stops: the state before it is saved, and what has come of its rollouts is kept beside it.

    <workdir>/checkpoints/<stage>/under_way/<i>-of-<n>/     of each process: a stored set of rollout/kept.py's records

The start that goes on from this state makes the step of them, under the same weights and with the same prompts. They
are there until the step is done; those that belong to no step that comes next are of no use and go as well.
"""

import contextlib
import pathlib
import threading
from collections.abc import Callable, Iterator

import jax
from flax import nnx

from rsagent_jax.data.trajectories import STAMP, RecordWriter, open_records
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.rollout.kept import record_about
from rsagent_jax.runtime import preemption, processes
from rsagent_jax.runtime.paths import remove_folder
from rsagent_jax.train.batch_source import BatchSource, GrpoSource
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.train.state import TrainState
from rsagent_jax.types import DataError


class UnderWay:
    """Of one stage."""

    def __init__(self, checkpoints: Checkpoints, source: BatchSource, updates: int, flush: Callable[[], None]):
        """updates: optimiser steps to a step; flush: what is logged, before a state is saved."""
        self.checkpoints, self.source, self.updates, self.flush = checkpoints, source, updates, flush
        self.directory, self.lock = checkpoints.directory / "under_way", threading.Lock()
        self.stage = checkpoints.directory.name

    def take_up(self, done: int) -> None:
        """Gives the source what was kept of the step after `done`."""
        if not isinstance(self.source, GrpoSource):
            return
        kept = self.source.kept
        for folder, step in self._sets():
            try:
                records = open_records(folder) if step == done + 1 else ()
                for record in (records[i] for i in range(len(records))):
                    uid = record_about(record)["uid"]
                    kept[uid] = max(kept.get(uid, b""), record, key=len)  # of several, the one that has come further
            except (DataError, ValueError, KeyError, TypeError, RuntimeError) as error:
                print(f"warning: {folder} is damaged, and its trajectories are played anew: {error}")
        if kept:
            said = _in_words(list(kept.values()))
            print(f"{self.stage}: goes on within step {done + 1}, of which {said} are kept")

    def forget(self, done: int) -> None:
        """What was kept of step `done`, and of any other than the one after it. The lead removes it for all."""
        of_grpo = isinstance(self.source, GrpoSource) and processes.is_lead()
        if not of_grpo or not self.directory.exists() or done + 1 in dict(self._sets()).values():
            return
        remove_folder(self.directory)

    def _sets(self) -> list[tuple[pathlib.Path, int | None]]:
        """Each with its step."""
        found = []
        for stamp in sorted(self.directory.glob(f"*/{STAMP}")):
            with contextlib.suppress(DataError):
                found.append((stamp.parent, read_json(stamp).get("step")))
        return found

    @contextlib.contextmanager
    def making(self, step: int, state: TrainState, base: nnx.State) -> Iterator[None]:
        """While the batch of `step` is made, from the `state` before it. Preempted, with what is kept in words, on all
        processes where one has a signal; DataError where a save in the background has failed."""
        preemption.meanwhile(lambda: None)
        self.forget(step - 1)
        position, updates = self.source.state(), int(state.step)
        if isinstance(self.source, GrpoSource):
            self.source.ended = {}  # of the step before
        try:
            processes.all_or_none(lambda: (preemption.check(), self.checkpoints.check()))
            yield
            preemption.meanwhile(lambda: self._keep_rollouts(step, updates))
        except preemption.Preempted as stop:
            with self.lock:
                said = self._keep(step, state, position, base)
            raise preemption.Preempted(stop.signal_name, said) from None

    def _keep_rollouts(self, step: int, updates: int) -> None:
        """While the update of `step` is made: it may take longer than the notice, and can be made again of these if the
        state before it has been saved."""
        with self.lock:
            if isinstance(self.source, GrpoSource) and self.checkpoints.newest == updates:
                self._write(step)

    def _keep(self, step: int, state: TrainState, position: dict, base: nnx.State) -> str:
        processes.all_or_none(self.checkpoints.check_there)
        said = self._write(step) if isinstance(self.source, GrpoSource) else ""
        updates, somewhere = int(state.step), any(processes.exchange(said))
        self.flush()
        if (updates or somewhere) and self.checkpoints.newest != updates:
            self.checkpoints.save(state, position, base)
        self.checkpoints.finish()
        if not updates and not somewhere:
            return f": {self.stage} had not done a step"
        rollout = f", and {said} of step {step}" if said else ""
        return f": {self.stage} after step {updates // self.updates} is saved{rollout}"

    def _write(self, step: int) -> str:
        """This process's records, in words. A disk that is full of them need not be full for the checkpoint."""
        if not (records := self.source.under_way()):
            return ""
        directory = self.directory / f"{jax.process_index():05d}-of-{jax.process_count():05d}"
        try:
            writer = RecordWriter(directory)
            for record in records:
                writer.write(record)
            writer.close({"step": step})
        except DataError as error:
            print(f"warning: the trajectories of step {step} are not kept: {error}")
            return ""
        return _in_words(records)


def _in_words(records: list[bytes]) -> str:
    about = [record_about(record) for record in records]
    whole, turns = sum(a["status"] is not None for a in about), sum(a["turns"] for a in about)
    return f"{len(about)} trajectories ({whole} of them whole, {turns} turns)"
