"""Several updates of one batch: the correction for the engine is that of the first pass, the ratio is to its policy."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rsagent_jax.config.schema import BatchConfig, GrpoConfig, MeshConfig, OptimConfig
from rsagent_jax.data.packing import pack
from rsagent_jax.runtime import sharding
from rsagent_jax.train import losses
from rsagent_jax.train.state import EMPTY, make_optimizer
from rsagent_jax.train.step import make_programs, make_stage
from tests.rollout import small

ONE = GrpoConfig(tis_clip=1.1, entropy=0.01, kl=0.1, sampling=small.SAMPLING)


def programs(config: GrpoConfig, mesh):
    graphdef, params = small.split(small.model())
    params = jax.device_put(params, sharding.param_shardings(small.model(), mesh))
    stage, (tx, _) = make_stage(types.SimpleNamespace(grpo=config), "grpo"), make_optimizer(OptimConfig(lr=1e-2), 4)
    return stage, make_programs(graphdef, tx, stage, dataclasses.replace(small.COMPUTE, mesh=mesh), params), params


def test_several_updates_begin_as_a_single_one_and_are_then_held_against_where_they_began():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    items = [small.random_item(i, (9, 6), ((1, 4, 4),), advantage=a) for i, a in ((1, 1.0), (2, -0.5))]
    items = [dataclasses.replace(item, logprobs=item.logprobs - 4.5) for item in items]  # about what the policy says
    (batch,) = pack(items, BatchConfig(rows=1, tokens=64, patches=32), small.processor().config)
    batch, ref = jax.device_put(batch, sharding.rows(mesh)), jnp.full((1, 64), -3.0)
    single, alone, params = programs(ONE, mesh)
    double, several, _ = programs(dataclasses.replace(ONE, epochs=2), mesh)
    assert [(s.updates, s.tis_clip) for s in (single, double)] == [(1, 0.0), (2, 1.1)]

    want = alone.micro(params, EMPTY, batch, ref)
    (corrected,), metrics = several.correct_for_engine(params, EMPTY, [batch])
    got = several.micro(params, EMPTY, corrected, ref)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=1e-5)
    assert float(got.denominator) == float(want.denominator)
    grads = small.flat(want.grads)
    for name, value in small.flat(got.grads).items():
        np.testing.assert_allclose(value, grads[name], rtol=0, atol=1e-5 * np.abs(grads[name]).max(), err_msg=name)
    said = losses.mean_metrics(want.metrics)
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(said[name]), rel=1e-4), name
    # The engine's log-probs are random, so some weights are cut; by hand, from the old ones that the pass has found.
    mask = np.asarray(batch.loss_mask)
    old, engine = np.asarray(corrected.old_logprobs)[mask], np.asarray(batch.old_logprobs)[mask]
    weights = np.minimum(np.exp(old - engine), 1.1)
    assert 0 < (weights == np.float32(1.1)).sum() < len(weights)
    np.testing.assert_allclose(corrected.advantages[mask], np.asarray(batch.advantages)[mask] * weights, rtol=1e-5)

    # After an update the ratio is to those old ones, whatever the engine said.
    state, _ = several.train_step(several.create_state(params), EMPTY, [corrected], [ref])
    sums = several.micro(state.params, EMPTY, corrected, ref)
    now = several.correct_for_engine(state.params, EMPTY, [batch])[0][0].old_logprobs
    ratio = np.exp(np.asarray(now)[mask] - old)
    assert np.abs(ratio - 1).max() > 0.01
    assert float(sums.metrics["ratio"]) == pytest.approx(ratio.sum(), rel=1e-4)
