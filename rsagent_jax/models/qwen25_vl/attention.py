"""Attention inside segments of packed rows, four ways. All compute the same; fp32 softmax in each.

plain   scores of the whole row at once: fastest for short rows, memory grows with the square of the length
blocks  a block of queries at a time, made again in the backward pass: memory grows with the length, on any back end
splash  jax's Pallas kernel for TPU: skips what lies above the diagonal, holds no scores
cudnn   the fused kernel on GPU
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from rsagent_jax import sharding
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.types import DataError

PLAIN_MAX = 1024  # longest row that "auto" attends to at once
BLOCK = 512  # queries at a time, and the kernel's tiles
LANES = 128  # the kernel's smallest tile


def attention(q_BTNH: jax.Array, k: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, *, keys="BKSH") -> jax.Array:
    """Softmax attention with grouped heads; softmax in fp32. Rows of the mask without a True give finite garbage.

    `keys` names the axes of `k`, of which "BKHS" is how a cache holds them.
    """
    b, t, n, h = q_BTNH.shape
    kv, s = v_BKSH.shape[1:3]
    # One batched matrix product over (B, K): the G query heads of a group are extra rows. Fast on every back end.
    q = q_BTNH.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, h)
    scores = jnp.einsum(f"BKTH,{keys}->BKTS", q, k, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores.reshape(b, kv, -1, t, s), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype).reshape(b, kv, -1, s)
    o = jnp.einsum("BKTS,BKSH->BKTH", weights, v_BKSH).reshape(b, kv, -1, t, h)
    return o.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def in_segments(segment_ids_BT: jax.Array, compute: Compute, *, causal: bool) -> Callable[..., jax.Array]:
    """`attend(q_BTNH, k_BKTH, v_BKTH) -> o_BTNH` for rows with these segments.

    Place t sees the places of its own segment, with `causal` those up to t. Padding, segment 0, sees itself.
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
    if kind == "cudnn":
        mask = _mask(segment_ids_BT, segment_ids_BT, 0, causal)[:, None]
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=mask, implementation="cudnn"
        )
    if kind == "blocks":
        return functools.partial(_blocks, segment_ids_BT, causal)
    return functools.partial(_splash, segment_ids_BT, compute, causal)


def _mask(queries_BT, keys_BS, first: int | jax.Array, causal: bool) -> jax.Array:
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


def _splash(segment_ids_BT, compute: Compute, causal, q_BTNH, k_BKTH, v_BKTH):
    t, n, h = q_BTNH.shape[1:]
    tensor, kv = sharding.parts("heads", compute.mesh), k_BKTH.shape[1]
    if n % tensor or kv % tensor:
        raise DataError(f"mesh.tensor = {tensor} must divide the policy's {n} heads and {kv} key/value heads")
    pad = -t % LANES
    q = jnp.pad(q_BTNH.swapaxes(1, 2) * h**-0.5, ((0, 0), (0, 0), (0, pad), (0, 0)))
    k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, pad), (0, 0))) for a in (k_BKTH, v_BKTH))
    segments = jnp.pad(segment_ids_BT, ((0, 0), (0, pad)), constant_values=-1)
    kernel = _kernel(t + pad, n // tensor, causal, compute.platform != "tpu", compute.remat != "none")

    def each(q, k, v, segments):
        return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))

    heads = ("rows", "heads", None, None)
    o = sharding.per_device(each, (heads, heads, heads, ("rows", None)), heads, compute.mesh)(q, k, v, segments)
    return o.swapaxes(1, 2)[:, :t]


def is_fused(length: int) -> bool:
    """Whether the kernel's backward pass is one program of five matrix products, or two of seven.

    The one keeps a share of the queries' gradient per tile of keys, in fp32: 3 GiB for a row of 14,336 patches.
    """
    return length <= 8 * BLOCK


def _kernel(length: int, heads: int, causal: bool, interpret: bool, named: bool):
    """The kernel for one row and one device's heads. Its own name keeps the softmax's sums with its output."""
    block = next(b for b in (BLOCK, 256, LANES) if length % b == 0)
    mask = (splash_mask.CausalMask if causal else splash_mask.FullMask)((length, length))
    fused = is_fused(length)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    with jax.ensure_compile_time_eval():  # its tables are constants, made once per length
        return splash.make_splash_mha(
            splash_mask.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention" if named else None,
            interpret=interpret,
        )
