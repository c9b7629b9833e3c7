"""Trajectory -> reward. Every term is a `module:function` with a weight in the config, logged on its own.

From the paper (arXiv 2512.24023): R = 1.0 * R_final + 0.5 * R_process + 0.2 * R_format, the final term being the IoU
of the final mask, and the names of what R_process holds (step-wise IoU improvement, tool cost, novelty, point
sparsity). Ours: the definition of every other term, every coefficient inside R_process, and its clip range.

A researcher's own term is a function in a file or in any importable module (docs/rewards.md):

    def small_mask(trajectory: Trajectory, sample: Sample) -> float:
        return float(trajectory.final_mask.mean() < 0.5)
"""

import dataclasses
import numbers
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rsagent_jax.config.import_path import first_line, import_path, place
from rsagent_jax.config.reward import RewardGroup, RewardTerm
from rsagent_jax.masks import mask_iou
from rsagent_jax.types import DataError, Reward, Sample, Status, Trajectory

LARGEST = 1e6  # a term's value; beyond, sums and their float32 are not exact any more


def _ious(trajectory: Trajectory, sample: Sample) -> list[float]:
    """IoU of the empty mask, with which every trajectory starts, then of each mask in the order it was made."""
    empty = np.zeros_like(sample.gt_mask)
    return [mask_iou(mask, sample) for mask in (empty, *(record.mask for record in trajectory.masks))]


# --- Terms: each is (trajectory, sample) -> float ---


def final_iou(trajectory: Trajectory, sample: Sample) -> float:
    """IoU of the final mask, in [0, 1]. The paper's R_final.

    Silence is no answer (ours): without `finish` an empty mask earns 0, also where the target is absent and the empty
    mask is right. Else a policy would be paid for broken turns on every absent target.
    """
    if trajectory.status is not Status.FINISHED and not trajectory.final_mask.any():
        return 0.0
    return mask_iou(trajectory.final_mask, sample)


def iou_gain(trajectory: Trajectory, sample: Sample) -> float:
    """Sum over turns of max(0, IoU_t - best IoU before t), in [0, 1].

    Against the best so far and not the turn before, so that worsening a mask and mending it is not paid twice. The
    empty mask comes first: an absent target starts at 1 and has nothing to gain. The sum telescopes to the best IoU
    minus that start, so at equal weights `iou_gain - overshoot` is the final IoU minus it: between them the two
    weights say how much of the gain must be kept.
    """
    ious = _ious(trajectory, sample)
    return max(ious) - ious[0]


def overshoot(trajectory: Trajectory, sample: Sample) -> float:
    """Best IoU of any mask minus the final IoU, in [0, 1]: what was lost by not stopping. After MedSAM-Agent."""
    return max(_ious(trajectory, sample)) - final_iou(trajectory, sample)


def call_cost(trajectory: Trajectory, sample: Sample) -> float:
    """Number of tool calls made, refused ones included. `finish` is free: stopping must never cost."""
    return float(sum(turn.call is not None and not turn.call.ends for turn in trajectory.turns))


def novel_action(trajectory: Trajectory, sample: Sample) -> float:
    """Share in [0, 1] of effective actions that are not repeats; 0 where there is none.

    Effective: well-formed, not refused, not `finish`. A repeat is what the environment marked so, or an earlier call
    made again in the same view (the same view changes since the last reset), so that A, B, A, B does not pass for
    news. A share and not a count, so that it cannot be raised by acting more.
    """
    seen, views, effective, novel = set(), (), 0, 0
    for turn in trajectory.turns:
        call = turn.call
        if call is None or turn.error is not None or call.ends:
            continue
        effective += 1
        novel += not (turn.repeated or (call, views) in seen)
        seen.add((call, views))
        if call.changes_view:
            views = () if call.resets_view else (*views, call)
    return novel / effective if effective else 0.0


def point_excess(trajectory: Trajectory, sample: Sample, budget: int = 4) -> float:
    """Number of points above `budget` in a segment call, summed over the calls. The budget is ours."""
    return float(sum(max(0, len(getattr(t.call, "points", ())) - budget) for t in trajectory.turns))


def format_ok(trajectory: Trajectory, sample: Sample) -> float:
    """Share in [0, 1] of well-formed turns; 0 unless the policy ended the trajectory itself (FINISHED)."""
    if trajectory.status is not Status.FINISHED or not trajectory.turns:
        return 0.0
    return sum(turn.call is not None for turn in trajectory.turns) / len(trajectory.turns)


def overlong(trajectory: Trajectory, sample: Sample, limit: int, window: int) -> float:
    """How far the trajectory's tokens, images included, are into the last `window` before `limit`, in [0, 1]; 1 where
    they are over it, or the budget ended the trajectory.

    With weight -1 it is DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) with limit = L_max and window =
    L_cache. Ours: L_max is a whole trajectory's `grpo.sampling.context`, where DAPO's is an answer's.
    """
    return 1.0 if trajectory.status is Status.MAX_CONTEXT else _into(len(trajectory.tokens), limit, window)


def many_turns(trajectory: Trajectory, sample: Sample, limit: int = 8, window: int = 2) -> float:
    """The same of turns, with the limit `agent.max_turns`. Ours."""
    return _into(len(trajectory.turns), limit, window)


def _into(length: int, limit: int, window: int) -> float:
    return min(max((length - (limit - window)) / window, 0.0), 1.0) if window else float(length > limit)


# --- Composition ---


class RewardError(DataError):
    """A term raised, or returned what is no reward; the message names the term, the sample and the user's line."""


def make_reward(groups: Sequence[RewardGroup]) -> Callable[[Trajectory, Sample], Reward]:
    """The reward that `grpo.reward` of the config describes.

    total = sum over groups of weight * clip(sum over terms of weight * term).

    Functions are resolved here, once, so that a misspelt path, or one that cannot be called as it will be, fails before
    the first rollout. `Reward.parts` holds each term unweighted under `group/function` and each clipped group, before
    its weight, under `group`. Terms get arrays that they cannot write into.

    Raises:
      DataError: here, for a path that does not resolve.
      RewardError: from the reward, for a term that raises, or that returns anything but a number of at most LARGEST.
      ValueError: from the reward, for an ENV_FAILED trajectory (a broken tool is never scored; drop it from its
        group), or for a sample that is not the trajectory's own.
    """
    terms = [term for group in groups for term in group.terms]
    functions = {t: import_path(t.function, ("trajectory", "sample"), dict(t.arguments)) for t in terms}

    def reward(trajectory: Trajectory, sample: Sample) -> Reward:
        if not trajectory.status.judged:
            raise ValueError(f"sample {trajectory.sample_id}: a trajectory {trajectory.status} has no reward; drop it")
        if trajectory.sample_id != sample.id:
            raise ValueError(f"trajectory of sample {trajectory.sample_id} scored against sample {sample.id}")
        total, parts = 0.0, {}
        shown = read_only(trajectory), read_only(sample)
        for group in groups:
            value = 0.0
            for term, label in zip(group.terms, group.labels(), strict=True):
                raw = _value(functions[term], term, f"{group.name}/{label}", *shown)
                parts[f"{group.name}/{label}"] = raw
                value += term.weight * raw
            if group.clip:
                value = min(max(value, group.clip[0]), group.clip[1])
            parts[group.name] = value
            total += group.weight * value
        return Reward(total=total, parts=parts)

    return reward


def read_only(value: Any) -> Any:
    """The same with every array, of nested dataclasses and tuples as well, as a view that cannot be written into."""
    if isinstance(value, np.ndarray):
        view = value.view()
        view.flags.writeable = False
        return view
    if isinstance(value, tuple):
        return type(value)(map(read_only, value)) if type(value) is tuple else value
    if dataclasses.is_dataclass(value):
        fields = {field.name: read_only(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _value(function, term: RewardTerm, label: str, trajectory: Trajectory, sample: Sample) -> float:
    what = f"reward term {label} ({term.function})"
    try:
        value = function(trajectory, sample, **dict(term.arguments))
    except Exception as error:  # whatever the user's function raises is the user's to mend
        frames = traceback.extract_tb(error.__traceback__)  # ours, then the user's
        at, kind = place(error, frames[1].filename if len(frames) > 1 else term.function), type(error).__name__
        raise RewardError(f"{what} raised {kind} for sample {sample.id}: {at}: {first_line(error)}") from error
    # A bool is refused: `iou > 0.5` is a Python or a numpy bool by accident, and only one of them is a number.
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not abs(value) <= LARGEST:
        raise RewardError(
            f"{what} returned {repr(value)[:80]} for sample {sample.id};"
            f" it must be a float between {-LARGEST:.0f} and {LARGEST:.0f}"
        )
    return float(value)
