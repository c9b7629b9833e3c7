"""The chunked loss over the vocabulary against the whole one; packed gradients; remat. No torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rsagent_jax.models.qwen25_vl.logprobs import token_logprobs, token_logprobs_and_entropy

from . import tiny

SMALL = tiny.Case("small", ((1, 4, 10),), depth=1, fullatt=(0,))


@functools.cache
def program():
    """(model, function of a row -> (loss, hub name -> gradient))."""
    model = tiny.random_model(SMALL, seed=1)
    graphdef, state = nnx.split(model)

    def loss(state, row):
        model = nnx.merge(graphdef, state)
        return tiny.sft_loss(model, model(row), row)

    compiled = jax.jit(jax.value_and_grad(loss), compiler_options=tiny.QUICK)

    def call(row):
        value, grads = compiled(state, row)
        return float(value), tiny.to_hub(nnx.merge(graphdef, grads), "float32")

    return model, call


def gradients(parts):
    """Of a packed row. All rows have one shape."""
    model, call = program()
    return call(tiny.pack(parts, model.config, length=96, capacity=256))


def parts():
    return [tiny.sequence(SMALL, 1, ((1, 10, 6),)), tiny.sequence(SMALL, 2, ((1, 4, 8), (1, 4, 4)))]


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_gradients_of_a_packed_row_are_the_sum_of_those_of_its_sequences():
    _, packed = gradients(parts())
    alone = [gradients([part])[1] for part in parts()]
    n = [len(part.tokens) - 1 for part in parts()]
    for name, got in packed.items():
        want = (n[0] * alone[0][name] + n[1] * alone[1][name]) / sum(n)
        assert relative_error(got, want) <= 1e-5, name


def test_a_row_without_images_gives_the_vision_tower_a_gradient_of_exactly_zero():
    """Its patch buffer is all padding, which must neither be seen nor turn into NaN on the way back."""
    _, grads = gradients([tiny.sequence(SMALL, 4, ())])
    for name, value in grads.items():
        assert bool(value.any()) == (not name.startswith("visual.")), name
        assert np.isfinite(value).all(), name


@pytest.mark.parametrize(("piece", "temperature"), [(1, 1.0), (7 * 32, 0.7), (1 << 20, 1.3)])
def test_log_probabilities_entropies_and_gradients_by_pieces_equal_those_of_the_whole_softmax(piece, temperature):
    """Also where only some places are wanted, and beside log-probabilities that are those without entropies."""
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(2, 16, 8)).astype(np.float32), rng.normal(size=(41, 8)).astype(np.float32)
    targets, wanted = rng.integers(0, 41, (2, 16)), rng.random((2, 16)) < 0.6
    weights = rng.normal(size=(2, 2, 16)).astype(np.float32)

    def by_pieces(hidden, head):
        found = token_logprobs_and_entropy(hidden, head, targets, wanted, temperature=temperature, piece=piece)
        return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    def whole(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head.T / temperature)
        found = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], -jnp.sum(jnp.exp(log_p) * log_p, -1)
        found = [jnp.where(wanted, x, 0.0) for x in found]
        return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    run = [jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (by_pieces, whole)]
    ((_, got), grads), ((_, want), wants) = (f(hidden, head) for f in run)
    for x, y in zip((*got, *grads), (*want, *wants), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(np.abs(y).max(), 1))
    how = dict(temperature=temperature, piece=piece)
    alone = jax.jit(lambda *x: token_logprobs(*x, targets, wanted, **how))(hidden, head)
    np.testing.assert_array_equal(alone, got[0])


@pytest.mark.slow
@pytest.mark.parametrize("most", [None, 0, 1, 128, 129, 300, 384])
@pytest.mark.parametrize("piece", [1 << 20, 384 * 3 * 7])
def test_log_probabilities_of_the_wanted_places_alone_and_their_gradients(most, piece):
    """Three rows of 384 places; the fullest wants `most`, the next half of them, the last none; None: all."""
    rng = np.random.default_rng(most or 0)
    hidden, head = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 384, 8), (40, 8)))
    targets, weight = rng.integers(0, 40, (3, 384)), rng.normal(size=(3, 384)).astype(np.float32)
    wanted = np.full((3, 384), most is None)
    for row, count in zip(wanted, (most or 0, (most or 0) // 2, 0), strict=True):
        row[rng.permutation(384)[:count]] = True

    def whole(hidden, head):
        log_p = jax.nn.log_softmax(hidden @ head.T / 0.9)
        log_p = jnp.where(wanted, jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], 0.0)
        return jnp.sum(weight * log_p), log_p

    def some(hidden, head):
        log_p = token_logprobs(hidden, head, targets, None if most is None else wanted, temperature=0.9, piece=piece)
        return jnp.sum(weight * log_p), log_p

    run = [jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True)) for f in (some, whole)]
    ((_, got), grads), ((_, want), wants) = (f(hidden, head) for f in run)
    assert (np.asarray(got)[~wanted] == 0).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    for x, y in zip(grads, wants, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(np.abs(y).max(), 1))


def test_places_that_nobody_wants_are_not_computed():
    """768 places of which a quarter and no more are wanted: what stands at the others does not reach the gradient."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 384, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    targets, wanted = rng.integers(0, 40, (2, 384)), np.zeros((2, 384), bool)
    wanted.reshape(-1)[rng.permutation(768)[:256]] = True  # a quarter is 192, 256 in round numbers
    hidden[~wanted] = np.nan

    @jax.jit
    def grads(hidden, head, wanted):
        return jax.grad(lambda *x: jnp.sum(token_logprobs(*x, targets, wanted)), (0, 1))(hidden, head)

    assert all(np.isfinite(g).all() for g in grads(hidden, head, wanted))
    wanted[tuple(np.argwhere(~wanted)[0])] = True
    assert not np.isfinite(grads(hidden, head, wanted)[1]).any()


def test_the_whole_logits_never_exist_in_the_compiled_loss():
    """With T = 64 and V = 4096, an eighth at a time, the gradient's program has no room for one fp32 [T, V]."""
    t, v, d = 64, 4096, 8
    args = [
        jax.ShapeDtypeStruct(s, k) for s, k in (((1, t, d), jnp.float32), ((v, d), jnp.float32), ((1, t), jnp.int32))
    ]

    def loss(hidden, head, targets):
        return jnp.sum(token_logprobs(hidden, head, targets, piece=t * v // 8))

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * t * v
