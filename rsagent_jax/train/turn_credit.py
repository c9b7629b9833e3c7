"""Which turn earned what: reward groups that are credited turn by turn (`grpo.turn_credit`), on the host.

What turn t earned is how much the groups' reward grew by it: their reward of the trajectory as if it had ended there,
less the same of one turn before. So the parts add up to the groups' reward, whatever terms are in it and wherever a
group is clipped, and a term of one's own needs nothing new. Of the default `process` group that is the paper's
step-wise gain in IoU, each call's cost at the call, and what `finish` loses or keeps.

A token of turn t then counts for what came from t on, with the rest of the reward as before:

    V_t = total - sum over turns s < t of what s earned
    advantage of turn t = grpo.advantage over the group's V_t

A member that had ended by then stands in the group with all of its later turns at 0, so its V_t is what stopping was
worth. V_0 is the whole reward, so the first turn's advantage is that of `turn_credit = ()`. Rewards-to-go are those of
GRPO's process supervision (DeepSeekMath, arXiv 2402.03300, 4.1.3), normalised turn by turn inside the group as in
MT-GRPO (arXiv 2505.11821). Ours: increments of one and the same reward, and members that have ended as the baseline.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from rsagent_jax.array_types import Bool, Float, Float32
from rsagent_jax.rewards import RewardError
from rsagent_jax.types import Reward, Sample, Status, Trajectory

Values = Float[np.ndarray, "n G K"]
Scorer = Callable[[Sequence[Sequence[Trajectory]], Sequence[Sample]], list[Reward | RewardError]]


def earned_by_turn(
    score: Scorer, played: Sequence[tuple[Trajectory, Sample]]
) -> list[Float[np.ndarray, " turns"] | RewardError]:
    """What each turn added to the reward of the credited groups, of every trajectory; the error where there is one.

    score: that of rewards.make_scorer. It is asked once of all, so that terms that wait do so side by side.
    """
    ended = [[*(cut_after(t, turns) for turns in range(len(t.turns))), t] for t, _ in played]
    scored = iter(score(ended, [sample for _, sample in played]))
    rewards = [list(itertools.islice(scored, len(own))) for own in ended]
    errors = [next((r for r in own if isinstance(r, RewardError)), None) for own in rewards]
    return [error or np.diff([r.total for r in own]) for own, error in zip(rewards, errors, strict=True)]


def cut_after(trajectory: Trajectory, turns: int) -> Trajectory:
    """As if it had ended as MAX_TURNS after so many: its masks until then, the latest as the final one or an empty one.
    Tokens and seconds stay those of the whole."""
    kept = trajectory.turns[:turns]
    made = {turn.mask_id for turn in kept}
    masks = tuple(record for record in trajectory.masks if record.id in made)
    final = masks[-1].mask if masks else np.zeros_like(trajectory.final_mask)
    return dataclasses.replace(
        trajectory,
        turns=kept,
        masks=masks,
        final_mask=final,
        final_mask_id=masks[-1].id if masks else None,
        status=Status.MAX_TURNS,
    )


def rewards_to_go(totals: Float[np.ndarray, "n G"], earned: Sequence[Float[np.ndarray, " turns"]]) -> Values:
    """V of every turn; K is that of the longest. `earned`: of each trajectory in the order of `totals`, row by row."""
    longest = max([1, *map(len, earned)])
    before = np.zeros((totals.size, longest))
    for row, parts in zip(before, earned, strict=True):
        row[1 : len(parts)] = np.cumsum(parts)[: len(parts) - 1]
        row[max(len(parts), 1) :] = np.sum(parts)
    return totals[..., None] - before.reshape(*totals.shape, longest)


def by_token(advantages: Float32[np.ndarray, " K"], loss_mask: Bool[np.ndarray, " T"]) -> Float32[np.ndarray, " T"]:
    """Each turn's advantage at its tokens. Something is forced between two turns, so a turn is a run of the mask."""
    starts = loss_mask & ~np.append(False, loss_mask[:-1])
    turn = np.clip(np.cumsum(starts) - 1, 0, len(advantages) - 1)
    return np.where(loss_mask, advantages[turn], np.float32(0))
