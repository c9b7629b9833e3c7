"""Keys and values of every slot's context, and attention to them by blocks of places.

A block is computed whole and always in the same way, so what a query gets does not depend, to the last bit, on how long
other slots are; blocks that no slot has reached are not read. While tokens are sampled the cache is only read: new keys
and values wait in a small buffer and are written together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from rsagent_jax.models.qwen25_vl.config import TextConfig
from rsagent_jax.runtime import sharding

SMALL, LARGE = 256, 1024  # places of a block, for contexts up to 2,048 tokens and for longer ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's, so that each is updated in place; or some places of each row of it, in its dtype.

    Keys stand with their places last: one token's scores are then a product of two row-major matrices (on a CPU, 8x as
    fast as with the places first). As int8 each place of each head has its own scale.
    """

    keys: jax.Array  # [S, K, H, C]
    values: jax.Array  # [S, K, C, H]
    key_scales: jax.Array | None = None  # f32[S, K, C]
    value_scales: jax.Array | None = None

    @classmethod
    def of(cls, k_RTKH: jax.Array, v_RTKH: jax.Array, like: LayerCache) -> LayerCache:
        """New tokens, as the cache will hold them: who reads them now and later reads the same."""
        k, v = k_RTKH.transpose(0, 2, 3, 1), v_RTKH.transpose(0, 2, 1, 3)
        if like.key_scales is None:
            return cls(k.astype(like.keys.dtype), v.astype(like.values.dtype))
        (k, key_scales), (v, value_scales) = quantize(k, 2), quantize(v, 3)
        return cls(k, v, key_scales, value_scales)

    def each(self, f: Callable[..., jax.Array], *others: LayerCache) -> LayerCache:
        """f(array, axis of its places, the others' arrays) for each array that there is."""
        arrays = [(c.keys, c.values, c.key_scales, c.value_scales) for c in (self, *others)]
        columns = zip((3, 2, 2, 2), *arrays, strict=True)
        return LayerCache(*(None if x is None else f(x, axis, *rest) for axis, x, *rest in columns))

    def empty(self, places: int) -> LayerCache:
        """Zeros of as many places, in the shape and dtype of this one otherwise."""
        return self.each(lambda x, axis: jnp.zeros((*x.shape[:axis], places, *x.shape[axis + 1 :]), x.dtype))

    def with_place(self, index: jax.Array, new: LayerCache) -> LayerCache:
        """The same with place `index` of every row set to the only place of `new`."""
        return self.each(lambda x, axis, y: jax.lax.dynamic_update_slice_in_dim(x, y, index, axis), new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which slots a call is about: all of them, or one out of each of P equal groups of neighbours ("lanes").

    A lane stays on the devices that hold its slots, so choosing a slot moves nothing between devices.
    """

    pick: jax.Array | None = None  # i32[P], the slot's number inside its lane; None: all slots

    def read(self, x: jax.Array, start: int | jax.Array, size: int, axis: int) -> jax.Array:
        """[S, ...] -> the places `start` ... `start + size` along `axis` of each chosen slot, [P, ...]."""
        lanes = x.reshape(len(self.pick), -1, *x.shape[1:])
        sizes = [1, *x.shape[1:]]
        sizes[axis] = size

        def one(lane, i):  # slot and places at once: left to two steps, all slots' places are copied first
            index = [i] + [jnp.int32(0)] * (x.ndim - 1)
            index[axis] = start
            return jax.lax.dynamic_slice(lane, index, sizes)[0]

        return jax.vmap(one)(lanes, self.pick)

    def write(self, x: jax.Array, rows: jax.Array, axis: int, places: jax.Array) -> jax.Array:
        """x[S, ...] with rows[P, ...] written at `places`[P] and after, along `axis` of x."""
        zero = jnp.int32(0)

        def at(start, ndim, first=()):
            index = [zero] * ndim
            index[axis - 1] = start
            return (*first, *index)

        if self.pick is None:
            one = jax.vmap(lambda slot, row, start: jax.lax.dynamic_update_slice(slot, row, at(start, row.ndim)))
            return one(x, rows, places)
        lanes = x.reshape(len(self.pick), -1, *x.shape[1:])
        one = jax.vmap(
            lambda lane, row, i, start: jax.lax.dynamic_update_slice(lane, row[None], at(start, row.ndim, (i,)))
        )
        return one(lanes, rows, self.pick, places).reshape(x.shape)


ALL = Rows()
NAMES = ("rows", "kv_heads", None, None)


def empty_cache(config: TextConfig, slots: int, capacity: int, dtype: str, mesh=None) -> tuple[LayerCache, ...]:
    """One LayerCache per layer. dtype int8 adds the scales."""
    s, k, h, c = slots, config.num_key_value_heads, config.head_dim, capacity

    def zeros(shape, dtype):
        return sharding.constrain(jnp.zeros(shape, dtype), NAMES[: len(shape)], mesh)

    def layer():
        scales = [zeros((s, k, c), jnp.float32) for _ in range(2)] if dtype == "int8" else []
        return LayerCache(zeros((s, k, h, c), dtype), zeros((s, k, c, h), dtype), *scales)

    return tuple(layer() for _ in range(config.num_hidden_layers))


def write_cache(cache: LayerCache, rows: Rows, new: LayerCache, places: jax.Array) -> LayerCache:
    """Tokens t of row r at places[r] + t of its slot. The caller leaves room for all T, real or padding."""
    return cache.each(lambda x, axis, y: rows.write(x, y, axis, places), new)


def blocks(cache: LayerCache, rows: Rows, count: int, size: int) -> list[LayerCache]:
    """The first `count` blocks of each row's slot."""

    def cut(x, axis):
        if rows.pick is not None:
            x = rows.read(x, 0, count * size, axis)  # all at once: a program of many small copies takes long to compile
        return [jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis) for i in range(count)]

    pieces = cache.each(cut)
    return [pieces.each(lambda x, axis, i=i: x[i]) for i in range(count)]


def attend(q_RTNH: jax.Array, parts: Iterable[tuple[LayerCache, jax.Array]]) -> jax.Array:
    """Softmax in fp32 over all parts; each comes with what query t of row r sees of it, bool[R, T, P].

    A query sees at least one place of the first part, else its result is finite garbage. Returns [R, T, N, H].
    """
    r, t, n, h = q_RTNH.shape
    most = total = out = None
    for part, seen in parts:
        kv, size = part.keys.shape[1], part.keys.shape[3]
        q = q_RTNH.reshape(r, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(r, kv, -1, h)
        scores = jnp.einsum("RKTH,RKHS->RKTS", q, part.keys.astype(q.dtype), preferred_element_type=jnp.float32)
        scores *= h**-0.5
        if part.key_scales is not None:
            scores *= part.key_scales[:, :, None]
        scores = jnp.where(seen[:, None, None], scores.reshape(r, kv, -1, t, size), jnp.finfo(jnp.float32).min)
        scores = scores.reshape(r, kv, -1, size)
        # Of the first part, too, the higher of two: XLA's CPU back end has another exp for a softmax in one piece.
        higher = jnp.maximum(jnp.finfo(jnp.float32).min if most is None else most, scores.max(-1))
        weights = jnp.exp(scores - higher[..., None])
        added = weights.sum(-1)
        if part.value_scales is not None:
            weights *= part.value_scales[:, :, None]
        values = part.values.astype(q.dtype)
        more = jnp.einsum("RKTS,RKSH->RKTH", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        if most is None:
            total, out = added, more
        else:
            shrink = jnp.exp(most - higher)
            total, out = total * shrink + added, out * shrink[..., None] + more
        most = higher
    out = (out / total[..., None]).astype(q_RTNH.dtype).reshape(r, kv, -1, t, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(r, t, n, h)


def copy_places(cache: LayerCache, source, target, wanted, count: jax.Array, size: int) -> LayerCache:
    """In each lane p with wanted[p], the first `count` blocks of slot source[p] are copied to slot target[p]."""
    take, put = Rows(source), Rows(target)

    def one(x, axis):
        def step(i, x):
            old, new = (rows.read(x, i * size, size, axis) for rows in (put, take))
            new = jnp.where(wanted.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            return put.write(x, new, axis, jnp.full(len(source), i * size, jnp.int32))

        return jax.lax.fori_loop(0, count, step, x)

    return cache.each(one)


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 and the scales f32 without `axis`, over which they hold."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(x).max(axis), 1e-30) / 127
    return jnp.round(x / jnp.expand_dims(scales, axis)).astype(jnp.int8), scales
