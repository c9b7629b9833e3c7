"""Segmentation metrics by LISA's rules (dvlab-research/LISA: train_ds.py `validate`, utils/utils.py), from integers.

One result per sentence, at original resolution, pixels of the ignore mask excluded:

    IoU  = I / (U + 1e-5), and 1 where U = 0
    gIoU = mean of IoU over sentences
    cIoU = sum of I / (sum of U + 1e-10)

all as fractions of 1. Nothing is ever dropped:

* A **failure of the environment** (ENV_FAILED, or an exception before there is a trajectory) has no mask to judge. It
  counts as IoU 0 with I = 0 and the whole ground truth as U, even where the ground truth is empty and an empty mask
  would have been right.
* **Other endings than FINISHED** (MAX_TURNS, MAX_CONTEXT, INVALID, REPEATED) keep their final mask, which is what a
  user would get, and are scored by it. They are failures to stop, so they are listed.

`failures` in the summary counts every ending except FINISHED by kind. Counts are integers, so that hosts merge
exactly and in any order; send them as Python integers, they do not fit 32 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rsagent_jax.rewards import intersection_union
from rsagent_jax.types import DataError, Sample, Status, Trajectory

# IoU is summed in units of 2^-40, as integers: exact whatever the order, and within 1e-12 of the float mean.
_IOU_UNITS = 2**40

_RULES = {
    "resolution": "original",
    "ignore_policy": "excluded",
    "empty_policy": "IoU 1 where prediction and ground truth are both empty",
    "failure_policy": "env_failed: IoU 0, whole ground truth as union; other endings: their final mask",
}


# --- One sample ---


@dataclasses.dataclass(frozen=True)
class SampleResult:
    id: str
    intersection: int  # pixels
    union: int  # pixels
    status: Status
    turns: int
    tool_errors: int  # turns whose call was malformed or refused

    def __post_init__(self):
        if not 0 <= self.intersection <= self.union or not 0 <= self.tool_errors <= self.turns:
            raise ValueError(f"impossible counts: {self}")

    @property
    def iou(self) -> float:
        if self.status is Status.ENV_FAILED:
            return 0.0
        return self.intersection / (self.union + 1e-5) if self.union else 1.0


def score(trajectory: Trajectory, sample: Sample) -> SampleResult:
    """Judges the final mask. Raises ValueError if the trajectory is another sample's or its mask another size."""
    if trajectory.sample_id != sample.id:
        raise ValueError(f"trajectory of sample {trajectory.sample_id} scored against sample {sample.id}")
    turns = len(trajectory.turns)
    errors = sum(turn.error is not None for turn in trajectory.turns)
    if trajectory.status is Status.ENV_FAILED:
        return dataclasses.replace(failed(sample), turns=turns, tool_errors=errors)
    intersection, union = intersection_union(trajectory.final_mask, sample.gt_mask, sample.ignore_mask)
    return SampleResult(sample.id, intersection, union, trajectory.status, turns, errors)


def failed(sample: Sample) -> SampleResult:
    """The result of a sample for which no trajectory came back at all: IoU 0, union = the whole ground truth."""
    _, union = intersection_union(np.zeros_like(sample.gt_mask), sample.gt_mask, sample.ignore_mask)
    return SampleResult(sample.id, 0, union, Status.ENV_FAILED, turns=0, tool_errors=0)


# --- Sums and counts ---


@dataclasses.dataclass(frozen=True)
class Totals:
    """Everything the metrics need of many results; integers only."""

    n: int = 0
    intersection: int = 0  # pixels
    union: int = 0  # pixels
    iou_units: int = 0  # sum of IoU, in 2^-40
    turns: int = 0
    tool_errors: int = 0
    endings: tuple[int, ...] = (0,) * len(Status)  # in the order of Status

    @property
    def giou(self) -> float:
        return self.iou_units / _IOU_UNITS / self.n if self.n else 0.0

    @property
    def ciou(self) -> float:
        return self.intersection / (self.union + 1e-10)


def total(results: Iterable[SampleResult]) -> Totals:
    totals = Totals()
    for r in results:
        ending = tuple(int(r.status is status) for status in Status)
        one = Totals(1, r.intersection, r.union, round(r.iou * _IOU_UNITS), r.turns, r.tool_errors, ending)
        totals = merge(totals, one)
    return totals


def merge(a: Totals, b: Totals) -> Totals:
    """Totals of two disjoint sets of results, exactly: associative and commutative, with Totals() neutral."""
    endings = tuple(x + y for x, y in zip(a.endings, b.endings, strict=True))
    sums = {f.name: getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(Totals) if f.name != "endings"}
    return Totals(**sums, endings=endings)


# --- Intervals ---


def ious(results: Iterable[SampleResult]) -> dict[str, float]:
    """IoU by sample id. Raises DataError if an id appears twice: a host's padding must not be counted."""
    by_id: dict[str, float] = {}
    for result in results:
        if result.id in by_id:
            raise DataError(f"sample {result.id!r} has more than one result; every sentence is counted once")
        by_id[result.id] = result.iou
    return by_id


def bootstrap_ci(values: Sequence[float], *, n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, from `n` resamples with replacement. Raises DataError without values."""
    array = np.asarray(values, np.float64)
    if not array.size:
        raise DataError("no results to compute an interval from")
    rng = np.random.default_rng(seed)
    # One resample at a time: all at once would be n x 10^4 indices on RefCOCO.
    means = [array[rng.integers(0, array.size, array.size)].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap_ci(
    a: Mapping[str, float], b: Mapping[str, float], *, n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of mean(a - b), the two being values by sample id, paired by id.

    Raises DataError if the ids differ: an interval over the samples that happen to be in both would flatter one of
    them.
    """
    if a.keys() != b.keys():
        differ = sorted(a.keys() ^ b.keys())
        raise DataError(
            f"the two runs do not cover the same samples: {len(differ)} ids are in one only, such as {differ[:3]}"
        )
    return bootstrap_ci([a[key] - b[key] for key in sorted(a)], n=n, seed=seed)


# --- results.json ---


def summarize(results: Iterable[SampleResult], settings: Mapping[str, Any], *, benchmark: str) -> dict[str, Any]:
    """What results.json holds; the same whatever the order of `results`. JSON-ready if `settings` is.

    `settings` comes back with the metric's rules added under `metric`. `tool_error_rate` is the share of turns whose
    call was malformed or refused. Raises DataError if there are no results or an id appears twice.
    """
    results = sorted(results, key=lambda result: result.id)
    if not results:
        raise DataError(f"benchmark {benchmark!r}: no results")
    values = ious(results)
    totals = total(results)
    return {
        "benchmark": benchmark,
        "n": totals.n,
        "giou": totals.giou,
        "ciou": totals.ciou,
        "giou_ci95": list(bootstrap_ci(list(values.values()))),
        "failures": {s.value: c for s, c in zip(Status, totals.endings, strict=True) if s is not Status.FINISHED},
        "mean_turns": totals.turns / totals.n,
        "tool_error_rate": totals.tool_errors / max(totals.turns, 1),
        "settings": dict(settings) | {"metric": dict(_RULES)},
    }
