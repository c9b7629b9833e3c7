"""FLOPs of products and kernels in hand-written programs. test_report.py counts a real one."""

import jax
import jax.numpy as jnp
import pytest

from rsagent_jax.aot.hlo import read_program
from rsagent_jax.aot.work import Kernel, hlo_flops, kernels


def one(instruction: str, *operands: str) -> float:
    lines = [f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
    text = "\n".join(["HloModule m", "", "ENTRY %e () -> f32[] {", *lines, f"  ROOT %r = {instruction}", "}", ""])
    return hlo_flops(read_program(text))


def test_dot():
    dot = "dot(%p0, %p1), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}"
    # Batch 3, [4, 5] x [5, 6].
    assert one(f"f32[3,4,6] {dot}", "f32[3,4,5]", "f32[3,5,6]") == 2 * 3 * 4 * 5 * 6
    outer = "dot(%p0, %p1), lhs_contracting_dims={}, rhs_contracting_dims={}"
    assert one(f"f32[4,6] {outer}", "f32[4]", "f32[6]") == 2 * 4 * 6


@pytest.mark.parametrize(
    ("result", "left", "right", "attributes", "flops"),
    [
        # A product [10, 20] x [20, 30], as the compiler writes it: no spatial axis, or one of size 1.
        ("f32[10,30]", "f32[10,20]", "f32[20,30]", "dim_labels=bf_io->bf", 2 * 10 * 20 * 30),
        ("f32[2,5,30]", "f32[2,5,20]", "f32[20,30,1]", "window={size=1}, dim_labels=b0f_io0->b0f", 2 * 10 * 20 * 30),
        # The leading 2 as a spatial axis of both data and result.
        ("f32[2,5,30]", "f32[2,5,20]", "f32[20,30,1]", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 10 * 20 * 30),
        # A gradient of weights: the batch of 7 is what the kernel slides over, at one place.
        ("f32[20,30,1]", "f32[7,5,20]", "f32[7,5,30]", "window={size=7}, dim_labels=0fb_0io->bf0", 2 * 7 * 5 * 20 * 30),
        # Batch axes 4 x 2 as spatial ones: dilated so that only equal places meet. 8 products [5, 6] x [6, 3].
        (
            "f32[4,2,5,3]", "f32[4,2,5,6]", "f32[4,2,6,3]",
            "window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=01bf_01io->01bf", 2 * 8 * 5 * 6 * 3,
        ),
        # 8 places with a kernel of 3 and one of padding at each end: 8 * 3 - 2 meet data.
        ("f32[1,8,4]", "f32[1,8,5]", "f32[3,5,4]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 22 * 5 * 4),
        # Every second place of the same: outputs at 0, 2, 4, 6, the first misses one.
        (
            "f32[1,4,4]", "f32[1,8,5]", "f32[3,5,4]", "window={size=3 stride=2 pad=1_0}, dim_labels=b0f_0io->b0f",
            2 * 11 * 5 * 4,
        ),
        # Depthwise, 6 groups of one feature: the kernel's input features are 1.
        (
            "f32[1,6,6]", "f32[1,8,6]", "f32[3,1,6]", "window={size=3}, dim_labels=b0f_0io->b0f, feature_group_count=6",
            2 * 6 * 3 * 6,
        ),
        # Batch groups: 4 rows in 2 groups meet 2 of the 6 output features' halves each.
        ("f32[2,6]", "f32[4,5]", "f32[5,6]", "dim_labels=bf_io->bf, batch_group_count=2", 2 * 2 * 5 * 6),
    ],
)  # fmt: skip
def test_convolution(result, left, right, attributes, flops):
    assert one(f"{result} convolution(%p0, %p1), {attributes}", left, right) == flops


def test_an_unrolled_program_has_as_many_as_xla_counts():
    """On the CPU products stay dots; XLA also counts one FLOP per element of max, of which there are 24 * 96."""
    w, x = jax.ShapeDtypeStruct((64, 96), jnp.float32), jax.ShapeDtypeStruct((24, 64), jnp.float32)
    compiled = jax.jit(lambda x, w: jnp.maximum(x @ w, 0) @ w.T).lower(x, w).compile()
    assert (
        hlo_flops(read_program(compiled.as_text())) == compiled.cost_analysis()["flops"] - 24 * 96 == 4 * 24 * 64 * 96
    )


KERNELS = """HloModule m

ENTRY %e (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %flash.3 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"100","bytes_accessed":"8"}}}
  %flash.4.clone = f32[8] custom-call(%flash.3), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"50"}}}
  %splash_fwd.1 = f32[8] custom-call(%flash.4.clone), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{}}
  ROOT %other = f32[8] custom-call(%splash_fwd.1), custom_call_target="AllocateBuffer"
}
"""  # noqa: E501


def test_kernels():
    program = read_program(KERNELS)
    assert kernels(program) == [Kernel("flash", 2, 150.0), Kernel("splash_fwd", 1, None)]
    assert hlo_flops(program) == 150
    told = {"flash": 1.0, "splash_fwd": 7.0}
    assert kernels(program, lambda name, _: told[name]) == [Kernel("flash", 2, 2.0), Kernel("splash_fwd", 1, 7.0)]
    assert hlo_flops(program, lambda name, _: told[name] if name == "splash_fwd" else None) == 157
    by_shape = kernels(program, lambda _, shapes: float(shapes[0][0]))  # both take f32[8]
    assert [k.flops for k in by_shape] == [2 * 8.0, 8.0]
