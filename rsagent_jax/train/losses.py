"""The arithmetic of an update: SFT and policy-gradient objectives over packed rows. Pure functions, all in fp32.

Arrays are f32[B, T] and aligned to the target token: `logprobs[b, t]` is log p(token t | earlier tokens of its
segment), any finite number where undefined. `loss_mask` bool[B, T] is True where token t was sampled, never on
padding. `segment_ids` i32[B, T] is 1.. per trajectory, 0 padding; a trajectory never crosses rows.

Nothing here divides by a count. A loss is a *sum* of per-token losses times `weights`, and `loss_weights` returns the
denominator as well.

Micro-batches, shards and hosts add sums and denominators and divide once, `sum / max(denominator, 1)`, so that
accumulation equals the large batch whatever the lengths. Metrics are sums too: `merge_metrics` adds them,
`mean_metrics` divides.

The clip ranges, the normalisation, KL and truncated importance sampling are ours: the paper only says GRPO.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rsagent_jax.array_types import Array, Bool, Float, Int, Scalar

Floats, Mask, Segments = Float[Array, "B T"], Bool[Array, "B T"], Int[Array, "B T"]

# name -> f32[]: sum over trained tokens, maximum where the name ends in _max; "tokens" counts them.
LossMetrics = dict[str, Scalar]

# Beyond e^20 a ratio is a fault, not a measurement; the bound keeps inf and NaN out of the other tokens' gradients.
_MAX_LOG_RATIO = 20.0


def loss_weights(normalize: str, loss_mask: Mask, segment_ids: Segments, *, length: float) -> tuple[Floats, Scalar]:
    """(weights, 0 off the mask; denominator), as `grpo.normalize` says.

    token     every trained token counts the same (DAPO): long trajectories weigh more. Denominator: trained tokens
    sequence  every trajectory counts the same, 1 / its trained tokens each (published GRPO). Denominator: trajectories
    constant  every token counts 1 / `length` in every batch (Dr. GRPO): no bias by length. Denominator: trajectories
    """
    weights = loss_mask.astype(jnp.float32)
    if normalize == "token":
        return weights, weights.sum()
    if normalize == "constant":
        weights = weights / length
    elif normalize != "sequence":
        raise ValueError(f"normalize {normalize!r}")
    lengths_BS = _segment_sums(loss_mask, segment_ids)
    if normalize == "sequence":
        lengths_BT = jnp.take_along_axis(lengths_BS, segment_ids, axis=1)
        weights = jnp.where(loss_mask, 1.0 / jnp.maximum(lengths_BT, 1.0), 0.0)
    return weights, jnp.sum(lengths_BS[:, 1:] > 0, dtype=jnp.float32)


def sft_loss(logprobs: Floats, loss_mask: Mask) -> tuple[Scalar, Scalar]:
    """(sum over trained tokens of -log p, number of them). The paper trains on reasoning and tool-call tokens only."""
    return -jnp.sum(jnp.where(loss_mask, logprobs.astype(jnp.float32), 0.0)), loss_mask.sum(dtype=jnp.float32)


def policy_loss(
    ratio: str,
    logprobs: Floats,
    old_logprobs: Floats,
    advantages: Floats,
    loss_mask: Mask,
    segment_ids: Segments,
    weights: Floats,
    *,
    clip_low: float | Scalar,
    clip_high: float | Scalar,
    tau_pos: float | Scalar = 1.0,
    tau_neg: float | Scalar = 1.05,
) -> tuple[Scalar, LossMetrics]:
    """(loss sum, metrics) of the objective that `grpo.ratio` names. r is the ratio to the policy of `old_logprobs`;
    the advantages A are constant over a trajectory, or with `grpo.turn_credit` over a turn.

    grpo   -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with each token's own r: GRPO, and DAPO's clip-higher
    gspo   (arXiv 2507.18071) the same with one r per trajectory, the geometric mean of its tokens'. The published
           objective has weights by sequence, and a clip range of about 3e-4 and 4e-4: these ratios are near 1
    cispo  (MiniMax-M1, arXiv 2506.13585) REINFORCE with a clipped, constant weight, -stop(clip(r)) A log p. Every token
           keeps a gradient, clipped or not. clip_low = 1 leaves the lower side open, as published
    sapo   (arXiv 2511.20347) -4 / tau sigmoid(tau (r - 1)) A, tau being tau_pos where A > 0 and tau_neg elsewhere: the
           gradient fades as r leaves 1 and is nowhere cut off. Published with weights by sequence
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, loss_mask)
    if ratio == "gspo":
        lengths_BS = _segment_sums(loss_mask, segment_ids)
        means_BS = _segment_sums(log_ratio, segment_ids) / jnp.maximum(lengths_BS, 1.0)
        log_ratio = jnp.where(loss_mask, jnp.take_along_axis(means_BS, segment_ids, axis=1), 0.0)
    r, low, high = jnp.exp(log_ratio), 1.0 - clip_low, 1.0 + clip_high
    if ratio == "cispo":
        bounded = jax.lax.stop_gradient(jnp.clip(r, low, high))
        loss = -jnp.sum(weights * bounded * advantages * jnp.where(loss_mask, logprobs.astype(jnp.float32), 0.0))
        clipped = (r < low) | (r > high)
    elif ratio == "sapo":
        tau = jnp.where(advantages > 0, tau_pos, tau_neg)
        loss = -jnp.sum(weights * jax.nn.sigmoid(tau * (r - 1.0)) * 4.0 / tau * advantages)
        clipped = jnp.zeros_like(loss_mask)
    elif ratio not in ("grpo", "gspo"):
        raise ValueError(f"ratio {ratio!r}")
    else:  # the case is spelt out: jnp.minimum splits the gradient where its arguments tie
        clipped = jnp.where(advantages > 0, r > high, (advantages < 0) & (r < low))
        loss = -jnp.sum(weights * jnp.where(clipped, jnp.where(advantages > 0, high, low), r) * advantages)
    # Tokens are the old policy's: kl_old estimates KL(old || policy); entropy_sampled, -log p, the entropy.
    per_token = dict(ratio=r, clip_fraction=clipped, kl_old=kl_estimate("k3", log_ratio))
    sums = _sums(loss_mask, **per_token, entropy_sampled=-logprobs.astype(jnp.float32))
    return loss, sums | {"ratio_max": jax.lax.stop_gradient(jnp.max(jnp.where(loss_mask, r, 0.0)))}


def kl_estimate(estimator: str, d: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """KL(policy || reference) per token, as `grpo.kl_estimator` says; d = log p_ref - log p of the sampled token.

    k1  -d. Unbiased, noisy; its gradient is 0 in expectation, so it is for watching and not for penalising
    k2  d^2 / 2. A biased value, with the gradient of KL(policy || reference) on on-policy samples
    k3  e^d - d - 1. Unbiased, never negative; its gradient is that of KL(reference || policy). GRPO's and Seg-Zero's
    """
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d**2
    if estimator != "k3":
        raise ValueError(f"estimator {estimator!r}")
    return jnp.expm1(d) - d


def kl_loss(
    logprobs: Floats,
    ref_logprobs: Floats,
    loss_mask: Mask,
    weights: Floats,
    *,
    estimator: str,
    coefficient: float,
) -> tuple[Scalar, LossMetrics]:
    """coefficient * sum of weights * KL, to add to an objective's sum; metric `kl_ref` without the coefficient."""
    kl = kl_estimate(estimator, _log_ratio(ref_logprobs, logprobs, loss_mask))
    return coefficient * jnp.sum(weights * kl), _sums(loss_mask, kl_ref=kl)


def entropy_bonus(
    entropy: Floats, loss_mask: Mask, weights: Floats, *, coefficient: float
) -> tuple[Scalar, LossMetrics]:
    """-coefficient * sum of weights * entropy, to add to an objective's sum; `entropy` f32[B, T] in nats is that of the
    whole distribution. With weights by token this is TRL's `entropy_coef`."""
    return -coefficient * jnp.sum(weights * jnp.where(loss_mask, entropy, 0.0)), _sums(loss_mask, entropy=entropy)


# --- Engine against trainer ---


def truncated_importance_weights(
    trainer_logprobs: Floats, engine_logprobs: Floats, loss_mask: Mask, *, cap: float
) -> tuple[Floats, LossMetrics]:
    """min(p_trainer / p_engine, cap) without gradient, 1 off the mask; multiply the weights by it.

    Both are log-probs of the policy that sampled, before the update: the engine's as sampled, the trainer's
    recomputed. It corrects for the two programs rounding differently. The objective's `old_logprobs` are then the
    trainer's; with one update per batch that is stop_gradient(logprobs), with several what the trainer said before the
    first (decoupled PPO, arXiv 2110.00641: clipped against the proximal policy, corrected for the behaviour policy).
    Without this correction, pass the engine's as `old_logprobs`.

    `mean_metrics` makes `ess` of the weights: the effective sample size as a share of the tokens, 1 where all weigh the
    same (Kish: (sum of w)^2 / (n * sum of w^2)).
    """
    log_ratio = jax.lax.stop_gradient(_log_ratio(trainer_logprobs, engine_logprobs, loss_mask))
    ratio = jnp.exp(log_ratio)
    weights = jnp.minimum(ratio, cap)
    metrics = _sums(loss_mask, tis_ratio=ratio, tis_truncated=ratio > cap, mismatch_kl=kl_estimate("k3", log_ratio))
    metrics |= _sums(loss_mask, ess_weight=weights, ess_square=weights**2)
    return weights, metrics | {"mismatch_logprob_max": jnp.max(jnp.abs(log_ratio))}


# --- Metrics ---


def merge_metrics(a: LossMetrics, b: LossMetrics) -> LossMetrics:
    """Metrics of two micro-batches of one objective together."""
    return {name: jnp.maximum(a[name], b[name]) if name.endswith("_max") else a[name] + b[name] for name in a}


def mean_over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over a step's updates of what each said; maxima of maxima."""
    return {n: float((max if n.endswith("_max") else np.mean)([u[n] for u in updates])) for n in updates[0]}


def mean_metrics(metrics: LossMetrics) -> LossMetrics:
    """Sums -> means per trained token; maxima and `tokens` as they are; `ess`, of no tokens 0."""
    tokens = jnp.maximum(metrics["tokens"], 1.0)
    means = {name: x if name == "tokens" or name.endswith("_max") else x / tokens for name, x in metrics.items()}
    if "ess_square" in means:
        square = means.pop("ess_square")
        means["ess"] = means.pop("ess_weight") ** 2 / jnp.where(square > 0, square, 1.0)
    return means


# --- Private ---


def _log_ratio(numerator: Array, denominator: Array, loss_mask: Array) -> Array:
    """f32[B, T], 0 off the mask, within +-20 (where it is cut it has no gradient)."""
    difference = numerator.astype(jnp.float32) - denominator.astype(jnp.float32)
    return jnp.clip(jnp.where(loss_mask, difference, 0.0), -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _sums(loss_mask: Array, **per_token: Array) -> LossMetrics:
    sums = {name: jnp.sum(jnp.where(loss_mask, x, 0.0), dtype=jnp.float32) for name, x in per_token.items()}
    return jax.lax.stop_gradient(sums | {"tokens": loss_mask.sum(dtype=jnp.float32)})


def _segment_sums(values_BT: Array, segment_ids: Array) -> Array:
    """f32[B, T + 1]: column s is the sum over the row's segment s, column 0 is padding. At most T segments a row."""
    length = segment_ids.shape[1]
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=length + 1))(
        values_BT.astype(jnp.float32), segment_ids
    )
