"""The few layers that both towers use. Parameters are declared once, with logical axes for sharding.py.

A layer built with `stack=(L,)` holds L layers' parameters with a leading axis "layers", ready for compute.scan_layers.
Parameters are kept in fp32 and cast to the dtype of the activations where they are used.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from rsagent_jax.models.qwen25_vl import cpu
from rsagent_jax.models.qwen25_vl.compute import PLAIN, Compute

INIT_STDDEV = 0.02  # Hugging Face's initializer_range for Qwen2.5-VL


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], stack: tuple[int, ...] = (), init="normal"
):
    """Declares one parameter of `stack + shape` with a logical name per axis."""
    full = stack + shape
    names = ("layers",) * len(stack) + axes
    if len(full) != len(names):
        raise ValueError(f"parameter of shape {full} declared with axes {names}")
    if init == "normal":
        value = jax.random.normal(rngs.params(), full, jnp.float32) * INIT_STDDEV
    else:
        value = jnp.zeros(full, jnp.float32) if init == "zeros" else jnp.ones(full, jnp.float32)
    return nnx.Param(value, axes=names)


class LoraParam(nnx.Param):
    """A matrix of a low-rank adapter: declared, made and merged in lora.py."""


class Linear(nnx.Module):
    """x[..., in] @ kernel[in, out] (+ bias[out]) (+ x @ lora_a[in, r] @ lora_b[r, out] * lora_scale)."""

    def __init__(self, d_in: int, d_out: int, axes: tuple[str, str], rngs: nnx.Rngs, *, bias: bool, stack=()):
        self.kernel = param(rngs, (d_in, d_out), axes, stack)
        self.bias = param(rngs, (d_out,), axes[1:], stack, init="zeros") if bias else None
        self.lora_a = self.lora_b = None
        self.lora_scale = 0.0
        self.scale = None  # f32[out] of a kernel in int8, as rollout/programs.py may make it
        self.out_first = False  # True: the kernel stands [out, in], as rollout/programs.py wants it on a CPU

    def __call__(self, x: jax.Array, compute: Compute = PLAIN) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        y = cpu.product(x, kernel, self.out_first) if compute.platform == "cpu" else x @ kernel
        if self.scale is not None:
            y = (y * self.scale[...]).astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None:
            y = y + (x @ self.lora_a[...].astype(x.dtype) * self.lora_scale) @ self.lora_b[...].astype(x.dtype)
        return y


class RMSNorm(nnx.Module):
    """Normalised in fp32, scaled in the dtype of the activations, as Hugging Face does."""

    def __init__(self, dim: int, eps: float, rngs: nnx.Rngs, *, stack=()):
        self.scale = param(rngs, (dim,), ("norm",), stack, init="ones")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * x32.astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)); the vision tower has biases, the decoder none."""

    def __init__(self, dim: int, hidden: int, axes: tuple[str, str], rngs: nnx.Rngs, *, bias: bool, stack=()):
        self.gate = Linear(dim, hidden, axes, rngs, bias=bias, stack=stack)
        self.up = Linear(dim, hidden, axes, rngs, bias=bias, stack=stack)
        self.down = Linear(hidden, dim, axes[::-1], rngs, bias=bias, stack=stack)
        self.gate_up = None  # one map in place of two, as rollout/programs.py may join them

    def __call__(self, x: jax.Array, compute: Compute = PLAIN) -> jax.Array:
        if self.gate_up is None:
            gate, up = self.gate(x, compute), self.up(x, compute)
        else:
            gate, up = jnp.split(self.gate_up(x, compute), 2, axis=-1)
        gate, up = compute.name(gate, "mlp_gate"), compute.name(up, "mlp_up")
        return self.down(jax.nn.silu(gate) * up, compute)


def rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split layout: pairs are (i, i + H/2). Angles are fp32."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)  # a split's gradient is one concatenation
    (cos_a, cos_b), (sin_a, sin_b) = (jnp.split(angle[:, :, None], 2, axis=-1) for angle in (cos_BTH, sin_BTH))
    return jnp.concatenate([a * cos_a - b * sin_a, b * cos_b + a * sin_b], axis=-1).astype(x_BTNH.dtype)


def layer_at(stacked: nnx.Module, index: int) -> nnx.Module:
    """One layer of a stacked module."""
    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))
