"""The published sizes: their config.json, and every tensor's name and shape as transformers builds them."""

import copy
import json
import math

import pytest

from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import SIZES as CONFIGS
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, TextConfig, VisionConfig, load_config, size_config
from rsagent_jax.types import DataError

from . import tiny

# hidden, layers, heads, kv heads, intermediate, vocabulary, tied, max_window_layers, the tower's intermediate; and the
# parameters, which are the bytes of the published bf16 tensors / 2
SIZES = {
    "3b": ((2048, 36, 16, 2, 11008, 151936, True, 70, 3420), 3_754_622_976),
    "7b": ((3584, 28, 28, 4, 18944, 152064, False, 28, 3420), 8_292_166_656),
    "32b": ((5120, 64, 40, 8, 27648, 152064, False, 64, 3456), 33_452_718_336),
    "72b": ((8192, 80, 64, 8, 29568, 152064, False, 80, 3456), 73_410_777_344),
}


def published(name: str) -> dict:
    """config.json of Qwen/Qwen2.5-VL-<name>-Instruct: what decides the shape, and what else transformers reads."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def hub_shapes(config: Qwen25VLConfig) -> dict[str, tuple[int, ...]]:
    """What an export of this model holds."""
    return {hub: shape for hub, (_, _, shape) in convert.hub_slots(convert.abstract_model(config)).items()}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_by_name_is_the_published_config(name, tmp_path):
    (hidden, layers, heads, kv, intermediate, vocab, tied, window_layers, vision_intermediate), params = SIZES[name]
    text = TextConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, rms_norm_eps=1e-6, rope_theta=1e6,
        mrope_section=(16, 24, 24), tie_word_embeddings=tied,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=1280, intermediate_size=vision_intermediate, out_hidden_size=hidden, depth=32, num_heads=16,
        fullatt_block_indexes=(7, 15, 23, 31), in_channels=3, patch_size=14, temporal_patch_size=2,
        spatial_merge_size=2, window_size=112,
    )  # fmt: skip
    ids = dict(image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653)
    config = size_config(name)
    assert config == Qwen25VLConfig(text=text, vision=vision, eos_token_ids=(151645,), **ids)
    assert config.text.head_dim == 128 and config.vision.window_patches == 64
    raw = published(name)
    assert (raw["max_window_layers"], raw["torch_dtype"], raw["bos_token_id"]) == (window_layers, "bfloat16", 151643)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path) == config
    assert sum(math.prod(v.shape) for v in convert.flat_params(convert.abstract_model(config)).values()) == params


def derivative() -> dict:
    """A model of another shape than any that is published."""
    raw = published("3b") | {"num_hidden_layers": 5, "intermediate_size": 999, "num_key_value_heads": 16}
    raw |= {"tie_word_embeddings": False, "vocab_size": 1000}
    raw["vision_config"] |= {"depth": 3, "fullatt_block_indexes": [1], "patch_size": 16, "temporal_patch_size": 1}
    return raw


@pytest.mark.parametrize("name", [*SIZES, "derivative"])
def test_every_name_and_shape_is_that_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = derivative() if name == "derivative" else published(name)
    with torch.device("meta"):
        theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**copy.deepcopy(raw)))
    shapes = {parameter: tuple(value.shape) for parameter, value in theirs.named_parameters()}  # a tied head once
    assert {tiny.hf_name(hub): s for hub, s in hub_shapes(Qwen25VLConfig.from_hf(raw)).items()} == shapes


def test_what_a_config_json_leaves_out_has_the_value_that_transformers_gives_it():
    """Files that transformers writes hold only what differs from its defaults, among them that of the published 32B."""
    pytest.importorskip("torch")
    from transformers import Qwen2_5_VLConfig

    raw = published("32b")
    for key in ("depth", "num_heads", "fullatt_block_indexes", "patch_size", "window_size", "spatial_merge_size"):
        del raw["vision_config"][key]
    theirs, ours = Qwen2_5_VLConfig(**copy.deepcopy(raw)).vision_config, Qwen25VLConfig.from_hf(raw).vision
    assert ours == size_config("32b").vision
    assert (theirs.depth, theirs.num_heads, theirs.patch_size) == (ours.depth, ours.num_heads, ours.patch_size)
    assert tuple(theirs.fullatt_block_indexes) == ours.fullatt_block_indexes
    assert (theirs.window_size, theirs.spatial_merge_size) == (ours.window_size, ours.spatial_merge_size)


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(DataError, match="14b.*32b, 3b, 72b, 7b"):
        size_config("14b")
    with pytest.raises(DataError, match="3b"):
        size_config("../configs/3b")
