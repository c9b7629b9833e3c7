"""Work under way, kept line by line: what is done is found again after a kill at any point, and joined over shards.

    <folder>/00001-of-00004.jsonl        a line of settings, then one JSON object with an `id` per piece of work

Every line is whole or (the last one, after a kill) cut off at the next start. What is done is what any file holds, so
work may go on with another number of shards.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rsagent_jax.processes import Share
from rsagent_jax.types import DataError


class Journal:
    """Appends this shard's lines; `done` holds the ids that need not be done again."""

    def __init__(self, folder: pathlib.Path, share: Share, settings: dict[str, Any]):
        """DataError if the folder holds work of other settings, or cannot be written to."""
        self.path = folder / f"{share.index:05d}-of-{share.count:05d}.jsonl"
        self.done = {row["id"] for _, row in read(folder, settings)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            whole = _whole(self.path)
            self.file = self.path.open("ab")
            self.file.truncate(whole)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        if not whole:
            self._append(json.dumps({"settings": settings}))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """On the disk when this returns. DataError if the disk is full."""
        if rows:
            self._append("\n".join(json.dumps(row) for row in rows))
            self.done |= {row["id"] for row in rows}

    def _append(self, text: str) -> None:
        try:
            self.file.write(text.encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:  # what is still buffered does not fit either
            raise cannot_write(self.path, error) from None


def read(folder: pathlib.Path, settings: dict[str, Any] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every id of all shards, the first of its rows. DataError if a line is damaged, or made with
    other settings (None = whatever they are)."""
    for where, _, _, row in _rows(folder, settings):
        yield where, row


def read_in_order(folder: pathlib.Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same by the value of `key`, whatever order the work ended in; one row in memory at a time."""
    places = []
    for where, path, offset, row in _rows(folder, None):
        try:
            places.append((row[key], where, path, offset))
        except KeyError as error:
            raise damaged(where, error) from None
    for _, where, path, offset in sorted(places):
        with path.open("rb") as file:
            file.seek(offset)
            yield where, json.loads(file.readline())


def _rows(
    folder: pathlib.Path, settings: dict[str, Any] | None
) -> Iterator[tuple[str, pathlib.Path, int, dict[str, Any]]]:
    """(where, path, offset of the line, row)."""
    seen: set[str] = set()
    for path in sorted(folder.glob("*-of-*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                    if number == 1:
                        _same(row["settings"], settings, folder)
                    elif row["id"] not in seen:
                        seen.add(row["id"])
                        yield where, path, offset, row
                except DataError:
                    raise
                except (ValueError, KeyError, TypeError) as error:
                    raise damaged(where, error) from None
                offset += len(line)


def settings_of(folder: pathlib.Path) -> dict[str, Any]:
    """What the work was done with. DataError if there is none."""
    for path in sorted(folder.glob("*-of-*.jsonl")):
        with path.open("rb") as file:
            line = file.readline()
        if line.endswith(b"\n"):
            try:
                return json.loads(line)["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(f"{path}, line 1", error) from None
    raise DataError(f"{folder} holds nothing: no finished line in any <i>-of-<n>.jsonl")


def damaged(where: str, error: Exception) -> DataError:
    return DataError(f"{where} is damaged ({error!r}); remove that line and run again")


def write_whole(path: pathlib.Path, text: str) -> None:
    """The file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def cannot_write(path: pathlib.Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be written ({error.strerror or error}). What was written is kept: make room and run the same"
        " command again"
    )


def _whole(path: pathlib.Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _same(there: dict[str, Any], here: dict[str, Any] | None, folder: pathlib.Path) -> None:
    if here is None:
        return
    here = json.loads(json.dumps(here))
    differ = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if differ:
        said = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} now" for key in differ)
        raise DataError(
            f"{folder} holds results of other settings ({said[:600]}). Give another --workdir, or remove {folder} to"
            " start over"
        )
