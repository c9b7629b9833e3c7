"""Model FLOPs against arithmetic by hand, and against XLA's count of the same products written out."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rsagent_jax.aot.flops import Workload, model_flops
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, TextConfig, VisionConfig
from tests.models.tiny import PATCHES

TEXT = TextConfig(
    vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(1, 1, 0), tie_word_embeddings=False,
)  # fmt: skip
VISION = VisionConfig(
    depth=4, hidden_size=8, intermediate_size=20, num_heads=2, out_hidden_size=16, fullatt_block_indexes=(1,), **PATCHES
)
CONFIG = Qwen25VLConfig(
    text=TEXT, vision=VISION, image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4,
    eos_token_ids=(5,),
)  # fmt: skip
WORK = Workload(rows=2, tokens=60, segments=(30, 20), images=((10, 6), (4, 4)), trained=False, vision_trained=False)


def test_forward_by_hand():
    flops = model_flops(CONFIG, WORK)
    # Weights of a layer: q 16 x 16, k and v 16 x 8 (2 heads of 4), o 16 x 16, gate, up and down 16 x 32.
    layer = 256 + 2 * 128 + 256 + 3 * 512
    assert flops.decoder_matmuls == 2 * (2 * 60) * layer * 3
    # Pairs (30^2 + 20^2) / 2 = 650 a row; scores and values, 16 = 4 heads of 4, 2 FLOPs each; 3 layers, 2 rows.
    assert flops.decoder_attention == 2 * 3 * 650 * (2 * 16 + 2 * 16)
    assert flops.head == 2 * (2 * 60) * 16 * 100
    # 60 + 16 = 76 patches a row of 3 x 2 x 14 x 14 = 1176 numbers.
    assert flops.patch_embedding == 2 * (2 * 76) * 1176 * 8
    # A block: qkv 8 x 24, proj 8 x 8, gate, up and down 8 x 20; 4 blocks.
    assert flops.vision_matmuls == 2 * (2 * 76) * (192 + 64 + 480) * 4
    # Windows of 8 x 8 patches: the 10 x 6 image has 8 x 6 and 2 x 6, the other is one of 4 x 4; 3 blocks.
    assert flops.vision_window_attention == 2 * 3 * (48**2 + 12**2 + 16**2) * (2 * 8 + 2 * 8)
    assert flops.vision_full_attention == 2 * 1 * (60**2 + 16**2) * 32  # one block
    # Four patches of 8 become one of 32: 32 x 32, then 32 x 16; 19 merged a row.
    assert flops.merger == 2 * (2 * 19) * (32 * 32 + 32 * 16)
    assert flops.total == sum(dataclasses.astuple(flops))


def test_adapters_send_gradients_through_matrices_that_have_none():
    """Rank 2 on q (16 to 16) and gate (16 to 32) of 3 layers: 2 x (32 + 48) x 3 numbers, three products each."""
    forward = model_flops(CONFIG, WORK)
    step = model_flops(CONFIG, dataclasses.replace(WORK, adapters=480))
    assert step.adapters == 3 * 2 * (2 * 60) * 480 and forward.adapters == 0
    assert step.decoder_matmuls == 2 * forward.decoder_matmuls and step.head == 2 * forward.head
    assert step.decoder_attention == 3 * forward.decoder_attention
    assert step.vision_matmuls == forward.vision_matmuls and step.merger == forward.merger
    alone = model_flops(CONFIG, dataclasses.replace(WORK, embed_trained=True))
    assert alone.total == step.total - step.adapters


@pytest.mark.parametrize(
    ("trained", "vision_trained", "decoder", "attention", "tower", "embedding"),
    [
        (True, True, 3, 3, 3, 2),  # pixels need no gradient: the patch embedding has its weights' only
        (True, False, 3, 3, 1, 1),  # a frozen tower is run forward
        (False, True, 2, 3, 3, 2),  # gradients pass through a frozen decoder: no weights' products
        (False, False, 1, 1, 1, 1),
    ],
)
def test_backward_passes(trained, vision_trained, decoder, attention, tower, embedding):
    forward = model_flops(CONFIG, WORK)
    step = model_flops(CONFIG, dataclasses.replace(WORK, trained=trained, vision_trained=vision_trained))
    assert step.decoder_matmuls == decoder * forward.decoder_matmuls and step.head == decoder * forward.head
    assert step.decoder_attention == attention * forward.decoder_attention
    assert step.patch_embedding == embedding * forward.patch_embedding
    for part in ("vision_matmuls", "vision_window_attention", "vision_full_attention", "merger"):
        assert getattr(step, part) == tower * getattr(forward, part)


def test_a_row_of_text_has_no_vision():
    flops = model_flops(CONFIG, Workload(rows=1, tokens=8, segments=(8,)))
    assert flops.total == flops.decoder_matmuls + flops.decoder_attention + flops.head


def test_against_xla():
    """The decoder and its head, forward, as plain products; XLA counts the other half of the causal scores too."""
    d, ff, v, t, heads, kv, h = 64, 160, 512, 96, 4, 2, 16
    text = dataclasses.replace(
        TEXT, hidden_size=d, intermediate_size=ff, vocab_size=v, num_attention_heads=heads, num_key_value_heads=kv
    )
    config = dataclasses.replace(CONFIG, text=text)
    shapes = {"q": (d, d), "k": (d, kv * h), "v": (d, kv * h), "o": (d, d), "gate": (d, ff), "up": (d, ff),
              "down": (ff, d)}  # fmt: skip

    def forward(layers, head, x):
        for w in layers:
            q, k, values = ((x @ w[n]).reshape(t, -1, h).swapaxes(0, 1) for n in ("q", "k", "v"))
            k, values = jnp.repeat(k, heads // kv, 0), jnp.repeat(values, heads // kv, 0)
            x = x + (q @ k.swapaxes(1, 2) @ values).swapaxes(0, 1).reshape(t, d) @ w["o"]
            x = x + ((x @ w["gate"]) * (x @ w["up"])) @ w["down"]
        return x @ head

    layers = [{name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()} for _ in range(3)]
    head, x = jax.ShapeDtypeStruct((d, v), jnp.float32), jax.ShapeDtypeStruct((t, d), jnp.float32)
    counted = jax.jit(forward).lower(layers, head, x).compile().cost_analysis()["flops"]
    ours = model_flops(config, Workload(rows=1, tokens=t, segments=(t,), trained=False, vision_trained=False))
    # XLA's extra: 3 layers of t * (2 d + ff) additions and multiplications, one each.
    extra = 3 * t * (2 * d + ff)
    assert counted == pytest.approx(ours.total + ours.decoder_attention + extra, rel=1e-6)
