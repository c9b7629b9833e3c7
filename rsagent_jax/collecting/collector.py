"""Plays a collection's trajectories side by side, by a teacher or by a policy, into its journal."""

import base64
import dataclasses
import hashlib
import json
import weakref
from collections import Counter

import numpy as np

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.views import PixelLimits
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import CollectConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.processor import Processor
from rsagent_jax.masks import encode_rle, mask_iou
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.play import Failure, Failures, failure_of, play_samples
from rsagent_jax.rollout.policy import Policy, Task, TextPolicy
from rsagent_jax.runtime.journal import Journal, decisive_settings
from rsagent_jax.types import Sample, Trajectory
from sam_bridge.types import About


def attempt_id(sample_id: str, attempt: int, tries: int) -> str:
    """Of a line in the journal and in trajectories.jsonl; the sample's own where it is tried once."""
    return sample_id if tries == 1 else f"{sample_id}#{attempt}"


def collection_resume_fingerprint(
    config: CollectConfig, about: About, limits: PixelLimits, weights_sha256: str = ""
) -> dict:
    """What a trajectory depends on beside its sample: a collection that is taken up again must agree in it."""
    own, teacher = config.teacher.own, to_dict(config.teacher)
    teacher["remote"] = decisive_settings(config.teacher.remote)
    del teacher["own"]
    if own.weights:  # by what they are, not where
        sampling = decisive_settings(own.sampling)
        teacher = {"tries": own.tries, "dtype": own.dtype, "sampling": sampling, "weights_sha256": weights_sha256}
    decisive = {name: getattr(config, name) for name in ("seed", "limit", "processor")} | {
        "agent": decisive_settings(config.agent),
        "data": decisive_settings(config.data),
        "segmenter": dataclasses.asdict(about),  # what answers, not what a config calls it
        "pixel_limits": dataclasses.asdict(limits),
        "teacher": teacher,
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    return decisive | {"config_sha256": digest}


def useful_turns(state: EnvState, sample: Sample) -> list[bool]:
    """Of every turn: whether it is worth imitating. Not a malformed or refused call, nor a mask that is no better than
    the best one before it; turns that make no mask are."""
    best, useful = 0.0, []
    for turn in state.turns:
        found = None if turn.mask_id is None else mask_iou(state.masks[turn.mask_id - 1].mask, sample)
        useful.append(turn.error is None and (found is None or found > best))
        best = max(best, found or 0.0)
    return useful


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
        workers = self.config.segmenter.workers
        driver = Driver(policy, self.segmenter, self.processor, self.config.agent, workers=workers)
        keep = (self._keep, self._keep_failure)
        self.failures = play_samples(driver, self.samples, left, *keep, self.config, total, "collect")

    def _keep(self, task: Task, trajectory: Trajectory, state: EnvState) -> Failure | None:
        failure = failure_of(state)
        if failure is None and not trajectory.loss_mask.any():
            failure = "no room", "its prompt does not fit teacher.own.sampling's limits"
        if failure:
            self._keep_failure(task.uid, task.sample.id, failure)
        else:
            self.journal.add(self._row(task.uid, task.sample, state, trajectory))
        return failure

    def _keep_failure(self, uid: int, id: str, failure: Failure) -> None:
        attempt = attempt_id(id, uid % self.tries, self.tries)
        self.journal.add({"id": attempt, "sample": id, "uid": uid, "failed": {"kind": failure[0], "why": failure[1]}})

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
            "useful": useful_turns(state, sample),
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
        record = trajectories.encode_by_reference(state, sample.path, header, played)
        return row | {
            "query": sample.query,
            "ious": [mask_iou(m.mask, sample) for m in state.masks],
            "gt": encode_rle(sample.gt_mask),
            "record": base64.b64encode(record).decode("ascii"),
        }
