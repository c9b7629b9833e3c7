"""The few layers that both towers use. Parameters are declared once, with logical axes for sharding.py.

A layer built with `stack=(L,)` holds L layers' parameters with a leading axis "layers", ready for `jax.lax.scan`.
Parameters are kept in fp32 and cast to the dtype of the activations where they are used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

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


class Linear(nnx.Module):
    """x[..., in] @ kernel[in, out] (+ bias[out])."""

    def __init__(self, d_in: int, d_out: int, axes: tuple[str, str], rngs: nnx.Rngs, *, bias: bool, stack=()):
        self.kernel = param(rngs, (d_in, d_out), axes, stack)
        self.bias = param(rngs, (d_out,), axes[1:], stack, init="zeros") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Normalised in fp32, scaled in the dtype of the activations, as Hugging Face does."""

    def __init__(self, dim: int, eps: float, rngs: nnx.Rngs, *, axis: str = "embed", stack=()):
        self.scale = param(rngs, (dim,), (axis,), stack, init="ones")
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

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotary embedding in the half-split layout: pairs are (i, i + H/2). Angles are fp32."""
    x = x_BTNH.astype(jnp.float32)
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return (x * cos_BTH[:, :, None] + turned * sin_BTH[:, :, None]).astype(x_BTNH.dtype)


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


def scan_layers(stacked: nnx.Module, body, x, *, start: int = 0, stop: int | None = None, remat: str = "none"):
    """Runs `body(layer, x) -> x` over layers `start..stop` of a stacked module with one compiled body."""
    graphdef, state = nnx.split(stacked)
    state = jax.tree.map(lambda a: a[start:stop], state)

    def step(carry, layer_state):
        return body(nnx.merge(graphdef, layer_state), carry), None

    return jax.lax.scan(_remat(step, remat), x, state)[0]


def _remat(step, policy: str):
    """full: keep only the layer inputs; dots: keep the outputs of matrix products; none: keep everything."""
    if policy == "none":
        return step
    if policy == "full":
        return jax.checkpoint(step)
    if policy == "dots":
        return jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise ValueError(f"remat policy {policy!r}: use none, full or dots")


def layer_at(stacked: nnx.Module, index: int) -> nnx.Module:
    """One layer of a stacked module."""
    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))
