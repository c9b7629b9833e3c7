"""The vision tower: patch embedding, window and full attention blocks with 2-D rotary positions, merger.

Patches come in window order, in bins of a full window's size (positions.py), so a window block is a batch of equal
bins, most of them one window, and a full block attends inside each image's segment.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from rsagent_jax.models.qwen25_vl.attention import attention, in_segments
from rsagent_jax.models.qwen25_vl.compute import PLAIN, Compute, local, scan_layers, scan_states
from rsagent_jax.models.qwen25_vl.config import VisionConfig
from rsagent_jax.models.qwen25_vl.layers import Linear, RMSNorm, SwiGLU, rotate

EPS = 1e-6  # fixed in Hugging Face's code, not in its config
ROPE_THETA = 10_000.0


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, stack=()):
        dim = config.hidden_size
        self.heads = config.num_heads
        self.norm1 = RMSNorm(dim, EPS, rngs, stack=stack)
        self.norm2 = RMSNorm(dim, EPS, rngs, stack=stack)
        self.qkv = Linear(dim, 3 * dim, ("embed", "heads"), rngs, bias=True, stack=stack)
        self.proj = Linear(dim, dim, ("heads", "embed"), rngs, bias=True, stack=stack)
        self.mlp = SwiGLU(dim, config.intermediate_size, ("embed", "mlp"), rngs, bias=True, stack=stack)

    def __call__(self, x_BPD, cos, sin, attend, compute: Compute = PLAIN):
        b, p, d = x_BPD.shape
        parts = jnp.split(self.qkv(self.norm1(x_BPD), compute), 3, axis=-1)
        q, k, v = (a.reshape(b, p, self.heads, d // self.heads) for a in parts)
        q, k, v = (compute.name(a, "qkv") for a in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        o = compute.name(attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2)), "attention")
        x_BPD = x_BPD + compute.name(self.proj(o.reshape(b, p, d), compute), "attention_out")
        return x_BPD + self.mlp(self.norm2(x_BPD), compute)


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        dim, unit = config.hidden_size, config.merge_unit
        self.config = config
        self.patch_embed = Linear(config.patch_dim, dim, ("patch", "embed"), rngs, bias=False)
        self.blocks = VisionBlock(config, rngs, stack=(config.depth,))
        self.merger_norm = RMSNorm(dim, EPS, rngs)
        self.merger_in = Linear(dim * unit, dim * unit, ("embed", "mlp"), rngs, bias=True)
        self.merger_out = Linear(dim * unit, config.out_hidden_size, ("mlp", "embed"), rngs, bias=True)

    def __call__(self, patches_BPC, segment_ids_BP, positions_BP2, compute: Compute = PLAIN):
        """Returns merged embeddings [B, P / merge_unit, out_hidden_size], in window order; garbage for padding."""
        b, p, _ = patches_BPC.shape
        size, dtype = self.config.window_patches, jnp.dtype(compute.dtype)
        if p % size:  # with several rows, a bin would hold patches of two of them
            raise ValueError(f"a patch buffer of {p} places is not a whole number of windows of {size} patches")
        if not p:  # a batch of text only
            return jnp.zeros((b, 0, self.config.out_hidden_size), dtype)
        cos, sin = compute.tables(*rotary_angles(positions_BP2, self.config.hidden_size // self.config.num_heads))
        x = compute.rows(local(self.patch_embed, compute)(patches_BPC.astype(dtype), compute))

        def bins(a):
            return a.reshape(b * p // size, size, *a.shape[2:])

        side = self.config.window_side * self.config.spatial_merge_size
        window = jnp.concatenate([bins(positions_BP2) // side, bins(segment_ids_BP)[..., None]], axis=-1)
        mask = jnp.all(window[:, :, None] == window[:, None], axis=-1)
        angles = bins(cos), bins(sin)
        attend = in_segments(segment_ids_BP, compute, causal=False)

        def full(block, x):
            return block(x, cos, sin, attend, compute)

        def windowed(block, x):
            return block(bins(x), *angles, lambda q, k, v: attention(q, k, v, mask), compute).reshape(x.shape)

        x = self._run_blocks(windowed, full, x, compute)
        unit = self.config.merge_unit
        merged = self.merger_norm(x).reshape(b, p // unit, unit * x.shape[-1])
        hidden = jax.nn.gelu(local(self.merger_in, compute)(merged, compute), approximate=False)
        return compute.rows(local(self.merger_out, compute)(hidden, compute))

    def _run_blocks(self, windowed, full, x, compute: Compute):
        """All blocks in order. Published sizes repeat n window blocks and a full one: one scan over such groups."""
        every = period(self.config)
        if every is None:
            has_full = lambda block: block in self.config.fullatt_block_indexes  # noqa: E731
            for is_full, run in itertools.groupby(range(self.config.depth), has_full):
                run = list(run)
                body = full if is_full else windowed
                x = scan_layers(self.blocks, body, x, compute, start=run[0], stop=run[-1] + 1)
            return x
        graphdef, state = nnx.split(self.blocks)
        groups = jax.tree.map(lambda a: a.reshape(-1, every, *a.shape[1:]), state)

        def group(x, states):
            x = scan_states(graphdef, jax.tree.map(lambda a: a[:-1], states), windowed, x, compute)
            return scan_states(graphdef, jax.tree.map(lambda a: a[-1:], states), full, x, compute), None

        return jax.lax.scan(group, x, groups, unroll=not compute.scan_layers)[0]


def rotary_angles(positions_BP2: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) fp32 [B, P, H]: a quarter of the head turns with the row, a quarter with the column, then repeated."""
    quarter = head_dim // 4
    inverse = 1.0 / ROPE_THETA ** (jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angles = (positions_BP2.astype(jnp.float32)[..., None] * inverse).reshape(*positions_BP2.shape[:2], -1)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def period(config: VisionConfig) -> int | None:
    """n if every n-th block, and no other, has full attention (and n > 1); else None."""
    every = config.fullatt_block_indexes[0] + 1 if config.fullatt_block_indexes else 0
    regular = every > 1 and config.depth % every == 0
    return every if regular and config.fullatt_block_indexes == tuple(range(every - 1, config.depth, every)) else None
