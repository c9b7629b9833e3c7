"""Objectives against hand arithmetic and hand-derived gradients, and packed against unpacked."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.config.schema import GrpoConfig
from rsagent_jax.train import losses

CLIP = dict(clip_low=0.2, clip_high=0.3)
WORDS = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(GrpoConfig).items()}
WEIGHTS = {name: functools.partial(losses.loss_weights, name, length=8.0) for name in WORDS["normalize"]}

# One row: trajectory 1 has trained tokens 1, 2 and a forced token 3; trajectory 2 has one trained token; then padding.
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 0]])
MASK = jnp.array([[0, 1, 1, 0, 0, 1, 0]], bool)
ADVANTAGES = jnp.array([[2.0, 2.0, 2.0, 2.0, -1.0, -1.0, 0.0]])
LOGPROBS = jnp.array([[-9.0, -1.0, -2.0, -9.0, -9.0, -0.5, -9.0]])


def logprobs_with(ratios):
    """Log-probs whose ratio to LOGPROBS is `ratios` at the trained tokens, and wild elsewhere."""
    return jnp.where(MASK, LOGPROBS, 7.0).at[0, jnp.array([1, 2, 5])].add(jnp.log(jnp.array(ratios)))


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(ratio, logprobs, old, advantages, weights, clip):
    def loss(lp):
        return losses.policy_loss(ratio, lp, old, advantages, MASK, SEGMENTS, weights, **clip)

    return jax.value_and_grad(loss, has_aux=True)(logprobs)


def loss_and_grad(ratio, logprobs, weights=None, clip=CLIP, old=LOGPROBS, advantages=ADVANTAGES):
    weights = MASK.astype(jnp.float32) if weights is None else weights
    (loss, metrics), grad = value_and_grad(ratio, logprobs, old, advantages, weights, clip)
    return loss, losses.mean_metrics(metrics), np.asarray(grad[0])


def test_normalisations():
    # Three trained tokens in two trajectories, of 2 and 1.
    for name, expected, denominator in (
        ("token", [0, 1, 1, 0, 0, 1, 0], 3),
        ("sequence", [0, 1 / 2, 1 / 2, 0, 0, 1, 0], 2),
        ("constant", [0, 1 / 8, 1 / 8, 0, 0, 1 / 8, 0], 2),
    ):
        weights, count = WEIGHTS[name](MASK, SEGMENTS)
        np.testing.assert_allclose(weights[0], expected)
        assert count == denominator and weights.dtype == count.dtype == jnp.float32


def test_a_trajectory_without_trained_tokens_is_not_counted():
    mask = MASK.at[0, 5].set(False)
    assert WEIGHTS["sequence"](mask, SEGMENTS)[1] == 1
    weights, count = WEIGHTS["sequence"](jnp.zeros_like(MASK), SEGMENTS)
    assert count == 0 and not weights.any()


def test_sft_is_the_negative_log_likelihood_of_trained_tokens():
    # 1 + 2 + 0.5 over 3 tokens; gradient -1 on each.
    total, count = losses.sft_loss(LOGPROBS, MASK)
    assert (float(total), float(count)) == (3.5, 3.0)
    grad = jax.grad(lambda lp: losses.sft_loss(lp, MASK)[0])(LOGPROBS)
    np.testing.assert_array_equal(grad, -MASK.astype(jnp.float32))


@pytest.mark.parametrize("ratio", WORDS["ratio"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_at_ratio_one_the_gradient_is_reinforce(ratio, name):
    # d/dlogp = -A * weight; with the token normalisation and its denominator that is -A / N.
    weights, _ = WEIGHTS[name](MASK, SEGMENTS)
    # A clip range of zero width puts ratio 1 on both of its edges: the gradient must not be halved there.
    for clip in (CLIP, dict(clip_low=0.0, clip_high=0.0)):
        _, metrics, grad = loss_and_grad(ratio, logprobs_with([1.0, 1.0, 1.0]), weights, clip)
        np.testing.assert_allclose(grad, -np.asarray(ADVANTAGES * weights)[0], rtol=1e-6)
        assert metrics["clip_fraction"] == 0 and metrics["ratio"] == metrics["ratio_max"] == 1


@pytest.mark.parametrize(
    ("ratios", "loss", "grad", "clipped"),
    [
        # A = 2, 2, -1; clip 0.8 .. 1.3. -(2 * 1.1 + 2 * 0.5 - 1 * 1.5): a bad step for its advantage is never clipped.
        ([1.1, 0.5, 1.5], -(2.2 + 1.0 - 1.5), [-2.2, -1.0, 1.5], 0),
        # -(2 * 1.3 + 2 * 1.0 - 1 * 0.8): the first and the last went far enough and lose their gradient.
        ([1.5, 1.0, 0.5], -(2.6 + 2.0 - 0.8), [0.0, -2.0, 0.0], 2 / 3),
        # Just inside and just outside the range.
        ([1.299, 1.301, 0.801], -(2.598 + 2.6 - 0.801), [-2.598, 0.0, 0.801], 1 / 3),
        ([1.0, 1.0, 0.799], -(2.0 + 2.0 - 0.8), [-2.0, -2.0, 0.0], 1 / 3),
    ],
)
def test_grpo_clips_both_signs(ratios, loss, grad, clipped):
    value, metrics, gradient = loss_and_grad("grpo", logprobs_with(ratios))
    assert value == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(gradient[[1, 2, 5]], grad, rtol=1e-5)
    np.testing.assert_array_equal(gradient[[0, 3, 4, 6]], 0.0)
    assert metrics["clip_fraction"] == pytest.approx(clipped)
    assert metrics["ratio"] == pytest.approx(sum(ratios) / 3, rel=1e-5)
    assert metrics["ratio_max"] == pytest.approx(max(ratios), rel=1e-5)
    # k3 of KL(old || policy), the tokens being the old policy's: r - 1 - log r
    assert metrics["kl_old"] == pytest.approx(np.mean([r - 1 - np.log(r) for r in ratios]), rel=1e-4, abs=1e-7)


def test_a_token_without_advantage_is_never_counted_as_clipped():
    loss, metrics, _ = loss_and_grad("grpo", logprobs_with([0.1, 9.0, 0.1]), advantages=0 * ADVANTAGES)
    assert loss == 0 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize(("ratio", "clipped"), [("grpo", 2 / 3), ("gspo", 1 / 3), ("cispo", 2 / 3)])
def test_which_tokens_count_as_clipped(ratio, clipped):
    """1.5 with A > 0 and 0.7 with A < 0; GSPO has sqrt(1.5 * 0.9) = 1.16 for both of trajectory 1. Values and
    gradients of all objectives, and what is added to them, test_trl.py has."""
    assert loss_and_grad(ratio, logprobs_with([1.5, 0.9, 0.7]))[1]["clip_fraction"] == pytest.approx(clipped)


def test_sapo_fades_where_the_others_clip():
    # A = 2, 2, -1; tau 1 where A > 0, else 2. f(r) = 4 / tau sigmoid(tau (r - 1)), r f'(r) = 4 r s (1 - s).
    # r = 1.5: s = sigmoid(0.5) = 0.622459; r = 1: s = 0.5; r = 0.5, tau = 2: s = sigmoid(-1) = 0.268941.
    call = functools.partial(losses.policy_loss, "sapo", tau_pos=1.0, tau_neg=2.0, **CLIP)
    loss_of = lambda lp: call(lp, LOGPROBS, ADVANTAGES, MASK, SEGMENTS, MASK.astype(jnp.float32))  # noqa: E731
    (value, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(logprobs_with([1.5, 1.0, 0.5]))
    assert value == pytest.approx(-(4 * 0.622459 * 2 + 2 * 2 - 2 * 0.268941), rel=1e-5)
    slopes = [4 * 1.5 * 0.622459 * 0.377541, 1.0, 4 * 0.5 * 0.268941 * 0.731059]
    np.testing.assert_allclose(grad[0, jnp.array([1, 2, 5])], [-2 * slopes[0], -2 * slopes[1], slopes[2]], rtol=1e-5)
    assert losses.mean_metrics(metrics)["clip_fraction"] == 0


def test_penalties_are_logged_without_weights_and_coefficient():
    # Reference twice as likely at the first token, equal elsewhere: k3 = 2 - ln 2 - 1 = 0.306853. Entropies 1, 2 and 4.
    weights, _ = WEIGHTS["sequence"](MASK, SEGMENTS)
    ref, entropy = logprobs_with([2.0, 1.0, 1.0]), jnp.array([[9.0, 1.0, 2.0, 9.0, 9.0, 4.0, 9.0]])
    _, kl = losses.kl_loss(LOGPROBS, ref, MASK, weights, estimator="k3", coefficient=0.5)
    _, bonus = losses.entropy_bonus(entropy, MASK, weights, coefficient=0.1)
    assert losses.mean_metrics(kl)["kl_ref"] == pytest.approx(0.306853 / 3, rel=1e-5)
    assert losses.mean_metrics(bonus)["entropy"] == pytest.approx(7 / 3)


def test_metrics_of_several_updates_are_their_means_and_of_maxima_the_largest():
    said = [{"loss": 1.0, "ratio_max": 1.5}, {"loss": 2.0, "ratio_max": 3.0}]
    assert losses.mean_over_updates(said) == {"loss": 1.5, "ratio_max": 3.0}


@pytest.mark.parametrize("ratio", WORDS["ratio"])
def test_a_hopeless_token_does_not_spoil_the_others(ratio):
    # A log-prob 200 above the old one is a ratio of e^200 = inf in fp32; A < 0 leaves it unclipped.
    logprobs = logprobs_with([1.0, 1.0, 1.0]).at[0, 5].add(200.0)
    value, _, grad = loss_and_grad(ratio, logprobs)
    assert np.isfinite(value) and np.isfinite(grad).all()
    np.testing.assert_allclose(grad[[1, 2]], [-2.0, -2.0])


def test_entropy_estimate_and_bf16_input():
    # (1 + 2 + 0.5) / 3; bf16 holds these numbers exactly and the loss is fp32 all the same.
    bf16 = LOGPROBS.astype(jnp.bfloat16)
    loss, metrics, _ = loss_and_grad("grpo", bf16, old=bf16)
    assert loss.dtype == jnp.float32 and metrics["entropy_sampled"] == pytest.approx(3.5 / 3)


def test_kl_estimators_by_hand():
    d = jnp.array([0.0, np.log(2.0), -np.log(2.0)])
    np.testing.assert_allclose(losses.kl_estimate("k1", d), [0, -0.693147, 0.693147], rtol=1e-5)
    np.testing.assert_allclose(losses.kl_estimate("k2", d), [0, 0.240227, 0.240227], rtol=1e-5)  # 0.693147^2 / 2
    np.testing.assert_allclose(
        losses.kl_estimate("k3", d), [0, 2 - 0.693147 - 1, 0.5 + 0.693147 - 1], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", WORDS["kl_estimator"])
def test_kl_estimators_in_expectation(name):
    """Summed over all outcomes of a 3-way policy p with a reference q, values and gradients are as documented."""
    logits = jnp.array([0.3, -0.2, 0.5])
    p, q = jax.nn.softmax(logits), jnp.array([0.5, 0.3, 0.2])
    kl_pq, kl_qp = jnp.sum(p * jnp.log(p / q)), jnp.sum(q * jnp.log(q / p))

    def expectation(logits):  # sampled from p held fixed, as a batch of tokens is
        return jnp.sum(p * losses.kl_estimate(name, jnp.log(q) - jax.nn.log_softmax(logits)))

    if name != "k2":
        assert expectation(logits) == pytest.approx(float(kl_pq), rel=1e-5)

    def kl(logits, forward):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(log_p) * (log_p - jnp.log(q))) if forward else jnp.sum(q * (jnp.log(q) - log_p))

    expected = {"k1": jnp.zeros(3), "k2": jax.grad(kl)(logits, True), "k3": jax.grad(kl)(logits, False)}[name]
    np.testing.assert_allclose(jax.grad(expectation)(logits), expected, atol=1e-6)
    assert kl(logits, False) == pytest.approx(float(kl_qp), rel=1e-5)


def test_truncated_importance_weights():
    trainer = logprobs_with([1.5, 3.0, 0.5])
    call = functools.partial(losses.truncated_importance_weights, cap=2.0)
    weights, metrics = call(trainer, LOGPROBS, MASK)
    np.testing.assert_allclose(weights, [[1, 1.5, 2.0, 1, 1, 0.5, 1]], rtol=1e-6)
    means = losses.mean_metrics(metrics)
    assert means["tis_ratio"] == pytest.approx(5.0 / 3) and means["tis_truncated"] == pytest.approx(1 / 3)
    assert means["mismatch_logprob_max"] == pytest.approx(np.log(3.0))
    # Weights 1.5, 2 (cut from 3) and 0.5: (1.5 + 2 + 0.5)^2 / (3 * (2.25 + 4 + 0.25)) = 16 / 19.5.
    assert means["ess"] == pytest.approx(16 / 19.5) and not {"ess_weight", "ess_square"} & means.keys()
    # Of two micro-batches together, not the mean of theirs: the second has three tokens of weight 1.
    both = losses.merge_metrics(metrics, call(LOGPROBS, LOGPROBS, MASK)[1])
    assert losses.mean_metrics(both)["ess"] == pytest.approx((4 + 3) ** 2 / (6 * (6.5 + 3)))
    assert losses.mean_metrics(call(LOGPROBS, LOGPROBS, MASK & False)[1])["ess"] == 0
    np.testing.assert_array_equal(jax.grad(lambda lp: call(lp, LOGPROBS, MASK)[0].sum())(trainer), 0.0)


# --- Packing, accumulation ---

B, T, N = 3, 16, 8


@st.composite
def packings(draw):
    """[N, T] one trajectory a row, and the same ones packed in random order into the first B rows of an [N, T]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = ("logprobs", "old", "advantages", "mask", "segments")
    apart = {n: np.zeros((N, T), bool if n == "mask" else np.int32 if n == "segments" else np.float32) for n in names}
    packed = {n: np.zeros_like(x) for n, x in apart.items()}
    used, count = np.zeros(B, int), np.zeros(B, int)
    for i in rng.permutation(N):
        length, row = int(rng.integers(1, 7)), int(rng.integers(B))
        if used[row] + length > T:
            continue
        values = {
            "logprobs": rng.normal(-2, 0.5, length),
            "old": rng.normal(-2, 0.5, length),
            "advantages": rng.normal(),
            "mask": rng.random(length) < 0.7,
        }
        count[row] += 1
        for n, x in values.items():
            apart[n][i, :length] = packed[n][row, used[row] : used[row] + length] = x
        apart["segments"][i, :length], packed["segments"][row, used[row] : used[row] + length] = 1, count[row]
        used[row] += length
    return apart, packed


@jax.jit
def every_value(batch):
    """Loss sum, denominator and metrics of each pair. One program for all: compiling is what takes time."""
    values = {}
    for name, normalise in WEIGHTS.items():
        weights, denominator = normalise(batch["mask"], batch["segments"])
        arrays = [batch[n] for n in ("logprobs", "old", "advantages", "mask", "segments")]
        for ratio in WORDS["ratio"]:
            loss_sum, metrics = losses.policy_loss(ratio, *arrays, weights, **CLIP)
            values[f"{ratio} {name}"] = loss_sum, denominator, metrics
    return values


@given(packings())
@settings(max_examples=20, deadline=None)
def test_packed_equals_unpacked_equals_accumulated(pair):
    apart, packed = map(every_value, pair)
    # Row by row, as micro-batches or shards.
    rows = [every_value({n: x[i : i + 1] for n, x in pair[1].items()}) for i in range(B)]
    for key, (loss, denominator, metrics) in apart.items():
        packed_loss, packed_denominator, packed_metrics = packed[key]
        np.testing.assert_allclose(packed_loss, loss, rtol=1e-5, atol=1e-5, err_msg=key)
        np.testing.assert_allclose(sum(row[key][0] for row in rows), loss, rtol=1e-5, atol=1e-5, err_msg=key)
        assert packed_denominator == denominator == sum(row[key][1] for row in rows), key
        merged = functools.reduce(losses.merge_metrics, [row[key][2] for row in rows])
        for other in (packed_metrics, merged):
            assert other.keys() == metrics.keys()
            for name, x in metrics.items():
                np.testing.assert_allclose(other[name], x, rtol=1e-5, atol=1e-5, err_msg=f"{key} {name}")
