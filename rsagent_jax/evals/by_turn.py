"""What a trajectory would have been worth had it ended after k turns: the one-turn against k-turns curve of one run.

What counts after k turns is the latest mask. With `agent.announce_last` off a policy is not told how many turns it has:
under greedy sampling the figures are then those of runs with `agent.max_turns = k`, without running them; with it, such
a run may end better, since its policy is told its last turn. Beside them the best mask so far, which only an oracle
could have chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsagent_jax.config.schema import MetricConfig
from rsagent_jax.evals import metrics
from rsagent_jax.evals.metrics import Counts, SampleResult
from rsagent_jax.types import Sample, Status, Trajectory

Pixels = dict[str, tuple[int, int, int]]  # (intersection, predicted, true) by ignore_policy


def mask_pixels(trajectory: Trajectory, sample: Sample) -> tuple[tuple[int, Pixels], ...]:
    """(turn that made it, counted from 1; its pixels) for every mask of the trajectory."""
    made = {turn.mask_id: n for n, turn in enumerate(trajectory.turns, start=1) if turn.mask_id is not None}
    return tuple((made[m.id], metrics.pixel_counts(m.mask, sample)) for m in trajectory.masks)


def after(counts: Counts, masks: Sequence[tuple[int, Pixels]], turns: int) -> Counts:
    """The counts had the trajectory been ended after so many turns. Tool errors are not known by turn and stay 0."""
    if turns >= counts.turns:
        return counts
    made = [pixels for turn, pixels in masks if turn <= turns]
    nothing = {policy: (0, 0, true) for policy, (_, _, true) in counts.pixels.items()}
    latest = made[-1] if made else nothing
    return dataclasses.replace(counts, pixels=latest, status=Status.MAX_TURNS, turns=turns, tool_errors=0)


def curve(
    found: Sequence[tuple[Counts, Sequence[tuple[int, Pixels]]]],
    rules: MetricConfig,
    max_turns: int,
    images: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """A row for each number of turns: gIoU with its 95% interval and cIoU of the latest (or committed) masks, the share
    of trajectories that had ended, and gIoU had an oracle picked the best mask so far. `images`: of each id, which
    intervals are resampled by."""
    rows = []
    for k in range(1, max_turns + 1):
        results = [metrics.judge(after(counts, masks, k), rules) for counts, masks in found]
        totals = metrics.total_results(results)
        counted = [r.iou for r in results if not r.dropped]
        of = None if images is None else [images[r.id] for r in results if not r.dropped]
        played = [(counts, [pixels for turn, pixels in masks if turn <= k]) for counts, masks in found]
        best = [_best(*p, r, rules) for p, r in zip(played, results, strict=True) if not r.dropped]
        rows.append(
            {
                "turns": k,
                "giou": totals.giou,
                "giou_ci95": list(metrics.bootstrap_ci(counted, of)) if counted else None,
                "ciou": totals.ciou,
                "ended": float(np.mean([counts.turns <= k for counts, _ in found])),
                "oracle_best_giou": float(np.mean(best)) if counted else 0.0,
            }
        )
    return rows


def _best(counts: Counts, masks: Sequence[Pixels], latest: SampleResult, rules: MetricConfig) -> float:
    """IoU of the best of these masks and of the latest, by what the samples count."""
    if latest.status is Status.ENV_FAILED:
        return latest.iou
    tries = [dataclasses.replace(counts, status=Status.FINISHED, pixels=pixels) for pixels in masks]
    return max([latest.iou, *(metrics.judge(t, rules).iou for t in tries)])
