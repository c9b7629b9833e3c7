"""Weights and sequences of a config's shape with random content: a machine is as fast with them, and nothing has to be
downloaded."""

import jax
import numpy as np
from flax import nnx

from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.positions import Grid, merged_tokens, mrope_positions
from rsagent_jax.runtime import sharding
from rsagent_jax.types import Prompt


def random_policy(config: Qwen25VLConfig, mesh: jax.sharding.Mesh | None, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """On the mesh (None: one device). Kernels of variance 1 / fan-in, norms 1, biases 0: outputs of a usual size."""
    model = convert.abstract_model(config)
    graphdef, shapes = nnx.split(model, nnx.Param)

    def make(key: jax.Array) -> nnx.State:
        values = {}
        for i, (name, x) in enumerate(convert.flat_state(shapes).items()):
            if name.endswith(("scale", "bias")):
                values[name] = jax.numpy.full(x.shape, float(name.endswith("scale")), dtype)
            else:
                fan_in = x.shape[-1 if "embed" in name.rpartition(".")[2] else -2]
                values[name] = jax.random.normal(jax.random.fold_in(key, i), x.shape, dtype) * fan_in**-0.5
        return convert.with_values(shapes, values)

    where = None if mesh is None else sharding.param_shardings(model, mesh)
    return graphdef, jax.jit(make, out_shardings=where)(jax.random.key(0))


def random_prompt(
    config: Qwen25VLConfig, grids: tuple[Grid, ...], words: int, rng: np.random.Generator
) -> tuple[Prompt, int]:
    """Half of the words, images, the other half; and the position of the next token."""
    text = rng.integers(0, config.text.vocab_size, words).astype(np.int32)
    text[text == config.image_token_id] = 0
    images = np.full(sum(map(merged_tokens, grids)), config.image_token_id, np.int32)
    tokens = np.concatenate([text[: words // 2], images, text[words // 2 :]])
    positions, end = mrope_positions(tokens, grids, config.image_token_id)
    patches = rng.standard_normal((sum(h * w for _, h, w in grids), config.vision.patch_dim), np.float32)
    return Prompt(tokens, positions, patches, grids), end
