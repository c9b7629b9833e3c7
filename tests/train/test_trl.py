"""Every objective that TRL has as well: values and gradients against those of its own code (tests/golden)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rsagent_jax.train import losses

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "trl_losses.npz")
NAMES = sorted(name.removesuffix("/loss") for name in GOLDEN if name.endswith("/loss"))
# loss_type -> (ratio, normalize); with "sequence" as the level the ratio is GSPO's
OURS = {
    "grpo": ("grpo", "sequence"),
    "bnpo": ("grpo", "token"),
    "dr_grpo": ("grpo", "constant"),
    "dapo": ("grpo", "token"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
}


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_trl(name):
    kind, level, beta, corrected, bonus = name.split()
    ratio, normalize = OURS[kind]
    ratio = "gspo" if level == "sequence" else ratio
    clip = dict(clip_low=1.0 if kind == "cispo" else 0.2, clip_high=0.3)
    arrays = {n: jnp.asarray(GOLDEN[n]) for n in ("logprobs", "old", "ref", "entropy", "correction")}
    mask = jnp.asarray(GOLDEN["mask"], bool)
    segments = jnp.ones(mask.shape, int)
    advantages = jnp.broadcast_to(GOLDEN["advantages"][:, None], mask.shape)

    def run(logprobs, entropy):
        weights, denominator = losses.loss_weights(normalize, mask, segments, length=float(mask.shape[1]))
        weighed = weights * (arrays["correction"] if corrected == "1" else 1.0)
        how = arrays["old"], advantages, mask, segments, weighed
        loss, _ = losses.policy_loss(ratio, logprobs, *how, **clip)
        if float(beta):
            penalty = dict(estimator="k3", coefficient=float(beta))
            loss += losses.kl_loss(logprobs, arrays["ref"], mask, weights, **penalty)[0]
        if float(bonus):
            loss += losses.entropy_bonus(entropy, mask, weights, coefficient=float(bonus))[0]
        return loss / denominator

    loss, (grad, entropy_grad) = jax.value_and_grad(run, (0, 1))(arrays["logprobs"], arrays["entropy"])
    np.testing.assert_allclose(loss, GOLDEN[f"{name}/loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, GOLDEN[f"{name}/grad"], rtol=1e-5, atol=1e-6)
    if float(bonus):
        np.testing.assert_allclose(entropy_grad, GOLDEN[f"{name}/entropy_grad"], rtol=1e-5, atol=1e-7)
