"""Evaluates a policy on a benchmark: every sample gets a trajectory, greedy unless the config says otherwise.

  python evaluate.py --config=configs/eval_X.py --workdir=DIR [--weights=HF_DIR_OR_CHECKPOINT]

Leaves results.json, predictions.jsonl, trajectories.jsonl (some, for people) and report/index.html.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time

import jax
import numpy as np
from absl import flags
from flax import nnx
from pycocotools import mask as coco_mask
from tqdm import tqdm

from rsagent_jax import entry
from rsagent_jax.agent.replay import to_json
from rsagent_jax.checkpoint import load_policy, policy_directory
from rsagent_jax.config import EvalConfig, to_dict
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.samples import open_samples
from rsagent_jax.evals import metrics, report
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.rewards import mask_iou
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Task
from rsagent_jax.rollout.segmenter import open_segmenter


def main(config: EvalConfig) -> None:
    ############################## Policy, data ##############################
    workdir = entry.workdir()
    entry.use_compilation_cache(config.cache_dir, workdir / "compiled")
    if flags.FLAGS.weights:
        config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, weights=flags.FLAGS.weights))
    model = load_policy(config.policy.weights)
    processor = Processor.load(policy_directory(config.policy.weights))
    samples = open_samples(config.data)
    engine = Engine(model, config.sampling, processor.terminator_id, config.policy.dtype, jax.random.key(config.seed))

    ############################## Trajectories ##############################
    results, started = [], time.perf_counter()
    with (
        open_segmenter(config.segmenter) as segmenter,
        (workdir / "predictions.jsonl").open("w", encoding="utf-8") as predictions,
        (workdir / "trajectories.jsonl").open("w", encoding="utf-8") as trajectories,
        tqdm(total=len(samples), desc="evaluate", unit="sample", mininterval=2.0) as bar,
    ):
        driver = Driver(engine, segmenter, processor, config.agent, workers=config.segmenter.workers)
        for i in range(0, len(samples), engine.slots):
            tasks = [Task(samples[k], k, k) for k in range(i, min(i + engine.slots, len(samples)))]
            for task, (trajectory, state) in zip(tasks, driver.run(tasks), strict=True):
                result = metrics.score(trajectory, task.sample)
                results.append(result)
                predictions.write(json.dumps(_prediction(result, trajectory)) + "\n")
                trajectories.write(json.dumps(_example(result, task.sample, trajectory, state)) + "\n")
            bar.update(len(tasks))

    ############################## Results ##############################
    seconds = time.perf_counter() - started
    summary = metrics.summarize(results, to_dict(config), benchmark=config.benchmark) | {
        "seconds_per_sample": seconds / len(results),
        "weights_sha256": weights_checksum(model),
    }
    (workdir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.write_evaluation(workdir)
    low, high = summary["giou_ci95"]
    print(
        f"{config.benchmark}: n {summary['n']}  gIoU {summary['giou']:.3f} [{low:.3f}, {high:.3f}]"
        f"  cIoU {summary['ciou']:.3f}"
        f"  turns {summary['mean_turns']:.2f}  tool errors {summary['tool_error_rate']:.3f}"
    )
    print(f"{pathlib.Path(workdir) / 'report' / 'index.html'}")


def weights_checksum(model: nnx.Module) -> str:
    """sha256 over names and fp32 values: two runs with the same figure had the same weights."""
    digest = hashlib.sha256()
    for name, value in sorted(convert.flat_params(model).items()):
        digest.update(name.encode() + np.ascontiguousarray(np.asarray(value)).tobytes())
    return digest.hexdigest()


def _prediction(result: metrics.SampleResult, trajectory) -> dict:
    return {
        "id": result.id,
        "mask": _rle(trajectory.final_mask),
        "intersection": result.intersection,
        "union": result.union,
        "iou": result.iou,
        "status": result.status.value,
        "turns": result.turns,
    }


def _example(result: metrics.SampleResult, sample, trajectory, state) -> dict:
    ious = [mask_iou(record.mask, sample) for record in trajectory.masks]
    return {
        "id": result.id,
        "query": sample.query,
        "iou": result.iou,
        "status": result.status.value,
        "ious": ious,
        "gt": _rle(sample.gt_mask),
        "image": sample.path,
        "record": to_json(state, sample.path),
    }


def _rle(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


if __name__ == "__main__":
    entry.define_flags()
    flags.DEFINE_string("weights", None, "Hugging Face directory, or checkpoints/<stage>; overrides policy.weights.")
    entry.run(main, EvalConfig)
