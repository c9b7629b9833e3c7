"""Every way to compute a forward and backward pass against the plain one. No torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rsagent_jax.models.qwen25_vl import attention, vision
from rsagent_jax.models.qwen25_vl.attention import in_segments
from rsagent_jax.models.qwen25_vl.compute import MLP_MULTIPLE, REMAT, Compute
from rsagent_jax.models.qwen25_vl.cpu import FEW, LONG
from rsagent_jax.models.qwen25_vl.layers import Linear

from . import tiny

pytestmark = pytest.mark.slow

# Two groups of two window blocks and a full one; tall and wide images, left-over windows.
CASE = tiny.Case("grouped", ((1, 4, 10), (1, 10, 6)), depth=6, fullatt=(2, 5))


def segments(rows, t):
    """Segments of uneven length, the last one padding."""
    rng = np.random.default_rng(0)
    out = np.zeros((rows, t), np.int32)
    for row in out:
        cuts = np.sort(rng.choice(np.arange(1, t), 4, replace=False))
        for n, (a, b) in enumerate(zip((0, *cuts), cuts, strict=False), start=1):
            row[a:b] = n
    return jnp.asarray(out)


@pytest.mark.parametrize("causal", [True, False])
# a whole number of tiles; padded to one; a backward pass of one program, and of two
@pytest.mark.parametrize(("kind", "t", "fused"), [
    ("blocks", 640, True), ("blocks", 300, True), ("splash", 640, True), ("splash", 300, True), ("splash", 640, False),
    ("triton", 256, True), ("triton", 300, True), ("cudnn", 300, True), ("cudnn_causal", 300, True),
])  # fmt: skip
def test_attention_and_its_gradients_equal_the_plain_ones(kind, t, fused, causal, monkeypatch):
    """Padding may see anything, but stays finite. The Triton kernel has head dims that are no power of two, too; what
    cuDNN is asked for, jax's own plain form computes here."""
    monkeypatch.setattr(attention, "is_fused", lambda length: fused)
    asked = jax.nn.dot_product_attention
    in_plain = lambda *args, implementation, **how: asked(*args, implementation="xla", **how)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_plain)
    b, n, k, h = 2, 4, 2, 80 if (kind, t) == ("triton", 300) else 16
    rng = np.random.default_rng(1)
    q, key, v, weight = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((b, t, n, h), (b, k, t, h), (b, k, t, h), (b, t, n, h))
    )
    ids = segments(b, t)
    real = (ids > 0)[..., None, None]

    def value(kind):
        def f(q, key, v):
            o = in_segments(ids, Compute(attention=kind), causal=causal)(q, key, v)
            return jnp.sum(o * jnp.where(real, weight, 0)), o

        (_, o), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, key, v)
        assert bool(jnp.isfinite(o).all())
        return [jnp.where(real, o, 0), *grads]

    for got, want in zip(value(kind), value("plain"), strict=True):
        assert float(jnp.abs(got - want).max()) <= 2e-5 * max(1.0, float(jnp.abs(want).max()))


@pytest.mark.parametrize("keys", [LONG - 1, LONG])
def test_the_backward_pass_of_attention_gives_the_gradients_of_jax_s_own(keys):
    """jax.nn's attention, differentiated by jax; keys on both sides of where the products change."""
    rng = np.random.default_rng(2)
    queries, read = (2, 9, 4, 8), (2, 2, keys, 8)
    q, k, v, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (queries, read, read, queries))
    mask = jnp.asarray(rng.random((2, 9, keys)) < 0.7)

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask[:, None])

    def gradients(f):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(f(*qkv) * weight), (0, 1, 2)))(q, k, v)

    ours = gradients(lambda *qkv: attention.attention(*qkv, mask))
    for a, b in zip(ours, gradients(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv", "dim", "causal"), [(16, 2, 128, True), (16, 16, 80, False)])
def test_the_triton_kernels_lower_for_a_gpu_at_real_shapes_and_no_mask_is_made(heads, kv, dim, causal, monkeypatch):
    monkeypatch.setattr(Compute, "platform", "gpu")
    t = 2048
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, t, heads, dim), (1, kv, t, dim), (1, kv, t, dim))]

    def f(q, k, v, ids):
        return jnp.sum(in_segments(ids, Compute("bfloat16", attention="triton"), causal=causal)(q, k, v))

    traced = jax.jit(jax.grad(f, (0, 1, 2))).trace(*shapes, jax.ShapeDtypeStruct((1, t), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3 and f"{t}x{t}x" not in text  # forward, the sums, backward


@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_computes_just_the_tiles_that_segments_share(causal):
    """Against all pairs of places; a tile of the diagonal is computed whatever is in it."""
    side, t = 4, 48
    for ids in (segments(2, t), segments(2, t) * (np.arange(t) % 5 > 0)):  # the second with holes, as windows have
        same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None]
        same &= np.tri(t, dtype=bool) if causal else True
        want = np.asarray(same).reshape(2, t // side, side, t // side, side).any((2, 4)) | np.eye(t // side, dtype=bool)
        assert (np.asarray(attention.tiles_between(ids, side, causal)) == want).all()
        assert want.sum() < want.size * (0.3 if causal else 0.5)


def test_auto_takes_plain_attention_for_short_rows_and_blocks_for_long_ones_on_a_cpu():
    """By what the program holds: plain attention has scores of the whole row."""
    for t, whole in ((512, True), (2048, False)):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, t, 2, 8), (1, 2, t, 8), (1, 2, t, 8))]
        ids = jax.ShapeDtypeStruct((1, t), jnp.int32)
        text = str(jax.make_jaxpr(lambda q, k, v, i: in_segments(i, Compute(), causal=True)(q, k, v))(*shapes, ids))
        assert (f"[1,2,{t},{t}]" in text or f"[1,2,1,{t},{t}]" in text) == whole


@functools.cache
def gradients(compute, grouped=True):
    """(loss, gradients as one flat dict) of a packed row with three images."""
    model = tiny.random_model(CASE, seed=1)
    graphdef, state = nnx.split(model)
    parts = [tiny.sequence(CASE, 1, ((1, 10, 6),)), tiny.sequence(CASE, 2, ((1, 4, 8), (1, 4, 4)))]
    row = tiny.pack(parts, model.config, length=96, capacity=256)

    def loss(state, row):
        model = nnx.merge(graphdef, state)
        return tiny.sft_loss(model, model(row, compute), row)

    period = vision.period
    if not grouped:
        vision.period = lambda config: None
    try:
        value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=tiny.QUICK)(state, row)
    finally:
        vision.period = period
    return float(value), {jax.tree_util.keystr(p): np.asarray(g) for p, g in jax.tree_util.tree_leaves_with_path(grads)}


def assert_equal(got, want):
    assert abs(got[0] - want[0]) <= 1e-6
    for name, g in got[1].items():
        assert np.linalg.norm(g - want[1][name]) <= 1e-5 * np.linalg.norm(want[1][name]) + 1e-9, name


@pytest.mark.parametrize(
    "compute",
    [
        *(Compute(remat=remat) for remat in (*REMAT, "save:attention,mlp_up") if remat != "none"),
        *(Compute(remat=remat, scan_layers=False) for remat in ("none", "full", "selective")),
        *(Compute(remat=remat, attention=kind) for remat in ("none", "attention") for kind in ("blocks", "splash")),
        Compute(remat="attention", attention="triton"),
    ],
    ids=str,
)
def test_remat_unrolled_layers_and_other_attention_give_the_gradients_of_the_plain_pass(compute):
    assert_equal(gradients(compute), gradients(Compute()))


def test_inner_sizes_filled_with_zeros_give_the_same_loss_and_gradients_of_the_parameters_as_they_are(monkeypatch):
    """Both towers' sizes are no multiples of 100; with them filled, the gradients keep the parameters' shapes."""
    monkeypatch.setitem(MLP_MULTIPLE, "cpu", 100)
    filled, seen = [], jnp.pad
    monkeypatch.setattr(jnp, "pad", lambda x, width: filled.append(width) or seen(x, width))
    got = gradients.__wrapped__(Compute())
    assert {width[-1][1] for width in filled} > {0}
    monkeypatch.undo()
    assert_equal(got, gradients(Compute()))


def test_a_scan_over_groups_of_vision_blocks_equals_a_scan_per_run():
    assert vision.period(tiny.random_model(CASE).config.vision) == 3
    assert_equal(gradients(Compute()), gradients(Compute(), grouped=False))


@pytest.mark.parametrize(
    ("depth", "full", "every"),
    [
        (32, (7, 15, 23, 31), 8),
        (6, (2, 5), 3),
        (6, (2,), None),
        (6, (0, 3), None),
        (4, (0, 1, 2, 3), None),
        (4, (), None),
    ],
)
def test_only_regular_towers_are_scanned_in_groups(depth, full, every):
    sizes = dict(hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = vision.VisionConfig(depth=depth, fullatt_block_indexes=full, **sizes, **tiny.PATCHES)
    assert vision.period(config) == every


def test_what_a_policy_keeps_is_not_computed_again():
    """Matrix products in the gradient's jaxpr: full makes all of a layer's again, dots none of them."""

    def products(remat):
        model = tiny.random_model(CASE, seed=1)
        graphdef, state = nnx.split(model)
        row = tiny.pack([tiny.sequence(CASE, 1, ((1, 4, 4),))], model.config, length=64, capacity=64)

        def loss(state):
            return jnp.sum(nnx.merge(graphdef, state)(row, Compute(remat=remat)))

        return str(jax.make_jaxpr(jax.grad(loss))(state)).count("dot_general")

    none, full, dots, selective = (products(r) for r in ("none", "full", "dots", "selective"))
    assert none <= dots < selective < full


@pytest.mark.parametrize("rows", [(1,), (3, 5), (FEW,), (2, FEW)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_kernel_that_stands_output_first_gives_the_same_product(rows, bias):
    plain, turned = (Linear(24, 40, ("embed", "mlp"), nnx.Rngs(0), bias=bias) for _ in range(2))
    turned.kernel = turned.kernel.replace(plain.kernel[...].T)
    turned.out_first = True
    x = jax.random.normal(jax.random.key(1), (*rows, 24))
    want = jax.jit(lambda x: plain(x))(x)
    got = jax.jit(lambda x: turned(x))(x)
    assert got.shape == (*rows, 40) and float(jnp.abs(want).max()) > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
