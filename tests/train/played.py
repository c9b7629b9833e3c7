"""A source of GRPO's batches over trajectories that are there already: what its tests share."""

import dataclasses
import types

from agent_fakes import disc

from rsagent_jax.agent.environment import SegmentFailure
from rsagent_jax.config.reward import RewardGroup, RewardTerm
from rsagent_jax.config.schema import BatchConfig, GrpoConfig, SamplingConfig
from rsagent_jax.train.batch_source import GrpoSource
from rsagent_jax.types import DataError, Status, Trajectory
from sam_bridge.types import FailureKind
from tests.rollout import small

BATCH = BatchConfig(rows=2, tokens=64, patches=64)


def sample(i: int):
    return dataclasses.replace(small.sample(i, 56, 56), gt_mask=disc(56, 56, 28, 28, 20))


class Samples(list):
    """By number; those that are `broken` cannot be read."""

    def __init__(self, numbers, broken=()):
        super().__init__(map(sample, numbers))
        self.broken = broken

    @property
    def ids(self):
        return [one.id for one in self]

    def __getitem__(self, i):
        if i in self.broken:
            raise DataError(f"picture {i} is missing")
        return super().__getitem__(i)


def state_of(t: Trajectory):
    """What the driver would know of it: the segmenter answered where there is a mask, and failed where the tool did."""
    broken = t.status is Status.ENV_FAILED
    replies = (object(),) if broken or t.final_mask.any() else (None,)
    failure = SegmentFailure(FailureKind(t.seconds.get("kind", "timeout")), "") if broken else None
    return types.SimpleNamespace(replies=replies, failure=failure)


class Played:
    """A driver that has the trajectories already, and an engine that only notes what it is given."""

    def __init__(self, groups):
        self.groups, self.tasks, self.loaded, self.policy = groups, [], [], self

    def run(self, tasks, *_):
        self.tasks += tasks
        out, groups = [], list(self.groups)
        for t in tasks:
            number = int(t.sample.id[1:])
            made = groups[number][t.uid % len(groups[number])]
            out.append((dataclasses.replace(made, group_id=t.group_id), state_of(made)))
        return out

    def metrics(self):
        return {"rollout/seconds": 1.0}

    segmenter = None

    def load(self, params, key):
        self.loaded.append((params, key))

    def release_memory(self):
        self.loaded.append("released")


def nothing_new():
    """The policy's parameters, which this engine has no use for."""


def source(groups, samples=None, **config) -> GrpoSource:
    """Every step plays all groups; `groups[i]` are the trajectories of sample i."""
    samples = [sample(i) for i in range(len(groups))] if samples is None else samples
    settings = GrpoConfig(
        **{
            "prompts": len(groups),
            "group": len(groups[0]),
            "batch": BATCH,
            "sampling": SamplingConfig(context=64, max_new_tokens=20, patches=64),
            "reward": (RewardGroup("final", 1.0, (RewardTerm("rsagent_jax.rewards:final_iou"),)),),
            "advantage": "mean",
        }
        | config
    )
    return GrpoSource(settings, samples, Played(groups), small.processor(), seed=0)


def step_of(groups, **config):
    """(batches, metrics) of the first step."""
    return source(groups, **config).next(nothing_new, None)


def trained(batches) -> dict[int, list[float]]:
    """Sampled token -> the advantages of the trajectories that were made of it."""
    out = {}
    for b in batches:
        for row in range(len(b.tokens)):
            for s in range(1, b.segment_ids[row].max() + 1):
                at = (b.segment_ids[row] == s) & b.loss_mask[row]
                (token,), (advantage,) = set(b.tokens[row][at].tolist()), set(b.advantages[row][at].tolist())
                assert (b.old_logprobs[row][at] == -1.5).all()
                out.setdefault(token, []).append(round(advantage, 5))
    return {k: sorted(v) for k, v in out.items()}


def iou(radius: float) -> float:
    mask, gt = disc(56, 56, 28, 28, radius), sample(0).gt_mask
    return (mask & gt).sum() / (mask | gt).sum()
