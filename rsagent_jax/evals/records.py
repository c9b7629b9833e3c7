"""The results of an evaluation under way, in a journal (runtime/journal.py): one line per evaluated sample."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from rsagent_jax.evals.by_turn import Pixels
from rsagent_jax.evals.metrics import Counts
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.processes import Share
from rsagent_jax.types import Status

FOLDER = "shards"


@dataclasses.dataclass(frozen=True)
class Record:
    """One evaluated sample."""

    counts: Counts
    mask: dict[str, Any]  # COCO RLE of the final mask
    seconds: float  # of the wave it ran in, divided among it
    example: dict[str, Any]  # a line of trajectories.jsonl
    masks: tuple[tuple[int, Pixels], ...] = ()  # of every mask: the turn that made it, its pixels (evals/by_turn.py)
    failure: tuple[str, str] | None = None  # (kind, why) where the segmenter ended it: no measurement

    def to_row(self) -> dict[str, Any]:
        counts = dataclasses.asdict(self.counts) | {"status": self.counts.status.value}
        rest = {"mask": self.mask, "seconds": self.seconds, "example": self.example, "masks": self.masks}
        row = {"id": self.counts.id, "counts": counts, **rest}
        return row if self.failure is None else row | {"failed": _failed(*self.failure)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Record:
        """ValueError, KeyError or TypeError for a row that is not one."""
        pixels = _triples(row["counts"]["pixels"])
        counts = Counts(**row["counts"] | {"pixels": pixels, "status": Status(row["counts"]["status"])})
        masks = tuple((turn, _triples(pixels)) for turn, pixels in row["masks"])
        failure = (row["failed"]["kind"], row["failed"]["why"]) if "failed" in row else None
        return cls(counts, row["mask"], row["seconds"], row["example"], masks, failure)


def _triples(pixels: dict[str, Any]) -> Pixels:
    return {policy: tuple(triple) for policy, triple in pixels.items()}


def _failed(kind: str, why: str) -> dict[str, str]:
    return {"kind": kind, "why": why}


class Shard:
    """Appends the records of this shard; `done` holds the ids that need not be evaluated again."""

    def __init__(self, workdir: pathlib.Path, share: Share, settings: dict[str, Any], current: Mapping[str, str]):
        """`current`: fingerprints of all samples by id. DataError if the work directory holds results of other
        settings, or cannot be written to."""
        self.journal = journal.Journal(workdir / FOLDER, share, settings, current)
        self.done, self.notes, self.close = self.journal.done, self.journal.notes, self.journal.close

    def add(self, record: Record) -> None:
        self.journal.add([record.to_row()])

    def add_unreadable(self, id: str, kind: str, why: str) -> None:
        """A sample without a trajectory."""
        self.journal.add([{"id": id, "failed": _failed(kind, why)}])


@dataclasses.dataclass(frozen=True)
class FoundRecords:
    """What the shards hold of the samples as they are now, by id."""

    measured: dict[str, Record]
    failed: dict[str, Record]  # the segmenter ended them
    unreadable: dict[str, str]  # why


def read_records(workdir: pathlib.Path, settings: dict[str, Any], current: Mapping[str, str]) -> FoundRecords:
    """Of all shards. DataError if they were made with other settings or are damaged."""
    found = FoundRecords({}, {}, {})
    for where, row in journal.read_journal(workdir / FOLDER, settings, current):
        try:
            if "counts" in row:
                record = Record.from_row(row)
                (found.failed if record.failure else found.measured)[row["id"]] = record
            else:
                found.unreadable[row["id"]] = row["failed"]["why"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise journal.damaged(where, error) from None
    return found
