"""Where batches come from: stored trajectories (SFT) or the policy's own (GRPO). The step decides what comes next."""

import dataclasses
import functools
import itertools
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
from rsagent_jax.data.pipeline import Pipeline
from rsagent_jax.data.processor import Processor
from rsagent_jax.masks import intersection_union, mask_iou
from rsagent_jax.rewards import RewardError, make_scorer
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.kept import ended_run, pack_run, take_up
from rsagent_jax.rollout.policy import Task
from rsagent_jax.runtime import preemption
from rsagent_jax.runtime.paths import write_whole
from rsagent_jax.runtime.processes import Share, all_or_none, allgather_sum, exchange
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.train.advantages import advantage_function, scale_by_batch, zero_variance
from rsagent_jax.train.carry_over import InFlight
from rsagent_jax.train.judged import Judged
from rsagent_jax.train.prompts import Prompts
from rsagent_jax.train.rollouts import Rollouts
from rsagent_jax.train.turn_credit import by_token, earned_by_turn
from rsagent_jax.types import Batch, DataError, Reward, Sample, Status, Trajectory
from sam_bridge.types import FailureKind

ALONE = Share()
REWARD_ERROR = "reward_error.json"  # in the work directory: the trajectory that a reward failed on
TOOL_FAILURES = tuple(kind.value for kind in FailureKind if not kind.callers_fault)


class BatchSource(Protocol):
    steps: int  # of the stage
    examples: dict[str, Any]  # of the last step, for people; {} where there are none
    judged: Sequence[Judged]  # every trajectory of the last step; () where none are played

    def next(self, policy: Callable[[], nnx.State], key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        """This process's rows of a step's micro-batches, and what there is to log of them.

        All of one shape, equally many on every process, in a run for each minibatch (packing.pack_evenly); none where
        nothing teaches, and then there is no update.
        policy: gives the parameters to play with, whole inside this process, when they are asked for.
        """

    def state(self) -> dict[str, Any]:
        """JSON values that `restore` continues from."""

    def restore(self, state: dict[str, Any]) -> None: ...


class SftSource:
    """Stored trajectories, shuffled anew each epoch; the position is the number of trajectories read."""

    judged: Sequence[Judged] = ()

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
        processor: Processor,
        seed: int,
        share: Share = ALONE,
        workdir: pathlib.Path | None = None,
    ):
        """`workdir`: where a trajectory that a reward fails on is left."""
        share.of(config.prompts, "grpo.prompts")  # a group never crosses a process
        self.config, self.driver, self.processor = config, driver, processor
        self.share, self.workdir, self.steps = share, workdir, config.steps
        how = dict(seed=seed, share=share, unreadable=config.data.unreadable, **dataclasses.asdict(config.read))
        self.pipeline = Pipeline(samples, **how)
        self.prompts = Prompts(self.pipeline, config.curriculum)
        self.in_flight = InFlight(driver, config.group, config.max_staleness)
        self.again: list[int] = []  # prompts that were in flight when the run was stopped
        self.kept: dict[int, bytes] = {}  # by uid, of the next step: trajectories as far as they had come then
        self.ended: dict[Task, tuple[Trajectory, EnvState]] = {}  # of the step that is being played
        self.advantage = advantage_function(config.advantage, config.ddof)
        self.score = make_scorer(config.reward)
        self.turn_score = make_scorer([group for group in config.reward if group.name in config.turn_credit])
        self.examples: dict[str, Any] = {}  # the first group of the last step, for people
        self.judged: list[Judged] = []
        self.reward_seconds = 0.0  # of the step

    def next(self, policy: Callable[[], nnx.State], key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        c, start = self.config, time.perf_counter()
        self.judged, self.ended, self.reward_seconds = [], {}, 0.0
        PROGRESS.enter_part("weights")
        self.driver.policy.load(policy(), key)
        load_seconds = time.perf_counter() - start
        played = self._play_on(start) if c.surplus else self._play(start)
        figures = played.metrics()
        waiting = figures.get("rollout/tool_wait", 0.0) * figures.get("rollout/seconds", 0.0)
        self.driver.policy.release_memory()  # weights and cache give their memory to the gradients
        self.kept = {}  # what is left is another process's, and the next step counts uids anew
        if errors := played.reward_errors:
            print(f"grpo: {len(errors)} of {len(played.rewards)} trajectories have no reward, such as: {errors[0]}")
        judged_from = time.perf_counter()
        items, metrics = self._judge(played)
        broken = Counter(state.failure.kind.value for t, state in played.outcomes if t.status is Status.ENV_FAILED)
        teaches, failures = self._all_agree(played.outcomes, broken, items)
        # Where nothing teaches on any process no batch is made on any, and no update.
        batches = pack_evenly(items, c.batch, self.processor.config, self.share, c.minibatches) if teaches else []
        tokens = sum(int(t.loss_mask.sum()) for t in played.trajectories)
        metrics |= {
            "no_update": float(not teaches),
            "unreadable": float(self.pipeline.skipped),  # samples, since the start of the stage
            **{f"env_failed/{kind}": float(n) for kind, n in failures.items()},  # of all processes
            "perf/total_num_tokens": float(sum(len(t.tokens) for t in played.trajectories)),  # of this process's share
            "rollout_seconds": played.seconds,
            "seconds/weights": load_seconds,
            "seconds/rollout": played.seconds - load_seconds - waiting,
            "seconds/tool": waiting,  # nothing to do but to wait for it
            "seconds/reward": self.reward_seconds + time.perf_counter() - judged_from,
            "tokens_per_s": tokens / played.seconds,
            **figures,
            **counters(self.driver.segmenter),
            **_fill(items, batches),
        }
        if c.refill:  # of all processes
            metrics |= {"rounds": float(len(played.figures)), "refilled": float(played.drawn - c.prompts)}
        if c.surplus:  # of this process, but staleness_max, which is of all
            metrics |= {"in_flight": float(len(self.in_flight.groups)), **played.staleness(self.driver.version)}
        if c.curriculum:
            metrics |= {"passed_over": float(self.prompts.passed_over)}  # samples, since the start of the stage
        return batches, metrics

    def _play(self, start: float) -> Rollouts:
        """`prompts` groups, with their rewards; with `refill`, others in place of those that teach nothing. `start`:
        when the step began.

        Every round is agreed upon by all processes, and all draw equally many prompts in it: as many as are missing
        over all of them, rounded up. So a step may have some groups more than `prompts`, never more than processes.
        """
        c, out, missing = self.config, Rollouts(self.config.group), self.config.prompts
        for last in (*[False] * c.refill, True):
            missing += -missing % self.share.count
            how = dict(n=missing, needed=not out.figures)  # none of a later round's need be readable
            drawn = all_or_none(lambda how=how: self.prompts.draw(**how))
            # uids count over all processes and rounds: who plays a trajectory, and when, does not change its random
            # numbers.
            first, places = len(out.samples), [(out.drawn + i, sample) for i, sample in drawn]
            tasks = [Task(s, first + g, i * c.group + k) for g, (i, s) in enumerate(places) for k in range(c.group)]
            round_ = functools.partial(self._play_round, out, [s for _, s in drawn], tasks, missing, start)
            all_or_none(round_)
            if last:
                break
            teach = out.by_group(self._trained(out) & ~np.repeat(self._flat(out), c.group)).any(axis=1)
            missing = c.prompts - allgather_sum([int(teach.sum())])[0]
            if missing <= 0:
                break
            out.replaced, start = ~teach, time.perf_counter()
        self._learn(out)
        return out

    def _play_round(self, out: Rollouts, samples: list[Sample], tasks: list[Task], drawn: int, start: float) -> None:
        outcomes = self.driver.run(tasks, take_up(self.kept, tasks, self.driver), self.ended)
        out.seconds += time.perf_counter() - start  # without the wait for other processes
        out.add(samples, outcomes, drawn, self.driver.metrics())
        self._score(out)
        preemption.check()  # before an update that may take longer than the notice

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
        teaching = sum(bool(np.any(item.advantage)) for item in items)
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

    def _play_on(self, start: float) -> Rollouts:
        """`prompts` groups that are done, of those in flight: `surplus` more, over all processes, when it begins."""
        c, out = self.config, Rollouts(self.config.group)
        missing = c.prompts + c.surplus - allgather_sum([len(self.in_flight.groups)])[0]
        again, self.again = self.again[:missing], self.again[missing:]
        drawn = all_or_none(lambda: self.prompts.draw_again(again)) if again else []
        new = [(self.prompts.places[i], sample) for i, sample in drawn]
        missing -= len(again)
        if (missing := missing + -missing % self.share.count) > 0:
            needed = not new and not self.in_flight.groups
            drawn = all_or_none(lambda: self.prompts.draw(missing, needed=needed))
            new += [(self.prompts.places[i], sample) for i, sample in drawn]
        all_or_none(lambda: self._play_in_flight(out, new, start))
        self._learn(out)
        return out

    def _play_in_flight(self, out: Rollouts, new: list[tuple[int, Sample]], start: float) -> None:
        c = self.config
        known = functools.partial(take_up, self.kept, driver=self.driver)
        groups = self.in_flight.play(new, self.share.of(c.prompts, "grpo.prompts"), known)
        for g in groups:
            self.ended |= {Task(g.sample, g.number, uid): outcome for uid, outcome in g.outcomes.items()}
        out.seconds = time.perf_counter() - start
        outcomes = [outcome for place, group in enumerate(groups) for outcome in group.in_order(place)]
        out.add([group.sample for group in groups], outcomes, c.prompts, self.driver.metrics())
        self._score(out)
        preemption.check()  # before an update that may take longer than the notice

    def _learn(self, out: Rollouts) -> None:
        if self.config.curriculum:
            self.prompts.learn(out.success())

    def _score(self, out: Rollouts) -> None:
        """Rewards of what has none yet. A broken tool's trajectory has no reward and no advantage, nor has one without
        a value of every term where grpo.on_reward_error says to drop it."""
        PROGRESS.enter_part("reward")
        start, new = time.perf_counter(), out.outcomes[len(out.rewards) :]
        groups = [[t for t, _ in new[i : i + self.config.group]] for i in range(0, len(new), self.config.group)]
        samples = [out.samples[group[0].group_id] for group in groups]
        every = self.score([[t for t in group if t.status.judged] for group in groups], samples)
        judged = zip([t for t, _ in new if t.status.judged], every, strict=True)
        whole = [(t, out.samples[t.group_id]) for t, reward in judged if isinstance(reward, Reward)]
        scored, by_turn = iter(every), iter(earned_by_turn(self.turn_score, whole) if self.config.turn_credit else ())
        for trajectory, state in new:
            reward = next(scored) if trajectory.status.judged else None
            sample, earned = out.samples[trajectory.group_id], np.zeros(0)
            if isinstance(reward, Reward) and self.config.turn_credit:
                earned = next(by_turn)
                if isinstance(earned, RewardError):
                    reward, earned = earned, np.zeros(0)
            if isinstance(reward, RewardError):
                if self.config.on_reward_error == "stop" or not out.reward_errors:  # of a step the first is kept
                    reward = self._kept(reward, state, sample)
                if self.config.on_reward_error == "stop":
                    raise reward
                out.reward_errors.append(str(reward))
                reward = None
            out.rewards.append(reward)
            out.earned.append(earned)
        self.reward_seconds += time.perf_counter() - start

    def _flat_turns(self, out: Rollouts) -> np.ndarray:
        """bool[groups, K]: nothing to teach in this turn; K as of the values."""
        values, spread = out.values(), self.config.min_spread
        return np.stack([zero_variance(values[..., t], out.valid, spread) for t in range(values.shape[-1])], axis=-1)

    def _flat(self, out: Rollouts) -> np.ndarray:
        """bool[groups]: nothing to teach, in no turn."""
        return self._flat_turns(out).all(axis=-1)

    def _trained(self, out: Rollouts) -> np.ndarray:
        """bool[trajectories]: can be trained on, if its group teaches."""
        usable = np.array([self._usable(t) for t in out.trajectories])
        return out.valid.reshape(-1) & usable & ~(out.overlong & self.config.mask_overlong)

    def _advantages(self, out: Rollouts) -> np.ndarray:
        """f32[trajectories, K] by turn; K = 1 where a trajectory is credited as a whole."""
        c, values, valid, kept = self.config, out.values(), out.valid, ~out.replaced
        advantages = np.stack([self.advantage(values[..., t], valid) for t in range(values.shape[-1])], axis=-1)
        if c.advantage_scale != "none":
            scaled = {"rewards": values, "advantages": advantages}[c.advantage_scale][kept, :, 0][valid[kept]]
            everywhere = np.concatenate(exchange(scaled.tolist()))
            advantages = scale_by_batch(advantages, everywhere, ddof=c.ddof)
        if c.turn_credit and c.drop_zero_variance:
            advantages = np.where(self._flat_turns(out)[:, None], np.float32(0), advantages)
        return advantages.reshape(-1, advantages.shape[-1])

    def _judge(self, out: Rollouts) -> tuple[list[Item], dict[str, float]]:
        """Advantages, and the trained items."""
        c, played, chosen, rewards = self.config, out.trajectories, out.samples, out.rewards
        advantages, trained, flat = self._advantages(out), self._trained(out), np.repeat(self._flat(out), c.group)
        trained &= ~np.repeat(out.replaced, c.group) & ~(flat & c.drop_zero_variance)
        by_turn = zip(played, advantages, strict=True)
        credit = [by_token(a, t.loss_mask) if c.turn_credit else float(a[0]) for t, a in by_turn]
        items = [_item(t, a) for t, a, ok in zip(played, credit, trained, strict=True) if ok]
        self.judged = [
            Judged(chosen[t.group_id], t, state, r, a, bool(ok))
            for (t, state), r, a, ok in zip(out.outcomes, rewards, credit, trained, strict=True)
        ]
        self.examples = {
            "id": chosen[0].id,
            "query": chosen[0].query,
            "trajectories": [
                {
                    "status": j.trajectory.status.value,
                    "turns": [turn.text for turn in j.trajectory.turns],
                    "advantage": j.whole_advantage,
                    "reward": None if j.reward is None else {"total": j.reward.total, **j.reward.parts},
                }
                for j in self.judged[: c.group]
            ],
        }
        ends = (*self.processor.end_ids, *c.sampling.stop_ids)
        valid, usable = out.valid.reshape(-1), np.array([self._usable(t) for t in played])
        tokens = np.concatenate([t.tokens for t in played])
        counts = {
            "dropped": float(np.mean(valid & ~usable)),
            "reward_failed": len(out.reward_errors) / len(played),  # dropped, by grpo.on_reward_error
            "overlong": float(np.mean(valid & out.overlong)),  # not trained on, by grpo.mask_overlong
            "image_tokens": float((tokens == self.processor.image_id).sum() / max(len(tokens), 1)),  # share of all
            "cut": sum(_cut(t, ends).sum() for t in played) / max(sum(len(t.turns) for t in played), 1),  # of the turns
        }
        return items, _summary(played, chosen, rewards, flat) | counts

    def _kept(self, error: RewardError, state: EnvState, sample: Sample) -> RewardError:
        """The same error, which says where the trajectory is now."""
        if self.workdir is None:
            return error
        path = self.workdir / REWARD_ERROR
        write_whole(path, state_to_json(state, sample.path) + "\n")
        kept = RewardError(f"{error}\n  The trajectory is in {path}; rsagent_jax.agent.replay.replay reads it.")
        kept.__cause__ = error
        return kept

    def _usable(self, t: Trajectory) -> bool:
        """Whether it took a turn and fits a row: its images together may need more patches than a row has."""
        return bool(t.loss_mask.any()) and fits(_item(t, 0.0), self.config.batch, self.processor.config)

    def under_way(self) -> list[bytes]:
        """Records of what has come of the step that was stopped, and of what is in flight; for `kept` of the start that
        makes this step."""
        ended = [ended_run(task, *outcome) for task, outcome in (self.ended | self.in_flight.ended()).items()]
        records = [record for run in (*ended, *self.driver.broken_off) if (record := pack_run(run))]
        return [*records, *self.kept.values()]

    def state(self) -> dict[str, Any]:
        """What is in flight is kept by its prompts, and begun anew after a restart but for what `kept` has."""
        if not self.config.surplus:
            return self.prompts.state()
        numbers = sorted({*itertools.chain(*exchange([*self.in_flight.groups, *self.again]))})
        return self.prompts.state() | {"in_flight": numbers, "version": self.driver.version}

    def restore(self, state: dict[str, Any]) -> None:
        self.prompts.restore(state)
        self.again = list(state.get("in_flight", []))
        if "version" in state:
            self.driver.version = state["version"]


def _item(t: Trajectory, advantage: float | np.ndarray) -> Item:
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
        pairs = [(t.final_mask, chosen[t.group_id]) for t in played if t.status.judged]
        out["giou"] = float(np.mean([mask_iou(mask, sample) for mask, sample in pairs]))
        sums = np.sum([intersection_union(mask, s.gt_mask, s.ignore_mask) for mask, s in pairs], axis=0)
        out["ciou"] = float(sums[0] / max(sums[1], 1))
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
