"""A process's part of a collection, and the set that is kept of all parts."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.collecting import filter
from rsagent_jax.collecting.collector import Collector, attempt_id, collection_resume_fingerprint, teacher_policy
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.schema import CollectConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.models.qwen25_vl.load import processor_directory, weights_checksum
from rsagent_jax.rollout.driver import pixel_limits
from rsagent_jax.rollout.endpoint import Endpoint
from rsagent_jax.rollout.open import open_engine
from rsagent_jax.rollout.play import is_segmenters, unmeasured
from rsagent_jax.rollout.policy import Policy
from rsagent_jax.rollout.startup import check_weights
from rsagent_jax.runtime import command, processes
from rsagent_jax.runtime import journal as journals
from rsagent_jax.runtime.paths import remove_file
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.types import DataError


@dataclasses.dataclass(frozen=True)
class Collected:
    """What the kept set is made of, besides what the journal holds."""

    settings: dict[str, Any]  # of the journal
    current: dict[str, str]  # fingerprint by attempt
    mine: list[str]  # this process's attempts


def collect_share(config: CollectConfig, workdir: pathlib.Path, share: processes.Share) -> Collected:
    """Plays what is left of this process's attempts."""
    own = config.teacher.own
    processor = Processor.load(processor_directory(own.weights or config.processor))
    samples = open_samples(config.data)
    if own.weights:
        check_weights(own.weights)  # after everything that costs less: it may download them
    order = np.random.default_rng(config.seed).permutation(len(samples))[: config.limit or None].tolist()
    own = dataclasses.replace(own, sampling=processor.with_ends(own.sampling))
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
                PROGRESS.enter_part("teacher")
                policy = open_teacher(config, processor, workdir)
                Collector(config, processor, samples, segmenter, journal, checksum).collect(left, len(mine), policy)
                if config.teacher.remote.url:
                    print(f"  endpoint: {Endpoint.shared(config.teacher.remote).told()}")
    PROGRESS.enter("results")
    return Collected(settings, current, [id for id, _ in mine])


def finish_collection(config: CollectConfig, workdir: pathlib.Path, share: processes.Share, made: Collected) -> None:
    """The kept set, once every attempt is made; says what is left else. DataError for what failed."""
    state = journals.survey(workdir / filter.ATTEMPTS, made.settings, made.current)
    kinds = {id: failed["kind"] for id, failed in state.items() if failed}
    mine = made.mine if jax.process_count() == 1 else list(made.current)
    if lost := [kinds[id] for id in mine if is_segmenters(kinds.get(id, ""))]:
        raise unmeasured(lost, len(mine))
    if missing := made.settings["planned"] - len(state) + sum(map(is_segmenters, kinds.values())):
        return processes.tell_left(missing, "trajectories", share, workdir)
    if len(kinds) == len(state):
        raise DataError(f"nothing could be collected: {next(failed for failed in state.values())}")
    options = dict(settings=made.settings, current=made.current)
    filter.write_kept_set(workdir, workdir, config.filter, config.records_per_file, **options)


def open_teacher(config: CollectConfig, processor: Processor, workdir: pathlib.Path) -> Policy:
    """Our own policy, ready to play, or the teacher that the config names."""
    own = config.teacher.own
    if not own.weights:
        return teacher_policy(config, processor, import_path(config.teacher.function))
    command.use_compilation_cache("", workdir / "compiled")
    engine = open_engine(own.weights, processor, own.sampling, config.agent, own.dtype, config.seed)
    engine.warm_up()
    return engine
