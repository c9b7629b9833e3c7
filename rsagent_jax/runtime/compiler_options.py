"""Options of the XLA compiler by kind of device, for the programs of training and of rollouts.

Each is here for an effect that the compiler's figures show. docs/scaling.md (Compiler options) has them, and the usual
options that are not here for want of one.
"""

import jax

# All-gathers of weights begin early and go on beside products, as they do on v5e and TPU7x without being asked to. Of
# the 3B's gradients (without the tower) a device then waits for 20.7 in place of 60.3 ms of the 98.8 that v6e-8 sends,
# for 35.0 in place of all 77.4 ms on v5p-8, and its memory's peak grows by 0.14 and 0.05 GiB.
GATHER_EARLY = {"xla_enable_async_all_gather": "true", "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true"}
OPTIONS = {
    "TPU v5": GATHER_EARLY,  # v5p
    "TPU v6 lite": GATHER_EARLY,
    # libtpu 0.0.42 moves gathers of the vision tower's rows to TPU7x's SparseCores and aborts there on the 7B ("Not
    # enough space for TILESPMEM spill"): they stay on the TensorCore.
    "TPU7x": {"xla_tpu_offload_gather_to_sparsecore": "false"},
}

# libtpu 0.0.42 lays bf16 arrays out in tiles of 8 rows between programs and of 16 inside: every call of the engine
# would copy the weights and all keys. With this the tiles are the same inside: 30.49 GiB a step of the 7B, not 36.84.
ENGINE_OPTIONS = {"TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"}}


def compiler_options(mesh: jax.sharding.Mesh | None, *, engine: bool = False) -> dict[str, str] | None:
    """For `jax.jit` of a program on this mesh's devices, without one on this process's."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return (ENGINE_OPTIONS if engine else OPTIONS).get(device.device_kind)
