"""Collects trajectories for SFT: a teacher acts with the real tools, a filter keeps the good ones.

  python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=runs/mine [--shard=0/4]

Every trajectory is written to <workdir>/attempts as it ends, so a stopped command goes on where it was (and plays again
what has changed since; SIGTERM ends it with status 75), and --shard=i/n lets many machines write to one work directory.
Whichever ends last filters what is there and writes the kept set (ArrayRecord for Grain, trajectories.jsonl, a report);
`rsagent_jax.refilter` does that again with other thresholds. No set is written while the segmenter failed some: the
next start plays those again. Samples that cannot be read are named and left out (data.unreadable).

The paper's filter: final IoU >= 0.9 within 8 turns; ours adds that the teacher ended it, that no turn was malformed and
none repeated the one before.

With --config.teacher.own.weights a policy of our own acts through the rollout engine, several times per sample, and
the filter keeps the first good try; the very ids that it sampled are stored.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import dataclasses
import pathlib

from rsagent_jax.collecting.collection import collect_share, finish_collection
from rsagent_jax.collecting.endpoint import Remote
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.schema import CollectConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.load import pin_step, processor_directory
from rsagent_jax.rollout.driver import pixel_limits
from rsagent_jax.rollout.endpoint import check_endpoint
from rsagent_jax.rollout.startup import check_disk, check_rollout, check_segmenter, policy_shape
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.progress import PROGRESS


def main(
    config: CollectConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    shard: str = "",  # i/n: collect every n-th trajectory from the i-th on, counted from 0
    aot: str = "",  # a TPU slice or topology to compile teacher.own's engine for instead of collecting
) -> int | None:
    own = config.teacher.own
    if aot:
        from rsagent_jax.aot import stages  # loads the TPU compiler

        return stages.compile_engine(own.sampling, own.weights, own.dtype, aot)
    processes.initialize_distributed()
    PROGRESS.enter("collection")
    workdir, share = command.make_workdir(workdir, own="attempts"), processes.own_share(shard, "--shard")
    own = dataclasses.replace(own, weights=pin_step(own.weights))
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, own=own))
    processes.all_or_none(lambda: check_collect(config, workdir))
    made = processes.all_or_none(lambda: collect_share(config, workdir, share))
    # What the others of a slice collected is there now, so one of them puts it together.
    processes.on_lead(lambda: finish_collection(config, workdir, share, made))


def check_collect(config: CollectConfig, workdir: pathlib.Path) -> None:
    """What is needed besides data, looked at before any time is spent; the cheapest first."""
    own = config.teacher.own
    if own.weights:
        print(check_rollout(config.agent, own.sampling, *policy_shape(own.weights), "teacher.own"))
    else:
        if import_path(config.teacher.function, ("config", "rng")) is Remote:
            check_endpoint(config.teacher.remote)
        pixel_limits(config.agent, Processor.load(processor_directory(config.processor)))
    check_disk(workdir)
    check_segmenter(config.segmenter)
