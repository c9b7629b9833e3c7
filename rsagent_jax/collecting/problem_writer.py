"""Writes problems about pictures with a remote model: queries that mean one known object of a picture.

The model's answer is text from outside: it is read strictly, and every query that cannot be used has a reason that can
be counted. The prompt is ours; the paper says that proprietary models wrote its problems, not how they were asked.
"""

import collections
import functools
import json
import pathlib
import re
import threading
from collections import Counter
from typing import Any

import cv2
import numpy as np
from tqdm.contrib.concurrent import thread_map

from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.prompts import MAX_QUERY_CHARS, sanitize
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import ProblemsConfig
from rsagent_jax.masks import encode_rle
from rsagent_jax.rollout.endpoint import Endpoint, message_part
from rsagent_jax.rollout.play import UNREADABLE, Failures
from rsagent_jax.rollout.policy import PolicyFailure
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.image_files import keep_image, read_image
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.runtime.paths import absolute_name, write_whole
from rsagent_jax.types import DataError, Sample

ANSWERS = "answers"  # the journal's folder

_ASK = """The second image is the first one with one object marked: tinted blue, outlined in yellow. The data set \
calls it "{name}".

Write {count} queries that mean exactly this object and nothing else in the first image. Each must need reasoning: \
about what the object is for, what it does or what happens to it, how it relates to other things in the picture, or \
common knowledge. Do not call the object by its name or its usual synonyms. Do not speak of images, marks, tints, \
outlines or masks: whoever reads a query sees only the first image. Queries may be questions or instructions, must \
differ from each other, and have {low} to {high} words.

Answer with JSON alone: {{"queries": ["…", …]}}"""

# What tells of the mark, which nobody else can see.
_MARK = re.compile(
    r"\b(highlight\w*|outlin\w*|overla\w*|mask(ed|s)?|(un)?marked|tint\w*"
    r"|(first|second|other) (image|picture)|bounding box)\b",
    re.IGNORECASE,
)


class BadAnswer(ValueError):
    """The answer as a whole cannot be read."""


def problem_question(
    image: np.ndarray, mask: np.ndarray, name: str, count: int, words: tuple[int, int], size: int
) -> list[dict]:
    """Messages for an OpenAI-compatible endpoint. u8[h, w, 3], bool[h, w]; both pictures at most `size` pixels long."""
    text = _ASK.format(name=sanitize(name), count=count, low=words[0], high=words[1])
    longest = min(size, max(mask.shape))
    marked = draw_overlay(image, mask, longest)
    plain = cv2.resize(image, marked.shape[1::-1], interpolation=cv2.INTER_AREA)
    return [{"role": "user", "content": [message_part(part) for part in (plain, marked, text)]}]


def read_answer(text: str) -> list[str]:
    """The queries as they were written. BadAnswer where there is no JSON object with a list of texts."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise BadAnswer("no JSON object")
    try:
        queries = json.loads(text[start : end + 1])["queries"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadAnswer(f"no JSON object with queries ({type(error).__name__})") from None
    if not isinstance(queries, list) or not queries or not all(isinstance(q, str) for q in queries):
        raise BadAnswer("queries is no list of texts")
    return queries


def fault(query: str, name: str, words: tuple[int, int]) -> str | None:
    """Why a query cannot be used, or None. `name` is the data set's own expression."""
    if sanitize(query) != " ".join(query.split()).strip() or len(query) > MAX_QUERY_CHARS:
        return "cannot stand in a prompt"
    if not words[0] <= len(query.split()) <= words[1]:
        return "too short or too long"
    if _MARK.search(query):
        return "speaks of the mark"
    return "the data set's own words" if normal(query) == normal(name) else None


def normal(query: str) -> str:
    """Equal for queries that differ in case, spaces and punctuation only."""
    return " ".join(re.findall(r"\w+", query.casefold()))


class ProblemWriter:
    """Asks side by side; what fails is counted in `failures` and asked again by the next start."""

    def __init__(self, config: ProblemsConfig, samples, workdir: pathlib.Path, answers: Journal):
        self.config, self.samples, self.workdir, self.answers = config, samples, workdir, answers
        self.words = (config.min_words, config.max_words)
        self.failures = Failures(give_up_after=0)
        self.lock = threading.Lock()

    def run(self, left: list[tuple[int, int]], total: int) -> None:
        """`left`: (uid, place in the samples). DataError where going on is of no use."""
        work = functools.partial(self._work, Endpoint.shared(self.config.writer, "writer"))
        bar = dict(total=total, initial=total - len(left), desc="problems", unit="object", mininterval=2.0)
        thread_map(work, left, max_workers=self.config.writer.concurrent, **bar)
        self.failures.tell()

    def _work(self, endpoint: Endpoint, job: tuple[int, int]) -> None:
        uid, place = job
        try:
            sample = self.samples[place]
        except DataError as error:
            return self._fail(UNREADABLE, self.samples.ids[place], error)
        try:
            row = self._row(uid, sample, *self._ask(endpoint, sample))
        except PolicyFailure as failure:
            return self._fail(failure.kind, sample.id, failure)
        except BadAnswer as error:
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
        messages = problem_question(*image, c.queries, self.words, c.picture_size)
        kept: dict[str, str] = {}
        malformed = None  # the last answer
        for _ in range(c.tries):
            try:
                said, malformed = read_answer(endpoint.complete(messages).text), None
            except BadAnswer as error:
                malformed = error
                rejected["malformed answer"] += 1
                continue
            for query in said[: c.queries]:
                words = normal(query)
                reason = fault(query, sample.query, self.words)
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
        row["image"] = absolute_name(sample.path if own else keep_image(self.workdir, sample.image))
        row["segmentation"] = encode_rle(sample.gt_mask)
        if sample.ignore_mask is not None and sample.ignore_mask.any():
            row["ignore"] = absolute_name(keep_image(self.workdir, sample.ignore_mask.astype(np.uint8) * 255))
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
                words = row["image"], normal(query)
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
    write_whole(path, "".join(lines.values()))
    report = {"problems": len(lines), "left_out": dict(left_out), "not_answered": failed, "config": to_dict(config)}
    write_whole(workdir / "problems.json", json.dumps(report, indent=2) + "\n")
    print(f"{len(lines)} problems in {path}")
    for reason, count in sorted(left_out.items()):
        print(f"  left out {count}: {reason}")
    return len(lines)
