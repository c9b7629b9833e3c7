"""A step's rollouts once they are judged: their figures, all of them on disk, and an update from what is there.

`grpo.dump_every` writes <workdir>/dumps/step_<n>/, which SFT and replay read as any stored set; `train.py --replay=DIR`
trains one update from it, without an engine and without a segmenter.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.config.schema import GrpoConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.npz import read_arrays
from rsagent_jax.data.packing import Item, fits, pack_evenly
from rsagent_jax.data.processor import Processor
from rsagent_jax.evals.behaviour import behaviour, summarize_behaviours
from rsagent_jax.masks import encode_rle, mask_iou
from rsagent_jax.models.qwen25_vl.config import read_json
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.runtime.paths import absolute, open_path, remove_folder
from rsagent_jax.runtime.processes import Share, all_or_none, allgather_sum
from rsagent_jax.types import Batch, DataError, Reward, Sample, Status, Trajectory


@dataclasses.dataclass(frozen=True)
class Judged:
    """A trajectory of a step, and what it is to training."""

    sample: Sample
    trajectory: Trajectory
    state: EnvState  # the final one
    reward: Reward | None  # None where a broken tool ended it
    advantage: float | np.ndarray  # of the trajectory, or f32[T] of each token
    trained: bool  # whether it is in the step's batch

    @property
    def whole_advantage(self) -> float:
        """That of the whole reward: of the first sampled token, where grpo.turn_credit gives each turn its own."""
        t = self.trajectory
        sampled = np.broadcast_to(self.advantage, len(t.tokens))[t.loss_mask]
        return float(sampled[0]) if len(sampled) else 0.0


def rollout_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """What is logged of a step's trajectories beside rewards and endings; {} of none.

    behaviour/…    evals/behaviour.py has the definitions; what there is nothing to count of is left out
    best_iou_gap   mean of the best mask's IoU less the final mask's, over those that made one
    length/…       tokens of a trajectory (mean, max), sampled ones (sampled), and of a turn (turn)
    entropy/drawn  nats per token: mean of -log p over what the engine drew, an estimate of the policy's entropy
    """
    kept = [j for j in judged if j.trajectory.status.judged]
    if not kept:
        return {}
    played, found, gaps = [j.trajectory for j in kept], [], []
    for j in kept:
        t = j.trajectory
        ious, iou = [mask_iou(m.mask, j.sample) for m in t.masks], mask_iou(t.final_mask, j.sample)
        found.append(behaviour([turn.text for turn in t.turns], ious, iou, t.query))
        gaps += [max(ious) - iou] if ious else []
    out = {f"behaviour/{k}": float(v) for k, v in summarize_behaviours(found).items() if v is not None}
    drawn = np.concatenate([t.logprobs[t.loss_mask] for t in played])
    lengths, turns = [len(t.tokens) for t in played], sum(len(t.turns) for t in played)
    out |= {"length/mean": float(np.mean(lengths)), "length/max": float(max(lengths))}
    out |= {"length/sampled": len(drawn) / len(played), "length/turn": len(drawn) / max(turns, 1)}
    out |= {"best_iou_gap": float(np.mean(gaps))} if gaps else {}
    return out | ({"entropy/drawn": -float(np.mean(drawn))} if len(drawn) else {})


def replays(judged: Sequence[Judged]) -> dict[str, Any]:
    """What rollouts.jsonl needs beside the texts to show a step's first group, as JSON values; {} of none.

    image: a path; gt: COCO RLE; played: of each trajectory iou, ious (of its masks) and record (of agent/replay.py).
    """
    group = [j for j in judged if j.trajectory.group_id == judged[0].trajectory.group_id]
    if not group:
        return {}
    sample = group[0].sample
    played = [_measured(j) | {"record": state_to_json(j.state, sample.path)} for j in group]
    return {"image": sample.path, "gt": encode_rle(sample.gt_mask), "played": played}


def _measured(j: Judged) -> dict[str, Any]:
    masks = [mask_iou(m.mask, j.sample) for m in j.trajectory.masks]
    return {"iou": mask_iou(j.trajectory.final_mask, j.sample), "ious": masks}


def dump_rollouts(
    directory: pathlib.Path,
    step: int,
    judged: Sequence[Judged],
    driver: Driver,
    share: Share,
    keep: int = 0,
) -> None:
    """Writes every trajectory of a step as a stored set: those that are not trained on, too, and say so. `share`: which
    of all processes' trajectories these are. `keep`: of this dump and the older ones beside it, so many of the newest
    stay; 0 = all."""
    writer = trajectories.RecordWriter(directory)
    for j in judged:
        t = j.trajectory
        header = {
            "id": j.sample.id,
            "query": j.sample.query,
            "step": step,
            "group": t.group_id,
            "status": t.status.value,
            **_measured(j),
            "gt": encode_rle(j.sample.gt_mask),
            "reward": None if j.reward is None else {"total": float(j.reward.total), **j.reward.parts},
            "advantage": j.whole_advantage,
            "trained": j.trained,
        }
        arrays = {"logprobs": t.logprobs, "advantages": np.full(len(t.tokens), j.advantage, np.float32)}
        writer.write(trajectories.encode_by_reference(j.state, j.sample.path, header, t, arrays))
    stamp = trajectories.shown_with(driver.agent, driver.limits) | {"step": step}
    writer.close(stamp | {"processes": jax.process_count(), "share": dataclasses.astuple(share)})
    # Those of later steps are of a start before this one, and are written anew.
    older = sorted(d for d in directory.parent.glob("step_*") if d.name <= directory.name) if keep else []
    for dump in older[:-keep]:
        remove_folder(dump)


def open_dump(directory: str) -> list[Sequence[bytes]]:
    """The records of every share of a step, in order: the lead's, which `directory` names, and those that the other
    processes have beside it. DataError where one of them is missing."""
    lead, parts = absolute(open_path(directory)), {}
    records = trajectories.open_records(lead)
    count = read_json(lead / trajectories.STAMP).get("processes", 1)
    for i in range(count):
        part = lead if i == 0 else lead.parent.parent / f"process_{i}" / "dumps" / lead.name
        if not (part / trajectories.STAMP).exists():
            raise DataError(
                f"--replay={directory}: {count} processes played this step, and {part} is not there; give the lead's"
                " directory, WORKDIR/dumps/step_…, beside which the work directories of the others are"
            )
        index, _ = read_json(part / trajectories.STAMP).get("share", (0, 1))
        if index not in parts:  # processes of one tensor group play the same
            parts[index] = trajectories.open_records(part) if i else records
    return [parts[index] for index in sorted(parts)]


class ReplaySource:
    """One step of GRPO from a dump: the batches that the step was trained on, with the log-probs and advantages of
    then."""

    steps = 1
    judged: Sequence[Judged] = ()

    def __init__(self, config: GrpoConfig, directory: str, processor: Processor, share: Share):
        self.config, self.directory, self.processor, self.share = config, directory, processor, share
        parts, self.examples = all_or_none(lambda: open_dump(directory)), {}
        if len(parts) == share.count:  # as it was played, so minibatches are the same as well
            self.records = [(parts[share.index], i) for i in range(len(parts[share.index]))]
        else:
            self.records = [(part, i) for part in parts for i in range(len(part))][share.index :: share.count]

    def next(self, policy: Callable[[], nnx.State], key: jax.Array) -> tuple[list[Batch], dict[str, float]]:
        """DataError, on all processes, for a set that no `grpo.dump_every` wrote, or if nothing was trained on."""
        del policy, key
        items, headers = all_or_none(self._read)
        kept = [i for i in items if fits(i, self.config.batch, self.processor.config)]
        played, trained, fit = allgather_sum([len(headers), len(items), len(kept)])
        if not fit:
            why = "none fits a row of grpo.batch" if trained else "none was trained on: the step made no update"
            raise DataError(f"--replay={self.directory}: of its {played} trajectories {why}")
        rewards = [h["reward"]["total"] for h in headers if h["reward"] is not None]
        metrics = {"dropped": float(len(items) - len(kept))}
        ious = [h["iou"] for h in headers if Status(h["status"]).judged]
        metrics |= {"giou": float(np.mean(ious))} if ious else {}
        metrics |= {"reward": float(np.mean(rewards))} if rewards else {}
        how = self.processor.config, self.share, self.config.minibatches
        return pack_evenly(kept, self.config.batch, *how), metrics

    def _read(self) -> tuple[list[Item], list[dict[str, Any]]]:
        """What was trained on, and the headers of all that was played, of this process's share."""
        items, headers = [], []
        for part, i in self.records:
            record = part[i]
            header = trajectories.record_header(record)
            if not {"logprobs", "advantages"} <= read_arrays(record).keys():
                raise DataError(
                    f"--replay={self.directory}: record {i} has no log-probs and advantage; give a directory that"
                    " grpo.dump_every wrote, such as WORKDIR/dumps/step_000010"
                )
            headers.append(header)
            if header["trained"]:
                items.append(trajectories.decode_record(record, self.processor))
        return items, headers

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        del state
