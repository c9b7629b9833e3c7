"""The engine's compiled programs: pure functions of weights, slots and one call's work.

encode  images of at most one slot per lane -> embeddings, which wait in the lane
copy    the context that a slot shares with another of its lane, instead of reading it again
step    appends a piece of a prompt to at most one slot per lane, then samples up to K tokens in every open slot
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rsagent_jax.config.schema import SamplingConfig
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.language import mrope_angles
from rsagent_jax.models.qwen25_vl.layers import Linear
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.rollout import kv_cache as kv
from rsagent_jax.rollout.kv_cache import LayerCache, Rows
from rsagent_jax.rollout.sampling import sample_tokens
from rsagent_jax.runtime import sharding
from rsagent_jax.runtime.compiler_options import compiler_options

LAYERS = ("decoder", "layers")  # where the decoder's stacked layers stand among the parameters
# By path inside a layer: what has the same input, and is one product where no tensor axis splits the outputs.
JOINED = {("qkv",): (("q",), ("k",), ("v",)), ("mlp", "gate_up"): (("mlp", "gate"), ("mlp", "up"))}
HEAD, TIED = ("decoder", "lm_head"), ("decoder", "embed")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters in the dtype of the activations, or kernels and head in int8 (sampling.weights_dtype). The decoder's
    layers stand one by one: nothing is cut out of a stack at every token."""

    layers: tuple[nnx.State, ...]
    unstacked: nnx.State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What stays on the device between calls."""

    cache: tuple[LayerCache, ...]  # per layer
    hidden: jax.Array  # [S, D] after each slot's last token
    images: jax.Array  # [P, M, D] embeddings of the images that a lane is about to append


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """What one `encode` looks at: as many patch buffers as lanes, as in types.Batch. Of each row of the mesh the first
    ones have something to look at, for any of the row's lanes."""

    patches: jax.Array  # f32[P, N, C]
    segment_ids: jax.Array  # i32[P, N]
    positions: jax.Array  # i32[P, N, 2]
    lanes: jax.Array  # i32[P] whose waiting embeddings a buffer's replace: number inside the row; -1: none's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Piece:
    """At most T tokens of a prompt per lane."""

    slots: jax.Array  # i32[P] number inside the lane
    tokens: jax.Array  # i32[P, T]
    positions: jax.Array  # i32[P, 3, T]
    image_places: jax.Array  # i32[P, T] 0 = text, else 1 + place among the lane's embeddings
    counts: jax.Array  # i32[P] real tokens; 0: nothing to append in this lane
    lengths: jax.Array  # i32[P] tokens that the slot has already


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turns:
    """The slots' turns under way, [S] each."""

    open: jax.Array  # bool: samples
    lengths: jax.Array  # i32 tokens in the cache, the appended piece included
    positions: jax.Array  # i32 of the next token
    done: jax.Array  # i32 tokens of this turn so far
    budget: jax.Array  # i32 tokens that the turn may have
    uids: jax.Array  # i32
    numbers: jax.Array  # i32 which turn of the trajectory
    temperature: jax.Array  # f32, 0 = greedy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """What the last macro-step drew."""

    tokens: jax.Array  # i32[S, K]
    logprobs: jax.Array  # f32[S, K]
    counts: jax.Array  # i32[S]
    finished: jax.Array  # bool[S] by the terminator
    stopped: jax.Array  # bool[S] by any stop id
    steps: jax.Array  # i32[] decode steps that ran


class RolloutPrograms:
    """`sampling.lanes` lanes share the slots evenly. A mesh's rows hold lanes and slots, its tensor axis heads."""

    def __init__(self, model: Qwen25VL, sampling: SamplingConfig, terminator: int, compute: Compute):
        self.config: Qwen25VLConfig = model.config
        self.sampling, self.compute, self.terminator = sampling, compute, terminator
        self.stops = jnp.array(sorted({terminator, *sampling.stop_ids}), jnp.int32)
        # XLA's CPU back end multiplies a few rows with an [in, out] kernel on one core, and an [out, in] kernel with a
        # few columns on all cores.
        self.out_first = compute.mesh is None and compute.platform == "cpu"
        self.int8, shell = sampling.weights_dtype == "int8", nnx.clone(model)
        for _, module in nnx.iter_modules(shell.decoder.layers):
            if isinstance(module, Linear):
                module.out_first, module.scale = self.out_first, nnx.data(nnx.Param(0.0)) if self.int8 else None
        self.joined = JOINED if sharding.parts("heads", compute.mesh) == 1 else {}
        if self.joined:
            layers, mlp = shell.decoder.layers, shell.decoder.layers.mlp
            layers.qkv, layers.q, layers.k, layers.v = nnx.data(layers.q), None, None, None
            mlp.gate_up, mlp.gate, mlp.up = nnx.data(mlp.gate), None, None
        self.head = HEAD if shell.decoder.lm_head is not None else TIED  # what it is among the parameters
        if self.int8:  # tied embeddings stay beside the head that is made of them, to be looked up
            shell.decoder.lm_head, shell.decoder.head_scale = (nnx.data(nnx.Param(0.0)) for _ in range(2))
        self.layer_def, _ = nnx.split(shell.decoder.layers)
        shell.decoder.layers = None
        self.unstacked_def, _ = nnx.split(shell, nnx.Param)
        self.block = kv.SMALL if sampling.context <= 2048 else kv.LARGE
        jit = functools.partial(jax.jit, compiler_options=compiler_options(compute.mesh, engine=True))
        self.encode = jit(self._encode, donate_argnums=1)
        self.copy = jit(self._copy, donate_argnums=0)
        self.step = jit(self._step, donate_argnums=1, static_argnames=("blocks", "steps"))

    @property
    def blocks(self) -> int:
        """Blocks of a slot's cache: its context, and the padding of a piece or the steps after a turn's end."""
        return -(-(self.sampling.context + max(self.sampling.prefill, self.sampling.chunk)) // self.block)

    @property
    def buckets(self) -> list[int]:
        """How many blocks of the cache a call may read: 1, 2, 4, ... all."""
        whole = self.blocks
        return sorted({min(2**i, whole) for i in range(whole.bit_length() + 1)})

    def empty(self) -> Slots:
        c, s = self.config, self.sampling
        dtype, mesh = jnp.dtype(self.compute.dtype), self.compute.mesh
        cache = kv.empty_cache(c.text, s.slots, self.blocks * self.block, s.kv_dtype or self.compute.dtype, mesh)
        images = jnp.zeros((s.lanes, s.patches // c.vision.merge_unit, c.text.hidden_size), dtype)
        hidden = jnp.zeros((s.slots, c.text.hidden_size), dtype)
        return Slots(cache, self.compute.rows(hidden), self.compute.rows(images))

    def split(self, params: nnx.State) -> Weights:
        """The training parameters, or some of them (weight_parts in rollout/weights.py), in the engine's form; also of
        abstract ones, under eval_shape."""
        flat = dict(nnx.to_flat_state(params))
        cast = {path: v.replace(v.get_value().astype(jnp.dtype(self.compute.dtype))) for path, v in flat.items()}
        for path in [p for p in flat if self.int8 and p[:2] == LAYERS and p[-1] == "kernel"]:
            cast[path], cast[*path[:-1], "scale"] = _int8(flat[path], -2)
        if self.int8 and self.head in flat:
            cast[HEAD], cast["decoder", "head_scale"] = _int8(flat[self.head], -1)
        for (whole, parts), leaf in itertools.product(self.joined.items(), ("kernel", "bias", "scale")):
            if found := [cast.pop(path) for part in parts if (path := (*LAYERS, *part, leaf)) in cast]:
                values = jnp.concatenate([v.get_value() for v in found], -1)
                cast[*LAYERS, *whole, leaf] = found[0].replace(values)
        turned = lambda path: self.out_first and path[-1] == "kernel"  # noqa: E731
        turn = lambda v: v.replace(v.get_value().swapaxes(-1, -2))  # noqa: E731
        stacked = [(path[2:], turn(v) if turned(path) else v) for path, v in cast.items() if path[:2] == LAYERS]
        stacked = nnx.from_flat_state(stacked)
        unstacked = nnx.from_flat_state([(path, v) for path, v in cast.items() if path[:2] != LAYERS])
        count = self.config.text.num_hidden_layers
        return Weights(tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)), unstacked)

    def _encode(self, weights: Weights, slots: Slots, images: Images) -> Slots:
        """`sampling.encode` buffers of every row of the mesh at a time, and none that nobody wants: all lanes'
        activations together take more memory than the cache can spare."""
        model = nnx.merge(self.unstacked_def, weights.unstacked)
        rows, size = sharding.parts("rows", self.compute.mesh), images.patches.shape[1] // self.config.vision.merge_unit
        lanes = self.sampling.lanes // rows
        count = max(n for n in range(1, self.sampling.encode + 1) if lanes % n == 0)

        def encode_some(held, new):
            def encode(held):
                flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new)
                merged = model.vision(flat.patches, flat.segment_ids, flat.positions, self.compute).astype(held.dtype)
                merged = merged.reshape(rows, count, size, -1)
                for i in range(count):
                    wanted, lane = new.lanes[:, i] >= 0, Rows(jnp.maximum(new.lanes[:, i], 0))
                    kept = jnp.where(wanted[:, None, None], merged[:, i], lane.read(held, 0, size, 1))
                    held = lane.write(held, kept, 1, jnp.zeros(rows, jnp.int32))
                return held

            return jax.lax.cond(jnp.any(new.lanes >= 0), encode, lambda held: held, held), None

        by_turn = jax.tree.map(lambda x: x.reshape(rows, -1, count, *x.shape[1:]).swapaxes(0, 1), images)
        return dataclasses.replace(slots, images=jax.lax.scan(encode_some, slots.images, by_turn)[0])

    def _copy(self, slots: Slots, source, target, wanted, count: jax.Array) -> Slots:
        cache = tuple(kv.copy_places(layer, source, target, wanted, count, self.block) for layer in slots.cache)
        return dataclasses.replace(slots, cache=cache)

    def _step(
        self,
        weights: Weights,
        slots: Slots,
        key: jax.Array,
        piece: Piece | None,
        turns: Turns,
        *,
        blocks: int,
        steps: int | None = None,
    ) -> tuple[Slots, Sampled | None]:
        """`blocks` of every slot's cache are read: no slot in use may have more when the call ends.

        `steps`: so many without looking whether a slot is still open, for a program with loops of known length; with 0
        nothing is sampled.
        """
        model = nnx.merge(self.unstacked_def, weights.unstacked)
        if piece is not None:
            slots = self._append(model, weights, slots, piece, blocks)
        if steps == 0:
            return slots, None
        return self._decode(model, weights, slots, key, turns, blocks, steps)

    def _append(self, model, weights: Weights, slots: Slots, piece: Piece, blocks: int) -> Slots:
        x = model.place(piece.tokens, slots.images, piece.image_places, self.compute)
        rows = Rows(piece.slots)
        places = piece.lengths[:, None] + jnp.arange(x.shape[1])
        cache = []

        def attend(layer, q, k, v):
            cache.append(
                kv.write_cache(slots.cache[layer], rows, LayerCache.of(k, v, slots.cache[layer]), piece.lengths)
            )
            parts = kv.blocks(cache[-1], rows, blocks, self.block)
            starts = range(0, blocks * self.block, self.block)
            seen = [(at + jnp.arange(self.block)) <= places[:, :, None] for at in starts]
            return kv.attend(q, zip(parts, seen, strict=True))

        hidden = self._layers(model, weights, x, piece.positions, attend)
        last = jnp.take_along_axis(hidden, jnp.maximum(piece.counts - 1, 0)[:, None, None], axis=1)[:, 0]
        lanes = slots.hidden.reshape(len(piece.slots), -1, slots.hidden.shape[-1])
        here = (jnp.arange(lanes.shape[1]) == piece.slots[:, None]) & (piece.counts > 0)[:, None]
        lanes = jnp.where(here[..., None], last[:, None], lanes)
        return dataclasses.replace(slots, cache=tuple(cache), hidden=lanes.reshape(slots.hidden.shape))

    def _decode(self, model, weights: Weights, slots: Slots, key, turns: Turns, blocks: int, steps: int | None):
        count, limit = len(turns.open), self.sampling.chunk
        keys = jax.vmap(lambda u, n: jax.random.fold_in(jax.random.fold_in(key, u), n))(turns.uids, turns.numbers)
        # On a TPU a product reads its block out of the cache as it goes: blocks cut before the loop would be a second
        # cache, written and read. Elsewhere a product wants a whole array, which is better cut once.
        read = lambda layer: kv.blocks(layer, kv.ALL, blocks, self.block)  # noqa: E731
        old = None if self.compute.platform == "tpu" else [read(layer) for layer in slots.cache]
        starts = range(0, blocks * self.block, self.block)
        seen = [(at + jnp.arange(self.block)) < turns.lengths[:, None, None] for at in starts]

        def step(carry):
            i, recent, hidden, open_, out = carry
            # Split like the head: a row of logits is nothing beside the head that would have to be gathered for it.
            logits = sharding.constrain(model.logits(hidden[:, None])[:, 0], ("rows", "vocab"), self.compute.mesh)
            token, logprob = sample_tokens(logits, self.sampling, keys, turns.done + out.counts, turns.temperature)
            finished, stopped = token == self.terminator, jnp.isin(token, self.stops)
            out = Sampled(
                # An open slot has drawn in every step before: its count is i.
                out.tokens.at[:, i].set(jnp.where(open_, token, 0)),
                out.logprobs.at[:, i].set(jnp.where(open_, logprob, 0.0)),
                out.counts + open_,
                out.finished | (open_ & finished),
                out.stopped | (open_ & stopped),
                i + 1,
            )
            x = model.decoder.embed_tokens(token[:, None], self.compute)
            positions = jnp.broadcast_to((turns.positions + i)[:, None, None], (count, 3, 1))
            mine = jnp.broadcast_to(jnp.arange(limit) <= i, (count, 1, limit))
            new = []

            def attend(layer, q, k, v):
                new.append(recent[layer].with_place(i, LayerCache.of(k, v, slots.cache[layer])))
                parts = old[layer] if old else read(slots.cache[layer])
                return kv.attend(q, [*zip(parts, seen, strict=True), (new[-1], mine)])

            after = self._layers(model, weights, x, positions, attend)[:, 0]
            hidden = jnp.where((open_ & ~finished)[:, None], after, hidden)
            return i + 1, tuple(new), hidden, open_ & ~stopped & (turns.done + out.counts < turns.budget), out

        zeros, none = jnp.zeros(count, jnp.int32), jnp.zeros(count, bool)
        tokens = jnp.zeros((count, limit), jnp.int32)
        out = Sampled(tokens, tokens.astype(jnp.float32), zeros, none, none, jnp.int32(0))
        recent = tuple(layer.empty(limit) for layer in slots.cache)
        carry = (jnp.int32(0), recent, slots.hidden, turns.open, out)
        if steps is None:
            carry = jax.lax.while_loop(lambda c: (c[0] < limit) & jnp.any(c[3]), step, carry)
        else:
            carry = jax.lax.fori_loop(0, steps, lambda _, c: step(c), carry)
        _, recent, hidden, _, out = carry
        # What is behind a slot's last token is overwritten by its next ones, and never seen.
        cache = tuple(
            kv.write_cache(layer, kv.ALL, part, turns.lengths) for layer, part in zip(slots.cache, recent, strict=True)
        )
        return dataclasses.replace(slots, cache=cache, hidden=hidden), out

    def _layers(self, model, weights: Weights, x_RTD, positions_R3T, attend) -> jax.Array:
        """Normed hidden states [R, T, D]; `attend(layer, q_RTNH, k_RTKH, v_RTKH)` sees to the cache."""
        cos, sin = mrope_angles(positions_R3T, self.config.text)
        x = self.compute.rows(x_RTD)
        for i, state in enumerate(weights.layers):
            layer = nnx.merge(self.layer_def, state)
            see = lambda q, k, v, i=i: attend(i, q, k.swapaxes(1, 2), v.swapaxes(1, 2))  # noqa: E731
            x = self.compute.rows(layer(x, cos, sin, see, self.compute))
        return model.decoder.norm(x)


def _int8(variable: nnx.Variable, axis: int) -> tuple[nnx.Variable, nnx.Variable]:
    """A kernel in int8 and its scales, one for all of `axis`."""
    numbers, scales = kv.quantize(variable.get_value(), axis)
    names = list(variable.get_metadata("axes"))
    del names[axis]
    return variable.replace(numbers), nnx.Param(scales, axes=tuple(names))


def weight_shardings(programs: RolloutPrograms, params: Any, mesh: jax.sharding.Mesh) -> Weights:
    """Where the engine's weights live: split over tensor, whole in every row of the mesh."""
    abstract = jax.eval_shape(programs.split, params)

    def place(variable):
        names = variable.get_metadata("axes")
        shape = variable.get_value().shape
        spec = sharding.spec_of(shape, names[len(names) - len(shape) :], mesh)
        return variable.replace(jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract, is_leaf=lambda v: isinstance(v, nnx.Variable))
