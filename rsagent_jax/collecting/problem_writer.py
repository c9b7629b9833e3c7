"""Writes problems (question and answer) about pictures with a remote model."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import pathlib
import threading
from collections import Counter
from typing import Any

import numpy as np
from tqdm import tqdm

from rsagent_jax.collecting import problem_prompt
from rsagent_jax.collecting.endpoint import Endpoint
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import ProblemsConfig
from rsagent_jax.masks import encode_rle
from rsagent_jax.rollout.failures import UNREADABLE, Failures
from rsagent_jax.rollout.policy import PolicyFailure
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.image_files import keep_image, read_image
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.types import DataError, Sample

ANSWERS = "answers"  # the journal's folder


class ProblemWriter:
    """Asks side by side; what fails is counted in `failures` and asked again by the next start."""

    def __init__(self, config: ProblemsConfig, samples, workdir: pathlib.Path, answers: Journal):
        self.config, self.samples, self.workdir, self.answers = config, samples, workdir, answers
        self.words = (config.min_words, config.max_words)
        self.failures = Failures(give_up_after=0)
        self.usage: dict[str, float] = {}
        self.lock = threading.Lock()

    def run(self, left: list[tuple[int, int]], total: int) -> None:
        """`left`: (uid, place in the samples). DataError where going on is of no use."""
        endpoint = Endpoint.shared(self.config.writer, "writer")
        with (
            concurrent.futures.ThreadPoolExecutor(self.config.writer.concurrent) as pool,
            tqdm(total=total, initial=total - len(left), desc="problems", unit="object", mininterval=2.0) as bar,
        ):
            try:
                asked = [pool.submit(self._work, *job, endpoint) for job in left]
                for answered in concurrent.futures.as_completed(asked):
                    answered.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
        self.failures.tell()
        self.usage = endpoint.told()

    def _work(self, uid: int, place: int, endpoint: Endpoint) -> None:
        try:
            sample = self.samples[place]
        except DataError as error:
            return self._fail(UNREADABLE, self.samples.ids[place], error)
        try:
            row = self._row(uid, sample, *self._ask(endpoint, sample))
        except PolicyFailure as failure:
            return self._fail(failure.kind, sample.id, failure)
        except problem_prompt.BadAnswer as error:
            return self._fail("malformed answer", sample.id, error)
        with self.lock:
            self.answers.add(row)

    def _fail(self, kind: str, id: str, why: Exception) -> None:
        with self.lock:
            self.failures.add(kind, id, str(why))

    def _ask(self, endpoint: Endpoint, sample: Sample) -> tuple[list[str], Counter[str]]:
        """Usable queries, and how many could not be used, by reason. BadAnswer after `tries` answers of no use."""
        c, rejected = self.config, Counter()
        if not sample.gt_mask.any():
            return [], Counter({"no target to ask for": 1})
        image = sample.image, sample.gt_mask, sample.query
        messages = problem_prompt.problem_question(*image, c.queries, self.words, c.image_size)
        kept: dict[str, str] = {}
        malformed = None  # the last answer
        for _ in range(c.tries):
            try:
                said, malformed = problem_prompt.read_answer(endpoint.complete(messages)), None
            except problem_prompt.BadAnswer as error:
                malformed = error
                rejected["malformed answer"] += 1
                continue
            for query in said[: c.queries]:
                words = problem_prompt.normal(query)
                reason = problem_prompt.fault(query, sample.query, self.words)
                if reason := reason or ("said twice" if words in kept else None):
                    rejected[reason] += 1
                else:
                    kept[words] = " ".join(query.split())
            if kept:
                break
        if malformed:
            raise malformed
        return list(kept.values()), rejected

    def _row(self, uid: int, sample: Sample, queries: list[str], rejected: Counter[str]) -> dict[str, Any]:
        # The picture's own file; a copy where it is none, or where an EXIF orientation would turn it.
        own = sample.path and np.array_equal(read_image(sample.path, upright=True), sample.image)
        row = {"id": sample.id, "uid": uid, "name": sample.query, "queries": queries, "rejected": dict(rejected)}
        row["image"] = os.path.abspath(sample.path if own else keep_image(self.workdir, sample.image))
        row["segmentation"] = encode_rle(sample.gt_mask)
        if sample.ignore_mask is not None and sample.ignore_mask.any():
            row["ignore"] = os.path.abspath(keep_image(self.workdir, sample.ignore_mask.astype(np.uint8) * 255))
        return row


def write_set(
    workdir: pathlib.Path,
    config: ProblemsConfig,
    failed: dict[str, int],
    settings: dict[str, Any] | None = None,
    current: dict[str, str] | None = None,
) -> int:
    """<split>.jsonl in the order of the uids, and problems.json with what was left out. Returns the number of lines.

    Words that were said of one object twice stand there once; words that were said of two objects of a picture mean
    neither of them and are left out.
    """
    rows, left_out, objects = [], Counter(), collections.defaultdict(set)
    for where, row in journal.read_journal(workdir / ANSWERS, settings, current, by="uid"):
        try:
            left_out.update(row["rejected"])
            line = {key: row[key] for key in ("image", "segmentation", "ignore") if key != "ignore" or key in row}
            for n, query in enumerate(row["queries"]):
                words = row["image"], problem_prompt.normal(query)
                objects[words].add(row["segmentation"]["counts"])
                rows.append((words, {"id": f"{row['id']}/{n}", "query": query} | line))
        except (KeyError, TypeError, ValueError) as error:
            raise journal.damaged(where, error) from None
    lines: dict[tuple[str, str], str] = {}
    for words, line in rows:
        if len(objects[words]) > 1:
            left_out["said of two objects"] += 1
        elif words in lines:
            left_out["said of the object before"] += 1
        else:
            lines[words] = json.dumps(line) + "\n"
    if not lines:
        raise DataError(f"none of the queries can be used: {dict(left_out)}; see {workdir / ANSWERS}")
    path = workdir / f"{config.data.split}.jsonl"
    journal.write_whole(path, "".join(lines.values()))
    report = {"problems": len(lines), "left_out": dict(left_out), "not_answered": failed, "config": to_dict(config)}
    journal.write_whole(workdir / "problems.json", json.dumps(report, indent=2) + "\n")
    print(f"{len(lines)} problems in {path}")
    for reason, count in sorted(left_out.items()):
        print(f"  left out {count}: {reason}")
    return len(lines)
