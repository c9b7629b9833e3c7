"""Work under way, kept line by line: what is done is found again after a kill at any point, and joined over shards.

    <folder>/00001-of-00004.jsonl        a line of settings, then one JSON object with an `id` per piece of work

A row carries the fingerprint of what its work was made of, and the latest row of an id is the one that counts. So work
on inputs that have changed since is done again, and its new row stands in place of the old one. A row with `failed`
({"kind": …, "why": …}) is no work done: it is kept to be counted, and the next start tries again.

A line that is not whole, as a kill leaves the last one, or that is damaged, is no work done: the next start cuts it
off, says so and does the work again. What is done is what any file holds, so work may go on with another number of
shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rsagent_jax.config.build import to_dict
from rsagent_jax.config.endpoint import EndpointConfig, RemoteConfig
from rsagent_jax.config.schema import AgentConfig, DataConfig, SamplingConfig
from rsagent_jax.runtime.json_lines import mend_lines, parse_object
from rsagent_jax.runtime.paths import AppendFile, make_directory, open_lines, write_lines, writing
from rsagent_jax.runtime.workdir_lock import hold_journal
from rsagent_jax.types import DataError

if TYPE_CHECKING:  # readers of data leave jax out
    from rsagent_jax.runtime.processes import Share

SHOWN = 3  # ids named on the terminal
T = TypeVar("T")


def fingerprints(samples: Any, places: Mapping[str, int]) -> dict[str, str]:
    """By id: what the sample at its place is made of now; "" for one whose record cannot even be found."""
    out = {}
    for id, place in places.items():
        try:
            out[id] = samples.fingerprint(place)
        except DataError:  # reading the sample says it again, by name
            out[id] = ""
    return out


# What work that is taken up again need not agree in: where things are, how many at a time, how long is waited.
_ASKING = "key_variable timeout_s retries backoff_s concurrent per_minute price_in price_out".split()
FREE = {
    DataConfig: ("root", "exclude_root", "limit", "unreadable"),
    AgentConfig: ("tool_deadline_s",),
    SamplingConfig: ("slots", "chunk", "prefill", "lanes", "encode", "tensor"),
    EndpointConfig: _ASKING,
    RemoteConfig: _ASKING,
}


def decisive_settings(config: DataConfig | AgentConfig | SamplingConfig | EndpointConfig) -> dict[str, Any]:
    """What it must agree in."""
    return {k: v for k, v in to_dict(config).items() if k not in FREE[type(config)]}


class Journal:
    """Appends this shard's lines; `done` holds the ids that need not be done again.

    `current` are the fingerprints by id of all the work there is, not of this shard's alone. `notes` are for the
    terminal: what was cut off, what has changed and what is no longer there.
    """

    def __init__(self, folder: pathlib.Path, share: Share, settings: dict[str, Any], current: Mapping[str, str]):
        """DataError if the folder holds work of other settings, a file without its first line, or cannot be written
        to; or another process does this share."""
        self.path = folder / f"{share.index:05d}-of-{share.count:05d}.jsonl"
        self.settings, self.current, self.notes = settings, current, []
        with writing(self.path):
            make_directory(folder)
        with contextlib.ExitStack() as stack:
            stack.callback(hold_journal(self.path))
            self._open(folder)
            self._held = stack.pop_all()

    def _open(self, folder: pathlib.Path) -> None:
        settings, current = self.settings, self.current
        latest = _latest(folder, settings, damaged_lines=(others := []))
        rows = {line.id: line for line in latest}
        self.times = {id: line.at for id, line in rows.items()}
        self.done = {id for id, line in rows.items() if not line.failed and line.fingerprint == current.get(id)}
        worked = [id for id, line in rows.items() if not line.failed and id not in self.done]
        self.gone = [id for id in worked if id not in current]
        self.changed = [id for id in worked if id in current]
        for ids, what in (self.changed, "changed since, done again"), (self.gone, "no longer in the data, left out"):
            if ids:
                more = ", …" if len(ids) > SHOWN else ""
                self.notes.append(f"{what}: {len(ids)} ({', '.join(ids[:SHOWN])}{more})")
        with writing(self.path):
            if not self.path.exists():  # as a whole, so that no other shard ever sees it empty
                write_lines(self.path, (json.dumps({"settings": settings}) + "\n").encode())
            self.notes += mend_lines(self.path, lambda row: "settings" in row or _fields(row) is not None)
            self.notes += [note for note in others if not note.startswith(f"{self.path},")]
        self.file = AppendFile(self.path, gather=True)

    def left(self, work: Sequence[tuple[str, T]], what: str) -> list[T]:
        """Of (id, job) the jobs that are not done; says on the terminal how many are, and the notes."""
        left = [job for id, job in work if id not in self.done]
        goes_on = [f"goes on: {len(work) - len(left)} of {len(work)} {what} are done"] * (len(left) < len(work))
        for note in (*self.notes, *goes_on):
            print(note)
        return left

    def add(self, row: dict[str, Any]) -> None:
        """On the disk when this returns; in a bucket within a second, and work that a kill has lost is done again.
        DataError if it, or an earlier row, cannot be written."""
        # Later than the row that this one takes the place of: clocks of machines differ.
        at = max(time.time(), self.times.get(row["id"], 0.0) + 1e-3)
        self.file.add(json.dumps(row | {"fingerprint": self.current[row["id"]], "at": at}) + "\n")
        if "failed" not in row:
            self.done.add(row["id"])

    def close(self) -> None:
        with self._held:
            self.file.close()


def read_journal(
    folder: pathlib.Path,
    settings: dict[str, Any] | None = None,
    current: Mapping[str, str] | None = None,
    by: str = "at",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every id, ordered by the rows' `by`; one row in memory at a time.

    With `current` only of ids in it, and of rows made of the same. Damaged lines are left out, and named on the
    terminal. DataError if one was made with other settings (None = whatever they are).
    """
    lines = _latest(folder, settings, current, by, damaged_lines=(notes := []))
    for note in notes:
        print(note)
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(open_lines(path)) for path in sorted({line.path for line in lines})}
        for line in sorted(lines, key=lambda line: (line.key, line.where)):
            files[line.path].seek(line.offset)
            yield line.where, json.loads(files[line.path].readline())


def survey(
    folder: pathlib.Path, settings: dict[str, Any] | None = None, current: Mapping[str, str] | None = None
) -> dict[str, dict[str, str] | None]:
    """By id: None where the work is done, else the `failed` of its row. As `read` in all else."""
    return {line.id: line.failed for line in _latest(folder, settings, current)}


def settings_of(folder: pathlib.Path) -> dict[str, Any]:
    """What the work was done with. DataError if there is none."""
    for path in sorted(folder.glob("*-of-*.jsonl")):
        with open_lines(path) as file:
            return _head(path, file.readline())["settings"]
    raise DataError(f"{folder} holds nothing: there is no <i>-of-<n>.jsonl in it")


@dataclasses.dataclass(frozen=True)
class _Line:
    """What is needed of a row to choose among those of its id, and where it is."""

    id: str
    at: float  # when it was written, seconds of the epoch
    fingerprint: str | None
    failed: dict[str, str] | None
    key: Any  # what it is ordered by
    where: str
    path: pathlib.Path
    offset: int  # bytes


def _latest(
    folder: pathlib.Path,
    settings: dict[str, Any] | None,
    current: Mapping[str, str] | None = None,
    by: str = "at",
    *,
    damaged_lines: list[str] | None = None,
) -> list[_Line]:
    """Those that count. `damaged_lines` gets a sentence for each that is no row."""
    latest: dict[str, _Line] = {}
    for path in sorted(folder.glob("*-of-*.jsonl")):
        with open_lines(path) as file:
            offset = len(head := file.readline())
            _check_settings(_head(path, head)["settings"], settings, folder)
            for number, line in enumerate(file, start=2):
                where = f"{path}, line {number}"
                try:
                    row = parse_object(line)
                    id, at = _fields(row)
                    key = at if by == "at" else row[by]
                    new = _Line(id, at, row.get("fingerprint"), row.get("failed"), key, where, path, offset)
                    if id not in latest or at >= latest[id].at:
                        latest[id] = new
                except (ValueError, KeyError, TypeError) as error:
                    if not line.endswith(b"\n"):
                        break  # half of one: of a kill, or being written at this moment
                    if damaged_lines is not None:
                        damaged_lines.append(f"{where}: damaged ({error!r}), left out: its work is not done")
                offset += len(line)
    return [x for x in latest.values() if current is None or (x.id in current and x.fingerprint == current[x.id])]


def _fields(row: dict[str, Any]) -> tuple[str, float]:
    """Id and time. KeyError, TypeError or ValueError for what is no row."""
    if not isinstance(row["id"], str):
        raise TypeError("id")
    if "failed" in row and not all(isinstance(row["failed"][name], str) for name in ("kind", "why")):
        raise TypeError("failed")
    return row["id"], float(row.get("at", 0.0))


def _head(path: pathlib.Path, line: bytes) -> dict[str, Any]:
    """The first line. DataError where it is none: an empty file, a page of HTML, half a line."""
    try:
        head = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        head = None
    if not isinstance(head, dict) or not isinstance(head.get("settings"), dict):
        begins = f"it begins with {line[:40]!r}" if line else "it is empty"
        raise DataError(f"{path} is no journal of this command ({begins}); remove it, or put back the file as it was")
    return head


def _check_settings(there: dict[str, Any], settings: dict[str, Any] | None, folder: pathlib.Path) -> None:
    if settings is None:
        return
    old, new = flatten_settings(there), flatten_settings(json.loads(json.dumps(settings)))
    if differ := [ChangedField(k, old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)]:
        said = "; ".join(map(str, differ))
        raise DataError(
            f"{folder} holds results of other settings ({said[:600]}). Give another --workdir, or remove {folder} to"
            " start over"
        )


@dataclasses.dataclass(frozen=True)
class ChangedField:
    """A setting that another start had otherwise; in words for a refusal."""

    field: str
    old: Any
    new: Any
    why: str = ""

    def __str__(self) -> str:
        old, new = (text if len(text := json.dumps(v)) < 100 else text[:97] + "..." for v in (self.old, self.new))
        return f"{self.field}: {old} there, {new} now{f' ({self.why})' if self.why else ''}"


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value. Items of a group (reward terms, parts of a mix) are `group[name].field`, in any order."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= flatten_settings(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for item in value:
                group = f"{name}[{item.get('name') or item.get('function')}]"
                while f"{group}.weight" in out:  # one function as two terms
                    group += "'"
                out |= flatten_settings(item, f"{group}.")
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out


def damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where} is damaged ({error!r}); remove that line and run again")
