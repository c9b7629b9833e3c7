"""Top-k and top-p against transformers' own, and the draw's distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsagent_jax.config.schema import SamplingConfig
from rsagent_jax.rollout.sampling import filtered, sample_tokens


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 3, 17, 60]), st.sampled_from([1.0, 0.95, 0.5, 0.1, 1e-3]))
def test_top_k_then_top_p_keep_what_transformers_keeps(seed, k, p):
    pytest.importorskip("torch")
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(seed).normal(size=(3, 50)).astype(np.float32) * 3
    theirs = torch.tensor(logits)
    if k:
        theirs = TopKLogitsWarper(k)(None, theirs)
    if p < 1:
        theirs = TopPLogitsWarper(p)(None, theirs)
    ours = filtered(jax.nn.log_softmax(jnp.asarray(logits)), k, p)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))


def test_tokens_as_likely_as_the_last_one_in_are_in():
    logp = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2]]))
    assert np.isfinite(filtered(logp, 2, 1.0)).all()
    assert np.isfinite(filtered(logp, 0, 0.5)).all()
    assert np.isfinite(filtered(logp, 1, 1.0)).tolist() == [[True, False, False, False]]


def test_draws_follow_the_filtered_distribution_and_log_probs_the_whole_one():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    sampling, count = SamplingConfig(temperature=1.0, top_k=2), 4000
    keys = jax.random.split(jax.random.key(0), count)
    steps, drawn = jnp.zeros(count, jnp.int32), jnp.ones(count)
    tokens, logprobs = sample_tokens(jnp.tile(logits, (count, 1)), sampling, keys, steps, drawn)
    shares = np.bincount(tokens, minlength=4) / count
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0, 0], atol=4 * np.sqrt(2 / 9 / count))  # four sigma
    np.testing.assert_allclose(logprobs, np.asarray(logits)[tokens], atol=1e-6)


def test_each_slot_draws_at_its_own_temperature_or_takes_the_likeliest_token():
    p, count = np.array([0.3, 0.4, 0.3]), 4000
    keys, warmth = jax.random.split(jax.random.key(0), count), jnp.arange(count) % 2 * 0.5
    logits, steps = jnp.tile(jnp.log(p), (count, 1)), jnp.zeros(count, jnp.int32)
    tokens, logprobs = map(np.asarray, sample_tokens(logits, SamplingConfig(temperature=1.0), keys, steps, warmth))
    assert (tokens[::2] == 1).all()
    np.testing.assert_allclose(logprobs[::2], np.log(0.4), atol=1e-6)
    sharp = p**2 / (p**2).sum()  # at temperature 0.5
    np.testing.assert_allclose(np.bincount(tokens[1::2]) / (count / 2), sharp, atol=4 * np.sqrt(0.25 / (count / 2)))
    np.testing.assert_allclose(logprobs[1::2], np.log(sharp)[tokens[1::2]], atol=1e-6)
    alone = sample_tokens(logits, SamplingConfig(temperature=0.5), keys, steps, jnp.full(count, 0.5))
    np.testing.assert_array_equal(tokens[1::2], np.asarray(alone[0])[1::2])
