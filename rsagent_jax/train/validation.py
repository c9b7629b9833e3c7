"""Validation in a training run: the sets of `validation`, played with the weights of this very step and judged by the
code of evaluate.py.

It plays through the driver and the engine that GRPO has anyway (SFT opens them for it), so its figures at step k are
those of evaluate.py with checkpoint k and the shapes of grpo.sampling.

    <workdir>/validation.jsonl                     a line per validation: stage, step, checksum of the weights, figures
    <workdir>/validation/<stage>/<step>/<set>/     some of its trajectories, as SFT and replay read them

A line also tells what need not be played again: the same weights on the same samples, as after a restart, or at the end
of SFT and before GRPO.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.rules import FIGURES
from rsagent_jax.config.schema import EvalConfig, TrainConfig
from rsagent_jax.config.validation import ValidationConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.sets.index import Entry, SampleIndex, spread
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.evals import metrics
from rsagent_jax.evals.behaviour import Behaviour, recorded_behaviour, summarize_behaviours
from rsagent_jax.evals.records import Record, make_record
from rsagent_jax.models.qwen25_vl.fingerprint import params_checksum
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.play import Failure, play_samples
from rsagent_jax.rollout.policy import Task
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.journal import decisive_settings, fingerprints
from rsagent_jax.runtime.json_lines import keep_lines
from rsagent_jax.runtime.paths import AppendFile
from rsagent_jax.runtime.preemption import Preempted
from rsagent_jax.types import DataError, Status, Trajectory

RESULTS = "validation.jsonl"
NAMED = 3  # pictures in the warning of an overlap
TRIES = 2  # of a sample that the segmenter fails


def evaluation_config(config: TrainConfig, name: str) -> EvalConfig:
    """What evaluate.py would be given for the same figures of the set `name`, but for the weights."""
    part = next(part for part in config.validation.sets if part.name == name)
    temperature = 0.0 if config.validation.greedy else config.grpo.sampling.temperature
    return EvalConfig(
        benchmark=name,
        seed=config.seed,
        policy=config.policy,
        agent=config.agent,
        segmenter=config.segmenter,
        data=part.data,
        sampling=dataclasses.replace(config.grpo.sampling, temperature=temperature),
        metric=config.validation.metric,
        cache_dir=config.cache_dir,
    )


def open_validation_sets(config: ValidationConfig) -> dict[str, SampleIndex]:
    """By name. DataError, naming the set, where there is nothing in one."""
    sets = {}
    for part in config.sets:
        try:
            sets[part.name] = open_samples(part.data, f"validation.sets.{part.name}.data")
        except DataError as error:
            raise DataError(f"validation.sets.{part.name}: {error}") from error
    return sets


def overlaps(config: TrainConfig) -> list[str]:
    """A warning for each validation set with pictures that training sees as well. DataError for a set without samples.

    Copies of a picture are known as one by COCO's names (Entry.image_key), of other pictures by their path.
    """
    sets, trained = open_validation_sets(config.validation), {}
    if sets and "sft" in config.stages:
        paths = filter(None, trajectories.picture_paths(config.sft.trajectories))
        trained["sft.trajectories"] = {Entry("", "", path).image_key for path in paths}
    if sets and "grpo" in config.stages:
        trained["grpo.data"] = set(open_samples(config.grpo.data).image_keys)
    warnings = []
    for name, samples in sets.items():
        keys = set(samples.image_keys)
        for where, seen in trained.items():
            if both := sorted(keys & seen):
                first = ", ".join(both[:NAMED]) + ", …" * (len(both) > NAMED)
                warnings.append(
                    f"warning: validation.sets.{name}: {len(both)} of its {len(keys)} pictures are in {where}, which is"
                    f" trained on ({first}): its figures are no measure of what is new. grpo.data.exclude leaves the"
                    " pictures of a set out"
                )
    return warnings


class Validator:
    """One stage's validation."""

    def __init__(self, config: TrainConfig, stage: str, driver: Driver | None, workdir: pathlib.Path):
        """`driver` plays through an engine, whose weights are another's whenever this is not running. Without sets
        nothing is ever due."""
        self.config, self.stage, self.driver = config, stage, driver
        self.sets = open_validation_sets(config.validation)
        self.share = processes.Share(jax.process_index(), jax.process_count())
        self.workdir = processes.own_directory(workdir)
        self.settings = processes.exchange(self._fingerprint())[0]  # the lead's: times of copied files differ
        self.measure = f"{config.validation.best_mode} {config.validation.keep_best}, settings {self.settings}"
        self.path = self.workdir / RESULTS
        self.found: dict[int, dict[str, Any]] = {}  # of this stage, by step, of earlier starts: the last line of each
        self.history: dict[int, dict[str, Any]] = {}  # those that stand before the step that comes next
        self.known: dict[tuple[str, str], dict[str, float]] = {}  # whole figures by (checksum, settings), of any stage

        def remember(line: dict[str, Any]) -> bool:
            self._know(line)
            if line["stage"] == stage:
                self.found[line["step"]] = line
            return True

        keep_lines(self.path, remember)
        if any(line["settings"] != self.settings for line in self.found.values()):
            why = "of other settings, pictures or questions, or of another segmenter"
            print(f"{stage}: earlier validations {why}: their figures are not compared, and none is the best any more")

    def _know(self, line: dict[str, Any]) -> None:
        """Its figures need not be played for again, unless a set of them was not measured."""
        if all(f"val/{name}/giou" in line["values"] for name in self.sets):
            self.known[line["checksum"], line["settings"]] = line["values"]

    def begin(self, done: int) -> None:
        """The stage goes on after step `done`: what an earlier start has validated after it counts no longer, but
        need not be played again where the weights are the same."""
        self.history = {step: line for step, line in self.found.items() if step <= done}

    def _fingerprint(self) -> str:
        """Of all that the figures depend on besides the weights: what answers, and what is asked of it."""
        c = self.config
        settings = [to_dict(c.validation.metric), c.validation.greedy, c.seed, decisive_settings(c.agent)]
        settings += [decisive_settings(c.grpo.sampling), c.policy.dtype]
        if self.sets:
            settings.append(dataclasses.asdict(self.driver.segmenter.about))
        for name, samples in self.sets.items():
            made_of = fingerprints(samples, {id: k for k, id in enumerate(samples.ids)})
            settings.append([name, made_of, samples.image_keys])
        return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:16]

    def due(self, step: int, steps: int) -> bool:
        every = self.config.validation.every
        return bool(self.sets) and (step == steps or bool(every and step % every == 0))

    def was_stopped(self, done: int, steps: int) -> bool:
        """Whether an earlier start was to validate step `done` and has not come to it."""
        own = bool(done and self.history) and done not in self.history and self.due(done, steps)
        return processes.exchange(own)[0]  # the lead's: others may not have its history

    def run(self, policy: Callable[[], nnx.State], step: int) -> dict[str, float]:
        """The figures of the weights that `policy` gives, by the names that they are logged under; {} where a signal
        stopped it, and then the next start does it.

        The engine's memory is free again afterwards. DataError, on all processes, where a sample cannot be read
        (data.unreadable=stop), or where the segmenter stays away.
        """
        start, dtype = time.perf_counter(), self.config.policy.dtype
        params = policy()
        checksum = params_checksum(params, dtype)
        values = self.known.get((checksum, self.settings))
        if processes.allgather_sum([values is not None]) != [self.share.count]:
            key = jax.random.key(self.config.seed)
            self.driver.policy.load(params, key, greedy=self.config.validation.greedy)
            del params  # a copy of the parameters need not stay while the engine plays with its own
            try:
                values = self._measure(step)
            except Preempted:  # the step is not lost: it is saved when the next one begins
                return {}
        line = {"stage": self.stage, "step": step, "checksum": checksum, "settings": self.settings, "values": values}
        self.history[step] = line | {"seconds": time.perf_counter() - start}
        self._know(line)
        if any(self.found.get(step, {}).get(name) != value for name, value in line.items()):
            file = AppendFile(self.path)
            file.add(json.dumps(self.history[step]) + "\n")
            file.close()
        return values

    def _measure(self, step: int) -> dict[str, float]:
        """The figures of the weights that the engine holds, which are released."""
        try:
            found = {name: self._play(name, step) for name in self.sets}
        finally:
            self.driver.policy.release_memory()
        values = {f"val/{name}/{k}": v for name, figures in found.items() for k, v in figures.items()}
        for figure in FIGURES:  # the mean over the sets
            if all(figure in figures for figures in found.values()):
                values[f"val/{figure}"] = math.fsum(figures[figure] for figures in found.values()) / len(found)
        return values

    def score(self, step: int) -> float | None:
        """How good the weights of this step are, the larger the better; None where that was not measured, or on other
        sets or in another way than now."""
        c, line = self.config.validation, self.history.get(step, {})
        value = line["values"].get(c.keep_best) if line.get("settings") == self.settings else None
        return None if value is None else value if c.best_mode == "max" else -value

    def stop(self, step: int) -> bool:
        """Whether so many validations up to `step` have passed since the best one that the stage ends; it says so.

        The lead decides for all processes, which call it together: another may have no history of earlier starts.
        """
        scores = [s for k in sorted(self.history) if k <= step and (s := self.score(k)) is not None]
        if not (patience := self.config.validation.early_stop):
            return False
        own = bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= patience
        if ends := processes.exchange(own)[0]:
            best = self.config.validation.keep_best
            print(f"{self.stage}: stops after step {step}: {patience} validations in a row without a better {best}")
        return ends

    ############################## One set ##############################

    def _play(self, name: str, step: int) -> dict[str, float]:
        """Every process plays its part of the samples; all of them get the figures of all."""
        records, unreadable = processes.all_or_none(lambda: self._play_share(name, step))
        rows, keys = [], dict(zip(self.sets[name].ids, self.sets[name].pictures, strict=True))
        for record in records:
            result = dataclasses.asdict(metrics.judge(record.counts, self.config.validation.metric))
            result.pop("rules")
            rows.append([result, dataclasses.asdict(recorded_behaviour(record, self.config.validation.metric))])
        said = processes.exchange([rows, unreadable])
        results, behaviours = [], []
        for result, behaviour in (row for part, _ in said for row in part):
            again = {"status": Status(result["status"]), "rules": self.config.validation.metric}
            results.append(metrics.SampleResult(**result | again))
            behaviours += [Behaviour(**behaviour)] if again["status"].judged else []
        return self._figures(name, results, behaviours, keys, sum(count for _, count in said))

    def _figures(self, name, results, behaviours, keys: dict[str, str], unreadable: int) -> dict[str, float]:
        lost = sum(r.status is Status.ENV_FAILED for r in results)
        counts = {"unreadable": float(unreadable), "env_failed": float(lost)}
        if not results or (lost and self.config.validation.metric.failure_policy == "refuse"):
            print(
                f"warning: validation.sets.{name} is not measured this time: of {len(keys)} samples {unreadable} cannot"
                f" be read, and the segmenter failed {lost}"
            )
            return counts
        summary = metrics.summarize_results(results, {}, benchmark=name, images=keys)
        low, high = summary["giou_ci95"]
        figures = {"giou": summary["giou"], "giou_low": low, "giou_high": high, "ciou": summary["ciou"]}
        figures |= {"n": float(summary["n"]), "turns": summary["mean_turns"]}
        figures |= {"tool_error_rate": summary["tool_error_rate"]}
        figures |= {key: summary[key] for key in ("n_acc", "t_acc", "giou_target") if summary.get(key) is not None}
        endings = {status.value: sum(r.status is status for r in results) / len(results) for status in Status}
        figures |= {f"endings/{status}": share for status, share in endings.items()}
        behaved = summarize_behaviours(behaviours)
        return figures | counts | {key: float(v) for key, v in behaved.items() if v is not None}

    def _play_share(self, name: str, step: int) -> tuple[list[Record], int]:
        """What was played, a trajectory that the segmenter failed tried again; how many samples cannot be read."""
        samples, config = self.sets[name], evaluation_config(self.config, name)
        places = range(self.share.index, len(samples), self.share.count)
        wanted = set(spread(len(samples), self.config.validation.keep)) if self.config.validation.keep else set()
        records: dict[int, Record] = {}
        kept: dict[int, bytes] = {}
        unreadable: set[int] = set()

        def keep(task: Task, trajectory: Trajectory, state: EnvState) -> Failure | None:
            records[task.uid] = make_record(self.workdir, task.sample, trajectory, state, 0.0, config.metric)
            if task.uid in wanted and trajectory.loss_mask.any():
                names = ("id", "query", "iou", "status", "ious", "gt")
                header = {name: records[task.uid].example[name] for name in names} | {"step": step}
                kept[task.uid] = trajectories.encode_by_reference(state, task.sample.path, header, trajectory)
            return records[task.uid].failure

        def keep_failure(uid: int, id: str, failure: Failure) -> None:
            unreadable.add(uid)

        left, label = [(k, k) for k in places], f"{name}, step {step}"
        for _ in range(TRIES):
            play_samples(self.driver, samples, left, keep, keep_failure, config, len(left), label, leave=False)
            left = [(k, k) for k in places if k in records and records[k].failure]
            if not left:
                break
        self._write(self.workdir / "validation" / self.stage / f"{step:06d}" / name, kept)
        return [records[k] for k in sorted(records)], len(unreadable)

    def _write(self, directory: pathlib.Path, kept: dict[int, bytes]) -> None:
        if not kept:
            return
        writer = trajectories.RecordWriter(directory)
        for place in sorted(kept):
            writer.write(kept[place])
        writer.close(trajectories.shown_with(self.config.agent, self.driver.limits))
