"""The optimiser and the jitted programs around it: what is frozen stays, micro-batches are divided once, schedules."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rsagent_jax.config import GrpoConfig, OptimConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.train.state import PARTS, create_state, is_frozen, make_optimizer, state_shardings
from rsagent_jax.train.step import grpo_objective
from rsagent_jax.types import DataError
from tests.rollout import small


def names(tree) -> dict:
    return {".".join(map(str, k)): v.get_value() for k, v in nnx.to_flat_state(tree)}


@pytest.fixture(scope="module")
def params():
    return small.split(small.model())[1]


def test_the_parts_that_can_be_frozen_cover_every_parameter_once(params):
    found = {part: {k for k, v in names(is_frozen(params, (part,))).items() if v} for part in PARTS}
    assert all(found.values())
    assert sorted(k for part in found.values() for k in part) == sorted(convert.TABLE)
    assert found["embed"] == {"decoder.embed"} and found["head"] == {"decoder.lm_head"}
    with pytest.raises(DataError, match=r"optim\.freeze: unknown visoin; parts are vision, merger"):
        is_frozen(params, ("visoin",))
    tied = nnx.from_flat_state([(k, v) for k, v in nnx.to_flat_state(params) if k[-1] != "lm_head"])
    with pytest.raises(DataError, match="this policy has no head"):
        is_frozen(tied, ("vision", "head"))


def test_an_update_leaves_frozen_parts_alone_and_clips_by_the_norm_of_the_rest(params):
    tx, _ = make_optimizer(OptimConfig(lr=0.1, clip_norm=1.0, weight_decay=0.1, freeze=("vision", "embed")), 10)
    state = create_state(params, tx)
    grads = jax.tree.map(np.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, state.opt_state, params)
    frozen = names(is_frozen(params, ("vision", "embed")))
    for name, update in names(updates).items():
        assert (not np.asarray(update).any()) == frozen[name], name


@pytest.mark.parametrize("freeze", [(), ("vision",)])
def test_moments_live_where_their_parameters_do_and_all_else_everywhere(params, freeze):
    tx, _ = make_optimizer(OptimConfig(freeze=freeze), 10)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    named = {name: NamedSharding(mesh, P(None, "x") if v.ndim > 1 else P("x")) for name, v in names(params).items()}
    placed = convert.with_params(small.model(), {k: jax.device_put(v, named[k]) for k, v in names(params).items()})
    whole = NamedSharding(mesh, P())
    where = state_shardings(small.split(placed)[1], tx, whole)
    assert jax.tree.structure(where) == jax.tree.structure(create_state(params, tx)) and where.step == whole
    assert names(where.params) == named
    trained = sum(not v for v in names(is_frozen(params, freeze)).values()) if freeze else len(named)
    moments = [s for s in jax.tree.leaves(where.opt_state) if s != whole]
    assert len(moments) == 2 * trained and set(moments) == set(named.values())


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


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: make_optimizer(OptimConfig(schedule="linear"), 1), r"optim\.schedule must be constant or cosine"),
        (lambda: grpo_objective(GrpoConfig(ratio="ppo")), r"grpo\.ratio must be one of grpo, gspo, cispo"),
        (lambda: grpo_objective(GrpoConfig(kl_estimator="k4")), r"grpo\.kl_estimator must be one of k1, k2, k3"),
        (lambda: grpo_objective(GrpoConfig(normalize="no")), r"grpo\.normalize must be one of token"),
        (lambda: grpo_objective(GrpoConfig(updates=2)), r"grpo\.tis_clip needs updates = 1"),
    ],
)
def test_switches_that_do_not_exist_are_data_errors(make, match):
    with pytest.raises(DataError, match=match):
        make()
