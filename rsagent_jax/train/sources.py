"""Where batches come from: stored trajectories (SFT) or the policy's own (GRPO). The step decides what comes next."""

from __future__ import annotations

import functools
import pathlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.replay import to_json
from rsagent_jax.agent.views import check_shape
from rsagent_jax.config import GrpoConfig, ReadConfig, SftConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.packing import Item, fits, pack_evenly
from rsagent_jax.data.pipeline import Pipeline, Unreadable
from rsagent_jax.data.processor import Processor
from rsagent_jax.processes import Share
from rsagent_jax.rewards import RewardError, make_reward, mask_iou
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Task
from rsagent_jax.train.advantages import ADVANTAGES, zero_variance
from rsagent_jax.types import Batch, DataError, Sample, Status, Trajectory

ALONE = Share()
REWARD_ERROR = "reward_error.json"  # in the work directory: the trajectory that a reward failed on


class BatchSource(Protocol):
    def next(self, params: nnx.State, key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        """This process's rows of one optimiser step's micro-batches, and what there is to log of them.

        All of one shape, equally many on every process, at least one.
        """

    def state(self) -> dict[str, Any]:
        """JSON values that `restore` continues from."""

    def restore(self, state: dict[str, Any]) -> None: ...


class SftSource:
    """Stored trajectories, shuffled anew each epoch; the position is the number of trajectories read."""

    def __init__(self, config: SftConfig, processor: Processor, seed: int, share: Share = ALONE):
        share.of(config.trajectories_per_step, "sft.trajectories_per_step")
        self.config, self.processor, self.share = config, processor, share
        self.records = trajectories.open_records(config.trajectories)
        decode = functools.partial(trajectories.decode, processor=processor)
        what = f"{config.trajectories}, record"
        self.pipeline = _pipeline(self.records, decode, config.read, seed, share, config.unreadable, what)
        self.dropped = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return steps_of(self.config, len(self.records))

    def next(self, params: nnx.State, key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        del params, key  # what is read next depends on the position only
        count = self.config.trajectories_per_step
        items = self.pipeline.take(count)
        kept = [i for i in items if fits(i, self.config.batch, self.processor.config)]
        self.dropped += len(items) - len(kept)
        batches = pack_evenly(kept, self.config.batch, self.processor.config, self.share)
        if not batches:
            raise DataError(
                f"sft: no trajectory of this step fits {self.config.batch}; raise sft.batch.tokens or sft.batch.patches"
            )
        counts = {"dropped": float(self.dropped), "unreadable": float(self.pipeline.skipped)}
        return batches, {"epoch": self.pipeline.position / len(self.records), **counts, **_fill(kept, batches)}

    def state(self) -> dict[str, Any]:
        return self.pipeline.state() | {"dropped": self.dropped}

    def restore(self, state: dict[str, Any]) -> None:
        self.pipeline.restore(state)
        self.dropped = state["dropped"]


def steps_of(config: SftConfig, records: int) -> int:
    """Optimiser steps of SFT on that many stored trajectories."""
    return config.steps or max(1, round(config.epochs * records / config.trajectories_per_step))


class GrpoSource:
    """Groups of trajectories by the policy being trained, with rewards and advantages."""

    def __init__(
        self,
        config: GrpoConfig,
        samples: Sequence[Sample],
        driver: Driver,
        engine: Engine,
        processor: Processor,
        seed: int,
        share: Share = ALONE,
        workdir: pathlib.Path | None = None,
    ):
        """`workdir`: where a trajectory that a reward fails on is left."""
        share.of(config.prompts, "grpo.prompts")  # a group never crosses a process
        name = {"zscore": "zscore" if config.ddof else "zscore_ddof0", "mean": "mean_only", "loo": "leave_one_out"}
        self.workdir = workdir
        self.config, self.driver, self.engine, self.processor = config, driver, engine, processor
        self.share = share
        self.pipeline = _pipeline(samples, _showable, config.read, seed, share, config.data.unreadable)
        self.advantage = ADVANTAGES[name[config.advantage]]
        self.reward = make_reward(config.reward)
        self.examples: dict[str, Any] = {}  # the first group of the last step, for people

    def next(self, params: nnx.State, key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        c, start = self.config, time.perf_counter()
        self.engine.load(params, key)
        del params  # a copy that was made for this gives its memory to the cache
        mine = range(self.share.index, c.prompts, self.share.count)
        drawn = [(i, s) for i, s in zip(mine, self.pipeline.draw(c.prompts), strict=True) if not _unreadable(s)]
        chosen = [s for _, s in drawn]
        # uids count over all processes: who plays a trajectory does not change its random numbers.
        tasks = [Task(s, g, i * c.group + k) for g, (i, s) in enumerate(drawn) for k in range(c.group)]
        outcomes = self.driver.run(tasks)
        played, states = [t for t, _ in outcomes], [state for _, state in outcomes]
        rollout_seconds = time.perf_counter() - start
        items, metrics = self._judge(played, chosen, states)
        batches = pack_evenly(items, c.batch, self.processor.config, self.share)
        tokens = sum(int(t.sampled.sum()) for t in played)
        metrics |= {
            "unreadable": float(self.pipeline.skipped),  # samples, since the start of the stage
            "rollout_seconds": rollout_seconds,
            "tokens_per_s": tokens / rollout_seconds,
            **self.driver.metrics(),
            **_fill(items, batches),
        }
        return batches, metrics

    def _judge(
        self, played: list[Trajectory], chosen: list[Sample], states: list[EnvState]
    ) -> tuple[list[Item], dict[str, float]]:
        """Rewards, advantages and the trained items. A broken tool's trajectory has no reward and no advantage."""
        c = self.config
        valid = np.array([t.status.judged for t in played])
        if not valid.any():
            raise DataError("every trajectory of this step ended with a broken segmenter; see the side-car's log")
        rewards = [None] * len(played)
        for i in np.flatnonzero(valid):
            try:
                rewards[i] = self.reward(played[i], chosen[played[i].group_id])
            except RewardError as error:
                raise self._kept(error, states[i], chosen[played[i].group_id]) from error
        totals = np.array([0.0 if r is None else r.total for r in rewards], np.float32).reshape(-1, c.group)
        valid_G = valid.reshape(-1, c.group)
        advantages = self.advantage(totals, valid_G).reshape(-1)
        flat = np.repeat(zero_variance(totals, valid_G, c.min_spread), c.group)
        trained = valid & ~(flat & c.drop_zero_variance)
        overlong = np.array([t.status is Status.MAX_CONTEXT for t in played])
        if c.mask_overlong:
            trained &= ~overlong
        usable = np.array([self._usable(t) for t in played])
        trained &= usable
        items = [_item(t, float(a)) for t, a, ok in zip(played, advantages, trained, strict=True) if ok]
        if not items:  # nothing to learn from this step: one trajectory with advantage 0 keeps every host in step
            spare = [t for t, ok in zip(played, valid & usable, strict=True) if ok]
            if not spare:
                raise DataError(
                    "grpo: no trajectory of this step took a turn and fits a row; raise grpo.sampling.context or"
                    " grpo.sampling.patches if prompts do not fit a slot, or grpo.batch.patches"
                )
            items = [_item(spare[0], 0.0)]
        self.examples = {
            "id": chosen[0].id,
            "query": chosen[0].query,
            "trajectories": [
                {
                    "status": t.status.value,
                    "turns": [turn.text for turn in t.turns],
                    "advantage": float(a),
                    "reward": None if r is None else {"total": r.total, **r.parts},
                }
                for t, a, r in zip(played[: c.group], advantages, rewards, strict=False)
            ],
        }
        ends = (self.processor.terminator_id, *c.sampling.stop_ids)
        counts = {
            "dropped": float(np.mean(valid & ~usable)),
            "overlong": float(np.mean(valid & overlong)),  # not trained on, by grpo.mask_overlong
            "cut": sum(_cut(t, ends).sum() for t in played) / max(sum(len(t.turns) for t in played), 1),  # of the turns
        }
        return items, _summary(played, chosen, rewards, flat) | counts

    def _kept(self, error: RewardError, state: EnvState, sample: Sample) -> RewardError:
        """The same error, which says where the trajectory is now."""
        if self.workdir is None:
            return error
        path = self.workdir / REWARD_ERROR
        path.write_text(to_json(state, sample.path) + "\n", encoding="utf-8")
        return RewardError(f"{error}\n  The trajectory is in {path}; rsagent_jax.agent.replay.replay reads it.")

    def _usable(self, t: Trajectory) -> bool:
        """Whether it took a turn and fits a row: its images together may need more patches than a row has."""
        return bool(t.sampled.any()) and fits(_item(t, 0.0), self.config.batch, self.processor.config)

    def state(self) -> dict[str, Any]:
        return self.pipeline.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.pipeline.restore(state)


def _pipeline(
    source: Sequence[Any], transform, read: ReadConfig, seed: int, share: Share, unreadable: str, what: str = "sample"
) -> Pipeline:
    settings = {"threads": read.threads, "workers": read.workers, "ahead": read.ahead}
    settings |= {"unreadable": unreadable, "what": what}
    return Pipeline(source, transform, seed=seed, share=share, **settings)


def _showable(sample: Sample) -> Sample:
    """DataError for a picture that no view can show: to be skipped like one that cannot be decoded."""
    check_shape(*sample.image.shape[:2])
    return sample


def _unreadable(element: Any) -> bool:
    return isinstance(element, Unreadable)


def _item(t: Trajectory, advantage: float) -> Item:
    return Item(t.tokens, t.positions, t.sampled, t.logprobs, t.patches, t.grids, advantage)


def _cut(t: Trajectory, ends: tuple[int, ...]) -> np.ndarray:
    """bool[turns]: which were ended by their budget of tokens rather than by one of `ends`."""
    last = t.sampled & ~np.append(t.sampled[1:], False)  # something is forced between any two turns
    return ~np.isin(t.tokens[last], ends)


def _fill(items: list[Item], batches: list[Batch]) -> dict[str, float]:
    """How many trajectories, and the share of the rows' places that they take."""
    places = sum(b.tokens.size for b in batches)
    return {"trajectories": float(len(items)), "fill": sum(len(i.tokens) for i in items) / places}


def _summary(played, chosen, rewards, flat) -> dict[str, float]:
    """Means over the step's trajectories: every reward part, IoU, turns, errors, endings, seconds."""
    kept = [r for r in rewards if r is not None]
    out = {"reward": float(np.mean([r.total for r in kept]))}
    out |= {f"reward/{part}": float(np.mean([r.parts[part] for r in kept])) for part in kept[0].parts}
    turns = [turn for t in played for turn in t.turns]
    endings = Counter(t.status for t in played)
    out |= {
        "giou": float(np.mean([mask_iou(t.final_mask, chosen[t.group_id]) for t in played if t.status.judged])),
        "turns": len(turns) / len(played),
        "tool_errors": sum(turn.error is not None for turn in turns) / max(len(turns), 1),
        "clipped": sum(turn.clipped for turn in turns) / len(played),
        "repeated": sum(turn.repeated for turn in turns) / len(played),
        "zero_variance": float(np.mean(flat)),
        "tool_seconds": float(np.sum([t.seconds["tool"] for t in played])),
    }
    return out | {f"endings/{status.value}": endings[status] / len(played) for status in Status}
