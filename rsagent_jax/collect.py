"""Collects trajectories for SFT: a teacher acts with the real tools, a filter keeps the good ones.

  python -m rsagent_jax.collect --config=configs/collect_quickstart.py --workdir=runs/x

The paper's filter: final IoU >= 0.9 within 8 turns; ours adds that the policy ended it and no turn was malformed.
"""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
from tqdm import tqdm

from rsagent_jax import entry
from rsagent_jax.agent.environment import EnvState, opening_observation, reset
from rsagent_jax.agent.replay import to_json
from rsagent_jax.checkpoint import policy_directory
from rsagent_jax.config import CollectConfig, to_dict
from rsagent_jax.data import trajectories
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.samples import open_samples
from rsagent_jax.evals.metrics import score
from rsagent_jax.resolve import resolve
from rsagent_jax.rollout.driver import Driver, pixel_limits
from rsagent_jax.rollout.policy import Task, TextPolicy
from rsagent_jax.rollout.segmenter import open_segmenter
from rsagent_jax.types import Status, Trajectory

WAVE = 64  # trajectories under way at a time


def main(config: CollectConfig) -> None:
    workdir = entry.workdir()
    processor = Processor.load(policy_directory(config.processor))
    samples = open_samples(config.data)
    order = np.random.default_rng(config.seed).permutation(len(samples))[: config.limit or None]
    make_teacher = resolve(config.teacher.function)
    teachers = {}

    def act(task: Task, state: EnvState) -> str:
        if task.uid not in teachers:
            teachers[task.uid] = make_teacher(config.teacher, np.random.default_rng((config.seed, task.uid)))
        return teachers[task.uid].act(state, task.sample.gt_mask)

    counts: Counter[str] = Counter()
    kept_stats: list[tuple[float, int]] = []
    writer = trajectories.Writer(workdir)
    with (
        open_segmenter(config.segmenter) as segmenter,
        (workdir / "trajectories.jsonl").open("w", encoding="utf-8") as lines,
        tqdm(total=len(order), desc="collect", unit="trajectory", mininterval=2.0) as bar,
    ):
        policy = TextPolicy(act, processor, slots=WAVE)
        driver = Driver(policy, segmenter, processor, config.agent, workers=config.workers)
        limits = pixel_limits(config.agent, processor)
        for i in range(0, len(order), WAVE):
            tasks = [Task(samples[int(s)], i + k, i + k) for k, s in enumerate(order[i : i + WAVE])]
            for task, (trajectory, state) in zip(tasks, driver.run(tasks), strict=True):
                result = score(trajectory, task.sample)
                verdict = judge(trajectory, result.iou, config)
                counts[verdict] += 1
                if verdict == "kept":
                    record = {"id": trajectory.sample_id, "iou": result.iou, "turns": result.turns}
                    record["status"] = trajectory.status.value
                    first = opening_observation(reset(task.sample.image, task.sample.query, config.agent, limits)).image
                    images = [first] + [t.observation.image for t in trajectory.turns if _pictured(t)]
                    header = record | {"query": task.sample.query, "replay": to_json(state)}
                    writer.write(trajectories.encode(trajectory, images, header))
                    lines.write(json.dumps(record) + "\n")
                    kept_stats.append((result.iou, result.turns))
            bar.update(len(tasks))
            teachers.clear()
    writer.close({"verdicts": dict(counts), "config": to_dict(config)})
    iou, turns = np.mean(kept_stats, axis=0) if kept_stats else (0.0, 0.0)
    print(f"kept {counts['kept']} of {len(order)} trajectories: mean IoU {iou:.3f}, {turns:.2f} turns")
    for verdict, count in sorted(counts.items()):
        if verdict != "kept":
            print(f"  dropped {count}: {verdict}")


def judge(trajectory: Trajectory, iou: float, config: CollectConfig) -> str:
    """ "kept", or why not."""
    if trajectory.status is not Status.FINISHED:
        return trajectory.status.value
    if any(turn.error is not None for turn in trajectory.turns):
        return "malformed or refused call"
    if len(trajectory.turns) > config.max_turns:
        return f"more than {config.max_turns} turns"
    if iou < config.min_iou:
        return f"final IoU below {config.min_iou}"
    return "kept"


def _pictured(turn) -> bool:
    return turn.observation is not None and turn.observation.image is not None


if __name__ == "__main__":
    entry.define_flags()
    entry.run(main, CollectConfig)
