"""The results of an evaluation under way, in a journal (data/journal.py): one line per evaluated sample."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from rsagent_jax.data import journal
from rsagent_jax.evals.by_turn import Pixels
from rsagent_jax.evals.metrics import Counts
from rsagent_jax.processes import Share
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

    def to_row(self) -> dict[str, Any]:
        counts = dataclasses.asdict(self.counts) | {"status": self.counts.status.value}
        rest = {"mask": self.mask, "seconds": self.seconds, "example": self.example, "masks": self.masks}
        return {"id": self.counts.id, "counts": counts, **rest}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Record:
        """ValueError, KeyError or TypeError for a row that is not one."""
        pixels = _triples(row["counts"]["pixels"])
        counts = Counts(**row["counts"] | {"pixels": pixels, "status": Status(row["counts"]["status"])})
        masks = tuple((turn, _triples(pixels)) for turn, pixels in row["masks"])
        return cls(counts, row["mask"], row["seconds"], row["example"], masks)


def _triples(pixels: dict[str, Any]) -> Pixels:
    return {policy: tuple(triple) for policy, triple in pixels.items()}


class Shard:
    """Appends the records of this shard; `done` holds the ids that need not be evaluated again."""

    def __init__(self, workdir: pathlib.Path, share: Share, settings: dict[str, Any]):
        """DataError if the work directory holds results of other settings, or cannot be written to."""
        self.journal = journal.Journal(workdir / FOLDER, share, settings)
        self.done, self.close = self.journal.done, self.journal.close

    def add(self, records: Sequence[Record]) -> None:
        self.journal.add([record.to_row() for record in records])


def read(workdir: pathlib.Path, settings: dict[str, Any]) -> dict[str, Record]:
    """The records of all shards by sample id. DataError if they were made with other settings or are damaged."""
    found: dict[str, Record] = {}
    for where, row in journal.read(workdir / FOLDER, settings):
        try:
            found[row["id"]] = Record.from_row(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise journal.damaged(where, error) from None
    return found
