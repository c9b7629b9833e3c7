"""What is written in another way for XLA's CPU back end alone; a TPU computes the plain forms.

Laptops, tests and the quickstart run here, so it is worth its lines: benchmarks/train_step.py compares a training step
with torch's on the same machine, benchmarks/rollout.py the decoding with transformers'. Results are those of the plain
forms up to rounding; the parity tests hold them to Hugging Face's.
"""

import jax
import jax.numpy as jnp

FEW = 64  # rows for which a kernel that stands [out, in] comes first in the product
LONG = 128  # keys from which on their gradient is a product with the weights on the right


def product(x: jax.Array, kernel: jax.Array, out_first: bool) -> jax.Array:
    """x[..., in] @ kernel[in, out]; `out_first`: the kernel stands [out, in], as rollout/programs.py lays it out.

    Rows become one axis: with two, the kernel's gradient takes twice the time (a TPU's compiler would then move 9% more
    bytes). While a few rows are decoded, the kernel comes first and is read once, along its memory.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not out_first:
        y = _matmul(rows, kernel)
    elif len(rows) > FEW:
        y = jnp.einsum("RI,OI->RO", rows, kernel)
    else:  # the barrier keeps the compiler from swapping the two again
        y = jax.lax.optimization_barrier(jnp.einsum("OI,RI->OR", kernel, rows)).T
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _matmul(x_RI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x @ kernel. For the kernel's gradient the smaller operand is turned over first: the faster of the compiler's two
    libraries takes no product that sums over the left one's first axis."""
    return x_RI @ kernel_IO


def _matmul_backward(kept, dy_RO):
    x, kernel = kept
    keep = jax.lax.optimization_barrier  # else the compiler makes a transposition part of the product again
    d_kernel = keep(x.T) @ dy_RO if x.shape[1] <= dy_RO.shape[1] else keep(keep(dy_RO.T) @ x).T
    return dy_RO @ kernel.T, d_kernel


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def buffer(x: jax.Array) -> jax.Array:
    """x[..., H], the same fp32 bits, in memory.

    Of a table of cosines, the compiler computes what a layer needs in that layer, for every head and once more in the
    backward pass, barrier or not. A product it leaves where it is, and one with the identity is exact.
    """
    return x @ jnp.eye(x.shape[-1], dtype=x.dtype)


@jax.custom_vjp
def softmax_attention(q_BKRH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """o_BKRH of R = G * T rows of queries, with a backward pass of its own that keeps q, k, v and the weights only.

    What is masked has weight 0 there. A row without a True has equal weights: nothing may depend on what it gives.
    """
    return _attend(q_BKRH, k_BKSH, v_BKSH, mask_BTS)[0]


def _attend(q_BKRH, k_BKSH, v_BKSH, mask_BTS):
    (b, kv, rows, h), (t, s) = q_BKRH.shape, mask_BTS.shape[1:]
    scores = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores.reshape(b, kv, -1, t, s), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype).reshape(b, kv, rows, s)
    return jnp.einsum("BKRS,BKSH->BKRH", weights, v_BKSH), (q_BKRH, k_BKSH, v_BKSH, weights)


def _attend_backward(kept, do_BKRH):
    q, k, v, weights = kept
    dp = jnp.einsum("BKRH,BKSH->BKRS", do_BKRH, v, preferred_element_type=jnp.float32)
    w = weights.astype(jnp.float32)
    ds = (w * (dp - jnp.sum(w * dp, axis=-1, keepdims=True)) * q.shape[-1] ** -0.5).astype(q.dtype)
    return jnp.einsum("BKRS,BKSH->BKRH", ds, k), _over_queries(ds, q), _over_queries(weights, do_BKRH), None


def _over_queries(a_BKRS, b_BKRH):
    """[B, K, S, H]: the gradient of keys or values.

    With many keys the larger operand stands on the right, where Eigen reads it along its rows; down its columns takes
    2.8 times as long with 1,024 keys and 1.5 times with 384, but less with a window's 64.
    """
    if a_BKRS.shape[-1] < LONG:
        return jnp.einsum("BKRS,BKRH->BKSH", a_BKRS, b_BKRH)
    return jax.lax.optimization_barrier(jnp.einsum("BKRH,BKRS->BKHS", b_BKRH, a_BKRS)).swapaxes(2, 3)


softmax_attention.defvjp(_attend, _attend_backward)
