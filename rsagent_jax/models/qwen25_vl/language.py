"""The decoder: M-RoPE, grouped-query attention, SwiGLU; packed rows in training, a KV cache per slot in rollouts."""

import jax
import jax.numpy as jnp
from flax import nnx

from rsagent_jax.models.qwen25_vl.attention import in_segments
from rsagent_jax.models.qwen25_vl.compute import PLAIN, Compute, scan_layers
from rsagent_jax.models.qwen25_vl.config import TextConfig
from rsagent_jax.models.qwen25_vl.layers import Linear, RMSNorm, SwiGLU, param, rotate
from rsagent_jax.runtime import sharding


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, rngs: nnx.Rngs, stack=()):
        dim, head = config.hidden_size, config.head_dim
        self.head_dim = head
        heads, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        self.ends = (heads, heads + kv)  # of q and k, where q, k and v stand in a row
        self.norm1 = RMSNorm(dim, config.rms_norm_eps, rngs, stack=stack)
        self.norm2 = RMSNorm(dim, config.rms_norm_eps, rngs, stack=stack)
        self.q = Linear(dim, heads, ("embed", "heads"), rngs, bias=True, stack=stack)
        self.k = Linear(dim, kv, ("embed", "kv_heads"), rngs, bias=True, stack=stack)
        self.v = Linear(dim, kv, ("embed", "kv_heads"), rngs, bias=True, stack=stack)
        self.o = Linear(heads, dim, ("heads", "embed"), rngs, bias=False, stack=stack)
        self.qkv = None  # one map in place of three, as rollout/programs.py may join them
        self.mlp = SwiGLU(dim, config.intermediate_size, ("embed", "mlp"), rngs, bias=False, stack=stack)

    def __call__(self, x_BTD, cos, sin, attend, compute: Compute = PLAIN):
        """`attend(q_BTNH, k_BKTH, v_BKTH) -> o_BTNH` decides what is seen: the packed row, or a cache."""
        b, t, _ = x_BTD.shape
        y = self.norm1(x_BTD)
        if self.qkv is None:
            parts = [linear(y, compute) for linear in (self.q, self.k, self.v)]
        else:
            parts = jnp.split(self.qkv(y, compute), self.ends, axis=-1)
        q, k, v = (part.reshape(b, t, -1, self.head_dim) for part in parts)
        q, k, v = (compute.name(a, "qkv") for a in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        o = compute.name(attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2)), "attention")
        x_BTD = x_BTD + compute.name(self.o(o.reshape(b, t, -1), compute), "attention_out")
        return x_BTD + self.mlp(self.norm2(x_BTD), compute)


class Decoder(nnx.Module):
    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.config = config
        table = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        self.embed = param(rngs, *table)
        self.layers = DecoderLayer(config, rngs, stack=(config.num_hidden_layers,))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs)
        self.lm_head = None if config.tie_word_embeddings else param(rngs, *table)
        self.head_scale = None  # f32[V] of a head in int8, as rollout/programs.py may make it

    @property
    def head_VD(self) -> jax.Array:
        return (self.embed if self.lm_head is None else self.lm_head)[...]

    def embed_tokens(self, tokens: jax.Array, compute: Compute) -> jax.Array:
        """Rows of the table, [B, T, D].

        Split over fsdp, the table stays where it is: every device looks up its part of D for all rows of its group, and
        the rows are exchanged. Without these constraints the whole table travels to every device.
        """
        table = self.embed[...].astype(jnp.dtype(compute.dtype))
        tokens = sharding.constrain(tokens, ("groups", None), compute.mesh)
        return compute.rows(sharding.constrain(table[tokens], ("groups", None, "embed"), compute.mesh))

    def __call__(self, x_BTD, positions_B3T, segment_ids_BT, compute: Compute = PLAIN) -> jax.Array:
        """Packed rows: token t sees tokens s <= t of its own segment. Returns normed hidden states [B, T, D]."""
        cos, sin = compute.tables(*mrope_angles(positions_B3T, self.config))
        attend = in_segments(segment_ids_BT, compute, causal=True)
        x = scan_layers(self.layers, lambda layer, x: layer(x, cos, sin, attend, compute), x_BTD, compute)
        return self.norm(x)


def mrope_angles(positions_B3T: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) fp32 [B, T, H]: contiguous runs of frequencies turn with the temporal, height and width position."""
    half = config.head_dim // 2
    inverse = 1.0 / config.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    sections = jnp.array(config.mrope_section)
    axis = jnp.repeat(jnp.arange(len(sections)) % 3, sections, total_repeat_length=half)
    angles = jnp.moveaxis(positions_B3T.astype(jnp.float32), 1, -1)[..., axis] * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
