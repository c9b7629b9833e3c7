"""Plays a collection's trajectories side by side, by a teacher or by a policy, into its journal."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import dataclasses
import hashlib
import inspect
import itertools
import json
import pathlib
from collections import Counter

import jax
import numpy as np
from tqdm import tqdm

from rsagent_jax.agent import environment
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.tools import call_json
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.collecting import filter
from rsagent_jax.collecting.endpoint import Endpoint, EndpointError
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import (
    CollectConfig,
)
from rsagent_jax.data import trajectories
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.masks import encode_rle, mask_iou
from rsagent_jax.models.qwen25_vl.load import load_policy, weights_checksum
from rsagent_jax.rollout import failures
from rsagent_jax.rollout.driver import Driver, pixel_limits
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Policy, Task
from rsagent_jax.runtime import command, processes
from rsagent_jax.runtime import journal as journals
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.types import DataError, Sample, Trajectory
from sam_bridge.types import About


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
    filter.write_rules(workdir, config.filter)
    return left


def attempt_fingerprints(samples: SampleIndex, order: list[int], tries: int) -> dict[str, str]:
    """By attempt: what its sample is made of."""
    ids = samples.ids
    of = journals.fingerprints(samples, {ids[k]: k for k in order})
    return {attempt_id(id, t, tries): fingerprint for id, fingerprint in of.items() for t in range(tries)}


def open_policy(config: CollectConfig, processor: Processor, workdir: pathlib.Path) -> tuple[Engine, str]:
    """The engine with the weights of teacher.own, and their checksum."""
    own = config.teacher.own
    command.use_compilation_cache("", workdir / "compiled")
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


def collection_resume_fingerprint(
    config: CollectConfig, about: About, limits: PixelLimits, weights_sha256: str = ""
) -> dict:
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
                elif not trajectory.loss_mask.any():
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
        return environment.apply_reply(state, proposal, environment.run_tool(self.segmenter, state, proposal))

    async def _in_thread(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    def _row(self, uid: int, sample: Sample, state: EnvState, played: Trajectory | None = None) -> dict:
        """A line of the journal: what the filter and the report need, and the record itself."""
        mask, _ = environment.final_mask(state)
        iou = mask_iou(mask, sample)
        if played is None:
            tokens, _, loss_mask, _ = trajectories.context_of(state, self.processor)
        else:
            tokens, loss_mask = played.tokens, played.loss_mask
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
            "sampled_tokens": int(loss_mask.sum()),
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
        return row | {
            "query": sample.query,
            "ious": [mask_iou(m.mask, sample) for m in state.masks],
            "gt": encode_rle(sample.gt_mask),
            "record": base64.b64encode(record).decode("ascii"),
        }
