"""Where batches come from: stored trajectories (SFT) or the policy's own (GRPO). The step decides what comes next."""

import dataclasses
import functools
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.agent.segmenter import counters
from rsagent_jax.config.schema import GrpoConfig, SftConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.packing import Item, fits, pack_evenly
from rsagent_jax.data.pipeline import Pipeline, Unreadable
from rsagent_jax.data.processor import Processor
from rsagent_jax.masks import mask_iou
from rsagent_jax.rewards import RewardError, make_reward
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Task
from rsagent_jax.runtime.paths import write_whole
from rsagent_jax.runtime.processes import Share, all_or_none, allgather_sum
from rsagent_jax.train.advantages import advantage_function, zero_variance
from rsagent_jax.types import Batch, DataError, Sample, Status, Trajectory
from sam_bridge.types import FailureKind

ALONE = Share()
REWARD_ERROR = "reward_error.json"  # in the work directory: the trajectory that a reward failed on
TOOL_FAILURES = tuple(kind.value for kind in FailureKind if not kind.callers_fault)


class BatchSource(Protocol):
    steps: int  # of the stage
    examples: dict[str, Any]  # of the last step, for people; {} where there are none

    def next(self, policy: Callable[[], nnx.State], key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        """This process's rows of one optimiser step's micro-batches, and what there is to log of them.

        All of one shape, equally many on every process; none where nothing teaches, and then there is no update.
        policy: gives the parameters to play with, whole inside this process, when they are asked for.
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
        decode = functools.partial(trajectories.decode_record, processor=processor, turns=config.turns)
        how = dict(seed=seed, share=share, unreadable=config.unreadable, **dataclasses.asdict(config.read))
        self.pipeline = Pipeline(self.records, decode, what=f"{config.trajectories}, record", **how)
        self.dropped, self.examples, self.steps = 0, {}, steps_of(config, len(self.records))

    def next(self, policy: Callable[[], nnx.State], key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        del policy, key  # what is read next depends on the position only
        count = self.config.trajectories_per_step
        items = all_or_none(lambda: self.pipeline.take(count))
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
        self.config, self.driver, self.engine, self.processor = config, driver, engine, processor
        self.share, self.workdir, self.steps = share, workdir, config.steps
        how = dict(seed=seed, share=share, unreadable=config.data.unreadable, **dataclasses.asdict(config.read))
        self.pipeline = Pipeline(samples, **how)
        self.advantage = advantage_function(config.advantage, config.ddof)
        self.reward = make_reward(config.reward)
        self.examples: dict[str, Any] = {}  # the first group of the last step, for people

    def next(self, policy: Callable[[], nnx.State], key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        c, start = self.config, time.perf_counter()
        self.engine.load(policy(), key)
        mine = range(self.share.index, c.prompts, self.share.count)
        elements = all_or_none(lambda: self.pipeline.draw(c.prompts))
        drawn = [(i, s) for i, s in zip(mine, elements, strict=True) if not isinstance(s, Unreadable)]
        chosen = [s for _, s in drawn]
        # uids count over all processes: who plays a trajectory does not change its random numbers.
        tasks = [Task(s, g, i * c.group + k) for g, (i, s) in enumerate(drawn) for k in range(c.group)]
        outcomes = self.driver.run(tasks)
        rollout_seconds = time.perf_counter() - start
        rollout_metrics = self.driver.metrics()
        self.engine.release_memory()  # weights and cache give their memory to the gradients
        played, states = [t for t, _ in outcomes], [state for _, state in outcomes]
        items, metrics = all_or_none(lambda: self._judge(played, chosen, states))
        broken = Counter(state.failure.kind.value for t, state in outcomes if t.status is Status.ENV_FAILED)
        teaches, failures = self._all_agree(outcomes, broken, items)
        # Where nothing teaches on any process no batch is made on any, and no update.
        batches = pack_evenly(items, c.batch, self.processor.config, self.share) if teaches else []
        tokens = sum(int(t.loss_mask.sum()) for t in played)
        metrics |= {
            "no_update": float(not teaches),
            "unreadable": float(self.pipeline.skipped),  # samples, since the start of the stage
            **{f"env_failed/{kind}": float(n) for kind, n in failures.items()},  # of all processes
            "rollout_seconds": rollout_seconds,
            "tokens_per_s": tokens / rollout_seconds,
            **rollout_metrics,
            **counters(self.driver.segmenter),
            **_fill(items, batches),
        }
        return batches, metrics

    def _all_agree(
        self, outcomes: list[tuple[Trajectory, EnvState]], broken: Counter, items: list[Item]
    ) -> tuple[bool, dict[str, int]]:
        """Whether the step teaches anything, and the segmenter's failures by kind: on all processes together, so that
        all of them update or none does.

        DataError, on all of them, if the segmenter is broken or no trajectory can be trained on.
        """
        kinds = [broken[kind] for kind in TOOL_FAILURES]
        # Those that never called it, malformed ones above all, say nothing of the segmenter.
        called = sum(
            t.status is Status.ENV_FAILED or any(r is not None for r in state.replies) for t, state in outcomes
        )
        usable = sum(t.status.judged and self._usable(t) for t, _ in outcomes)
        teaching = sum(item.advantage != 0 for item in items)
        called, usable, teaching, *kinds = allgather_sum([called, usable, teaching, *kinds])
        failed, bound = sum(kinds), self.config.max_env_failed
        if failed and (failed > bound * called or not usable):
            named = ", ".join(f"{kind} {n}" for kind, n in zip(TOOL_FAILURES, kinds, strict=True) if n)
            raise DataError(
                f"grpo: {failed} of this step's {called} trajectories that called the segmenter ended because it failed"
                f" ({named}); grpo.max_env_failed = {bound} allows {bound:.0%}. No update was made of this step, and"
                " the last checkpoint is as it was: see the side-car's log, bring it back, and run the same command"
                " again to go on from there"
            )
        if not usable:
            raise DataError(
                "grpo: no trajectory of this step took a turn and fits a row; raise grpo.sampling.context or"
                " grpo.sampling.patches if prompts do not fit a slot, or grpo.batch.patches"
            )
        return teaching > 0, dict(zip(TOOL_FAILURES, kinds, strict=True))

    def _judge(
        self, played: list[Trajectory], chosen: list[Sample], states: list[EnvState]
    ) -> tuple[list[Item], dict[str, float]]:
        """Rewards, advantages and the trained items. A broken tool's trajectory has no reward and no advantage."""
        c = self.config
        valid = np.array([t.status.judged for t in played])
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
        ends = (*self.processor.end_ids, *c.sampling.stop_ids)
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
        write_whole(path, state_to_json(state, sample.path) + "\n")
        return RewardError(f"{error}\n  The trajectory is in {path}; rsagent_jax.agent.replay.replay reads it.")

    def _usable(self, t: Trajectory) -> bool:
        """Whether it took a turn and fits a row: its images together may need more patches than a row has."""
        return bool(t.loss_mask.any()) and fits(_item(t, 0.0), self.config.batch, self.processor.config)

    def state(self) -> dict[str, Any]:
        return self.pipeline.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.pipeline.restore(state)


def _item(t: Trajectory, advantage: float) -> Item:
    return Item(t.tokens, t.positions, t.loss_mask, t.logprobs, t.patches, t.grids, advantage)


def _cut(t: Trajectory, ends: tuple[int, ...]) -> np.ndarray:
    """bool[turns]: which were ended by their budget of tokens rather than by one of `ends`."""
    last = t.loss_mask & ~np.append(t.loss_mask[1:], False)  # something is forced between any two turns
    return ~np.isin(t.tokens[last], ends)


def _fill(items: list[Item], batches: list[Batch]) -> dict[str, float]:
    """How many trajectories, and the share of the rows' places that they take."""
    places = sum(b.tokens.size for b in batches)
    used = sum(len(i.tokens) for i in items) if batches else 0
    return {"trajectories": float(len(items) if batches else 0), "fill": used / max(places, 1)}


def _summary(played, chosen, rewards, flat) -> dict[str, float]:
    """Means over the step's trajectories: every reward part, IoU, turns, errors, endings, seconds.

    Rewards and IoU are left out where all of this process's trajectories ended with a broken tool.
    """
    out, kept = {}, [r for r in rewards if r is not None]
    if kept:
        out = {"reward": float(np.mean([r.total for r in kept]))}
        out |= {f"reward/{part}": float(np.mean([r.parts[part] for r in kept])) for part in kept[0].parts}
        out["giou"] = float(np.mean([mask_iou(t.final_mask, chosen[t.group_id]) for t in played if t.status.judged]))
    turns = [turn for t in played for turn in t.turns]
    endings = Counter(t.status for t in played)
    out |= {
        "turns": len(turns) / len(played),
        "tool_errors": sum(turn.error is not None for turn in turns) / max(len(turns), 1),
        "clipped": sum(turn.clipped for turn in turns) / len(played),
        "repeated": sum(turn.repeated for turn in turns) / len(played),
        "zero_variance": float(np.mean(flat)),
        "tool_seconds": float(np.sum([t.seconds["tool"] for t in played])),
    }
    return out | {f"endings/{status.value}": endings[status] / len(played) for status in Status}
