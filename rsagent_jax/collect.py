"""Collects trajectories for SFT: a teacher acts with the real tools, a filter keeps the good ones.

  python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=runs/x [--shard=0/4]

Every trajectory is written to <workdir>/attempts as it ends, so a stopped command goes on where it was (and plays again
what has changed since), and --shard=i/n lets many machines write to one work directory. Whichever ends last filters
what is there and writes the kept set (ArrayRecord for Grain, trajectories.jsonl, a report); `rsagent_jax.refilter` does
that again with other thresholds. No set is written while the segmenter failed some: the next start plays those again.
Samples that cannot be read are named and left out (data.unreadable).

The paper's filter: final IoU >= 0.9 within 8 turns; ours adds that the teacher ended it, that no turn was malformed and
none repeated the one before.

With --config.teacher.own.weights a policy of our own acts through the rollout engine, several times per sample, and
the filter keeps the first good try; the very ids that it sampled are stored.
"""

from __future__ import annotations

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import contextlib
import dataclasses
import pathlib

import numpy as np

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.collecting import filter
from rsagent_jax.collecting.collector import Collector, attempt_id, collection_resume_fingerprint, teacher_policy
from rsagent_jax.collecting.endpoint import Endpoint, Remote, check_endpoint
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.schema import CollectConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.models.qwen25_vl.load import policy_directory, weights_checksum
from rsagent_jax.rollout.driver import pixel_limits
from rsagent_jax.rollout.engine import open_engine
from rsagent_jax.rollout.play import is_segmenters, unmeasured
from rsagent_jax.rollout.policy import Policy
from rsagent_jax.rollout.startup import check_disk, check_policy, check_segmenter
from rsagent_jax.runtime import journal as journals
from rsagent_jax.runtime.paths import remove_file
from rsagent_jax.runtime.processes import parse_share
from rsagent_jax.types import DataError


def main(
    config: CollectConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    shard: str = "0/1",  # i/n: collect every n-th trajectory from the i-th on, counted from 0
) -> None:
    workdir, share = command.make_workdir(workdir), parse_share(shard, "--shard")
    check_collect(config, workdir)
    processor = Processor.load(policy_directory(config.teacher.own.weights or config.processor))
    samples = open_samples(config.data)
    order = np.random.default_rng(config.seed).permutation(len(samples))[: config.limit or None].tolist()
    own = dataclasses.replace(config.teacher.own, sampling=processor.with_ends(config.teacher.own.sampling))
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, own=own))
    tries, checksum = (own.tries, weights_checksum(own.weights)) if own.weights else (1, "")
    ids = samples.ids
    prints = journals.fingerprints(samples, {ids[k]: k for k in order})
    current = {attempt_id(id, t, tries): prints[id] for id in prints for t in range(tries)}
    # All tries of a sample are one machine's, so that they share its opening.
    places = list(enumerate(order))[share.index :: share.count]
    mine = [(attempt_id(ids[k], t, tries), (n * tries + t, k)) for n, k in places for t in range(tries)]
    with open_segmenter(config.segmenter) as segmenter:
        limits = pixel_limits(config.agent, processor)
        settings = collection_resume_fingerprint(config, segmenter.about, limits, checksum) | {"planned": len(current)}
        with contextlib.closing(journals.Journal(workdir / filter.ATTEMPTS, share, settings, current)) as journal:
            if journal.gone:
                raise DataError(
                    f"{journal.path.parent} holds trajectories of {len(journal.gone)} samples that the data no longer"
                    f" has, such as {journal.gone[:3]}; give another --workdir, or remove {journal.path.parent} to"
                    " start over"
                )
            left = journal.left(mine, "trajectories")
            if current.keys() - journal.done:  # what an earlier start kept is not the set of these samples
                remove_file(workdir / trajectories.STAMP)
            filter.write_rules(workdir, config.filter)
            if left:
                policy = open_teacher(config, processor, workdir)
                Collector(config, processor, samples, segmenter, journal, checksum).collect(left, len(mine), policy)
                if config.teacher.remote.url:
                    print(f"  endpoint: {Endpoint.shared(config.teacher.remote).told()}")
    state = journals.survey(workdir / filter.ATTEMPTS, settings, current)
    kinds = {id: failed["kind"] for id, failed in state.items() if failed}
    if lost := [kinds[id] for id, _ in mine if is_segmenters(kinds.get(id, ""))]:
        raise unmeasured(lost, len(mine))
    if missing := settings["planned"] - len(state) + sum(map(is_segmenters, kinds.values())):
        print(f"shard {share.index} of {share.count} is done; {missing} trajectories are left to the others")
        return
    if len(kinds) == len(state):
        raise DataError(f"nothing could be collected: {next(failed for failed in state.values())}")
    filter.write_kept_set(workdir, workdir, config.filter, config.records_per_file, settings=settings, current=current)


def check_collect(config: CollectConfig, workdir: pathlib.Path) -> None:
    """What is needed besides data, looked at before any time is spent; the cheapest first."""
    own = config.teacher.own
    if own.weights:
        print(check_policy(own.weights, config.agent, own.sampling, "teacher.own"))
    else:
        if import_path(config.teacher.function, ("config", "rng")) is Remote:
            check_endpoint(config.teacher.remote)
        pixel_limits(config.agent, Processor.load(policy_directory(config.processor)))
    check_disk(workdir)
    check_segmenter(config.segmenter)


def open_teacher(config: CollectConfig, processor: Processor, workdir: pathlib.Path) -> Policy:
    """Our own policy, ready to play, or the teacher that the config names."""
    own = config.teacher.own
    if not own.weights:
        return teacher_policy(config, processor, import_path(config.teacher.function))
    command.use_compilation_cache("", workdir / "compiled")
    engine = open_engine(own.weights, processor, own.sampling, config.agent, own.dtype, config.seed)
    engine.warm_up()
    return engine
