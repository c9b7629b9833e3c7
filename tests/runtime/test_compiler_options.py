"""The options of each kind of device are known to its compiler, and do what they are there for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rsagent_jax.aot.compiled import Program
from rsagent_jax.aot.schedule import Overlap, schedule_overlap
from rsagent_jax.aot.topology import devices, parse_topology
from rsagent_jax.runtime.compiler_options import OPTIONS, compiler_options


def layers(name: str, options) -> Overlap:
    """Of products with weights that are gathered from four devices, two a layer."""
    topology = parse_topology(name)
    mesh = Mesh(np.array(devices(topology)[:4]), ("fsdp",))
    if options == "ours":
        options = compiler_options(mesh)

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def forward(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None), x, w)[0]

    x, w = abstract((4096, 1024), "fsdp"), abstract((6, 2, 1024, 1024), None, None, "fsdp")
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    compiled = jax.jit(forward, compiler_options=options, out_shardings=rows).lower(x, w).compile()
    return schedule_overlap(Program(compiled.as_text()), topology)


@pytest.mark.parametrize(
    ("name", "kind"), [("v5p:2x2x1", "TPU v5"), ("v6e:2x2", "TPU v6 lite"), ("tpu7x:2x1x1", "TPU7x")]
)
def test_weights_are_gathered_beside_products(name, kind):
    ours = layers(name, "ours")
    assert devices(parse_topology(name))[0].device_kind == kind and kind in OPTIONS
    assert ours.asynchronous >= 6 and ours.hidden_s > 0
    if kind != "TPU7x":  # whose compiler does so without being asked to
        assert layers(name, None).asynchronous == 0


def test_every_kind_with_options_is_tested_and_a_cpu_has_none():
    assert set(OPTIONS) == {"TPU v5", "TPU v6 lite", "TPU7x"}
    assert compiler_options(Mesh(np.array(jax.devices()[:1]), ("one",))) is None
