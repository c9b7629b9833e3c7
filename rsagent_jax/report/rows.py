"""The trajectories below a directory as rows of a table: read once, then only what is new.

    index = RowIndex(directory)
    index.refresh()                     what was added since; half a line is none yet
    select_rows(index.rows, asked)      filtered and sorted
    index.example(row)                  the trajectory itself: one record of one file is read

A directory is the work directory of evaluate.py, collect or train.py, a stored set, or has such directories in it. Rows
are known by keys that stay the same when a file is written anew, such as `eval-grpo:refcoco/…`.
"""

import base64
import dataclasses
import functools
import json
import math
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.data.npz import read_arrays
from rsagent_jax.data.shards import open_array_record
from rsagent_jax.report.trajectory import Example, collected_example, evaluated_example, stored_example
from rsagent_jax.runtime.json_lines import parse_object
from rsagent_jax.runtime.paths import is_remote
from rsagent_jax.types import DataError

STAMP = "collect.json"  # of a stored set (data/trajectories.py)
STORED = ("", "dumps/*/", "validation/*/*/*/")  # where they are in a work directory
RESULTS = ("results.json", "trajectories.jsonl")  # of an evaluation that is done
LOOKED_FOR = "shards/ of evaluate.py, attempts/ of collect, rollouts.jsonl or dumps/ of train.py, or a stored set"
WORDS = ("q", "status", "source", "sort", "page", "row", "turn")  # of a query; all others are ranges of values
RULES = [f for f in dataclasses.fields(MetricConfig) if f.name != "failure_policy"]
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A trajectory, as the table has it."""

    key: str
    source: str
    sample: str
    query: str
    status: str
    values: dict[str, float]  # iou, turns, step, reward, advantage, and the reward's terms by their names
    at: float  # of rows with one key the latest counts
    place: tuple[int, int, int]  # of its line or record: where it begins, how long it is, which part of it

    def to_json(self) -> dict[str, Any]:
        """What the page is given."""
        return {name: getattr(self, name) for name in ("key", "source", "sample", "query", "status", "values")}


Fields = tuple[str, str, str, str, dict[str, Any], float]  # key, sample, query, status, values, at


def select_rows(rows: Iterable[Row], asked: Mapping[str, str]) -> list[Row]:
    """Those that a query asks for. DataError for one that cannot be understood.

    q=text of the question or the sample's id, status=, source=; NAME=LOW..HIGH of a value, either end may be missing;
    sort=NAME or sort=-NAME (falling). A row without the value is in no range of it, and last when sorted.
    """
    ranges = {name: _range(name, text) for name, text in asked.items() if name not in WORDS and text}
    text = asked.get("q", "").casefold()
    found = [
        row
        for row in rows
        if text in f"{row.query}\n{row.sample}".casefold()
        and asked.get("status") in (None, "", row.status)
        and asked.get("source") in (None, "", row.source)
        and all(name in row.values and low <= row.values[name] <= high for name, (low, high) in ranges.items())
    ]
    if name := asked.get("sort", "").removeprefix("-"):
        sign = -1 if asked["sort"].startswith("-") else 1
        found.sort(key=lambda row: (name not in row.values, sign * row.values.get(name, 0)))
    return found


def _range(name: str, text: str) -> tuple[float, float]:
    low, dots, high = text.partition("..")
    try:
        if dots:
            return float(low or "-inf"), float(high or "inf")
    except ValueError:
        pass
    raise DataError(f"{name}={text} is no range; the form is {name}=0.2..0.8, and either end may be left out")


# ------------------------------------------------------------------------------------ what lines and records say


def _values(**named: Any) -> dict[str, float]:
    """Those that there are; a reward's total and its terms."""
    reward = named.pop("reward", None) or {}
    named |= {"reward": reward.get("total"), **{k: v for k, v in reward.items() if k != "total"}}
    return {k: v for k, v in named.items() if isinstance(v, int | float) and math.isfinite(v)}


def _evaluated(line: dict[str, Any]) -> Iterator[Fields]:
    """Of a line of an evaluation's journal, or of its trajectories.jsonl."""
    e = line.get("example", line)
    turns = len(json.loads(e["record"])["turns"])
    yield e["id"], e["id"], e["query"], e["status"], _values(iou=e["iou"], turns=turns), line.get("at", 0.0)


def _evaluated_example(line: dict[str, Any], _: int) -> Example:
    return evaluated_example(line.get("example", line))


def _collected(line: dict[str, Any]) -> Iterator[Fields]:
    values = _values(iou=line["iou"], turns=line["turns"], tokens=line["tokens"])
    yield line["id"], line["sample"], line["query"], line["status"], values, line.get("at", 0.0)


def _collected_example(line: dict[str, Any], _: int) -> Example:
    return collected_example(line)


def _stored(record: bytes) -> tuple:
    """The Fields behind the key."""
    about = json.loads(read_arrays(record)["header"].tobytes())
    replayed = json.loads(about["replay"])
    values = _values(**{name: about.get(name) for name in ("step", "iou", "reward", "advantage", "tokens")})
    values["turns"] = len(replayed["turns"])
    return about.get("sample", about.get("id", "")), replayed["query"], about.get("status", ""), values, 0.0


def _group(line: dict[str, Any]) -> Iterator[Fields]:
    """Of a line of rollouts.jsonl: the first group of a step."""
    for number, (said, more) in enumerate(zip(line["trajectories"], line["played"], strict=True)):
        figures = {name: said[name] for name in ("reward", "advantage")}
        values = _values(step=line["step"], iou=more["iou"], turns=len(said["turns"]), **figures)
        yield f"{line['step']}/{number}", line["id"], line["query"], said["status"], values, 0.0


def _group_example(line: dict[str, Any], part: int) -> Example:
    names = {name: line[name] for name in ("id", "query", "gt", "image")}
    return evaluated_example(names | line["played"][part] | {"status": line["trajectories"][part]["status"]})


# --------------------------------------------------------------------------------------------- files of many rows


class GrowingFile:
    """A file of JSON lines that may grow, or be put in place of by another, while it is read."""

    rules = ""

    def __init__(self, path: pathlib.Path, source: str, read: Callable, example: Callable):
        """read: the Fields of a line's trajectories; example: the Example of a line and the number of one of them."""
        self.path, self.source, self.read, self.make = path, source, read, example
        self.file, self.offset = None, 0
        self.rows: dict[str, Row] = {}
        self.damaged, self.unplayed = 0, 0  # lines that are none; pieces of work without a trajectory

    def refresh(self) -> bool:
        """Whether there is anything new."""
        now = os.stat(self.path)
        # The open file keeps its inode from being given to another.
        other = (
            self.file is None
            or not os.path.samestat(now, os.fstat(self.file.fileno()))
            or now.st_size < self.offset  # cut off
        )
        if other:
            self.file, self.offset, self.rows, self.damaged, self.unplayed = self.path.open("rb"), 0, {}, 0, 0
        before = self.offset
        self.file.seek(before)
        for line in self.file if now.st_size > before else ():
            if not line.endswith(b"\n"):  # half of one: it is being written
                break
            self._add(line)
            self.offset += len(line)
        return other or self.offset > before

    def _add(self, text: bytes) -> None:
        try:
            line = parse_object(text)
            if "settings" in line:  # the first line of a journal
                return
            if "failed" in line and "record" not in line and "example" not in line:
                self.unplayed += 1
                return
            for part, (key, *fields) in enumerate(self.read(line)):
                key, place = f"{self.source}:{key}", (self.offset, len(text), part)
                self.rows[key] = Row(key, self.source, *fields, place)
        except DAMAGED:
            self.damaged += 1

    def _line(self, row: Row) -> dict[str, Any]:
        return parse_object(os.pread(self.file.fileno(), row.place[1], row.place[0]))

    def example(self, row: Row) -> Example:
        return self.make(self._line(row), row.place[2])

    def record(self, row: Row) -> bytes | None:
        """The stored trajectory, which has the tokens; None where there is none."""
        return base64.b64decode(self._line(row)["record"]) if self.read is _collected else None


class ResultsFile(GrowingFile):
    """The trajectories.jsonl of an evaluation that is done, whose samples and rules are those of results.json: its
    journal has samples that are no longer in the data too, and IoU by the rules of the start that played them."""

    rules, written = "", 0  # rules of IoU that are not the defaults; when results.json was written, which is last
    unread = 0  # whether that could not be read

    def refresh(self) -> bool:
        """Whether there is anything new."""
        path = self.path.with_name("results.json")
        now = os.stat(path).st_mtime_ns
        if not super().refresh() and now == self.written:
            return False
        self.written, before, self.unread = now, self.unread, 0
        try:
            results = parse_object(path.read_bytes())
            self.unplayed = len(results.get("unreadable", ()))
            rules = results.get("settings", {}).get("metric", {})
            own = (f"{f.name} {rules[f.name]}" for f in RULES if rules.get(f.name, f.default) != f.default)
            self.rules = ", ".join(own)
        except DAMAGED:
            self.unread = 1
        self.damaged = max(0, self.damaged - before) + self.unread
        return True


class RecordFile:
    """A file of a stored set, which is whole once its stamp is written."""

    unplayed, rules = 0, ""

    def __init__(self, path: pathlib.Path, source: str, within: str):
        """within: its folder, as keys have it."""
        self.path, self.source, self.within, self.state = path, source, within, None
        self.rows: dict[str, Row] = {}
        self.damaged = 0

    def refresh(self) -> bool:
        """Whether there is anything new."""
        now = os.stat(self.path)
        if self.state and os.path.samestat(now, self.state) and now.st_mtime_ns == self.state.st_mtime_ns:
            return False
        self.state, self.rows, self.damaged = now, {}, 0
        try:
            reader = open_array_record(self.path, "make it again")
        except DataError:
            self.damaged = 1
            return True
        for number in range(reader.num_records()):
            key = f"{self.source}:{self.within}/{self.path.stem}/{number}"
            try:
                (record,) = reader.read([number])
                self.rows[key] = Row(key, self.source, *_stored(record), (number, 1, 0))
            except (RuntimeError, *DAMAGED):
                self.damaged += 1
        return True

    def record(self, row: Row) -> bytes | None:
        # Opened for each: a run may have more of these than a process may have open.
        return open_array_record(self.path, "make it again").read([row.place[0]])[0]

    def example(self, row: Row) -> Example:
        return stored_example(self.record(row), {})


class RowIndex:
    """All rows below a directory. Several threads may use it."""

    def __init__(self, directory: pathlib.Path):
        """DataError where there is no such directory on this machine."""
        if is_remote(directory) or not directory.is_dir():
            raise DataError(
                f"{directory} is no directory of this machine; give a work directory, or copy it here first"
            )
        self.directory, self.lock = directory, threading.Lock()
        self.files: dict[pathlib.Path, GrowingFile | RecordFile] = {}
        self.rows: dict[str, Row] = {}
        self.version = 0  # grows with every change

    def refresh(self) -> int:
        """Reads what is new, and returns the version. A file that vanishes meanwhile takes its rows along."""
        with self.lock:
            found, changed = dict(_files(self.directory)), False
            changed = bool(self.files.keys() - found.keys())
            self.files = {path: self.files.get(path) or make() for path, make in found.items()}
            for path, file in list(self.files.items()):
                try:
                    changed |= file.refresh()
                except OSError:
                    del self.files[path]
                    changed = True
            if changed:
                rows: dict[str, Row] = {}
                for key, row in ((k, r) for file in self.files.values() for k, r in file.rows.items()):
                    if key not in rows or row.at >= rows[key].at:
                        rows[key] = row
                self.rows, self.version = rows, self.version + 1  # at once: it is read without the lock
            return self.version

    def notes(self) -> list[str]:
        """What is no row, counted, and by which rules IoU is where they are not the defaults."""
        kinds = {"damaged lines or records are left out": sum(f.damaged for f in self.files.values())}
        kinds["pieces of work have no trajectory: unreadable, or not measured"] = sum(
            f.unplayed for f in self.files.values()
        )
        rules = [f"IoU of {f.source} is by its own rules: {f.rules}" for f in self.files.values() if f.rules]
        return [*(f"{n} {what}" for what, n in kinds.items() if n), *rules]

    def example(self, row: Row) -> Example:
        """DataError where its record cannot be read any more."""
        return self._of(row, "example")

    def record(self, row: Row) -> bytes | None:
        """The stored trajectory, which has the tokens; None where there is none. DataError as above."""
        return self._of(row, "record")

    def _of(self, row: Row, what: str) -> Any:
        with self.lock:
            try:
                file = next(file for file in self.files.values() if file.rows.get(row.key) is row)
                return getattr(file, what)(row)
            except (StopIteration, OSError, *DAMAGED) as error:
                raise DataError(f"{row.key} cannot be read any more ({error!r}); load the page again") from None


def _files(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, Callable]]:
    """Every file that has trajectories, and what makes its reader."""
    children = sorted(p for p in root.iterdir() if p.is_dir())
    for folder in (root, *children, *(p for child in children for p in sorted(child.glob("process_*")))):
        source = root.resolve().name if folder == root else folder.relative_to(root).as_posix()
        done = [folder / "trajectories.jsonl"] * all((folder / name).exists() for name in RESULTS)
        evaluated = [] if done else sorted(folder.glob("shards/*-of-*.jsonl"))
        yield from (
            (path, functools.partial(ResultsFile, path, source, _evaluated, _evaluated_example)) for path in done
        )
        collected = sorted(folder.glob("attempts/*-of-*.jsonl"))
        for paths, name, how in (
            (evaluated, source, (_evaluated, _evaluated_example)),
            (collected, source, (_collected, _collected_example)),
            (sorted(folder.glob("rollouts*.jsonl")), f"{source}/rollouts", (_group, _group_example)),
        ):
            yield from ((path, functools.partial(GrowingFile, path, name, *how)) for path in paths)
        for stamp in (p for pattern in STORED for p in sorted(folder.glob(f"{pattern}{STAMP}"))):
            within = stamp.parent.relative_to(folder)
            if not (collected and within.parts == ()):  # what was kept of the attempts
                name = "/".join((source, *within.parts[:1]))
                records = sorted(stamp.parent.glob("*.array_record"))
                yield from ((path, functools.partial(RecordFile, path, name, within.as_posix())) for path in records)
