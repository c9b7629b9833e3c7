"""One host of several, started by tests/runtime/test_watchdog.py: steps with a meeting in each."""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib
import resource
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from rsagent_jax.runtime import processes, watchdog
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.types import DataError


def main(
    *,
    steps: int = 1000,
    outside: bool = False,  # the hosts meet in jax's store and not in a collective
    hangs: str = "",  # i/n: host i does, in step n
    fails: str = "",  # i/n: host i does, in step n
    saves: str = "",  # a directory: a checkpoint in every step
    full: str = "",  # i/n: from step n on host i has no room for one
    silent_s: float = 4.0,
    hang_s: float = 0.0,
):
    watchdog.BEAT_S, watchdog.POLL_S, watchdog.GRACE_S, watchdog.SILENT_S = 0.3, 0.1, 3.0, silent_s
    processes.initialize_distributed()
    with watchdog.WATCHDOG.limited(hang_s, 0.0):
        run(steps, outside, hangs, fails, saves, full)


def run(steps: int, outside: bool, hangs: str, fails: str, saves: str, full: str) -> None:
    at = f"{jax.process_index()}/{{}}".format
    meet = (lambda: processes.exchange("")) if outside else (lambda: multihost_utils.process_allgather(np.int32(1)))
    save = saver(pathlib.Path(saves)) if saves else lambda step: None
    for step in range(1, steps + 1):
        PROGRESS.enter("rollout", step)
        if fails == at(step):
            raise DataError("the segmenter stays away")
        while hangs == at(step):
            time.sleep(1)
        time.sleep(0.05)
        PROGRESS.enter("update", step)
        meet()
        PROGRESS.enter("checkpoint", step)
        if full == at(step):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        save(step)
        if step in (1, 5):
            print("step", step, flush=True)


def saver(directory: pathlib.Path) -> Callable[[int], None]:
    """Restores what there is and says its step; returns what saves a state of 3072 numbers, drawn by its step."""
    import optax
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from rsagent_jax.train.checkpoint import Checkpoints
    from rsagent_jax.train.state import TrainState

    rows = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))
    tx, whole = optax.sgd(0.1), NamedSharding(rows.mesh, PartitionSpec())
    numbers = lambda step: np.random.default_rng(step).random(3072, np.float32)  # noqa: E731

    def state(step: int) -> TrainState:
        put = lambda value, where: jax.make_array_from_callback(value.shape, where, lambda at: value[at])  # noqa: E731
        params = nnx.State({"head": nnx.Param(put(numbers(step), rows))})
        return TrainState(put(np.array(step, np.int32), whole), params, tx.init(params))

    checkpoints = Checkpoints(directory, pathlib.Path("nowhere"))
    if restored := checkpoints.restore(state(0)):
        found, position = restored
        for shard in found.params["head"][...].addressable_shards:
            assert (np.asarray(shard.data) == numbers(position["step"])[shard.index]).all()
        print("restored", position["step"], flush=True)

    def save(step: int) -> None:
        processes.all_or_none(checkpoints.check)
        step += position["step"] if restored else 0
        checkpoints.save(state(step), {"step": step})

    return save
