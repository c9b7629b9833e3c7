"""How a forward pass is computed: dtype, what the backward pass keeps, which attention, which mesh.

None of it changes what is computed, up to rounding; every variant is tested against the plain one.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from rsagent_jax.config.schema import PolicyConfig
from rsagent_jax.models.qwen25_vl import cpu
from rsagent_jax.runtime import sharding

# Activations that a block names, in the order in which it makes them.
NAMES = ("qkv", "attention", "attention_out", "mlp_gate", "mlp_up")
# By platform, the multiple to which the forward pass fills the MLPs' inner sizes with zeros, which change nothing. A
# GPU's products are slow where a size is no multiple of 8, as is the vision tower's 3,420.
MLP_MULTIPLE = {"gpu": 128}
# Policies: what the backward pass finds again, everything else it computes anew.
REMAT: dict[str, tuple[str, ...] | None] = {
    "none": None,  # no remat: all is kept
    "full": (),  # only the blocks' inputs
    "attention": ("attention",),  # the dearest per byte in long rows
    "selective": ("attention", "mlp_gate", "mlp_up"),  # the dear products; q, k, v and the output's are made again
    "dots": NAMES,  # every matrix product's result; norms and activation functions are made again
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """Settings of a forward pass. Hashable: part of a program's identity."""

    dtype: str = "float32"  # of activations
    remat: str = "none"  # a policy of REMAT, or save:a,b or offload:a,b with names of NAMES
    attention: str = "auto"  # attention.py says which there are
    mesh: jax.sharding.Mesh | None = None
    scan_layers: bool = True  # False: one layer after the other, each compiled; nothing is stacked for a loop

    @classmethod
    def of(cls, policy: PolicyConfig, mesh: jax.sharding.Mesh | None = None) -> Self:
        """What the config asks for, on this mesh."""
        return cls(policy.dtype, policy.remat, policy.attention, mesh, policy.scan_layers)

    @property
    def platform(self) -> str:
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    def rows(self, x: jax.Array) -> jax.Array:
        """Keeps an activation's leading axis over the mesh's rows, and its other axes whole."""
        return sharding.constrain(x, ("rows",) + (None,) * (x.ndim - 1), self.mesh)

    def tables(self, *tables: jax.Array) -> tuple[jax.Array, ...]:
        """What all layers read, computed once: only a CPU's compiler has to be told."""
        return tuple(map(cpu.buffer, tables)) if self.platform == "cpu" else tables

    def name(self, x: jax.Array, name: str) -> jax.Array:
        return checkpoint_name(x, name) if self.remat != "none" else x


def checkpoint_policy(remat: str):
    """Of jax.checkpoint; None for "none". `remat`: as config.ranges.Remat has it."""
    kind, colon, names = remat.partition(":")
    wanted = tuple(n.strip() for n in names.split(",")) if colon else REMAT[kind]
    policies = jax.checkpoint_policies
    if wanted is None:
        return None
    if kind == "offload":
        to_host = dict(offload_src="device", offload_dst="pinned_host")
        offload = policies.save_and_offload_only_these_names
        return offload(names_which_can_be_saved=[], names_which_can_be_offloaded=list(wanted), **to_host)
    return policies.save_only_these_names(*wanted)


PLAIN = Compute()


def scan_layers(stacked: nnx.Module, body, x, compute: Compute, *, start: int = 0, stop: int | None = None):
    """Runs `body(layer, x) -> x` over layers `start..stop` of a stacked module with one compiled body."""
    graphdef, state = nnx.split(stacked)
    return scan_states(graphdef, jax.tree.map(lambda a: a[start:stop], state), body, x, compute)


def scan_states(graphdef, state, body, x, compute: Compute):
    """As `scan_layers` on a split module. Each layer's parameters are gathered when its turn comes."""

    def step(carry, layer):
        return compute.rows(body(nnx.merge(graphdef, _local_state(layer, compute)), carry)), None

    if (policy := checkpoint_policy(compute.remat)) is not None:
        # A loop keeps the recomputation apart from the first pass; there, the barrier against merging the two would
        # only cost.
        step = jax.checkpoint(step, policy=policy, prevent_cse=not compute.scan_layers)
    return jax.lax.scan(step, compute.rows(x), state, unroll=not compute.scan_layers)[0]


def local(module: nnx.Module, compute: Compute) -> nnx.Module:
    """The module with its parameters cast and gathered; for what stands outside of a scan."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, _local_state(state, compute))


def _local_state(state, compute: Compute):
    """Parameters as the matrix products take them: cast where they lie, then gathered, at half the bytes of fp32; inner
    sizes filled with zeros where the platform gains by it. The parameters themselves stay as they are."""
    multiple = MLP_MULTIPLE.get(compute.platform, 1) if sharding.parts("mlp", compute.mesh) == 1 else 1

    def one(variable: nnx.Variable) -> nnx.Variable:
        value, names = variable.get_value().astype(jnp.dtype(compute.dtype)), variable.get_metadata("axes")
        names = names[len(names) - value.ndim :]
        value = sharding.gather(value, names, compute.mesh)
        fill = [(0, -n % multiple if name == "mlp" else 0) for n, name in zip(value.shape, names, strict=True)]
        return variable.replace(jnp.pad(value, fill) if any(map(any, fill)) else value)

    return jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
