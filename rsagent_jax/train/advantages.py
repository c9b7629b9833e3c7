"""Rewards -> advantages, on the host. n groups (prompts) of G samples each.

`valid` is False for ENV_FAILED members: their reward is meaningless (it may be NaN), they enter no
statistic and get advantage 0. A group that carries no signal (`zero_variance`) gets 0 throughout. Each is also
given `ddof`, which only the z-score has a use for.
"""

import functools
from collections.abc import Callable

import numpy as np

from rsagent_jax.array_types import Bool, Float, Float32, Float64, Int
from rsagent_jax.config.schema import ADVANTAGES

Rewards = Float[np.ndarray, "n G"]
Valid = Bool[np.ndarray, "n G"]
Advantages = Float32[np.ndarray, "n G"]

# Rewards are of order 1; two that differ by less than this differ by rounding. A z-score would blow such a difference
# up.
_SPREAD = 1e-6


def advantage_function(name: str, ddof: int = 1) -> Callable[[Rewards, Valid], Advantages]:
    """f(rewards, valid) -> advantages, as `grpo.advantage` and `grpo.ddof` say."""
    return functools.partial(globals()[ADVANTAGES[name]], ddof=ddof)


def group_zscore(rewards: Rewards, valid: Valid, *, ddof: int = 1, eps: float = 1e-6) -> Advantages:
    """(r - mean) / (std + eps) inside each group: GRPO, Eq. 6 of the paper.

    Which std the paper uses is not known. ddof=1 (unbiased) is Seg-Zero's; ddof=0 makes advantages larger by
    sqrt(G / (G - 1)), 1.155 at G = 4.
    """
    centred, count = _centred(rewards, valid)
    # Usable groups have at least 2 members; the maximum only keeps 0 / 0 out of the others.
    std = np.sqrt(np.sum(centred**2, axis=1, keepdims=True) / np.maximum(count - ddof, 1))
    return (centred / (std + eps)).astype(np.float32)


def mean_only(rewards: Rewards, valid: Valid, *, ddof: int = 1) -> Advantages:
    """r - mean inside each group: Dr. GRPO. Groups with little spread are not scaled up."""
    return _centred(rewards, valid)[0].astype(np.float32)


def leave_one_out(rewards: Rewards, valid: Valid, *, ddof: int = 1) -> Advantages:
    """r - mean of the other members: RLOO's baseline (arXiv 2402.14740). Equal to mean_only times count / (count - 1).

    All of RLOO, on the policy that sampled: with grpo.normalize = constant, which weighs every token alike, the
    gradient is that of its sum over a trajectory's log-probs. Off that policy the ratios here are by token, RLOO's is
    one of the whole trajectory (and its KL is part of the reward).
    """
    centred, count = _centred(rewards, valid)
    return (centred * count / np.maximum(count - 1, 1)).astype(np.float32)


def scale_by_batch(
    advantages: Float[np.ndarray, "n G ..."], values: Float[np.ndarray, " m"], *, ddof: int = 1, eps: float = 1e-6
) -> Float32[np.ndarray, "n G ..."]:
    """advantages / (std + eps), the standard deviation being that of `values`: of all groups of a step together, so
    that groups keep their relative weights (`grpo.advantage_scale`).

    rewards     every valid reward of the step: TRL's scale_rewards="batch" over `mean` (its eps is 1e-4)
    advantages  every valid member's advantage, over `mean`: REINFORCE++-baseline (arXiv 2501.03262), which counts a
                trajectory once for each of its tokens; over `loo`: TRL's RLOO with normalize_advantages. Their mean is
                0 inside every group, so there is none to take off
    """
    deviations = values.astype(np.float64) - np.mean(values, dtype=np.float64) if len(values) else np.zeros(1)
    std = np.sqrt(np.sum(deviations**2) / max(len(values) - ddof, 1))
    return (advantages / (std + eps)).astype(np.float32)


def zero_variance(rewards: Rewards, valid: Valid, spread: float = _SPREAD) -> Bool[np.ndarray, " n"]:
    """Groups with nothing to learn from, to be dropped or refilled: fewer than two valid rewards, or none more
    than `spread` from another. A reward that is not finite is an error of its term (rewards.RewardError).
    """
    widest = np.where(valid, rewards, -np.inf).max(axis=1) - np.where(valid, rewards, np.inf).min(axis=1)
    return (valid.sum(axis=1) < 2) | (widest <= max(spread, _SPREAD))


def _centred(rewards: Rewards, valid: Valid) -> tuple[Float64[np.ndarray, "n G"], Int[np.ndarray, "n 1"]]:
    """Reward minus the group's mean, 0 for invalid members and useless groups; valid members."""
    usable = valid & ~zero_variance(rewards, valid)[:, None]
    count = valid.sum(axis=1, keepdims=True)
    clean = np.where(valid, rewards, 0.0).astype(np.float64)
    mean = clean.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    return np.where(usable, clean - mean, 0.0), count
