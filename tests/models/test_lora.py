"""Adapters against plain matrices W + A B * alpha / rank: logits, gradients, merging; and what no adapter can be."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rsagent_jax.config.schema import LoraConfig
from rsagent_jax.models.qwen25_vl import convert, lora
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.layers import LoraParam

from . import tiny

CASE = tiny.CASE["two images"]
ALL = LoraConfig(rank=3, alpha=6.0)


def adapted(config: LoraConfig, b_stddev: float = 0.3):
    """(graph, adapters with a random B, the plain parameters) of a random model."""
    graphdef, plain = nnx.split(tiny.random_model(CASE, seed=1), nnx.Param)
    model = nnx.merge(graphdef, plain)
    lora.declare(model, config)
    graphdef, adapters, plain = nnx.split(model, LoraParam, nnx.Param)
    values, rng = convert.flat_state(lora.init(adapters, jax.random.key(0))), np.random.default_rng(2)
    for name, value in values.items():
        if name.endswith("lora_b"):
            values[name] = jnp.asarray(rng.normal(0, b_stddev, value.shape), jnp.float32)
    return graphdef, convert.with_values(adapters, values), plain


def added(config: LoraConfig, adapters: nnx.State, plain: nnx.State) -> dict[str, np.ndarray]:
    """The plain parameters with every adapter's product in its kernel; numpy, float64."""
    values = {name: np.asarray(v, np.float64) for name, v in convert.flat_state(plain).items()}
    flat = {name: np.asarray(v, np.float64) for name, v in convert.flat_state(adapters).items()}
    for name in flat:
        if name.endswith(".lora_a"):
            linear = name.removesuffix(".lora_a")
            values[f"{linear}.kernel"] += config.alpha / config.rank * flat[name] @ flat[f"{linear}.lora_b"]
    return values


def plain_model(values: dict[str, np.ndarray]):
    return convert.with_params(tiny.random_model(CASE), {n: jnp.asarray(v, jnp.float32) for n, v in values.items()})


@functools.cache
def row():
    return tiny.pack([tiny.sequence(CASE, 1), tiny.sequence(CASE, 2, ((1, 4, 8),))], tiny.random_model(CASE).config)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [ALL.targets, ("q",), ("o", "down")])
def test_logits_are_those_of_the_matrices_with_the_adapters_added(targets):
    config = dataclasses.replace(ALL, targets=targets)
    graphdef, adapters, plain = adapted(config)
    assert len(convert.flat_state(adapters)) == 2 * len(targets)
    got = tiny.logits(nnx.merge(graphdef, adapters, plain), row())
    want = tiny.logits(plain_model(added(config, adapters, plain)), row())
    assert np.abs(want - tiny.logits(plain_model(convert.flat_state(plain)), row())).max() > 5e-3  # they do something
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
def test_gradients_of_the_adapters_follow_from_those_of_the_matrices():
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW', where dW' is autodiff's through the plain model."""
    graphdef, adapters, plain = adapted(ALL)

    def loss(model):
        return tiny.sft_loss(model, model(row(), Compute(remat="full")), row())

    def gradient(f, x):
        return convert.flat_state(jax.jit(jax.grad(f), compiler_options=tiny.QUICK)(x))

    got = gradient(lambda a: loss(nnx.merge(graphdef, a, plain)), adapters)
    plain_graph, whole = nnx.split(plain_model(added(ALL, adapters, plain)), nnx.Param)
    kernels, flat = gradient(lambda p: loss(nnx.merge(plain_graph, p)), whole), convert.flat_state(adapters)
    assert len(got) == 14
    for name in flat:
        linear, which = name.rsplit(".", 1)
        dw, a, b = (
            np.asarray(x) for x in (kernels[f"{linear}.kernel"], flat[f"{linear}.lora_a"], flat[f"{linear}.lora_b"])
        )
        want = 2.0 * (dw @ b.swapaxes(1, 2) if which == "lora_a" else a.swapaxes(1, 2) @ dw)
        assert np.linalg.norm(want) > 1e-4, name
        assert np.linalg.norm(got[name] - want) <= 2e-5 * np.linalg.norm(want), name


def test_merging_adds_the_product_in_fp32_and_rounds_once():
    _, adapters, plain = adapted(ALL)
    want = added(ALL, adapters, plain)
    for dtype, ulp in ((jnp.float32, 2.0**-23), (jnp.bfloat16, 2.0**-7)):
        merged = lora.merge_adapters(convert.flat_state(plain), convert.flat_state(adapters), 2.0, dtype)
        assert merged.keys() == want.keys() and all(v.dtype == dtype for v in merged.values())
        for name, value in merged.items():
            # half a unit in the last place, and the product's own rounding in fp32
            bound = 0.5 * ulp * np.abs(want[name]) + 1e-6
            assert (np.abs(np.asarray(value, np.float64) - want[name]) <= bound).all(), name


def test_fresh_adapters_are_pefts_and_change_nothing():
    """PEFT: A by kaiming_uniform_(a=sqrt(5)), which is uniform within 1 / sqrt(in), and B zero."""
    graphdef, adapters, plain = adapted(ALL, b_stddev=0.0)
    values = {name: np.asarray(v) for name, v in convert.flat_state(adapters).items()}
    for name in (n for n in values if n.endswith("lora_a")):
        bound = 1 / math.sqrt(values[name].shape[1])
        assert bound * 0.9 < np.abs(values[name]).max() <= bound
        np.testing.assert_allclose(values[name].std(), bound / math.sqrt(3), rtol=0.2)
    assert len({values[n].ravel()[0] for n in values if n.endswith("lora_a")}) == 7  # no two alike
    got = tiny.logits(nnx.merge(graphdef, adapters, plain), row())
    np.testing.assert_allclose(got, tiny.logits(plain_model(convert.flat_state(plain)), row()), atol=1e-6)
