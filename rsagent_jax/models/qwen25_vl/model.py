"""Qwen2.5-VL: the vision tower's embeddings stand where the image tokens are, the decoder reads the row."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rsagent_jax.models.qwen25_vl.compute import PLAIN, Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.language import Decoder
from rsagent_jax.models.qwen25_vl.vision import VisionTower
from rsagent_jax.types import Batch

jax.tree_util.register_dataclass(Batch, [f.name for f in dataclasses.fields(Batch)], [])


class Qwen25VL(nnx.Module):
    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTower(config.vision, rngs)
        self.decoder = Decoder(config.text, rngs)

    def place(self, tokens_BT, merged_BMD, image_slots_BT, compute: Compute = PLAIN) -> jax.Array:
        """Token embeddings [B, T, D] with image embeddings in the image slots (0 = text, else 1 + merged place)."""
        x = self.decoder.embed_tokens(tokens_BT, compute)
        if merged_BMD.shape[1] == 0:  # a batch of text only
            return x
        seen = jnp.take_along_axis(merged_BMD, jnp.maximum(image_slots_BT - 1, 0)[..., None], axis=1)
        return jnp.where((image_slots_BT > 0)[..., None], seen, x)

    def __call__(self, batch: Batch, compute: Compute = PLAIN, *, embedded: bool = False) -> jax.Array:
        """Normed hidden states [B, T, D] of packed rows; `token_logprobs` turns them into log-probabilities.

        `embedded`: the batch has the tower's merged tokens in place of its patches.
        """
        merged = batch.patches
        if not embedded:
            merged = self.vision(merged, batch.patch_segment_ids, batch.patch_positions, compute)
        x = self.place(batch.tokens, merged, batch.image_slots, compute)
        return self.decoder(x, batch.positions, batch.segment_ids, compute)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """f32[B, T, V]; for few tokens only."""
        head = self.decoder.head_VD.astype(hidden_BTD.dtype)
        logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, head, preferred_element_type=jnp.float32)
        scale = self.decoder.head_scale
        return logits if scale is None else logits * scale[...]
