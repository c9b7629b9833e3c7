"""Meshes and where arrays live on 8 simulated devices; that steps on them are those of one, test_processes.py shows."""

import json

import jax
import pytest

from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.runtime import sharding
from tests.refusals import refused
from tests.simulated import run_simulated


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=-1, fsdp=2), (4, 2, 1)),
        (MeshConfig(data=2, fsdp=4, tensor=1), (2, 4, 1)),
    ],
)
def test_one_axis_takes_what_the_others_leave(config, shape):
    mesh = sharding.make_mesh(config, jax.devices()[:1] * 8)  # only their number matters here
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (MeshConfig(data=2, fsdp=1, tensor=1), r"'data': 2, 'fsdp': 1, 'tensor': 1.* does not cover 1 devices"),
        (MeshConfig(data=2, fsdp=-1, tensor=1), "does not cover 1 devices"),
    ],
)
def test_a_mesh_that_does_not_cover_the_devices_is_a_data_error(config, match):
    refused(match, sharding.make_mesh, config, jax.devices()[:1])


SPLIT = """
import json
import jax, numpy as np
from tests.rollout import small
from rsagent_jax.config.schema import MeshConfig, OptimConfig
from rsagent_jax.models.qwen25_vl.logprobs import token_logprobs
from rsagent_jax.runtime import sharding
from rsagent_jax.train.state import create_state, make_optimizer, state_shardings

mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
model = small.model()
params = jax.device_put(small.split(model)[1], sharding.param_shardings(model, mesh))
tx, _ = make_optimizer(OptimConfig(), 4)
where = state_shardings(params, tx, sharding.replicated(mesh))
state = jax.jit(lambda p: create_state(p, tx), out_shardings=where)(params)
leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(state)}
rng = np.random.default_rng(0)
hidden, head = rng.normal(size=(4, 6, 8)).astype(np.float32), rng.normal(size=(42, 8)).astype(np.float32)
targets, weight = rng.integers(0, 42, (4, 6)), rng.normal(size=(4, 6)).astype(np.float32)
def loss(hidden, head, mesh, piece):
    return jax.numpy.sum(weight * token_logprobs(hidden, head, targets, piece=piece, mesh=mesh))
grad = jax.jit(jax.grad(loss, (0, 1)), static_argnums=(2, 3))
split = jax.device_put(head, jax.NamedSharding(mesh, sharding.spec_of(head.shape, ("vocab", "embed"), mesh)))
plain, pieces = grad(hidden, head, None, 1 << 20), grad(jax.device_put(hidden, sharding.rows(mesh)), split, mesh, 6 * 8)
# Rows of 384 places, of which at most 130 are wanted.
hidden, targets = rng.normal(size=(4, 384, 8)).astype(np.float32), rng.integers(0, 42, (4, 384))
weight, wanted = rng.normal(size=(4, 384)), rng.permuted(np.arange(384)[None] < [[0], [130], [5], [60]], axis=1)
def some(hidden, head, mesh):
    return jax.numpy.sum(weight * token_logprobs(hidden, head, targets, wanted, piece=384 * 8, mesh=mesh))
grad = jax.jit(jax.grad(some, (0, 1)), static_argnums=2)
alone, spread = grad(hidden, head, None), grad(jax.device_put(hidden, sharding.rows(mesh)), split, mesh)

print(json.dumps({
    "local": {k: int(v.addressable_shards[0].data.size) for k, v in leaves.items()},
    "size": {k: int(v.size) for k, v in leaves.items()},
    "head": [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(plain, pieces)],
    "some": [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(alone, spread)],
    "some_size": [float(np.abs(np.asarray(a)).max()) for a in alone],
    "head_gradient": pieces[1].sharding.shard_shape(head.shape),
}))
"""


@pytest.fixture(scope="module")
def split():
    """What a process with 8 devices says of a state and of gradients that are split over them."""
    return json.loads(run_simulated(["-c", SPLIT], devices=8).splitlines()[-1])


@pytest.mark.slow
def test_the_loss_by_pieces_of_a_split_head_has_the_gradients_of_the_whole_and_leaves_the_heads_split(split):
    assert max(split["head"]) < 1e-5
    assert split["head_gradient"] == [21, 4]  # vocabulary over tensor, width over fsdp
    assert max(split["some"]) < 1e-5 * max(split["some_size"]) and min(split["some_size"]) > 0.1


@pytest.mark.slow
def test_parameters_and_both_moments_are_spread_over_fsdp_and_tensor(split):
    local, size = split["local"], split["size"]
    kernels = [k for k in local if "kernel" in k]
    params = [k for k in kernels if ".params" in k]
    assert params and len(kernels) == 3 * len(params)  # the parameter, its first and its second moment
    for k in kernels:
        assert local[k] * 2 <= size[k], k
    spread = [k for k in kernels if "mlp" in k and "decoder" in k]
    assert spread and all(local[k] * 4 == size[k] for k in spread)
    # a quarter of most; the patch embedding, a tenth of this small model, is split in two, norms and biases hardly
    assert sum(local.values()) < sum(size.values()) / 3
