"""Evaluates a policy on a benchmark: every sample gets a trajectory, greedy unless the config says otherwise.

  python evaluate.py --config=configs/eval.py:refcoco-testA --workdir=DIR [--weights=HF_DIR_OR_CHECKPOINT] [--shard=0/4]

With --config.bound.row=box|best_of_three|clicks an oracle plays in the policy's place (evals/bounds.py).
Leaves results.json, predictions.jsonl, trajectories.jsonl (for people) and report/index.html. Run a stopped command
again and it goes on, and plays again what has changed since. On a slice, the same command on every host shares the
samples out; --shard=i/n evaluates every n-th one, on machines that do not know of each other, and whichever finishes
last puts the results together. Both want one work directory. There are no results until every sample is measured: one
that the segmenter failed is played again by the next start (metric.failure_policy accepts it instead), one that cannot
be read is named and left out (data.unreadable). --aot=v5e-8 says whether the engine fits there. SIGTERM ends it with
status 75: start it again.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import contextlib
import dataclasses
import json
import pathlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import EvalConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.evals import bounds, metrics, records
from rsagent_jax.evals.behaviour import recorded_behaviour, summarize_behaviours
from rsagent_jax.models.qwen25_vl.load import (
    local_weights,
    pin_step,
    processor_directory,
    weight_files,
    weights_checksum,
)
from rsagent_jax.report import evaluation
from rsagent_jax.rollout.driver import Driver, pixel_limits
from rsagent_jax.rollout.open import open_policy
from rsagent_jax.rollout.play import Failure, play_samples, unmeasured
from rsagent_jax.rollout.policy import Task
from rsagent_jax.rollout.startup import check_disk, check_policy, check_segmenter, check_weights
from rsagent_jax.runtime import command, processes
from rsagent_jax.runtime import journal as journals
from rsagent_jax.runtime.paths import remove_file, write_whole
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.types import DataError, Trajectory
from sam_bridge import hub
from sam_bridge.types import Segmenter


def main(
    config: EvalConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    weights: str = "",  # a Hugging Face directory, org/name or checkpoints/<stage>[@best]; in place of policy.weights
    shard: str = "",  # i/n: evaluate every n-th sample from the i-th on, counted from 0
    aot: str = "",  # a TPU slice or topology to compile the engine for instead of evaluating
    aot_only: str = "",  # with --aot: only programs with this in their name, such as decode; or a,b
) -> int | None:
    if weights:
        config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, weights=weights))
    if aot or aot_only:
        from rsagent_jax.aot import stages  # loads the TPU compiler

        return stages.compile_engine(config.sampling, config.policy.weights, config.policy.dtype, aot, aot_only)
    processes.initialize_distributed()
    PROGRESS.enter("evaluation")
    workdir, share = command.make_workdir(workdir, own="shards"), processes.own_share(shard, "--shard")
    if config.bound.row in bounds.ORACLES:
        config = bounds.fill_bound_defaults(config)
    else:
        weights = pin_step(config.policy.weights)
        config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, weights=weights))
    played = processes.all_or_none(lambda: play_share(config, workdir, share))
    # What the others of a slice played is there now, so one of them puts it together.
    processes.on_lead(lambda: finish(config, workdir, share, played))


@dataclasses.dataclass(frozen=True)
class Played:
    """What the results are made of, besides what the journal holds."""

    samples: SampleIndex
    current: dict[str, str]  # fingerprint by id
    row: dict[str, Any]  # who played, for results.json
    settings: dict[str, Any]  # of the journal


def play_share(config: EvalConfig, workdir: pathlib.Path, share: processes.Share) -> Played:
    """Plays what is left of this process's samples."""
    check_evaluate(config, workdir)
    PROGRESS.enter_part("samples")
    samples = open_samples(config.data)
    for note in samples.notes:
        print(note)
    oracle = config.bound.row in bounds.ORACLES
    if not oracle and config.policy.backend == "engine":
        check_weights(config.policy.weights)  # after everything that costs less: it may download them
    ids = samples.ids
    current = journals.fingerprints(samples, {id: k for k, id in enumerate(ids)})

    with contextlib.ExitStack() as stack:
        segmenter = stack.enter_context(open_segmenter(config.segmenter))
        row = {"row": bounds.title(config.bound), "sees_the_truth": oracle}
        row["segmenter"] = dataclasses.asdict(segmenter.about)  # what answers, not what a config calls it
        if config.bound.row == "best_of_three":
            row["three_masks"] = bounds.masks_of(segmenter)
        settings = evaluation_resume_fingerprint(config, row)
        journal = journals.Journal(workdir / records.FOLDER, share, settings, current)
        stack.callback(journal.close)
        mine = range(share.index, len(samples), share.count)
        left = journal.left([(ids[k], k) for k in mine], "samples")
        if not journal.done.issuperset(ids):  # what an earlier start said is not the result of these samples
            remove_file(workdir / "results.json")
        if left:
            PROGRESS.enter_part("weights")
            driver = bounds.oracle_driver(config, segmenter) if oracle else policy_driver(config, segmenter, workdir)
            measure(config, workdir, samples, left, len(mine), driver, journal)
            if config.policy.backend == "openai" and not oracle:
                print(f"  endpoint: {driver.policy.endpoint.told()}")
    PROGRESS.enter("results")
    return Played(samples, current, row, settings)


def finish(config: EvalConfig, workdir: pathlib.Path, share: processes.Share, made: Played) -> None:
    """Puts the results together once every sample is measured; says what is left else. DataError for what failed."""
    samples, row, ids = made.samples, made.row, made.samples.ids
    alone = jax.process_count() == 1
    mine = range(share.index, len(ids), share.count) if alone else range(len(ids))
    played, unreadable = records.read_records(workdir, made.settings, made.current)
    refuse = config.metric.failure_policy == "refuse"
    lost = {id: record.failure[0] for id, record in played.items() if refuse and record.failure}
    if kinds := [lost[ids[k]] for k in mine if ids[k] in lost]:
        raise unmeasured(kinds, len(mine))
    kept = {id: record for id, record in played.items() if id not in lost}
    if missing := [id for id in ids if id not in kept and id not in unreadable]:
        return processes.tell_left(len(missing), "samples", share, workdir)
    if not kept:
        raise DataError(f"none of the {len(ids)} samples can be read; the first: {next(iter(unreadable.values()))}")
    images = {id: key for id, key in zip(ids, samples.pictures, strict=True) if id in kept}
    row |= {"benchmark": config.benchmark or samples.name, "samples": samples.name}
    row["weights_sha256"] = made.settings.get("weights_sha256")
    summary = write_results(workdir, config, row, [kept[id] for id in images], images, unreadable)
    if config.bound.row not in bounds.ORACLES:
        print(f"weights: {config.policy.weights}")
    print(headline(summary), evaluation.what_failed(summary), workdir / "report" / "index.html", sep="\n")


def check_evaluate(config: EvalConfig, workdir: pathlib.Path) -> None:
    """What is needed besides data, looked at before weights are loaded; the cheapest first."""
    check_disk(workdir)
    weights = config.policy.weights
    if config.bound.row == bounds.UNTRAINED and processor_directory(weights) != local_weights(weights, ()):
        raise DataError(f"bound.row is {bounds.UNTRAINED}, but {weights} is a checkpoint of train.py; give the weights")
    if config.bound.row not in bounds.ORACLES:
        print(check_policy(config.policy, config.agent, config.sampling))
    check_segmenter(config.segmenter)


def policy_driver(config: EvalConfig, segmenter: Segmenter, workdir: pathlib.Path) -> Driver:
    """The policy on this process's devices, or behind its endpoint."""
    command.use_compilation_cache(config.cache_dir, workdir / "compiled")
    processor = Processor.load(processor_directory(config.policy.weights))
    policy = open_policy(config.policy, processor, config.sampling, config.agent, config.seed)
    policy.warm_up()
    return Driver(policy, segmenter, processor, config.agent, workers=config.segmenter.workers)


def measure(
    config: EvalConfig,
    workdir: pathlib.Path,
    samples: SampleIndex,
    left: Sequence[int],
    total: int,
    driver: Driver,
    journal: journals.Journal,
) -> None:
    """A trajectory for each of the samples at `left`, into the journal as it ends.

    DataError where the segmenter fails too many in a row, or at a sample that cannot be read (data.unreadable=stop).
    """
    last = time.perf_counter()

    def keep(task: Task, trajectory: Trajectory, state: EnvState) -> Failure | None:
        nonlocal last
        since, last = last, time.perf_counter()
        record = records.make_record(workdir, task.sample, trajectory, state, last - since, config.metric)
        journal.add(record.to_row())
        return record.failure

    def keep_failure(uid: int, id: str, failure: Failure) -> None:
        journal.add({"id": id, "failed": {"kind": failure[0], "why": failure[1]}})

    play_samples(driver, samples, [(k, k) for k in left], keep, keep_failure, config, total, "evaluate")


def evaluation_resume_fingerprint(config: EvalConfig, row: dict) -> dict[str, Any]:
    """Everything but the samples that a trajectory depends on: a run that is taken up again must agree in it."""
    settings = row | {name: journals.decisive_settings(getattr(config, name)) for name in ("data", "agent")}
    if config.bound.row not in bounds.ORACLES:
        weights = config.policy.weights
        processor, settings["seed"] = Processor.load(processor_directory(weights)), config.seed
        if config.policy.backend == "openai":  # which weights are behind it, nobody says
            settings["served"] = journals.decisive_settings(config.policy.remote)
            if not hub.is_repository(weights) and weight_files(weights):  # but this is what is claimed of it
                settings["served"]["claimed_sha256"] = weights_checksum(weights)
        else:
            settings |= {"weights_sha256": weights_checksum(weights), "dtype": config.policy.dtype}
            settings["stop_ids"] = processor.with_ends(config.sampling).stop_ids
        settings["pixel_limits"] = dataclasses.asdict(pixel_limits(config.agent, processor))
        settings["sampling"] = journals.decisive_settings(config.sampling)
    return settings


def write_results(
    workdir: pathlib.Path, config: EvalConfig, row: dict, kept: list[records.Record], images: dict, unreadable: dict
) -> dict:
    """results.json, predictions.jsonl, trajectories.jsonl and the report of all samples, in the order of the data.

    images: of each id, which intervals are resampled by; unreadable: why, by id.
    """
    results = [metrics.judge(r.counts, config.metric) for r in kept]
    settings = to_dict(config)
    # the unit belongs to the conventions as well
    settings["metric"] |= {"unit": config.data.unit, "texts": config.data.texts, "split": config.data.split}
    settings["segmenter"] |= row["segmenter"]
    summary = metrics.summarize_results(results, settings, benchmark=row["benchmark"], images=images) | {
        "seconds_per_sample": sum(r.seconds for r in kept) / len(kept),
        **row,
        "unreadable": unreadable,
        "segmenter_failures": dict(Counter(r.failure[0] for r in kept if r.failure)),
        "by_turn": metrics.turn_curve(
            [(r.counts, r.masks) for r in kept], config.metric, config.agent.max_turns, images
        ),
        "behaviour": summarize_behaviours(
            [recorded_behaviour(r, config.metric) for r in kept if r.counts.status.judged]
        ),
        "conventions": metrics.other_conventions([r.counts for r in kept]),
    }
    predictions = [
        {"id": result.id, "sample_checksum": r.sample_checksum, "picture": images[result.id], "mask": r.mask}
        | {"dropped": result.dropped or ""}
        | {name: getattr(result, name) for name in ("intersection", "union", "iou", "status", "turns")}
        for result, r in zip(results, kept, strict=True)
    ]
    write_whole(workdir / "predictions.jsonl", "".join(json.dumps(p) + "\n" for p in predictions))
    # A row of the journal may be of a start with other rules.
    shown = [r.example | records.shown_ious(r.counts, r.masks, config.metric) for r in kept]
    write_whole(workdir / "trajectories.jsonl", "".join(json.dumps(example) + "\n" for example in shown))
    write_whole(workdir / "results.json", json.dumps(summary, indent=2) + "\n")
    evaluation.write_evaluation(workdir)
    return summary


def headline(summary: dict) -> str:
    low, high, title = *summary["giou_ci95"], evaluation.evaluation_title(summary)
    mark = "" if summary["row"] == "policy" else f" [{summary['row']}]"
    return (
        f"{title}{mark}: n {summary['n']}  gIoU {summary['giou']:.3f} [{low:.3f}, {high:.3f}]"
        f"  cIoU {summary['ciou']:.3f}  turns {summary['mean_turns']:.2f}  tool errors {summary['tool_error_rate']:.3f}"
    )
