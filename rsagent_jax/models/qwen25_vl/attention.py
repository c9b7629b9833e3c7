"""Attention inside segments of packed rows, six ways. All compute the same; fp32 softmax in each.

plain         scores of the whole row at once: fastest for short rows, memory grows with the square of the length
blocks        a block of queries at a time, made again in the backward pass: memory grows with the length, any back end
splash        jax's Pallas kernel for TPU: holds no scores, skips tiles of other segments and above the diagonal
cudnn         the fused kernel on GPU; segments and causality are a mask of the whole row, which it reads
cudnn_causal  the same kernel told of causality, so that it can skip what is above the diagonal; segments are the mask
triton        jax's Pallas kernel for GPU: compares segment ids tile by tile, stops at the diagonal, reads no mask
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as splash_mask_info

from rsagent_jax.array_types import Array, Bool, Float, Int
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.cpu import softmax_attention
from rsagent_jax.runtime import sharding
from rsagent_jax.types import DataError

PLAIN_MAX = 1024  # longest row that "auto" attends to at once
BLOCK = 512  # queries at a time, and the kernel's tiles
LANES = 128  # the kernel's smallest tile


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads; softmax in fp32. Rows of the mask without a True give finite garbage."""
    b, t, n, h = q_BTNH.shape
    kv = v_BKSH.shape[1]
    # One batched matrix product over (B, K): the G query heads of a group are extra rows. Fast on every back end.
    q = q_BTNH.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)
    o = softmax_attention(q, k_BKSH, v_BKSH, mask_BTS).reshape(b, kv, -1, t, h)
    return o.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def in_segments(segment_ids_BT: Int[Array, "B T"], compute: Compute, *, causal: bool) -> Callable[..., Array]:
    """`attend(q_BTNH, k_BKTH, v_BKTH) -> o_BTNH` for rows with these segments.

    Place t sees the places of its own segment, with `causal` those up to t. Padding, segment 0, gives finite garbage.
    """
    kind = compute.attention
    if kind == "auto":
        long = segment_ids_BT.shape[1] > PLAIN_MAX
        fused = jnp.dtype(compute.dtype).itemsize == 2  # cuDNN has no fp32 kernel
        kind = {"tpu": "splash", "gpu": "cudnn" if fused else "blocks"}.get(
            compute.platform, "blocks" if long else "plain"
        )
    if kind == "plain":
        mask = _mask(segment_ids_BT, segment_ids_BT, 0, causal)
        return lambda q, k, v: attention(q, k, v, mask)
    if kind in ("cudnn", "cudnn_causal"):
        told = causal and kind == "cudnn_causal"
        mask = _mask(segment_ids_BT, segment_ids_BT, 0, causal and not told)[:, None]
        run = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=told, implementation="cudnn")
        return lambda q, k, v: run(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
    if kind == "blocks":
        return functools.partial(_blocks, segment_ids_BT, causal)
    segments = jnp.pad(segment_ids_BT, ((0, 0), (0, -segment_ids_BT.shape[1] % LANES)), constant_values=-1)
    if kind == "triton":
        return functools.partial(_triton, segments, compute, causal)
    tiles = tiles_between(segments, tile(segments.shape[1]), causal)
    return functools.partial(_splash, segments, tiles, compute, causal)


def _mask(queries_BT, keys_BS, first, causal: bool):
    """bool[B, T, S]; the queries stand at places `first`... of the row."""
    same = queries_BT[:, :, None] == keys_BS[:, None, :]
    if not causal:
        return same
    places = first + jnp.arange(queries_BT.shape[1])
    return same & (jnp.arange(keys_BS.shape[1])[None] <= places[:, None])


def _blocks(segment_ids_BT, causal, q_BTNH, k_BKTH, v_BKTH):
    b, t, n, h = q_BTNH.shape
    block = -(-t // -(-t // BLOCK))  # as many blocks as BLOCK needs, of one size: 1280 are 3 x 427, not 3 x 512
    pad = -t % block  # padding queries get a segment that no key has: finite garbage, cut off below
    segments = jnp.pad(segment_ids_BT, ((0, 0), (0, pad)), constant_values=-1).reshape(b, -1, block).swapaxes(0, 1)
    q = jnp.pad(q_BTNH, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, -1, block, n, h).swapaxes(0, 1)

    @jax.checkpoint
    def one(args):
        i, q, mine = args
        return attention(q, k_BKTH, v_BKTH, _mask(mine, segment_ids_BT, i * block, causal))

    o = jax.lax.map(one, (jnp.arange(len(q)), q, segments))
    return o.swapaxes(0, 1).reshape(b, -1, n, h)[:, :t]


def _triton(segments_BT, compute: Compute, causal, q_BTNH, k_BKTH, v_BKTH):
    from jax.experimental.pallas.ops.gpu.attention import mha  # from jax 0.11 on its import warns of deprecation

    t, n, h = q_BTNH.shape[1:]
    _check_heads(n, k_BKTH.shape[1], compute)
    padded = ((0, 0), (0, segments_BT.shape[1] - t), (0, 0), (0, 0))
    q, k, v = (jnp.pad(a, padded) for a in (q_BTNH, k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2)))

    def run(q, k, v, segments):
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))  # it knows no grouped heads
        return mha(q, k, v, segments, sm_scale=h**-0.5, causal=causal, interpret=compute.platform != "gpu")

    heads, row = ("rows", None, "heads", None), ("rows", None)
    o = sharding.per_device(run, (heads, heads, heads, row), heads, compute.mesh)(q, k, v, segments_BT)
    return o[:, :t]


def _check_heads(n: int, kv: int, compute: Compute) -> None:
    """A kernel runs on each device's own heads."""
    tensor = sharding.parts("heads", compute.mesh)
    if n % tensor or kv % tensor:
        raise DataError(f"mesh.tensor = {tensor} must divide the policy's {n} heads and {kv} key/value heads")


def _splash(segments_BT, tiles_BQK, compute: Compute, causal, q_BTNH, k_BKTH, v_BKTH):
    t, n, h = q_BTNH.shape[1:]
    _check_heads(n, k_BKTH.shape[1], compute)
    pad = segments_BT.shape[1] - t
    q = jnp.pad(q_BTNH.swapaxes(1, 2) * h**-0.5, ((0, 0), (0, 0), (0, pad), (0, 0)))
    k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, pad), (0, 0))) for a in (k_BKTH, v_BKTH))
    run = functools.partial(_kernel, causal=causal, interpret=compute.platform != "tpu", named=compute.remat != "none")
    heads, row = ("rows", "heads", None, None), ("rows", None)
    names = (heads, heads, heads, row, (*row, None))
    o = sharding.per_device(jax.vmap(run), names, heads, compute.mesh)(q, k, v, segments_BT, tiles_BQK)
    return o.swapaxes(1, 2)[:, :t]


def tile(length: int) -> int:
    """Side of the kernel's tiles for rows of this length, a multiple of LANES."""
    return next(b for b in (BLOCK, 256, LANES) if length % b == 0)


def tiles_between(segment_ids_BT: Int[Array, "B T"], side: int, causal: bool) -> Bool[Array, "B Q K"]:
    """The tiles of queries and keys that may share a segment; exact where segments ascend along a row.

    A tile on the diagonal always counts: padding needs something to see.
    """
    blocks = segment_ids_BT.reshape(len(segment_ids_BT), -1, side)
    first = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(-1)
    last = blocks.max(-1)
    tiles = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
    number = jnp.arange(tiles.shape[1])
    tiles |= number[:, None] == number
    return tiles & (number[:, None] >= number) if causal else tiles


def is_fused(length: int) -> bool:
    """Whether the kernel's backward pass is one program of five matrix products, or two of seven.

    The one keeps a share of the queries' gradient per tile of keys, in fp32: 3 GiB for a row of 14,336 patches.
    """
    return length <= 8 * BLOCK


def _kernel(q_NTH, k_KTH, v_KTH, segments_T, tiles_QK, *, causal: bool, interpret: bool, named: bool):
    """The kernel for one row and one device's heads. Its own name keeps the softmax's sums with its output."""
    length = len(segments_T)
    block, fused = tile(length), is_fused(length)
    always = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute".split()
    sizes = dict.fromkeys(always, block) | dict.fromkeys(("block_q_dq", "block_kv_dq"), None if fused else block)
    places = jnp.arange(length) if causal else None

    def tables(axis: int):
        """Which tiles are computed, and for the others the one to load instead: the next on the way, else the last."""
        number = jax.lax.broadcasted_iota(jnp.int32, tiles_QK.shape, axis)
        following = jax.lax.cummin(jnp.where(tiles_QK, number, len(tiles_QK)), axis, reverse=True)
        last = jnp.max(jnp.where(tiles_QK, number, 0), axis, keepdims=True)
        loaded = jnp.where(following < len(tiles_QK), following, last)
        return splash_mask_info.MaskInfo(loaded[None], None, 2 * tiles_QK.astype(jnp.int32)[None], None, places)

    by_query = tables(1)
    kernel = splash.SplashAttentionKernel(
        by_query,
        None if fused else by_query,
        tables(0),
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name="attention" if named else None,
        mask_function=operator.ge if causal else None,
        interpret=interpret,
    )
    return kernel(q_NTH, k_KTH, v_KTH, splash.SegmentIds(segments_T, segments_T))
