"""Collects trajectories for SFT: a teacher acts with the real tools, a filter keeps the good ones.

  python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=runs/x [--shard=0/4]

Every trajectory is written to <workdir>/attempts as it ends, so a stopped command goes on where it was, and
--shard=i/n lets many machines write to one work directory. Whichever ends last filters what is there and writes the
kept set (ArrayRecord for Grain, trajectories.jsonl, a report); `rsagent_jax.refilter` does that again with other
thresholds. The paper's filter: final IoU >= 0.9 within 8 turns; ours adds that the teacher ended it, that no turn was
malformed and none repeated the one before.

With --config.teacher.own.weights a policy of our own acts through the rollout engine, several times per sample, and
the filter keeps the first good try; the very ids that it sampled are stored.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
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

from rsagent_jax import entry, processes
from rsagent_jax.agent import environment
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.remote import Endpoint, EndpointError
from rsagent_jax.agent.tools import call_json
from rsagent_jax.checkpoint import load_policy, policy_directory, weights_checksum
from rsagent_jax.config import CollectConfig, to_dict
from rsagent_jax.data import trajectories
from rsagent_jax.data.journal import Journal
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.samples import Mixture, open_samples
from rsagent_jax.evals import filtering
from rsagent_jax.processes import parse_share
from rsagent_jax.resolve import resolve
from rsagent_jax.rewards import mask_iou
from rsagent_jax.rollout.budget_check import check_budget
from rsagent_jax.rollout.driver import Driver, pixel_limits
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Policy, Task
from rsagent_jax.rollout.segmenter import open_segmenter
from rsagent_jax.types import DataError, Sample, Status, Trajectory

EXAMPLES = 5  # failures told on the terminal


def main(config: CollectConfig) -> None:
    workdir, share = entry.workdir(), parse_share(flags.FLAGS.shard, "--shard")
    processor = Processor.load(policy_directory(config.teacher.own.weights or config.processor))
    samples = open_samples(config.data)
    if isinstance(samples, Mixture):
        raise DataError("a mix cannot be collected from, its samples come up more than once; collect from its parts")
    order = np.random.default_rng(config.seed).permutation(len(samples))[: config.limit or None].tolist()
    own = config.teacher.own
    engine, checksum = open_policy(config, processor, workdir) if own.weights else (None, "")
    tries = own.tries if own.weights else 1
    ids, settings = samples.ids, what_decides(config, checksum)
    settings["planned"] = len(order) * tries
    make_teacher = None if engine else resolve(config.teacher.function)
    with (
        contextlib.closing(Journal(workdir / filtering.ATTEMPTS, share, settings)) as journal,
        open_segmenter(config.segmenter) as segmenter,
    ):
        # All tries of a sample are one machine's, so that they share its opening.
        places = list(enumerate(order))[share.index :: share.count]
        mine = [(n * tries + t, k, t) for n, k in places for t in range(tries)]
        left = [(uid, k) for uid, k, t in mine if attempt_id(ids[k], t, tries) not in journal.done]
        if len(left) < len(mine):
            print(f"goes on: {len(mine) - len(left)} of {len(mine)} trajectories are there")
        collector = Collector(config, processor, samples, make_teacher, segmenter, journal, checksum)
        if engine:
            collector.sample(left, len(mine), engine)
        else:
            asyncio.run(collector.run(left, len(mine)))
    for problem, count in sorted(collector.failed.items()):
        print(f"  not collected {count}: {problem}")
    if collector.usage:
        print(f"  endpoint: {collector.usage}")
    for detail in collector.examples[:EXAMPLES]:
        print(f"    {detail}")
    if collector.failed and not filtering.done(workdir):
        raise DataError(f"nothing could be collected ({dict(collector.failed)}): {collector.examples[0]}")
    missing = settings["planned"] - len(filtering.done(workdir)) - sum(collector.failed.values())
    if missing > 0:
        print(f"shard {share.index} of {share.count} is done; {missing} trajectories are left to the others")
        return
    filtering.write(workdir, workdir, config.filter, config.records_per_file, dict(collector.failed))


def open_policy(config: CollectConfig, processor: Processor, workdir: pathlib.Path) -> tuple[Engine, str]:
    """The engine with the weights of teacher.own, and their checksum."""
    own = config.teacher.own
    if own.tries < 1:
        raise DataError(f"teacher.own.tries must be at least 1, got {own.tries}")
    if own.tries > 1 and not own.sampling.temperature:
        raise DataError("teacher.own: at sampling.temperature=0 all tries are the same; raise it, or tries=1")
    print(check_budget(config.agent, processor, own.sampling, name="teacher.own"))
    entry.use_compilation_cache("", workdir / "compiled")
    model = load_policy(own.weights)
    checksum = weights_checksum(model)
    mesh = processes.local_mesh(own.sampling.tensor)
    key = jax.random.key(config.seed)
    overlay = processor.square(config.agent.history_size)
    engine = Engine(model, own.sampling, processor.terminator_id, own.dtype, key, mesh, overlay)
    engine.warm_up()
    return engine, checksum


def attempt_id(sample_id: str, attempt: int, tries: int) -> str:
    """Of a line in the journal and in trajectories.jsonl; the sample's own where it is tried once."""
    return sample_id if tries == 1 else f"{sample_id}#{attempt}"


def what_decides(config: CollectConfig, weights_sha256: str = "") -> dict:
    """What a trajectory depends on: a collection that is taken up again must agree in it."""
    resolved = to_dict(config)
    decisive = {key: resolved[key] for key in ("seed", "limit", "processor", "agent", "data")}
    decisive["backend"] = config.segmenter.backend
    teacher = resolved["teacher"]
    remote = {key: teacher["remote"][key] for key in ("url", "model", "temperature", "max_tokens")}
    decisive["teacher"] = teacher | {"remote": remote}
    del decisive["teacher"]["own"]
    if config.teacher.own.weights:  # by what they are, not where; slots, chunk and patches: how many at a time
        own = teacher["own"]
        sampling = {key: value for key, value in own["sampling"].items() if key not in ("slots", "chunk", "patches")}
        decisive["teacher"] = {"tries": own["tries"], "dtype": own["dtype"], "sampling": sampling}
        decisive["teacher"]["weights_sha256"] = weights_sha256
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return decisive | {"config_sha256": digest}


class Collector:
    """Plays trajectories side by side; what fails is counted in `failed` and tried again by the next start."""

    def __init__(
        self, config: CollectConfig, processor, samples, make_teacher, segmenter, journal: Journal, checksum: str = ""
    ):
        self.config, self.processor, self.samples, self.checksum = config, processor, samples, checksum
        self.tries = config.teacher.own.tries if config.teacher.own.weights else 1
        self.make_teacher, self.segmenter, self.journal = make_teacher, segmenter, journal
        self.limits = pixel_limits(config.agent, processor)
        self.failed: Counter[str] = Counter()
        self.examples: list[str] = []  # of failures, for people
        self.usage: dict[str, float] = {}

    async def run(self, left: list[tuple[int, int]], total: int) -> None:
        """`left`: (uid, place in the samples). DataError where going on is of no use."""
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
                    sample = self.samples[k]
                except DataError as error:
                    for _ in uids:
                        self._fail("unreadable sample", str(error))
                    bar.update(len(uids))
                    continue
                for uid in uids:
                    under_way[next(number)] = uid, sample
                    yield Task(sample, uid // self.tries, uid)

        with tqdm(total=total, initial=total - len(left), desc="collect", unit="trajectory", mininterval=2.0) as bar:
            for number, trajectory, state in driver.play(tasks()):
                uid, sample = under_way.pop(number)
                if state.status is Status.ENV_FAILED:
                    detail = state.failure.detail if state.failure else "a tool call went past its deadline"
                    kind = state.failure.kind.value if state.failure else "timeout"
                    self._fail(f"segmenter, {kind}", f"{sample.id}: {detail}")
                elif not trajectory.sampled.any():
                    self._fail(
                        "no room", f"{sample.id}: its prompt does not fit teacher.own.sampling.context or .patches"
                    )
                else:
                    self.journal.add([self._row(uid, sample, state, trajectory)])
                bar.update()

    async def _work(self, todo, bar) -> None:
        for uid, k in todo:
            try:
                sample = await self._in_thread(self.samples.__getitem__, k)
            except DataError as error:
                self._fail("unreadable sample", str(error))
            else:
                try:
                    state = await self._play(uid, sample)
                    if state.status is Status.ENV_FAILED:  # the tool's fault, so it is tried again
                        self._fail(f"segmenter, {state.failure.kind.value}", f"{sample.id}: {state.failure.detail}")
                    else:
                        self.journal.add([await self._in_thread(self._row, uid, sample, state)])
                except EndpointError as error:
                    self._fail(f"endpoint, {error.kind}", f"{sample.id}: {error}")
            bar.update()

    def _fail(self, kind: str, detail: str) -> None:
        self.failed[kind] += 1
        self.examples.append(detail)

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
            "config_sha256": what_decides(self.config, self.checksum)["config_sha256"],
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
