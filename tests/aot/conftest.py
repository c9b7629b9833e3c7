"""One small training step for a described v5e:2x2."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rsagent_jax.aot.topology import Topology, devices, parse_topology


@dataclasses.dataclass(frozen=True)
class Step:
    """Layers of x + attention(x), x + relu(x @ up) @ down under scan and remat, weights sharded on 4 devices."""

    layers: int = 3
    rows: int = 4  # one per device
    tokens: int = 256
    dim: int = 256
    hidden: int = 1024
    heads: int = 2
    devices: int = 4

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        d = self.dim
        return {"qkv": (d, 3 * d), "o": (d, d), "up": (d, self.hidden), "down": (self.hidden, d)}

    @property
    def weight_count(self) -> int:
        """Of one layer."""
        return sum(a * b for a, b in self.weights.values())


@pytest.fixture(scope="session")
def step() -> Step:
    return Step()


@pytest.fixture(scope="session")
def topology() -> Topology:
    return parse_topology("v5e:2x2")


@pytest.fixture(scope="session")
def traced(step: Step, topology: Topology) -> Any:
    mesh = Mesh(np.array(devices(topology)), ("fsdp",))
    rows, b, t, d = PartitionSpec("fsdp"), step.rows, step.tokens, step.dim
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((t, t))] * step.heads)
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    attend = jax.shard_map(jax.vmap(kernel), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)

    def layer(x, w):
        w = {name: value.astype(x.dtype) for name, value in w.items()}
        q, k, v = (a.reshape(b, t, step.heads, -1).swapaxes(1, 2) for a in jnp.split(x @ w["qkv"], 3, -1))
        x = x + attend(q, k, v).swapaxes(1, 2).reshape(b, t, d) @ w["o"]
        x = x + jax.nn.relu(x @ w["up"]) @ w["down"]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rows)), None

    def loss(weights, x):
        y, _ = jax.lax.scan(jax.checkpoint(layer), x.astype(jnp.bfloat16), weights)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    def train_step(weights, x):
        value, gradients = jax.value_and_grad(loss)(weights, x)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients), value

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    stacked = PartitionSpec(None, "fsdp")
    weights = {name: abstract((step.layers, *shape), stacked) for name, shape in step.weights.items()}
    return jax.jit(train_step, donate_argnums=0).trace(weights, abstract((b, t, d), rows))
