"""Plays a collection's trajectories side by side, by a teacher or by a policy, into its journal."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import pathlib
import weakref
from collections import Counter

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.collecting import filter
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import CollectConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.masks import encode_rle, mask_iou
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.failures import UNREADABLE, Failure, Failures, failure_of
from rsagent_jax.rollout.play import play_samples
from rsagent_jax.rollout.policy import Policy, Task
from rsagent_jax.rollout.text_policy import TextPolicy
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


def teacher_policy(config: CollectConfig, processor: Processor, make_teacher) -> TextPolicy:
    """`make_teacher(config.teacher, rng)` gives a trajectory its teacher, whose act(state, gt_mask) writes a turn."""
    teachers = weakref.WeakKeyDictionary()  # by task

    def act(task: Task, state: EnvState) -> str:
        if task not in teachers:
            teachers[task] = make_teacher(config.teacher, np.random.default_rng((config.seed, task.uid)))
        return teachers[task].act(state, task.sample.gt_mask)

    return TextPolicy(act, processor, slots=config.concurrent, threads=config.concurrent)


class Collector:
    """Plays trajectories side by side; what fails is counted in `failures` and tried again by the next start."""

    def __init__(self, config: CollectConfig, processor, samples, segmenter, journal: Journal, checksum: str = ""):
        self.config, self.processor, self.samples, self.checksum = config, processor, samples, checksum
        self.tries = config.teacher.own.tries if config.teacher.own.weights else 1
        self.segmenter, self.journal = segmenter, journal
        self.failures: Failures | None = None

    def collect(self, left: list[tuple[int, int]], total: int, policy: Policy) -> None:
        """`left`: (uid, place in the samples). Says what failed, however it ends.

        DataError where going on is of no use.
        """
        config = self.config
        driver = Driver(policy, self.segmenter, self.processor, config.agent, workers=config.segmenter.workers)
        unreadable = self._keep_unreadable if config.data.unreadable == "skip" else None
        options = {"total": total, "label": "collect", "give_up_after": config.segmenter.give_up_after}
        self.failures = play_samples(driver, self.samples, left, self._keep, unreadable, **options)

    def _keep(self, uid: int, sample: Sample, trajectory: Trajectory, state: EnvState) -> Failure | None:
        failure = failure_of(state)
        if failure is None and not trajectory.loss_mask.any():
            failure = "no room", "its prompt does not fit teacher.own.sampling's limits"
        if failure:
            self._keep_failure(uid, sample.id, *failure)
        else:
            self.journal.add([self._row(uid, sample, state, trajectory)])
        return failure

    def _keep_unreadable(self, uid: int, place: int, why: str) -> None:
        self._keep_failure(uid, self.samples.ids[place], UNREADABLE, why)

    def _keep_failure(self, uid: int, id: str, kind: str, why: str) -> None:
        attempt = attempt_id(id, uid % self.tries, self.tries)
        self.journal.add([{"id": attempt, "sample": id, "uid": uid, "failed": {"kind": kind, "why": why}}])

    def _row(self, uid: int, sample: Sample, state: EnvState, played: Trajectory) -> dict:
        """A line of the journal: what the filter and the report need, and the record itself."""
        calls = Counter(turn.call.name for turn in state.turns if turn.call is not None)
        row = {
            "id": attempt_id(sample.id, uid % self.tries, self.tries),
            "sample": sample.id,
            "uid": uid,
            "iou": mask_iou(played.final_mask, sample),
            "turns": len(state.turns),
            "status": state.status.value,
            "malformed": sum(turn.error is not None for turn in state.turns),
            "repeats": sum(turn.repeated for turn in state.turns),
            "tools": dict(calls),
            "tokens": len(played.tokens),
            "sampled_tokens": int(played.loss_mask.sum()),
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
