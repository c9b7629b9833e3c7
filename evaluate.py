"""Evaluates a policy on a benchmark: every sample gets a trajectory, greedy unless the config says otherwise.

  python evaluate.py --config=configs/eval.py:refcoco-testA --workdir=DIR [--weights=HF_DIR_OR_CHECKPOINT] [--shard=0/4]

With --config.bound.row=box|best_of_three|clicks an oracle plays in the policy's place (evals/bounds.py).
Leaves results.json, predictions.jsonl, trajectories.jsonl (for people) and report/index.html. Run a stopped command
again and it goes on; --shard=i/n evaluates every n-th sample, on as many machines as write to one work directory, and
whichever finishes last puts the results together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from absl import flags
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from rsagent_jax import entry, processes, startup
from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.replay import to_json
from rsagent_jax.checkpoint import load_policy, policy_directory, weights_checksum
from rsagent_jax.config import EvalConfig, to_dict
from rsagent_jax.data.journal import write_whole
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.samples import Mixture, open_samples
from rsagent_jax.evals import bounds, by_turn, metrics, records, report
from rsagent_jax.rewards import mask_iou
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.engine import Engine
from rsagent_jax.rollout.policy import Task
from rsagent_jax.rollout.segmenter import open_segmenter
from rsagent_jax.types import DataError, Trajectory
from sam_bridge.types import Segmenter

Player = Callable[[Segmenter, Iterable[Task]], Iterator[tuple[int, Trajectory, EnvState]]]


def main(config: EvalConfig) -> None:
    ############################## Data, who plays ##############################
    workdir = entry.workdir()
    if flags.FLAGS.weights:
        config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, weights=flags.FLAGS.weights))
    metrics.check_rules(config.metric)
    bounds.check(config.bound)
    oracle = config.bound.row in bounds.ORACLES
    if oracle:
        config = bounds.settled(config)
    share = processes.parse_share(flags.FLAGS.shard, "--shard")
    startup.evaluate(config, workdir)
    samples = open_samples(config.data)
    if isinstance(samples, Mixture):
        raise DataError("a mix cannot be evaluated, its samples come up more than once; evaluate its parts")
    for note in samples.notes:
        print(note)
    ids = samples.ids
    play, checksum = (functools.partial(bounds.play, config), None) if oracle else policy_player(config, workdir)

    ############################## Trajectories ##############################
    with contextlib.ExitStack() as stack:
        segmenter = stack.enter_context(open_segmenter(config.segmenter))
        row = {"row": bounds.title(config.bound), "sees_the_truth": oracle}
        if config.bound.row == "best_of_three":
            row["three_masks"] = bounds.masks_of(segmenter)
        settings = what_decides(config, row, checksum, ids)
        shard = stack.enter_context(contextlib.closing(records.Shard(workdir, share, settings)))
        mine = range(share.index, len(samples), share.count)
        left = [k for k in mine if ids[k] not in shard.done]
        if len(left) < len(mine):
            print(f"goes on: {len(mine) - len(left)} of {len(mine)} samples are done")
        bar = tqdm(total=len(mine), initial=len(mine) - len(left), desc="evaluate", unit="sample", mininterval=2.0)
        under_way, last = {}, time.perf_counter()

        def tasks():
            for number, k in enumerate(left):
                under_way[number] = samples[k]
                yield Task(under_way[number], k, k)

        for number, trajectory, state in play(segmenter, tasks()):
            now = time.perf_counter()
            shard.add([record(workdir, under_way.pop(number), trajectory, state, now - last)])
            last = now
            bar.update()
        bar.close()

    ############################## Results ##############################
    found = records.read(workdir, settings)
    if missing := [id for id in ids if id not in found]:
        print(f"shard {share.index} of {share.count} is done; {len(missing)} samples are left to the others")
        return
    summary = write_results(workdir, config, row, [found[id] for id in ids], checksum)
    low, high = summary["giou_ci95"]
    mark = "" if summary["row"] == "policy" else f" [{summary['row']}]"
    print(
        f"{config.benchmark}{mark}: n {summary['n']}  gIoU {summary['giou']:.3f} [{low:.3f}, {high:.3f}]"
        f"  cIoU {summary['ciou']:.3f}"
        f"  turns {summary['mean_turns']:.2f}  tool errors {summary['tool_error_rate']:.3f}"
    )
    print(f"{pathlib.Path(workdir) / 'report' / 'index.html'}")


def policy_player(config: EvalConfig, workdir: pathlib.Path) -> tuple[Player, str]:
    """The policy on this process's devices, and its weights' checksum."""
    entry.use_compilation_cache(config.cache_dir, workdir / "compiled")
    weights = config.policy.weights
    directory = policy_directory(weights)
    model = load_policy(weights)
    processor = Processor.load(directory)
    mesh = processes.local_mesh(config.sampling.tensor)
    key = jax.random.key(config.seed)
    overlay = processor.square(config.agent.history_size)
    engine = Engine(model, config.sampling, processor.terminator_id, config.policy.dtype, key, mesh, overlay)
    engine.warm_up()

    def play(segmenter, tasks):
        return Driver(engine, segmenter, processor, config.agent, workers=config.segmenter.workers).play(tasks)

    return play, weights_checksum(model)


def what_decides(config: EvalConfig, row: dict, checksum: str | None, ids: list[str]) -> dict:
    """Everything that a sample's trajectory depends on: a run that is taken up again must agree in it."""
    resolved = to_dict(config)
    common = row | {
        "samples_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "agent": resolved["agent"],
        "backend": config.segmenter.backend,
    }
    if checksum is None:
        return common
    free = {"slots", "chunk", "patches"}  # how many at a time, not what
    return common | {
        "weights_sha256": checksum,
        "dtype": config.policy.dtype,
        "seed": config.seed,
        "sampling": {key: value for key, value in resolved["sampling"].items() if key not in free},
    }


def write_results(
    workdir: pathlib.Path, config: EvalConfig, row: dict, found: list[records.Record], checksum: str | None
) -> dict:
    """results.json, predictions.jsonl, trajectories.jsonl and the report of all samples, in the order of the data."""
    results = [metrics.judge(r.counts, config.metric) for r in found]
    settings = to_dict(config)
    # the unit belongs to the conventions as well
    settings["metric"] |= {"unit": config.data.unit, "texts": config.data.texts, "split": config.data.split}
    summary = metrics.summarize(results, settings, benchmark=config.benchmark) | {
        "seconds_per_sample": sum(r.seconds for r in found) / len(found),
        **row,
        "weights_sha256": checksum,
        "by_turn": by_turn.curve([(r.counts, r.masks) for r in found], config.metric, config.agent.max_turns),
        "conventions": metrics.other_conventions([r.counts for r in found]),
    }
    predictions = [prediction(result, r.mask) for result, r in zip(results, found, strict=True)]
    write_whole(workdir / "predictions.jsonl", "".join(json.dumps(p) + "\n" for p in predictions))
    write_whole(workdir / "trajectories.jsonl", "".join(json.dumps(r.example) + "\n" for r in found))
    write_whole(workdir / "results.json", json.dumps(summary, indent=2) + "\n")
    report.write_evaluation(workdir)
    return summary


def record(workdir: pathlib.Path, sample, trajectory, state, seconds: float) -> records.Record:
    counts = metrics.count(trajectory, sample)
    path = sample.path or _kept_picture(workdir, sample)
    example = {
        "id": sample.id,
        "query": sample.query,
        "iou": metrics.judge(counts).iou,
        "status": trajectory.status.value,
        "ious": [mask_iou(m.mask, sample) for m in trajectory.masks],
        "gt": _rle(sample.gt_mask),
        "image": path,
        "record": to_json(state, path),
    }
    masks = by_turn.mask_pixels(trajectory, sample)
    return records.Record(counts, _rle(trajectory.final_mask), seconds, example, masks)


def _kept_picture(workdir: pathlib.Path, sample) -> str:
    """For a sample whose picture is no file (TFDS): the report needs one."""
    path = workdir / "pictures" / f"{hashlib.sha256(sample.image.tobytes()).hexdigest()[:16]}.png"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        Image.fromarray(sample.image).save(path)
    return str(path)


def prediction(result: metrics.SampleResult, mask: dict) -> dict:
    return {
        "id": result.id,
        "mask": mask,
        "intersection": result.intersection,
        "union": result.union,
        "iou": result.iou,
        "status": result.status.value,
        "turns": result.turns,
    }


def _rle(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


if __name__ == "__main__":
    entry.define_flags()
    flags.DEFINE_string("weights", None, "Hugging Face directory, or checkpoints/<stage>; overrides policy.weights.")
    flags.DEFINE_string("shard", "0/1", "i/n: evaluate every n-th sample from the i-th on, counted from 0.")
    entry.run(main, EvalConfig)
