"""What is trained and what is only read: nothing that is only read changes, and nothing else is trained differently."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rsagent_jax.config.schema import BatchConfig, GrpoConfig, LoraConfig, MeshConfig, OptimConfig
from rsagent_jax.data.packing import pack
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.runtime import sharding
from rsagent_jax.train.state import (
    EMPTY,
    PARTS,
    cast_frozen,
    init_adapters,
    make_optimizer,
    make_plain,
    partition_params,
    vision_frozen,
)
from rsagent_jax.train.step import Stage, batch_logprobs, grpo_objective, make_programs, micro_step
from tests.refusals import refused
from tests.rollout import small

pytestmark = pytest.mark.slow

OFF, LORA = LoraConfig(), LoraConfig(rank=4, alpha=8.0)
OPTIM = OptimConfig(lr=1e-2, eps=1e-3, weight_decay=0.1)  # a large eps: the sign of a gradient near zero is rounding
GRPO = Stage(grpo_objective(GrpoConfig(normalize="sequence", kl=0.1, tis_clip=0.0, sampling=small.SAMPLING)))


def parts(freeze=(), adapters=OFF):
    return partition_params(*small.split(small.model()), adapters, freeze)


@functools.cache
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def batch():
    images = ((1, 4, 4), (1, 6, 4))
    items = (small.random_item(1, (9, 8, 7), images, 1.0), small.random_item(2, (6, 5), ((1, 2, 10),), -0.7))
    (packed,) = pack(items, BatchConfig(rows=1, tokens=64, patches=96), small.processor().config)
    return jax.device_put(packed, sharding.rows(mesh()))


@functools.cache
def ref():
    return -1.0 - (batch().tokens % 7) / 7.0  # any function of the token


class Small:
    """Programs and state of a small stage, as train.run_stage makes them."""

    def __init__(self, freeze=(), adapters=OFF, dtype="float32"):
        plain, params = small.split(small.model())
        params = jax.device_put(params, sharding.param_shardings(small.model(), mesh()))
        self.compute = dataclasses.replace(small.COMPUTE, dtype=dtype, mesh=mesh())
        self.graphdef, params, base = partition_params(plain, params, adapters, freeze)
        self.base = cast_frozen(base, dtype)
        if adapters.rank:
            params = init_adapters(self.graphdef, params, self.base, jax.random.key(0), mesh())
        tx, reference = make_optimizer(OPTIM, 4)[0], plain if adapters.rank else None
        made = self.graphdef, tx, GRPO, self.compute, params, self.base
        self.programs = make_programs(*made, reference=reference)
        self.state = self.programs.create_state(params)

    def steps(self, count: int):
        """Metrics of every step; the batch is seen once."""
        seen, out = self.programs.embed(self.base, batch()), []
        for _ in range(count):
            self.state, metrics = self.programs.train_step(self.state, self.base, [seen], [ref()])
            out.append(jax.device_get(metrics))
        return out


@functools.cache
def masked_steps(freeze: tuple[str, ...]):
    """(parameters, metrics) of two steps in which all gradients are computed and the frozen ones thrown away."""
    graphdef, params = small.split(small.model())
    names = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(params)}
    prefixes = tuple(p for part in freeze for p in PARTS[part])
    values = {name: jnp.asarray(v) for name, v in small.flat(params).items()}
    labels = {name: "frozen" if name.startswith(prefixes) else "trained" for name in names}
    tx = optax.partition({"trained": make_optimizer(OPTIM, 4)[0], "frozen": optax.set_to_zero()}, labels)
    gradients = jax.jit(lambda p: micro_step(graphdef, GRPO, small.COMPUTE, p, EMPTY, batch(), ref()))
    opt, out = tx.init(values), []
    for _ in range(2):
        sums = gradients(convert.with_values(params, values))
        grads = {name: g / sums.denominator for name, g in convert.flat_state(sums.grads).items()}
        updates, opt = tx.update(grads, opt, values)
        values = optax.apply_updates(values, updates)
        norm = optax.tree.norm({name: g for name, g in grads.items() if labels[name] == "trained"})
        out.append({"loss": float(sums.loss / sums.denominator), "l2_grads": float(norm)})
    return {name: np.asarray(v) for name, v in values.items()}, out


@pytest.mark.parametrize("freeze", [("vision", "merger", "embed"), ("vision",)])
def test_frozen_parts_stay_bit_for_bit_and_the_rest_trains_as_if_their_gradients_were_thrown_away(freeze):
    stage = Small(freeze)
    assert vision_frozen(stage.state.params) == ("merger" in freeze)
    before = small.flat(stage.base)
    got = stage.steps(2)
    want, metrics = masked_steps(freeze)
    for step, other in zip(got, metrics, strict=True):
        for name, value in other.items():
            assert step[name] == pytest.approx(value, rel=2e-5), name
    start, after = small.flat(small.split(small.model())[1]), small.flat(stage.state.params)
    assert before.keys().isdisjoint(after) and before.keys() | after.keys() == start.keys()
    for name, value in small.flat(stage.base).items():
        np.testing.assert_array_equal(value, start[name], err_msg=name)
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    for name, value in after.items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=2e-5, err_msg=name)
        assert np.abs(value - start[name]).max() > 1e-3, name


def test_a_batch_that_was_seen_needs_the_tower_no_more():
    """The same sums and log-probs as with the tower inside the program; a broken tower changes nothing any more."""
    stage = Small(("vision", "merger"))
    params, seen = stage.state.params, stage.programs.embed(stage.base, batch())
    unit = small.processor().config.vision.merge_unit
    assert seen.patches.shape == (1, 96 // unit, 32) and seen.tokens is not None
    values = convert.flat_state(stage.base)
    values = {name: value * np.nan if name.startswith("vision.") else value for name, value in values.items()}
    broken = convert.with_values(stage.base, values)
    got = stage.programs.micro(params, broken, seen, ref())
    want = jax.jit(lambda p, b: micro_step(stage.graphdef, GRPO, stage.compute, p, b, batch(), ref(), embedded=False))(
        params, stage.base
    )
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-6)
    for name, value in small.flat(want.grads).items():
        assert np.linalg.norm(small.flat(got.grads)[name] - value) <= 1e-5 * np.linalg.norm(value), name
    logprobs = stage.programs.logprobs(params, broken, seen)
    whole = nnx.merge_state(params, stage.base)
    plain = jax.jit(lambda p: batch_logprobs(stage.graphdef, p, batch(), stage.compute, 1.0))(whole)
    np.testing.assert_allclose(logprobs, plain, atol=1e-5)


def test_adapters_train_alone_and_the_base_alone_is_their_reference():
    stage, start = Small(adapters=LORA), small.flat(small.split(small.model())[1])
    seen = stage.programs.embed(stage.base, batch())
    graphdef, params = small.split(small.model())
    plain = jax.jit(lambda p: batch_logprobs(graphdef, p, batch(), small.COMPUTE, 1.0))(params)
    np.testing.assert_allclose(stage.programs.logprobs(EMPTY, stage.base, seen), plain, atol=1e-5)
    first, adapters = stage.steps(2), small.flat(stage.state.params)
    _, metrics = masked_steps(("vision",))
    assert first[0]["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-5)  # fresh adapters change nothing
    assert {name.rsplit(".", 1)[1] for name in adapters} == {"lora_a", "lora_b"} and len(adapters) == 14
    for name, value in small.flat(stage.base).items():
        np.testing.assert_array_equal(value, start[name], err_msg=name)
    assert all(np.abs(v).max() > 1e-3 for name, v in adapters.items() if name.endswith("lora_b"))

    whole = make_plain(stage.base, LORA, "float32")(stage.state.params, stage.base)
    merged = jax.jit(lambda p: batch_logprobs(graphdef, p, batch(), small.COMPUTE, 1.0))(whole)
    apart = batch_logprobs(stage.graphdef, nnx.merge_state(stage.state.params, stage.base), batch(), stage.compute, 1.0)
    np.testing.assert_allclose(merged, apart, atol=2e-5)
    assert np.abs(merged - plain).max() > 0.01


def test_the_base_is_kept_in_the_dtype_of_the_activations():
    stage = Small(("vision", "merger"), dtype="bfloat16")
    start = small.flat(small.split(small.model())[1])
    assert {v.dtype for v in jax.tree.leaves(stage.state.params)} == {jnp.dtype("float32")}
    for name, value in small.flat(stage.base).items():
        np.testing.assert_array_equal(value, start[name].astype(jnp.bfloat16), err_msg=name)
    assert np.isfinite(stage.steps(1)[0]["loss"])


def test_the_parts_that_can_be_frozen_cover_every_parameter_once():
    found = {part: set(small.flat(parts((part,))[2])) for part in PARTS}
    assert all(found.values())
    assert sorted(name for part in found.values() for name in part) == sorted(convert.TABLE)
    assert found["embed"] == {"decoder.embed"} and found["head"] == {"decoder.lm_head"}


def test_settings_that_contradict_each_other_are_one_error():
    refused("are all there is; nothing is left to train", parts, tuple(PARTS))
    graphdef, params = small.split(small.model())
    tied = nnx.from_flat_state([(k, v) for k, v in nnx.to_flat_state(params) if k[-1] != "lm_head"])
    refused("this policy has no head", partition_params, graphdef, tied, OFF, ("vision", "head"))
