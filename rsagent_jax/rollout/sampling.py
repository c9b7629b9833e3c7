"""Draws a token per slot: temperature, top-k, top-p. Nothing is sorted: bisection finds both filters' thresholds."""

import jax
import jax.numpy as jnp

from rsagent_jax.config.schema import SamplingConfig


def sample_tokens(
    logits_SV: jax.Array, sampling: SamplingConfig, keys: jax.Array, steps: jax.Array, temperature_S: jax.Array
):
    """(tokens i32[S], log-probs f32[S]). `temperature_S` f32[S]: each slot's temperature, 0 = greedy; where
    sampling.temperature is 0 all are. The draw of step n of a key depends on these alone.

    Log-probs are of softmax(logits / temperature), as the trainer computes them: without top-k and top-p, which change
    what is drawn and not what is learned from. Of greedy slots they are of softmax(logits / sampling.temperature), and
    of softmax(logits) where that is 0.
    """
    scale = sampling.temperature or 1.0
    if sampling.temperature:
        scale = jnp.where(temperature_S > 0, temperature_S, scale)[:, None]
    logp = jax.nn.log_softmax(logits_SV / scale)
    scores = logits_SV
    if sampling.temperature:  # as jax.random.categorical draws, but one search for the largest serves both
        kept = filtered(logp, sampling.top_k, sampling.top_p)
        noise = jax.vmap(lambda key, n, p: jax.random.gumbel(jax.random.fold_in(key, n), p.shape, p.dtype))
        scores = jnp.where((temperature_S > 0)[:, None], kept + noise(keys, steps, kept), logits_SV)
    token = jnp.argmax(scores, axis=-1)
    return token.astype(jnp.int32), jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def filtered(logp_SV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Log-probs with -inf for what is not among the `top_k` likeliest (0: all), nor in the nucleus of mass `top_p`.

    The nucleus is the smallest set of likeliest tokens whose mass, after top-k, reaches `top_p`: the token that crosses
    it is in. Tokens as likely as the last one in are in, too.
    """
    if top_k and top_k < logp_SV.shape[-1]:
        probs = jnp.exp(logp_SV)
        kept = probs >= _threshold(probs, jnp.ones_like(probs), jnp.full(len(probs), float(top_k)))[:, None]
        logp_SV = jnp.where(kept, logp_SV, -jnp.inf)
    if top_p < 1.0:
        probs = jnp.exp(logp_SV)
        limit = _threshold(probs, probs, top_p * probs.sum(-1))
        logp_SV = jnp.where(probs >= limit[:, None], logp_SV, -jnp.inf)
    return logp_SV


def _threshold(probs_SV: jax.Array, weights_SV: jax.Array, wanted_S: jax.Array) -> jax.Array:
    """The largest t with sum(weights[probs >= t]) >= wanted: bisection over the bits, which order floats >= 0."""
    bits = jax.lax.bitcast_convert_type(probs_SV, jnp.int32)

    def step(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = jnp.sum(jnp.where(bits >= middle[:, None], weights_SV, 0.0), -1) >= wanted_S
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    zero = jnp.zeros(len(bits), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, step, (zero, zero + bits.max()))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
