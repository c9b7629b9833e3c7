"""The results of an evaluation under way, in a journal (runtime/journal.py): one line per evaluated sample."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rsagent_jax.agent.environment import EnvState
from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.evals.metrics import LISA, Counts, Pixels, count, judge, mask_ious, mask_pixels
from rsagent_jax.masks import encode_rle
from rsagent_jax.rollout.play import failure_of
from rsagent_jax.runtime import journal
from rsagent_jax.runtime.image_files import checksum, keep_image
from rsagent_jax.types import Sample, Status, Trajectory

FOLDER = "shards"


@dataclasses.dataclass(frozen=True)
class Record:
    """One evaluated sample."""

    counts: Counts
    mask: dict[str, Any]  # COCO RLE of the final mask
    seconds: float  # of the wave it ran in, divided among it
    example: dict[str, Any]  # a line of trajectories.jsonl
    masks: tuple[tuple[int, Pixels], ...] = ()  # of every mask: the turn that made it, its pixels
    failure: tuple[str, str] | None = None  # (kind, why) where the segmenter ended it: no measurement
    sample_checksum: str = ""  # of `checksum_of`; "" = not known: an earlier version wrote it

    def to_row(self) -> dict[str, Any]:
        """A row of the journal; JSON-ready."""
        row = {"id": self.counts.id} | dataclasses.asdict(self)
        failure = row.pop("failure")
        return row | ({"failed": {"kind": failure[0], "why": failure[1]}} if failure else {})

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """ValueError, KeyError or TypeError for a row that is not one."""
        pixels = _triples(row["counts"]["pixels"])
        counts = Counts(**row["counts"] | {"pixels": pixels, "status": Status(row["counts"]["status"])})
        masks = tuple((turn, _triples(pixels)) for turn, pixels in row["masks"])
        failure = (row["failed"]["kind"], row["failed"]["why"]) if "failed" in row else None
        known = row.get("sample_checksum", "")
        return cls(counts, row["mask"], float(row["seconds"]), row["example"], masks, failure, known)


def make_record(
    workdir: pathlib.Path,
    sample: Sample,
    trajectory: Trajectory,
    state: EnvState,
    seconds: float,
    rules: MetricConfig = LISA,
) -> Record:
    """What an evaluation keeps of a trajectory. A picture that is no file of its own is written below `workdir`."""
    counts, masks = count(trajectory, sample), mask_pixels(trajectory, sample)
    path = sample.path or keep_image(workdir, sample.image)
    example = {
        "id": sample.id,
        "query": sample.query,
        "status": trajectory.status.value,
        **shown_ious(counts, masks, rules),
        "gt": encode_rle(sample.gt_mask),
        "image": path,
        "record": state_to_json(state, path),
    }
    failure = failure_of(state)
    mask = encode_rle(trajectory.final_mask)
    return Record(counts, mask, seconds, example, masks, failure, checksum_of(sample))


def shown_ious(counts: Counts, masks: Sequence[tuple[int, Pixels]], rules: MetricConfig) -> dict[str, Any]:
    """Of the answer and of every mask, for people: also of what an `empty_policy` drops from the figures."""
    if rules.empty_policy == "dropped":
        rules = dataclasses.replace(rules, empty_policy="one")
    return {"iou": judge(counts, rules).iou, "ious": mask_ious(counts, masks, rules)}


def checksum_of(sample: Sample) -> str:
    """16 hex digits of its question, picture, target and ignored pixels as decoded: the same wherever the files lie,
    unlike the fingerprints of journals, which take what a file system or a bucket says."""
    ignored = None if sample.ignore_mask is None or not sample.ignore_mask.any() else encode_rle(sample.ignore_mask)
    parts = [sample.query, checksum(sample.image), encode_rle(sample.gt_mask), ignored]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _triples(pixels: dict[str, Any]) -> Pixels:
    return {policy: tuple(triple) for policy, triple in pixels.items()}


def read_records(
    workdir: pathlib.Path, settings: dict[str, Any], current: Mapping[str, str]
) -> tuple[dict[str, Record], dict[str, str]]:
    """(what was played, why a sample cannot be read) by id, of the samples as they are now and of all shards.

    DataError if they were made with other settings or are damaged.
    """
    played, unreadable = {}, {}
    for where, row in journal.read_journal(workdir / FOLDER, settings, current):
        try:
            if "counts" in row:
                played[row["id"]] = Record.from_row(row)
            else:
                unreadable[row["id"]] = row["failed"]["why"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise journal.damaged(where, error) from None
    return played, unreadable
