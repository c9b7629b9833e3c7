"""The optimiser and the jitted programs around it: where moments live, schedules, moments in host memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rsagent_jax.aot import topology
from rsagent_jax.aot.compiled import Program
from rsagent_jax.config.schema import BatchConfig, GrpoConfig, LoraConfig, MeshConfig, OptimConfig
from rsagent_jax.data import packing
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.runtime import sharding
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.train.state import create_state, make_optimizer, partition_params, skip, updates_made
from rsagent_jax.train.step import Stage, Sums, apply_gradients, grpo_objective, make_programs
from tests.rollout import small


@pytest.fixture(scope="module")
def params():
    return small.split(small.model())[1]


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (dict(schedule="constant", warmup_steps=0), {0: 1.0, 5: 1.0, 10: 1.0}),
        (dict(schedule="constant", warmup_steps=4), {0: 0.0, 1: 0.25, 4: 1.0, 10: 1.0}),
        (dict(schedule="cosine", warmup_steps=2), {1: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
    ],
)
def test_schedules_warm_up_linearly_and_then_hold_or_fall(config, values):
    _, schedule = make_optimizer(OptimConfig(lr=2.0, **config), 10)
    for step, share in values.items():
        assert float(schedule(step)) == pytest.approx(2.0 * share, abs=1e-6), step


@pytest.mark.slow
def test_an_update_passes_over_memory_as_often_as_it_must_and_says_how_far_the_parameters_moved():
    """Compiled for a TPU; the fewest are 8: the gradients for their norm, then gradients, parameters and two moments
    read, and parameters and moments written. The numbers, eagerly by optax."""
    tx, _ = make_optimizer(OptimConfig(lr=2e-5, weight_decay=0.01, schedule="cosine"), 1000)
    update = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=0)

    def state_and_sums(width):
        shapes = {"table": (8 * width, width)} | dict.fromkeys(("in", "out", "qkv"), (8, width, width))
        params, grads = ({n: jax.random.normal(jax.random.key(i), s) for n, s in shapes.items()} for i in (0, 1))
        return create_state(params, tx), Sums(grads, jnp.float32(1.0), jnp.float32(64.0), {"tokens": jnp.float32(64.0)})

    device = jax.sharding.SingleDeviceSharding(topology.devices(topology.parse_topology("v5p:2x2x1"))[0])
    large = jax.eval_shape(lambda: state_and_sums(1792))
    large = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), large)
    moved = Program(update.lower(*large).compile().as_text()).hbm_traffic_bytes()
    assert 8 <= moved / sum(4 * p.size for p in large[0].params.values()) < 8.08
    state, sums = state_and_sums(64)
    grads = jax.tree.map(lambda g: g / sums.denominator, sums.grads)
    asked, _ = tx.update(grads, state.opt_state, state.params)
    wanted = optax.apply_updates(state.params, asked)
    new, metrics = update(state, sums)
    assert float(metrics["l2_updates"]) == pytest.approx(float(optax.global_norm(asked)), rel=1e-3) != 0
    for name, p in wanted.items():
        np.testing.assert_allclose(new.params[name], p, rtol=0, atol=1e-8)


def test_a_clip_norm_of_0_is_off():
    """A gradient of norm 5 at 0 and at a bound that it never meets moves SGD-like moments alike; at 1 it is scaled."""
    gradient = {"w": jnp.array([3.0, 4.0])}
    moments = {}
    for bound in (0.0, 100.0, 1.0):
        tx, _ = make_optimizer(OptimConfig(lr=1.0, b1=0.5, clip_norm=bound), 1)
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        moments[bound] = optax.tree.get(state, "mu")["w"].tolist()
    assert moments == {0.0: [1.5, 2.0], 100.0: [1.5, 2.0], 1.0: pytest.approx([0.3, 0.4])}


@pytest.mark.slow
def test_a_skipped_step_counts_for_the_run_and_not_for_the_optimiser(params):
    tx, _ = make_optimizer(OptimConfig(schedule="cosine", warmup_steps=1), 10)
    state = create_state(params, tx)
    _, opt_state = tx.update(params, state.opt_state, params)
    state = dataclasses.replace(state, step=state.step + 1, opt_state=opt_state)
    after = skip(state, 3)
    assert (int(state.step), int(after.step), updates_made(state), updates_made(after)) == (1, 4, 1, 1)
    assert after.step.dtype == state.step.dtype and jax.tree.structure(after) == jax.tree.structure(state)
    assert after.params is state.params and after.opt_state is state.opt_state


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k2", lambda d: d**2 / 2, lambda d: -d), ("k3", lambda d: np.expm1(d) - d, lambda d: -np.expm1(d))],
)
def test_the_correction_for_the_engine_weighs_the_surrogate_and_not_the_kl(estimator, value, slope):
    """p_trainer / p_engine is 4, 0.5 and 1 at three trained tokens, capped at 2; d = log p_ref - log p. By hand."""
    mask = np.array([[False, True, True, False, True, False]])
    row = lambda values: np.zeros((1, 6), np.float32) + np.insert(np.float32(values), [0, 2, 3], 0.0)  # noqa: E731
    logprobs, advantage, d = row([-1.0, -2.0, -0.5]), row([2.0, 2.0, -1.0]), np.array([0.3, -0.2, 0.1])
    empty = packing.empty_batch(BatchConfig(rows=1, tokens=6, patches=16), small.processor().config)
    batch = dataclasses.replace(
        empty,
        segment_ids=np.array([[1, 1, 1, 2, 2, 0]]),
        loss_mask=mask,
        advantages=advantage,
        old_logprobs=logprobs - row(np.log([4.0, 0.5, 1.0])),
    )
    objective = grpo_objective(GrpoConfig(kl=0.1, kl_estimator=estimator, tis_clip=2.0))
    loss_fn = lambda lp: objective(lp, batch, logprobs + row(d))[0]  # noqa: E731
    loss, grads = jax.value_and_grad(loss_fn)(jnp.asarray(logprobs))
    assert float(loss) == pytest.approx(-(2 * 2.0 + 0.5 * 2.0 - 1.0) + 0.1 * value(d).sum(), rel=1e-6)
    np.testing.assert_allclose(grads[mask], [-4.0, -1.0, 1.0] + 0.1 * slope(d), rtol=1e-5)
    assert not np.asarray(grads)[~mask].any()


def test_every_update_takes_its_run_of_the_micro_batches():
    stage = Stage(None, epochs=2, minibatches=3)
    assert stage.updates == 6 and [range(6)[part] for part in stage.minibatch_slices(6)] == [
        *(range(2), range(2, 4), range(4, 6)),
        *(range(2), range(2, 4), range(4, 6)),
    ]
    assert stage.minibatch_slices(2) == [slice(0, 2)] * 2  # too few trajectories for three
    assert Stage(None).minibatch_slices(4) == [slice(0, 4)]


@pytest.mark.slow
def test_offloaded_moments_train_the_same_and_stay_in_host_memory(tmp_path):
    """Two updates with the moments in host memory against two without, and once more from a checkpoint."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx, _ = make_optimizer(OptimConfig(lr=1e-2), 4)

    def objective(logprobs, batch, ref):
        count = jnp.float32(batch.loss_mask.size)
        return -jnp.sum(jnp.where(batch.loss_mask, logprobs, 0.0)), count, {"tokens": count}

    def start(offload):
        graphdef, params = small.split(small.model())
        params = jax.device_put(params, sharding.param_shardings(small.model(), mesh))
        graphdef, params, base = partition_params(graphdef, params, LoraConfig(), ("vision",))
        compute = dataclasses.replace(small.COMPUTE, mesh=mesh)
        programs = make_programs(graphdef, tx, Stage(objective), compute, params, base, offload=offload)
        return programs, programs.create_state(params), base

    shape = BatchConfig(rows=1, tokens=64, patches=32)
    batch = packing.empty_batch(shape, small.processor().config)
    batch = dataclasses.replace(batch, tokens=batch.tokens + 3, segment_ids=batch.segment_ids + 1)
    batch = jax.device_put(dataclasses.replace(batch, loss_mask=~batch.loss_mask), sharding.rows(mesh))
    ref = jnp.zeros((1, 64))

    def kinds(state):
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.size > 1}

    ends = {}
    for offload in (False, True):
        programs, state, base = start(offload)
        for _ in range(2):
            state, _ = programs.train_step(state, base, [batch], [ref])
        assert kinds(state) == {"pinned_host" if offload else "device"}
        ends[offload] = state
    for name, value in convert.flat_state(ends[False].params).items():
        assert np.array_equal(np.asarray(convert.flat_state(ends[True].params)[name]), np.asarray(value)), name

    checkpoints = Checkpoints(tmp_path / "sft", small.weights())
    checkpoints.save(ends[True], {})
    checkpoints.manager.wait_until_finished()
    again, _ = checkpoints.restore(ends[True])
    checkpoints.close()
    assert kinds(again) == {"pinned_host"}
    for a, b in zip(jax.tree.leaves(again.opt_state), jax.tree.leaves(ends[True].opt_state), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
