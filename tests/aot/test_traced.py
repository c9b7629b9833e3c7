"""FLOPs of products and kernels in traced programs, by hand and against XLA's count; test_report.py has a real one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, PartitionSpec

from rsagent_jax.aot.traced import Kernel, traced_work


def work(f, *shapes, kernel_flops=None):
    return traced_work(jax.jit(f).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)), kernel_flops)


def products(f, *shapes) -> float:
    return work(f, *shapes).product_flops


W, X, ONE = (8, 8), (4, 8), 2 * 4 * 8 * 8  # one product of the two


@pytest.mark.parametrize(
    ("f", "shapes", "by_hand"),
    [
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), ((3, 4, 5), (3, 5, 6)), 2 * 3 * 4 * 5 * 6),  # batch of 3
        (lambda a, b: jnp.einsum("i,j->ij", a, b), ((4,), (6,)), 2 * 4 * 6),
        (lambda x, w: jax.lax.scan(lambda x, _: (x @ w, x @ w), x, length=5)[0], (X, W), 5 * ONE),  # one not needed
        (lambda x, w: jax.lax.fori_loop(2, 9, lambda _, x: x @ w, x), (X, W), 7 * ONE),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), (X, W), 2 * ONE),
        (lambda x, w: (x @ w, x + 1)[1], (X, W), 0),
        # Two products forward, two backward, and only the first of the forward ones is needed again.
        (jax.value_and_grad(lambda x, w: jax.checkpoint(lambda x: jnp.sin(x @ w) @ w)(x).sum()), (X, W), 5 * ONE),
    ],
)
def test_products(f, shapes, by_hand):
    assert products(f, *shapes) == by_hand


def test_a_part_per_device_counts_for_all_devices():
    mesh, rows = AbstractMesh((4,), ("x",)), PartitionSpec("x")
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert products(f, (16, 8), W) == 4 * ONE == products(lambda x, w: x @ w, (16, 8), W)


def test_a_loop_without_a_count_is_reported_and_counts_once():
    found = work(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x), X, W)
    assert (
        found.product_flops == ONE and len(found.unknown_trip_counts) == 1 and "while" in found.unknown_trip_counts[0]
    )


def test_kernels():
    def kernel(name, flops=None):
        body = lambda i, o: o.__setitem__(..., i[...])  # noqa: E731
        estimate = pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0) if flops else None
        out = jax.ShapeDtypeStruct((8,), np.float32)
        return pl.pallas_call(body, out_shape=out, cost_estimate=estimate, name=name)

    def f(x):
        x, _ = jax.lax.scan(lambda x, _: (kernel("flash", 100)(x), None), x, length=3)
        return kernel("splash_fwd")(kernel("flash", 50)(x))

    assert work(f, (8,)).kernels == (Kernel("flash", 4, 350.0), Kernel("splash_fwd", 1, None))
    told = {"flash": 1.0, "splash_fwd": 7.0}
    found = work(f, (8,), kernel_flops=lambda name, _: told[name])
    assert found.kernels == (Kernel("flash", 4, 4.0), Kernel("splash_fwd", 1, 7.0)) and found.product_flops == 0
    by_shape = work(f, (8,), kernel_flops=lambda _, shapes: float(shapes[0][0])).kernels  # both take f32[8]
    assert [k.flops for k in by_shape] == [4 * 8.0, 8.0]
