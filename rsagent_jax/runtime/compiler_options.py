"""Options of the XLA compiler by kind of device. Each is here for an effect that stands beside it; the rest of the
usual ones were tried (docs/tpu.md, Compiler options), and the compiler does as well or better without.
"""

import jax

OPTIONS = {
    # libtpu 0.0.42 moves gathers of the vision tower's rows to TPU7x's SparseCores and aborts there on the 7B ("Not
    # enough space for TILESPMEM spill"): they stay on the TensorCore. For programs with a forward pass.
    "TPU7x": {"xla_tpu_offload_gather_to_sparsecore": "false"},
}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """For `jax.jit` of a program on this mesh's devices."""
    return OPTIONS.get(mesh.devices.flat[0].device_kind)
