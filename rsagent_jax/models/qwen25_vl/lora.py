"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + b + (x A) B * alpha / rank, with A and B trained alone.

Why not qwix (0.1.8 was tried): it makes its adapters on the module that it finds on the call stack while the model runs
once, and in `compute.scan_layers` that module is a copy of one layer which exists inside lax.scan only; the call ends
with no adapter at all, or with flax's TraceContextError. Here they are declared and stacked as every parameter is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rsagent_jax.config.schema import LoraConfig
from rsagent_jax.models.qwen25_vl.layers import Linear, LoraParam
from rsagent_jax.models.qwen25_vl.model import Qwen25VL

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def declare(model: Qwen25VL, lora: LoraConfig) -> None:
    """Gives the targets of all decoder layers their adapters, in place, with shapes instead of arrays."""
    for name in lora.targets:
        linear: Linear = getattr(model.decoder.layers if name in ATTENTION else model.decoder.layers.mlp, name)
        (*stack, d_in, d_out), (*layers, in_axis, out_axis) = linear.kernel.shape, linear.kernel.get_metadata("axes")
        a, b = (
            jax.ShapeDtypeStruct((*stack, *shape), jnp.float32) for shape in ((d_in, lora.rank), (lora.rank, d_out))
        )
        linear.lora_a = nnx.data(LoraParam(a, axes=(*layers, in_axis, "rank")))
        linear.lora_b = nnx.data(LoraParam(b, axes=(*layers, "rank", out_axis)))
        linear.lora_scale = lora.alpha / lora.rank


def init(adapters: nnx.State, key: jax.Array) -> nnx.State:
    """Values for declared adapters, as PEFT makes them: A uniform within 1 / sqrt(in), B zero."""
    flat = []  # every matrix has its own key
    for i, (path, leaf) in enumerate(nnx.to_flat_state(adapters)):
        if path[-1] == "lora_a":
            bound = leaf.shape[-2] ** -0.5
            value = jax.random.uniform(jax.random.fold_in(key, i), leaf.shape, jnp.float32, -bound, bound)
        else:
            value = jnp.zeros(leaf.shape, jnp.float32)
        flat.append((path, leaf.replace(value)))
    return nnx.from_flat_state(flat)


def merge_adapters(plain: dict[str, Any], adapters: dict[str, Any], scale: float, dtype: Any) -> dict[str, Any]:
    """Parameters of the plain model, W + A B * scale, computed in fp32 and rounded to `dtype` once.

    Both by dotted path, as convert.flat_state has them; adapters are "….lora_a" and "….lora_b" beside "….kernel".
    """

    def one(matrices):  # a layer at a time: the products in fp32 of all layers would not fit beside the rest
        w, a, b = (m.astype(jnp.float32) for m in matrices)
        return (w + scale * jnp.matmul(a, b, precision="highest")).astype(dtype)

    out = {path: value.astype(dtype) for path, value in plain.items()}
    for path in adapters:
        if path.endswith(".lora_a"):
            linear = path.removesuffix(".lora_a")
            matrices = plain[f"{linear}.kernel"], adapters[path], adapters[f"{linear}.lora_b"]
            out[f"{linear}.kernel"] = jax.lax.map(one, matrices)
    return out
