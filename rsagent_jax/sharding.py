"""The mesh and where arrays live on it. Mesh axis names appear in this file only.

Parameters carry logical axis names (models/qwen25_vl/layers.param); RULES maps those to mesh axes.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rsagent_jax.config import MeshConfig
from rsagent_jax.types import DataError

AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "patch": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise DataError(f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, at most one is -1")
    known = int(np.prod([s for s in sizes if s > 0]))
    sizes = [devices.size // known if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != devices.size:
        raise DataError(f"mesh {dict(zip(AXES, sizes, strict=True))} does not cover {devices.size} devices")
    return Mesh(devices.reshape(sizes), AXES)


def param_shardings(model: nnx.Module, mesh: Mesh) -> nnx.State:
    """A NamedSharding per parameter. An axis that its mesh axis does not divide stays whole."""

    def one(variable):
        spec, used = [], set()
        for size, name in zip(variable.get_value().shape, variable.get_metadata("axes"), strict=True):
            axis = RULES[name]
            fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
            used.add(axis)
        return variable.replace(NamedSharding(mesh, P(*spec)))

    state = nnx.state(model, nnx.Param)
    return jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def rows(mesh: Mesh) -> NamedSharding:
    """Batches and slots: the leading axis over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
