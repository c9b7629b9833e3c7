"""The engine's weights from the parameters that are trained, wherever these lie."""

import collections
import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from rsagent_jax.rollout.programs import LAYERS, RolloutPrograms, Weights, weight_shardings


class WeightLoader:
    """Casts and lays out parameters for `programs`.

    local: makes arrays of a slice arrays of this process (processes.local_copy). It is asked for a part after another,
    so that no second copy of all weights is ever on a device. None where the parameters are this process's.
    """

    def __init__(
        self,
        programs: RolloutPrograms,
        params: nnx.State,
        mesh: jax.sharding.Mesh | None,
        local: Callable[[nnx.State], nnx.State] | None = None,
    ):
        self.programs, self.mesh, self.local = programs, mesh, local
        devices = jax.tree.leaves(params)[0].sharding.addressable_devices
        self.device = min(devices, key=lambda d: d.id)  # without a mesh
        self.where = None if mesh is None else weight_shardings(programs, params, mesh)
        self._split = {}  # programs that make weights, by the parameters that they make them of

    def load(self, params: nnx.State) -> Weights:
        if self.local is None:
            return self._laid_out(params)
        by_name = weight_parts(self.programs, params)
        # Each is awaited: else the next one's copy is asked for while this one's is there.
        made = [jax.block_until_ready(self._laid_out(self.local(part))) for part in by_name.values()]
        joined = lambda states: nnx.from_flat_state([leaf for state in states for leaf in flat_leaves(state)])  # noqa: E731
        layers = tuple(joined(layer) for layer in zip(*(part.layers for part in made), strict=True))
        return Weights(layers, joined(part.unstacked for part in made))

    def _laid_out(self, params: nnx.State) -> Weights:
        shared = self._shared(params)
        params = nnx.from_flat_state([(path, v) for path, v in flat_leaves(params) if path not in shared])
        made_of = frozenset(path for path, _ in flat_leaves(params))
        if (split := self._split.get(made_of)) is None:
            where = None if self.mesh is None else weight_shardings(self.programs, params, self.mesh)
            split = self._split[made_of] = jax.jit(self.programs.split, out_shardings=where)
        made = split(params)
        unstacked = nnx.from_flat_state([*flat_leaves(made.unstacked), *shared.items()])
        whole = dataclasses.replace(made, unstacked=unstacked)
        return whole if self.mesh else jax.device_put(whole, self.device)

    def _shared(self, params: nnx.State) -> dict[tuple, nnx.Variable]:
        """By path, the parameters that the programs can take as they are, without a copy."""
        where = {} if self.where is None else dict(flat_leaves(self.where.unstacked))
        dtype, found = np.dtype(self.programs.compute.dtype), {}
        for path, variable in flat_leaves(params):
            x = variable.get_value()
            new = path[:2] == LAYERS or (self.programs.int8 and path == self.programs.head)
            if new or x.dtype != dtype or not isinstance(x, jax.Array):
                continue
            if self.mesh is not None:
                target = where[path].get_value()
            elif len(x.sharding.device_set) == 1:
                target = jax.sharding.SingleDeviceSharding(*x.sharding.device_set)
            else:
                continue
            if x.sharding.is_equivalent_to(target, x.ndim):
                # Under the very same sharding each time, however it was written: else programs compile once more.
                shards = [shard.data for shard in x.addressable_shards]
                array = jax.make_array_from_single_device_arrays(x.shape, target, shards)
                found[path] = variable.replace(array)
        return found


def weight_parts(programs: RolloutPrograms, params: nnx.State) -> dict[str, nnx.State]:
    """What can be loaded one after another, by name: all that is outside of the decoder's layers, and each module of
    theirs, or those that become one."""
    joined = {part: whole for whole, together in programs.joined.items() for part in together}
    found = collections.defaultdict(list)
    for path, variable in flat_leaves(params):
        module = path[2:-1] if path[:2] == LAYERS else ("others",)
        found[".".join(joined.get(module, module))].append((path, variable))
    return {name: nnx.from_flat_state(leaves) for name, leaves in found.items()}


def flat_leaves(state: nnx.State) -> list[tuple[tuple, nnx.Variable]]:
    """As nnx.to_flat_state, which would keep the arrays alive until Python's garbage is collected."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return [(tuple(key.key for key in path), variable) for path, variable in leaves]
