"""The results of an evaluation under way: appended sample by sample, found again after a stop, joined over shards.

    <workdir>/shards/00001-of-00004.jsonl        a line of settings, then one line per sample

Every line is whole or (the last one, after a kill) cut off at the next start. What is done is what any file holds, so a
run may go on with another number of shards; what it adds up to does not depend on who did what.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from rsagent_jax.evals.metrics import Counts
from rsagent_jax.processes import Share
from rsagent_jax.types import DataError, Status

FOLDER = "shards"


@dataclasses.dataclass(frozen=True)
class Record:
    """One evaluated sample."""

    counts: Counts
    mask: dict[str, Any]  # COCO RLE of the final mask
    seconds: float  # of the wave it ran in, divided among it
    example: dict[str, Any]  # a line of trajectories.jsonl

    def to_json(self) -> str:
        counts = dataclasses.asdict(self.counts) | {"status": self.counts.status.value}
        return json.dumps({"counts": counts, "mask": self.mask, "seconds": self.seconds, "example": self.example})

    @classmethod
    def from_json(cls, line: str) -> Record:
        """ValueError, KeyError or TypeError for a line that is not one."""
        value = json.loads(line)
        counts = value["counts"]
        pixels = {policy: tuple(triple) for policy, triple in counts["pixels"].items()}
        counts = Counts(**counts | {"pixels": pixels, "status": Status(counts["status"])})
        return cls(counts, value["mask"], value["seconds"], value["example"])


class Shard:
    """Appends the records of this shard; `done` holds the ids that need not be evaluated again."""

    def __init__(self, workdir: pathlib.Path, share: Share, settings: dict[str, Any]):
        """DataError if the work directory holds results of other settings, or cannot be written to."""
        self.path = workdir / FOLDER / f"{share.index:05d}-of-{share.count:05d}.jsonl"
        self.done = set(read(workdir, settings))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab")
            self.file.truncate(_whole(self.path))
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        if not self.path.stat().st_size:
            self._append(json.dumps({"settings": settings}))

    def add(self, records: Sequence[Record]) -> None:
        """On the disk when this returns. DataError if the disk is full."""
        self._append("\n".join(record.to_json() for record in records))
        self.done |= {record.counts.id for record in records}

    def _append(self, text: str) -> None:
        try:
            self.file.write(text.encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:  # what is still buffered does not fit either
            raise _cannot_write(self.path, error) from None


def read(workdir: pathlib.Path, settings: dict[str, Any]) -> dict[str, Record]:
    """The records of all shards by sample id. DataError if they were made with other settings or are damaged."""
    found: dict[str, Record] = {}
    for path in sorted((workdir / FOLDER).glob("*-of-*.jsonl")):
        lines = path.read_bytes()[: _whole(path)].decode("utf-8", "replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                if number == 1:
                    _same(json.loads(line)["settings"], settings, workdir)
                    continue
                record = Record.from_json(line)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{path}, line {number} is damaged ({error!r}); remove that line and run again"
                ) from None
            found.setdefault(record.counts.id, record)
    return found


def _whole(path: pathlib.Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _same(there: dict[str, Any], here: dict[str, Any], workdir: pathlib.Path) -> None:
    here = json.loads(json.dumps(here))
    differ = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if differ:
        said = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} now" for key in differ)
        raise DataError(
            f"{workdir} holds results of other settings ({said[:600]}). Give another --workdir, or remove"
            f" {workdir / FOLDER} to start over"
        )


def _cannot_write(path: pathlib.Path, error: OSError) -> DataError:
    return DataError(
        f"{path} cannot be written ({error.strerror or error}). What was written is kept: make room and run the same"
        " command again"
    )


def write_whole(path: pathlib.Path, text: str) -> None:
    """The file as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _cannot_write(path, error) from None
