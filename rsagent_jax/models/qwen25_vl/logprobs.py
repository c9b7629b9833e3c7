"""Log-probabilities of given tokens, and entropies: by pieces of the vocabulary, only where somebody asks for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rsagent_jax.array_types import Array, Bool, Float, Int
from rsagent_jax.runtime import sharding

PIECE = 1 << 26  # logits per device at a time: 256 MiB in fp32
SHARES = (0.25, 0.375, 0.5, 0.75, 1.0)  # of the places of a row, in round numbers: what is computed
ROUND = 128
NAMES = ("vocab", None, "embed")  # of a piece of the head


@dataclasses.dataclass(frozen=True)
class _Settings:
    temperature: float
    piece: int
    mesh: jax.sharding.Mesh | None
    lengths: tuple[int, ...]  # ascending, the last is all of a row
    entropy: bool  # of the distributions, beside the log-probabilities


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    wanted_BT: Bool[Array, "B T"] | None = None,
    *,
    temperature: float = 1.0,
    piece: int = PIECE,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[Array, "B T"]:
    """log p(target) in fp32, without ever holding [B, T, V]; 0 where `wanted_BT` (bool; None: all) is False.

    The vocabulary is cut into pieces of at most about `piece` logits per device, which are made, used and dropped; the
    backward pass makes them again. A piece of the head is gathered over fsdp, in the dtype of the activations, when its
    turn comes, and its gradient is complete when its turn is over: neither is ever whole on a device.

    Most of a trajectory is images and prompts, whose log-probabilities nobody needs. The wanted places of a row move to
    its front, and the device computes the shortest of a few lengths that holds those of every row.
    """
    return _of_wanted(hidden_BTD, head_VD, targets_BT, wanted_BT, temperature, piece, mesh, entropy=False)[0]


def token_logprobs_and_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    wanted_BT: Bool[Array, "B T"] | None = None,
    *,
    temperature: float = 1.0,
    piece: int = PIECE,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The same, and in nats the entropy of the whole distribution that each target was drawn from, with gradients.

    It comes from the same pieces: per logit one more exponential and two more products each way, no more memory.
    """
    return _of_wanted(hidden_BTD, head_VD, targets_BT, wanted_BT, temperature, piece, mesh, entropy=True)


def _of_wanted(hidden_BTD, head_VD, targets_BT, wanted_BT, temperature, piece, mesh, *, entropy: bool):
    """(log-probabilities,) or (log-probabilities, entropies) in the shape of the targets, 0 where nobody wants them."""
    shape = targets_BT.shape
    if mesh is None or mesh.size == 1:  # one row: shared by all, and a CPU multiplies matrices faster than stacks
        hidden_BTD, targets_BT = hidden_BTD.reshape(1, -1, hidden_BTD.shape[-1]), targets_BT.reshape(1, -1)
        wanted_BT = None if wanted_BT is None else wanted_BT.reshape(1, -1)
    t = targets_BT.shape[1]
    lengths = (t,)
    order = jnp.broadcast_to(jnp.arange(t), targets_BT.shape)
    rung = jnp.int32(0)
    if wanted_BT is not None:
        lengths = tuple(sorted({min(-(-int(t * share) // ROUND) * ROUND, t) for share in SHARES}))
        order = jnp.argsort(~wanted_BT, axis=1, stable=True)
        rung = jnp.searchsorted(jnp.array(lengths), jnp.max(jnp.sum(wanted_BT, axis=1)))
    settings = _Settings(temperature, piece, mesh, lengths, entropy)
    found = _chosen(settings, hidden_BTD, head_VD, targets_BT, order, rung)
    return tuple((x if wanted_BT is None else jnp.where(wanted_BT, x, 0.0)).reshape(shape) for x in found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chosen(settings: _Settings, hidden_BTD, head_VD, targets_BT, order_BT, rung):
    return _forward(settings, hidden_BTD, head_VD, targets_BT, order_BT, rung)[0]


def _forward(settings: _Settings, hidden_BTD, head_VD, targets_BT, order_BT, rung):
    branches = [functools.partial(_logprobs, settings, length) for length in settings.lengths]
    logprobs, totals, *entropy = jax.lax.switch(rung, branches, hidden_BTD, head_VD, targets_BT, order_BT)
    return (logprobs, *entropy), (hidden_BTD, head_VD, targets_BT, order_BT, rung, (totals, *entropy))


def _backward(settings: _Settings, saved, cotangents):
    hidden_BTD, head_VD, targets_BT, order_BT, rung, totals = saved
    branches = [functools.partial(_gradients, settings, length) for length in settings.lengths]
    operands = (hidden_BTD, head_VD, targets_BT, order_BT, totals, cotangents)
    return *jax.lax.switch(rung, branches, *operands), None, None, None


_chosen.defvjp(_forward, _backward)


def _logprobs(settings: _Settings, length: int, hidden_BTD, head_VD, targets_BT, order_BT):
    """(log p(target), log of the sum over the vocabulary) of the first `length` places of `order_BT`, 0 elsewhere.

    With settings.entropy, then the entropy: that log less the mean of the logits, of which each piece gives its part.
    """
    x, targets = (_front(order_BT, length, a) for a in (hidden_BTD, targets_BT))
    pieces, tokens, real = _pieces(settings, hidden_BTD.shape, head_VD)

    def one(args):
        head, tokens, real = args
        logits = _logits(settings, x, _gathered(settings, x.dtype, head))
        target = jnp.sum(jnp.where(tokens == targets[..., None, None], logits, 0.0), axis=(2, 3))
        total = jax.nn.logsumexp(jnp.where(real, logits, -jnp.inf), axis=(2, 3))
        if not settings.entropy:
            return target, total
        p = jnp.where(real, jnp.exp(logits - total[..., None, None]), 0.0)  # inside this piece
        return target, total, jnp.sum(p * logits, axis=(2, 3))

    target, totals, *means = jax.lax.map(one, (pieces, tokens, real))
    total = jax.nn.logsumexp(totals, axis=0)
    entropy = (total - jnp.sum(jnp.exp(totals - total) * mean, axis=0) for mean in means)
    return tuple(_back(order_BT, a) for a in (jnp.sum(target, axis=0) - total, total, *entropy))


def _gradients(settings: _Settings, length: int, hidden_BTD, head_VD, targets_BT, order_BT, totals, cotangents):
    """Of hidden states and head: d log p = one at the target, less the probabilities; of the entropy, by logit,
    -p (log p + entropy)."""
    x, targets = (_front(order_BT, length, a) for a in (hidden_BTD, targets_BT))
    total, *entropy = (_front(order_BT, length, a)[..., None, None] for a in totals)
    cotangent, *slope = ((_front(order_BT, length, a) / settings.temperature)[..., None, None] for a in cotangents)
    (pieces, tokens, real), join = jax.vjp(lambda head: _pieces(settings, hidden_BTD.shape, head), head_VD)

    def one(dx, args):
        head, tokens, real = args
        head, scatter = jax.vjp(lambda head: _gathered(settings, x.dtype, head), head)
        logits = _logits(settings, x, head)
        p = jnp.where(real, jnp.exp(logits - total), 0.0)
        d = ((tokens == targets[..., None, None]) - p) * cotangent
        for whole, weight in zip(entropy, slope, strict=True):
            d = d - p * (logits - total + whole) * weight
        d = d.astype(x.dtype)
        dx = dx + jnp.einsum("BTKV,KVD->BTD", d, head).astype(jnp.float32)  # summed over the pieces in fp32
        return dx, *scatter(jnp.einsum("BTKV,BTD->KVD", d, x))

    dx, d_pieces = jax.lax.scan(one, jnp.zeros(x.shape, jnp.float32), (pieces, tokens, real))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, jax.dtypes.float0), (tokens, real))
    return _back(order_BT, dx.astype(x.dtype)), *join((d_pieces, *zero))


def _pieces(settings: _Settings, shape, head_VD):
    """The head [pieces, tensor, size, D], a device keeping its rows; their tokens; which are real."""
    mesh, (b, t, _), (v, d) = settings.mesh, shape, head_VD.shape
    parts = sharding.parts("vocab", mesh)
    each = -(-v // parts)  # of the vocabulary per device of the tensor axis
    logits = -(-(b * t // sharding.parts("rows", mesh)) * each)
    count = min(max(-(-logits // settings.piece), 1), each)
    size = -(-each // count)
    count = -(-each // size)  # without a piece of padding only
    head = jnp.pad(head_VD, ((0, each * parts - v), (0, 0))).reshape(parts, each, d)
    head = jnp.pad(head, ((0, 0), (0, count * size - each), (0, 0))).reshape(parts, count, size, d).swapaxes(0, 1)
    tokens = jnp.arange(parts)[:, None, None] * each + jnp.arange(count * size).reshape(count, size)
    real = (jnp.arange(count * size).reshape(count, size) < each) & (tokens < v)
    return head, tokens.swapaxes(0, 1), real.swapaxes(0, 1)


def _gathered(settings: _Settings, dtype, head):
    head = sharding.constrain(head, NAMES, settings.mesh).astype(dtype)
    return sharding.gather(head, NAMES, settings.mesh)


def _logits(settings: _Settings, x, head):
    """fp32[B, T, tensor, size]"""
    logits = jnp.einsum("BTD,KVD->BTKV", x, head, preferred_element_type=jnp.float32) / settings.temperature
    return sharding.constrain(logits, ("rows", None, "vocab", None), settings.mesh)


def _front(order_BT, length: int, x):
    """The first `length` places of every row in that order; all of them stay where they are."""
    return x if length == x.shape[1] else jax.vmap(lambda row, at: row[at])(x, order_BT[:, :length])


def _back(order_BT, x):
    """The inverse, 0 at the other places."""
    if x.shape[1] == order_BT.shape[1]:
        return x
    zero = jnp.zeros((*order_BT.shape, *x.shape[2:]), x.dtype)
    return jax.vmap(lambda row, at, x: row.at[at].set(x, unique_indices=True))(zero, order_BT[:, : x.shape[1]], x)
