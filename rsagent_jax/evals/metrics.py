"""Segmentation metrics from integers, by LISA's rules (dvlab-research/LISA: train_ds.py `validate`, utils/utils.py)
unless `MetricConfig` says otherwise.

One result per sentence, at original resolution, pixels of the ignore mask excluded:

    IoU  = I / (U + 1e-5), and 1 where U = 0
    gIoU = mean of IoU over sentences
    cIoU = sum of I / (sum of U + 1e-10)

all as fractions of 1. By default nothing is dropped, and what a convention drops is counted:

* A **failure of the environment or the endpoint** (ENV_FAILED, POLICY_FAILED) has no mask to judge and measures
  nothing: `failure_policy` "refuse", the config's default, gives no summary with one in it. Where the user accepts
  them, they count as IoU 0 with I = 0 and the whole ground truth as U, even where the ground truth is empty and an
  empty mask would have been right ("zero"), or are left out ("dropped").
* **Other endings than FINISHED** (MAX_TURNS, MAX_CONTEXT, INVALID, REPEATED) keep their final mask, which is what a
  user would get, and are scored by it. They are failures to stop, so they are listed.

gRefCOCO adds, over the samples without and with a target: N-acc, the share of no-target samples answered by an empty
mask, and T-acc, the share of target samples answered by one that is not empty. A failure, and an ending that
`ending_policy` gives nothing for, is right in neither. What an `empty_policy` does with IoU and gIoU changes neither.

Intervals are bootstrapped by picture: sentences of one picture fail together, and as if they were independent their
intervals would be too narrow (docs/evaluation.md has the coverage).

`failures` in the summary counts every ending except FINISHED by kind.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.masks import intersection_union
from rsagent_jax.types import DataError, Sample, Status, Trajectory

UNMEASURED = (Status.ENV_FAILED, Status.POLICY_FAILED)  # nobody's answer: the tool or the endpoint is broken
LISA = MetricConfig(failure_policy="zero")
# What others report, to be read beside LISA's figures (their evaluation scripts; the unit is a matter of the data).
CONVENTIONS = {
    "lisa": LISA,
    "seg_zero": MetricConfig(ignore_policy="target", empty_policy="dropped", failure_policy="dropped", epsilon=0.0),
    "lens": MetricConfig(ignore_policy="background", failure_policy="zero"),
}


Pixels = dict[str, tuple[int, int, int]]  # (intersection, predicted, true) by ignore_policy


@dataclasses.dataclass(frozen=True)
class Counts:
    """What every convention needs of a sample."""

    id: str
    pixels: Pixels
    status: Status
    turns: int
    tool_errors: int  # turns whose call was malformed or refused


@dataclasses.dataclass(frozen=True)
class SampleResult:
    id: str
    intersection: int  # pixels
    union: int  # pixels
    status: Status
    turns: int
    tool_errors: int  # turns whose call was malformed or refused
    no_target: bool = False  # the ground truth is empty
    said_empty: bool = False  # the final mask is; never of a failure
    rules: MetricConfig = LISA

    def __post_init__(self):
        if not 0 <= self.intersection <= self.union or not 0 <= self.tool_errors <= self.turns:
            raise ValueError(f"impossible counts: {self}")

    @property
    def has_answer(self) -> bool:
        """Whether there is a mask to judge by these rules; it may be empty."""
        return _has_answer(self.status, self.rules)

    @property
    def iou(self) -> float:
        if not self.has_answer:
            return 0.0
        if not self.union:
            return float(self.rules.empty_policy == "one")
        return self.intersection / (self.union + self.rules.epsilon)

    @property
    def dropped(self) -> str | None:
        """Why the convention does not count this sample, or None."""
        if self.status in UNMEASURED:
            return "failure" if self.rules.failure_policy == "dropped" else None
        return "empty" if not self.union and self.rules.empty_policy == "dropped" else None


def count(trajectory: Trajectory, sample: Sample) -> Counts:
    """Raises ValueError if the trajectory is another sample's or its mask another size."""
    if trajectory.sample_id != sample.id:
        raise ValueError(f"trajectory of sample {trajectory.sample_id} scored against sample {sample.id}")
    errors = sum(turn.error is not None for turn in trajectory.turns)
    failure = trajectory.status in UNMEASURED
    mask = np.zeros_like(sample.gt_mask) if failure else trajectory.final_mask
    return Counts(sample.id, pixel_counts(mask, sample), trajectory.status, len(trajectory.turns), errors)


def judge(counts: Counts, rules: MetricConfig = LISA) -> SampleResult:
    """One sample under one convention."""
    intersection, predicted, true = counts.pixels[rules.ignore_policy]
    answered = _has_answer(counts.status, rules)
    if not answered or predicted < rules.empty_below:
        intersection = predicted = 0
    union = predicted + true - intersection
    said_empty = answered and not predicted
    ending = (counts.status, counts.turns, counts.tool_errors)
    return SampleResult(counts.id, intersection, union, *ending, not true, said_empty, rules)


def _has_answer(status: Status, rules: MetricConfig) -> bool:
    return status not in UNMEASURED and (rules.ending_policy != "zero" or status is Status.FINISHED)


def pixel_counts(mask: np.ndarray, sample: Sample) -> Pixels:
    """(intersection, predicted, true) of bool[h, w] by ignore_policy."""
    ignore, gt = sample.ignore_mask, sample.gt_mask
    excluded = _triple(mask, gt, ignore)
    if ignore is None or not ignore.any():
        return dict.fromkeys(("excluded", "target", "background"), excluded)
    return {
        "excluded": excluded,
        "target": _triple(mask, gt | ignore, None),
        "background": _triple(mask, gt & ~ignore, None),
    }


def _triple(mask: np.ndarray, gt: np.ndarray, ignore: np.ndarray | None) -> tuple[int, int, int]:
    intersection, union = intersection_union(mask, gt, ignore)
    true = int(np.count_nonzero(gt if ignore is None else gt & ~ignore))
    return intersection, union - true + intersection, true


@dataclasses.dataclass(frozen=True)
class Totals:
    """The figures of many results."""

    n: int  # samples that count
    dropped: dict[str, int]  # those that do not, by the reason
    giou: float
    ciou: float


def total_results(results: Sequence[SampleResult]) -> Totals:
    """The same in any order: counts are integers, and IoU is summed exactly."""
    counted, why = [r for r in results if not r.dropped], Counter(r.dropped for r in results)
    giou = math.fsum(r.iou for r in counted) / max(len(counted), 1)
    ciou = sum(r.intersection for r in counted) / (sum(r.union for r in counted) + 1e-10)
    return Totals(len(counted), {reason: why[reason] for reason in ("failure", "empty")}, giou, ciou)


def bootstrap_ci(values: Sequence[float], images: Sequence[str] | None = None, **options) -> tuple[float, float]:
    """95% percentile interval of the mean. images, options, errors: of `cluster_bootstrap_ci`."""
    rows = np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=-1)
    return cluster_bootstrap_ci(rows, lambda sums: sums[:, 0] / sums[:, 1], images, **options)


def cluster_bootstrap_ci(
    rows: np.ndarray, statistic: Callable, images: Sequence[str] | None = None, *, n: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a statistic of sums, from `n` resamples of the pictures with replacement.

    rows: f64[N, K], what is summed over samples; statistic: sums f64[n, K] -> f64[n]. A picture comes into a resample
    with all of its samples. `images` names the picture of each row; None = every sample is one of its own. Raises
    DataError without rows.
    """
    if not len(rows):
        raise DataError("no results to compute an interval from")
    sums = rows
    if images is not None:
        _, cluster = np.unique(np.asarray(images), return_inverse=True)
        sums = np.stack([np.bincount(cluster, column) for column in rows.T], axis=-1)
    count, rng = len(sums), np.random.default_rng(seed)
    # One resample at a time: all at once would be n x 10^4 indices on RefCOCO.
    draws = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(n))
    low, high = np.percentile(statistic(np.stack([times @ sums for times in draws])), [2.5, 97.5])
    return float(low), float(high)


def summarize_results(
    results: Iterable[SampleResult], settings: dict[str, Any], *, benchmark: str, images: dict[str, str] | None = None
) -> dict[str, Any]:
    """What results.json holds; the same whatever the order of `results`. JSON-ready if `settings` is.

    `settings` comes back with the metric's rules under `metric`. `tool_error_rate` is the share of turns whose call was
    malformed or refused. `n` counts the samples in gIoU, `dropped` what the rules left out. `n_acc`, `t_acc` and
    `giou_target` are there where a sample has no target. `images`: the picture of each id, which intervals are
    resampled by. DataError if there are no results, an id appears twice, or the rules refuse one that failed.
    """
    results = sorted(results, key=lambda result: result.id)
    if not results:
        raise DataError(f"benchmark {benchmark!r}: no results")
    ids, counted = Counter(r.id for r in results), [r for r in results if not r.dropped]
    if twice := [id for id, n in ids.items() if n > 1]:  # padding must not be counted
        raise DataError(f"sample {twice[0]!r} has more than one result; every sentence is counted once")
    if not counted:
        raise DataError(f"benchmark {benchmark!r}: the rules drop all of its {len(results)} samples")
    totals, endings = total_results(results), Counter(r.status for r in results)
    if (lost := sum(endings[status] for status in UNMEASURED)) and results[0].rules.failure_policy == "refuse":
        why = ", ".join(f"{status} {endings[status]}" for status in UNMEASURED if endings[status])
        raise DataError(f"benchmark {benchmark!r}: {lost} of {len(results)} samples are not measured ({why})")
    of = None if images is None else [images[r.id] for r in counted]
    rules = {"resolution": "original", **to_dict(results[0].rules)}
    turns, errors = sum(r.turns for r in results), sum(r.tool_errors for r in results)
    out = {
        "benchmark": benchmark,
        **dataclasses.asdict(totals),
        "giou_ci95": list(bootstrap_ci([r.iou for r in counted], of)),
        "ci_unit": "sample" if of is None else "picture",
        "pictures": None if of is None else len(set(of)),
        "failures": {status.value: endings[status] for status in Status if status is not Status.FINISHED},
        "mean_turns": turns / len(results),
        "tool_errors": errors,
        "tool_error_rate": errors / max(turns, 1),
        "settings": settings | {"metric": settings.get("metric", {}) | rules},
    }
    # Of all samples but dropped failures: an empty_policy drops from gIoU, not from the accuracies.
    judged = [r for r in results if r.dropped != "failure"]
    if absent := [r for r in judged if r.no_target]:
        present = [r for r in judged if not r.no_target]
        answered = sum(r.has_answer and not r.said_empty for r in present)
        out["n_acc"] = sum(r.said_empty for r in absent) / len(absent)
        out["t_acc"] = answered / len(present) if present else None
        out["giou_target"] = math.fsum(r.iou for r in present) / len(present) if present else None
    return out


def other_conventions(counts: Sequence[Counts]) -> dict[str, dict[str, Any]]:
    """The same trajectories under each of CONVENTIONS: n, what was dropped, gIoU, cIoU."""
    return {
        name: dataclasses.asdict(total_results([judge(c, rules) for c in counts])) | {"rules": to_dict(rules)}
        for name, rules in CONVENTIONS.items()
    }


def mask_pixels(trajectory: Trajectory, sample: Sample) -> tuple[tuple[int, Pixels], ...]:
    """(turn that made it, counted from 1; its pixels) for every mask of the trajectory."""
    made = {turn.mask_id: n for n, turn in enumerate(trajectory.turns, start=1) if turn.mask_id is not None}
    return tuple((made[m.id], pixel_counts(m.mask, sample)) for m in trajectory.masks)


def mask_ious(counts: Counts, masks: Iterable[tuple[int, Pixels]], rules: MetricConfig = LISA) -> list[float]:
    """IoU of each of these masks, had it been the answer."""
    tries = (dataclasses.replace(counts, status=Status.FINISHED, pixels=pixels) for _, pixels in masks)
    return [judge(t, rules).iou for t in tries]


def end_after(counts: Counts, masks: Sequence[tuple[int, Pixels]], turns: int) -> Counts:
    """The counts had the trajectory been ended after so many turns. Tool errors are not known by turn and stay 0."""
    if turns >= counts.turns:
        return counts
    made = [pixels for turn, pixels in masks if turn <= turns]
    nothing = {policy: (0, 0, true) for policy, (_, _, true) in counts.pixels.items()}
    latest = made[-1] if made else nothing
    return dataclasses.replace(counts, pixels=latest, status=Status.MAX_TURNS, turns=turns, tool_errors=0)


def turn_curve(
    found: Sequence[tuple[Counts, Sequence[tuple[int, Pixels]]]],
    rules: MetricConfig,
    max_turns: int,
    images: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """What the trajectories of one run would have been worth had they ended after 1, 2, … turns: a row for each.

    A row has gIoU with its 95% interval and cIoU of the latest (or committed) masks over the `n` samples that count,
    which an `empty_policy` that drops may make others in every row, the share of trajectories that had ended, and gIoU
    had an oracle picked the best mask so far. `images`: of each id, which intervals are resampled by.
    With `agent.announce_last` off a policy is not told how many turns it has: under greedy sampling the figures are
    then those of runs with `agent.max_turns = k`; with it, such a run may end better, since it is told its last turn.
    """
    rows = []
    for k in range(1, max_turns + 1):
        results = [judge(end_after(counts, masks, k), rules) for counts, masks in found]
        totals = total_results(results)
        counted = [r.iou for r in results if not r.dropped]
        of = None if images is None else [images[r.id] for r in results if not r.dropped]
        played = [(counts, [(turn, pixels) for turn, pixels in masks if turn <= k]) for counts, masks in found]
        best = [_best_iou(*p, r, rules) for p, r in zip(played, results, strict=True) if not r.dropped]
        rows.append(
            {
                "turns": k,
                "n": totals.n,
                "giou": totals.giou,
                "giou_ci95": list(bootstrap_ci(counted, of)) if counted else None,
                "ciou": totals.ciou,
                "ended": float(np.mean([counts.turns <= k for counts, _ in found])),
                "oracle_best_giou": float(np.mean(best)) if counted else 0.0,
            }
        )
    return rows


def _best_iou(counts: Counts, masks: Sequence[tuple[int, Pixels]], latest: SampleResult, rules: MetricConfig) -> float:
    """IoU of the best of these masks and of the latest, by what the samples count."""
    if latest.status in UNMEASURED:
        return latest.iou
    return max([latest.iou, *mask_ious(counts, masks, rules)])
