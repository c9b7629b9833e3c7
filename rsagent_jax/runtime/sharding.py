"""The mesh and where arrays live on it. Mesh axis names appear in this file only.

Parameters carry logical axis names (models/qwen25_vl/layers.param), activations get theirs where they are constrained;
RULES maps both to mesh axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rsagent_jax.config.schema import MeshConfig
from rsagent_jax.types import DataError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": "fsdp",
    "patch": None,
    "norm": None,  # a few thousand numbers each: gathering them in every layer would cost more than keeping them
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    # activations
    "rows": ROWS,
    "groups": "data",  # rows, where fsdp holds another axis of the same array
    None: None,
}
LARGE = 1 << 20  # numbers; a parameter of this size must be split by every mesh axis that its rules name


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([s for s in sizes if s > 0]))
    sizes = [devices.size // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != devices.size:
        raise DataError(f"mesh {dict(zip(AXES, sizes, strict=True))} does not cover {devices.size} devices")
    return Mesh(devices.reshape(sizes), AXES)


def spec_of(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh) -> P:
    """Logical names -> mesh axes. An axis that its mesh axis does not divide stays whole.

    KeyError for a name without a rule. Two axes with rules to the same mesh axis are refused by jax.
    """
    sized = zip(shape, (RULES[name] for name in names), strict=True)
    return P(*(rule if rule and size % _size(rule, mesh) == 0 else None for size, rule in sized))


def param_shardings(model: nnx.Module, mesh: Mesh) -> nnx.State:
    """A NamedSharding per parameter. DataError lists the large ones that the mesh cannot split as their rules say."""
    state, whole = nnx.state(model, nnx.Param), []

    def one(path, variable):
        shape, names = variable.get_value().shape, variable.get_metadata("axes")
        spec = spec_of(shape, names, mesh)
        wanted = [(size, RULES[name]) for size, name in zip(shape, names, strict=True) if RULES[name]]
        unsplit = [(n, axis) for n, axis in wanted if n % _size(axis, mesh)]
        if unsplit and math.prod(shape) >= LARGE:
            faults = ", ".join(f"{n} is not a multiple of mesh.{axis} = {_size(axis, mesh)}" for n, axis in unsplit)
            whole.append(f"{jax.tree_util.keystr(path, simple=True, separator='.')} {list(shape)}: {faults}")
        return variable.replace(NamedSharding(mesh, spec))

    shardings = jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    if whole:
        raise DataError("the mesh cannot split these parameters:\n  - " + "\n  - ".join(whole))
    return shardings


def constrain(x: jax.Array, names: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """Inside jit: says where an activation (or a cast parameter) lives, so that the compiler need not guess."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(x.shape, names, mesh)))


def gather(x: jax.Array, names: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """Inside jit: a parameter whole over fsdp, still split over tensor; its gradient is split like it again.

    Left to itself, the TPU compiler keeps a kernel whose contracted axis is split where it is and sums partial products
    as the parts pass by: a result of the size of the activations is read and written once per device of the axis, in
    the activations' dtype.
    """
    if mesh is None or mesh.size == 1:
        return x
    whole = tuple(None if RULES[name] == "fsdp" else name for name in names)

    @jax.custom_vjp
    def gathered(x):
        return constrain(constrain(x, names, mesh), whole, mesh)

    gathered.defvjp(lambda x: (gathered(x), None), lambda _, g: (constrain(g, names, mesh),))
    return gathered(x)


def per_device(f, in_names: Sequence[Sequence[str | None]], out_names: Sequence[str | None], mesh: Mesh | None):
    """`f` on each device's part of its arguments (shard_map); `f` itself without a mesh. Sizes must divide."""
    if mesh is None or mesh.size == 1:
        return f
    specs = [P(*(RULES[name] for name in names)) for names in (*in_names, out_names)]
    return jax.shard_map(f, mesh=mesh, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)


def parts(name: str, mesh: Mesh | None) -> int:
    """Into how many parts the mesh splits an axis of this logical name."""
    return 1 if mesh is None or not RULES[name] else _size(RULES[name], mesh)


def rows(mesh: Mesh) -> NamedSharding:
    """Batches and slots: the leading axis over data and fsdp."""
    return NamedSharding(mesh, P(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _size(rule: str | tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((rule,) if isinstance(rule, str) else rule))
