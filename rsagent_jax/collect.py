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

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import pathlib
from collections import Counter

import jax
import numpy as np
from absl import flags
from pycocotools import mask as coco_mask
from tqdm import tqdm

from rsagent_jax import entry, processes, startup
from rsagent_jax.agent import environment
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.remote import Endpoint, EndpointError
from rsagent_jax.agent.tools import call_json
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.checkpoint import load_policy, policy_directory, weights_checksum
from rsagent_jax.config import CollectConfig, to_dict
from rsagent_jax.data import journal as journals
from rsagent_jax.data import trajectories
from rsagent_jax.data.index import SampleIndex
from rsagent_jax.data.journal import Journal
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.samples import Mixture, open_samples
from rsagent_jax.evals import filtering
from rsagent_jax.processes import parse_share
from rsagent_jax.resolve import resolve
from rsagent_jax.rewards import mask_iou
from rsagent_jax.rollout import failures
from rsagent_jax.rollout.driver import Driver, pixel_limits
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Policy, Task
from rsagent_jax.rollout.segmenter import open_segmenter
from rsagent_jax.types import DataError, Sample, Trajectory
from sam_bridge.types import About


def main(config: CollectConfig) -> None:
    workdir, share = entry.workdir(), parse_share(flags.FLAGS.shard, "--shard")
    startup.collect(config, workdir)
    processor = Processor.load(policy_directory(config.teacher.own.weights or config.processor))
    samples = open_samples(config.data)
    if isinstance(samples, Mixture):
        raise DataError("a mix cannot be collected from, its samples come up more than once; collect from its parts")
    order = np.random.default_rng(config.seed).permutation(len(samples))[: config.limit or None].tolist()
    own = dataclasses.replace(config.teacher.own, sampling=processor.with_ends(config.teacher.own.sampling))
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, own=own))
    engine, checksum = open_policy(config, processor, workdir) if own.weights else (None, "")
    tries = own.tries if own.weights else 1
    make_teacher = None if engine else resolve(config.teacher.function)
    # All tries of a sample are one machine's, so that they share its opening.
    places = list(enumerate(order))[share.index :: share.count]
    mine = [(n * tries + t, k) for n, k in places for t in range(tries)]
    current = fingerprints(samples, order, tries)
    with open_segmenter(config.segmenter) as segmenter:
        settings = what_decides(config, segmenter.about, pixel_limits(config.agent, processor), checksum)
        settings["planned"] = len(order) * tries
        with contextlib.closing(Journal(workdir / filtering.ATTEMPTS, share, settings, current)) as journal:
            left = begin(workdir, config, journal, mine, samples.ids, tries)
            if engine and left:
                engine.warm_up()
            collector = Collector(config, processor, samples, make_teacher, segmenter, journal, checksum)
            collector.collect(left, len(mine), engine)
    state = journals.survey(workdir / filtering.ATTEMPTS, settings, current)
    kinds = {id: failed["kind"] for id, failed in state.items() if failed}
    own_ids = [attempt_id(samples.ids[k], uid % tries, tries) for uid, k in mine]
    if lost := [kinds[id] for id in own_ids if failures.is_segmenters(kinds.get(id, ""))]:
        raise failures.unmeasured(lost, len(mine))
    lost = sum(map(failures.is_segmenters, kinds.values()))
    if missing := settings["planned"] - len(state) + lost:
        print(f"shard {share.index} of {share.count} is done; {missing} trajectories are left to the others")
        return
    if len(kinds) == len(state):
        raise DataError(f"nothing could be collected: {next(failed for failed in state.values())}")
    filtering.write(workdir, workdir, config.filter, config.records_per_file, settings=settings, current=current)


def begin(
    workdir: pathlib.Path, config: CollectConfig, journal: Journal, mine: list[tuple[int, int]], ids, tries: int
) -> list[tuple[int, int]]:
    """What is left of `mine`, (uid, place in the samples). DataError where the journal is of other samples."""
    for note in journal.notes:
        print(note)
    if journal.gone:
        raise DataError(
            f"{journal.path.parent} holds trajectories of {len(journal.gone)} samples that the data no longer has, such"
            f" as {journal.gone[:3]}; give another --workdir, or remove {journal.path.parent} to start over"
        )
    left = [(uid, k) for uid, k in mine if attempt_id(ids[k], uid % tries, tries) not in journal.done]
    if len(left) < len(mine):
        print(f"goes on: {len(mine) - len(left)} of {len(mine)} trajectories are there")
    if journal.current.keys() - journal.done:  # what an earlier start kept is not the set of these samples
        (workdir / trajectories.STAMP).unlink(missing_ok=True)
    filtering.write_rules(workdir, config.filter)
    return left


def fingerprints(samples: SampleIndex, order: list[int], tries: int) -> dict[str, str]:
    """By attempt: what its sample is made of."""
    ids = samples.ids
    of = journals.fingerprints(samples, {ids[k]: k for k in order})
    return {attempt_id(id, t, tries): fingerprint for id, fingerprint in of.items() for t in range(tries)}


def open_policy(config: CollectConfig, processor: Processor, workdir: pathlib.Path) -> tuple[Engine, str]:
    """The engine with the weights of teacher.own, and their checksum."""
    own = config.teacher.own
    entry.use_compilation_cache("", workdir / "compiled")
    model = load_policy(own.weights)
    checksum = weights_checksum(model)
    mesh = processes.local_mesh(own.sampling.tensor)
    key = jax.random.key(config.seed)
    overlay = processor.square(config.agent.history_size)
    engine = Engine(model, own.sampling, processor.terminator_id, own.dtype, key, mesh, overlay)
    return engine, checksum


def attempt_id(sample_id: str, attempt: int, tries: int) -> str:
    """Of a line in the journal and in trajectories.jsonl; the sample's own where it is tried once."""
    return sample_id if tries == 1 else f"{sample_id}#{attempt}"


def what_decides(config: CollectConfig, about: About, limits: PixelLimits, weights_sha256: str = "") -> dict:
    """What a trajectory depends on beside its sample: a collection that is taken up again must agree in it."""
    resolved = to_dict(config)
    decisive = {key: resolved[key] for key in ("seed", "limit", "processor")}
    decisive["agent"] = journals.agent_settings(config.agent)
    decisive["data"] = journals.data_settings(config.data)
    decisive["segmenter"] = dataclasses.asdict(about)  # what answers, not what a config calls it
    decisive["pixel_limits"] = dataclasses.asdict(limits)
    teacher = resolved["teacher"]
    remote = {key: teacher["remote"][key] for key in ("url", "model", "temperature", "max_tokens")}
    decisive["teacher"] = teacher | {"remote": remote}
    del decisive["teacher"]["own"]
    if config.teacher.own.weights:  # by what they are, not where; slots, chunk and patches: how many at a time
        own = teacher["own"]
        sampling = journals.sampling_settings(config.teacher.own.sampling)
        decisive["teacher"] = {"tries": own["tries"], "dtype": own["dtype"], "sampling": sampling}
        decisive["teacher"]["weights_sha256"] = weights_sha256
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return decisive | {"config_sha256": digest}


class Collector:
    """Plays trajectories side by side; what fails is counted in `failures` and tried again by the next start."""

    def __init__(
        self, config: CollectConfig, processor, samples, make_teacher, segmenter, journal: Journal, checksum: str = ""
    ):
        self.config, self.processor, self.samples, self.checksum = config, processor, samples, checksum
        self.tries = config.teacher.own.tries if config.teacher.own.weights else 1
        self.make_teacher, self.segmenter, self.journal = make_teacher, segmenter, journal
        self.limits = pixel_limits(config.agent, processor)
        self.skips = config.data.unreadable == "skip"
        self.failures = failures.Failures(config.segmenter.give_up_after)
        self.usage: dict[str, float] = {}

    def collect(self, left: list[tuple[int, int]], total: int, policy: Policy | None) -> None:
        """`left`: (uid, place in the samples); by the policy, or by the teacher. Says what failed, however it ends.

        DataError where going on is of no use.
        """
        try:
            if policy:
                self.sample(left, total, policy)
            else:
                asyncio.run(self.run(left, total))
        finally:
            self.failures.tell()
            if self.usage:
                print(f"  endpoint: {self.usage}")

    async def run(self, left: list[tuple[int, int]], total: int) -> None:
        """By the teacher."""
        todo = iter(left)
        with (
            concurrent.futures.ThreadPoolExecutor(self.config.workers) as self.pool,
            tqdm(total=total, initial=total - len(left), desc="collect", unit="trajectory", mininterval=2.0) as bar,
        ):
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.config.concurrent, len(left))):
                        group.create_task(self._work(todo, bar))
            except* DataError as errors:
                raise errors.exceptions[0] from None
            finally:
                if self.config.teacher.remote.url:
                    endpoint = Endpoint.shared(self.config.teacher.remote)
                    self.usage = vars(endpoint.usage) | {"cost": endpoint.usage.cost(endpoint.config)}

    def sample(self, left: list[tuple[int, int]], total: int, policy: Policy) -> None:
        """The same with a policy in the teacher's place: continuous batching, several tries of a sample at a time."""
        workers = self.config.segmenter.workers
        driver = Driver(policy, self.segmenter, self.processor, self.config.agent, workers=workers)
        under_way: dict[int, tuple[int, Sample]] = {}

        def tasks():
            places = itertools.groupby(left, key=lambda task: task[1])
            number = itertools.count()
            for k, tries in places:
                uids = [uid for uid, _ in tries]
                try:
                    sample = failures.readable_sample(self.samples, k)
                except DataError as error:
                    self._unreadable(uids, k, error)
                    bar.update(len(uids))
                    continue
                for uid in uids:
                    under_way[next(number)] = uid, sample
                    yield Task(sample, uid // self.tries, uid)

        with tqdm(total=total, initial=total - len(left), desc="collect", unit="trajectory", mininterval=2.0) as bar:
            for number, trajectory, state in driver.play(tasks()):
                uid, sample = under_way.pop(number)
                bar.update()
                if failure := failures.segmenter_failure(state):
                    self._keep_failure(uid, sample.id, *failure)
                elif not trajectory.sampled.any():
                    self._fail(uid, sample.id, "no room", "its prompt does not fit teacher.own.sampling's limits")
                else:
                    self.journal.add([self._row(uid, sample, state, trajectory)])
                self.failures.played(sample.id, failure)

    async def _work(self, todo, bar) -> None:
        for uid, k in todo:
            try:
                sample = await self._in_thread(failures.readable_sample, self.samples, k)
            except DataError as error:
                self._unreadable([uid], k, error)
            else:
                try:
                    state = await self._play(uid, sample)
                    if failure := failures.segmenter_failure(state):  # the tool's fault, so it is tried again
                        self._keep_failure(uid, sample.id, *failure)
                    else:
                        self.journal.add([await self._in_thread(self._row, uid, sample, state)])
                    self.failures.played(sample.id, failure)
                except EndpointError as error:
                    self._fail(uid, sample.id, f"endpoint, {error.kind}", str(error))
            bar.update()

    def _unreadable(self, uids: list[int], k: int, error: DataError) -> None:
        if not self.skips:
            raise error
        for uid in uids:
            self._fail(uid, self.samples.ids[k], failures.UNREADABLE, str(error))

    def _fail(self, uid: int, id: str, kind: str, why: str) -> None:
        self._keep_failure(uid, id, kind, why)
        self.failures.add(kind, id, why)

    def _keep_failure(self, uid: int, id: str, kind: str, why: str) -> None:
        attempt = attempt_id(id, uid % self.tries, self.tries)
        self.journal.add([{"id": attempt, "sample": id, "uid": uid, "failed": {"kind": kind, "why": why}}])

    async def _play(self, uid: int, sample: Sample) -> EnvState:
        teacher = self.make_teacher(self.config.teacher, np.random.default_rng((self.config.seed, uid)))
        state = environment.reset(sample.image, sample.query, self.config.agent, self.limits)
        while state.status is None:
            if inspect.iscoroutinefunction(teacher.act):
                text = await teacher.act(state, sample.gt_mask)
            else:
                text = await self._in_thread(teacher.act, state, sample.gt_mask)
            state = await self._in_thread(self._turn, state, text)
        return state

    def _turn(self, state: EnvState, text: str) -> EnvState:
        proposal = environment.propose(state, text)
        return environment.resolve(state, proposal, environment.run_tool(self.segmenter, state, proposal))

    async def _in_thread(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    def _row(self, uid: int, sample: Sample, state: EnvState, played: Trajectory | None = None) -> dict:
        """A line of the journal: what the filter and the report need, and the record itself."""
        mask, _ = environment.final_mask(state)
        iou = mask_iou(mask, sample)
        if played is None:
            tokens, _, sampled, _ = trajectories.context_of(state, self.processor)
        else:
            tokens, sampled = played.tokens, played.sampled
        calls = Counter(json.loads(call_json(turn.call))["name"] for turn in state.turns if turn.call is not None)
        row = {
            "id": attempt_id(sample.id, uid % self.tries, self.tries),
            "sample": sample.id,
            "uid": uid,
            "iou": iou,
            "turns": len(state.turns),
            "status": state.status.value,
            "malformed": sum(turn.error is not None for turn in state.turns),
            "repeats": sum(turn.repeated for turn in state.turns),
            "tools": dict(calls),
            "tokens": len(tokens),
            "sampled_tokens": int(sampled.sum()),
        }
        teacher = self.config.teacher
        provenance = {
            "teacher": "own policy" if teacher.own.weights else teacher.function,
            "model": teacher.own.weights or teacher.remote.model,
            "weights_sha256": self.checksum,
            "seed": self.config.seed,
            "config_sha256": self.journal.settings["config_sha256"],
        }
        header = row | {"query": sample.query, "provenance": provenance}
        record = trajectories.encode_by_reference(state, self.processor, sample.path, header, played)
        rle = coco_mask.encode(np.asfortranarray(sample.gt_mask.astype(np.uint8)))
        return row | {
            "query": sample.query,
            "ious": [mask_iou(m.mask, sample) for m in state.masks],
            "gt": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
            "record": base64.b64encode(record).decode("ascii"),
        }


if __name__ == "__main__":
    entry.define_flags()
    flags.DEFINE_string("shard", "0/1", "i/n: collect every n-th trajectory from the i-th on, counted from 0.")
    entry.run(main, CollectConfig)
