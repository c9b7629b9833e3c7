"""Samples turns on the device: every slot keeps its KV cache for the whole trajectory, all slots take a turn together.

Two programs: `prefill` appends what came back from the tools (text and images), `decode` samples until every slot has
ended its turn. Shapes come from small ladders, so few programs are compiled; nothing is prefilled twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rsagent_jax.config import SamplingConfig
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.language import Cache
from rsagent_jax.models.qwen25_vl.model import Qwen25VL
from rsagent_jax.models.qwen25_vl.positions import fill_patch_buffer, padded_patches
from rsagent_jax.rollout.policy import Request
from rsagent_jax.types import Completion, DataError

MIN_TOKENS = 64  # smallest rung of the prefill ladder
PLACES = 128  # smallest rung of the ladder of cache places that a call reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Append:
    """What one prefill appends: rows are slots, padded at the end. Fields as in types.Batch."""

    tokens: jax.Array  # i32[S, T]
    positions: jax.Array  # i32[S, 3, T]
    counts: jax.Array  # i32[S] real tokens
    patches: jax.Array  # f32[S, P, C]
    patch_segment_ids: jax.Array  # i32[S, P]
    patch_positions: jax.Array  # i32[S, P, 2]
    image_slots: jax.Array  # i32[S, T]


class Engine:
    """A Policy (rollout/policy.py) on the device. `load` gives it weights; `begin` forgets all slots."""

    def __init__(self, model: Qwen25VL, sampling: SamplingConfig, terminator_id: int, dtype: str, key: jax.Array):
        _check(sampling, model.config.vision.window_patches)
        self.config, self.sampling, self.compute = model.config, sampling, Compute(dtype)
        self.slots, self.context = sampling.slots, sampling.context
        self.max_new_tokens, self.patches = sampling.max_new_tokens, sampling.patches
        self.key = key
        self.graphdef, self.params = nnx.split(model, nnx.Param)
        self._prefill = jax.jit(
            functools.partial(_prefill, self.graphdef, self.compute), donate_argnums=1, static_argnames="places"
        )
        self._decode = jax.jit(
            functools.partial(_decode, self.graphdef, self.compute, sampling, terminator_id),
            donate_argnums=1,
            static_argnames="places",
        )
        self._empty = jax.jit(
            functools.partial(Cache.empty, self.config.text, self.slots, self.context, jnp.dtype(dtype))
        )
        self.begin()

    def load(self, params: nnx.State, key: jax.Array) -> None:
        """New weights, and the key that the next trajectories' keys are folded from."""
        self.params, self.key = params, key

    def begin(self) -> None:
        self.cache = None  # freed before the new one is made
        self.cache = self._empty()
        self.lengths = np.zeros(self.slots, np.int32)  # of the cache, on the host

    def turn(self, requests: Sequence[Request]) -> list[Completion]:
        append = self._gather(requests)
        places = self._places(requests, append.tokens.shape[1])
        self.cache, hidden = self._prefill(self.params, self.cache, append, places=places)
        self.lengths += append.counts
        uids, turns, starts = (np.zeros(self.slots, np.int32) for _ in range(3))
        active = np.zeros(self.slots, bool)
        for r in requests:
            uids[r.slot], turns[r.slot], starts[r.slot], active[r.slot] = r.task.uid, r.turn, r.position, True
        places = self._places(requests, self.max_new_tokens)
        self.cache, *out = self._decode(
            self.params, self.cache, hidden, self.key, uids, turns, starts, active, places=places
        )
        tokens, logprobs, counts, finished = jax.device_get(out)
        self.lengths += counts - finished
        return [
            Completion(tokens[r.slot, :n], logprobs[r.slot, :n], bool(finished[r.slot]))
            for r in requests
            for n in [int(counts[r.slot])]
        ]

    def _places(self, requests: Sequence[Request], more: int) -> int:
        """How much of the cache a call that appends `more` tokens to these slots can touch, as a rung of a ladder.

        Other slots may be longer: what they compute is not used, and what they would write is dropped.
        """
        longest = max(int(self.lengths[r.slot]) for r in requests)
        return min(_rung(longest + more, PLACES), self.context)

    def _gather(self, requests: Sequence[Request]) -> Append:
        vision = self.config.vision
        length = _rung(max(len(r.prompt.tokens) for r in requests), MIN_TOKENS)
        patches = max(padded_patches(r.prompt.grids, vision) for r in requests)
        patches = _rung(patches, vision.window_patches)
        out = Append(
            np.zeros((self.slots, length), np.int32),
            np.zeros((self.slots, 3, length), np.int32),
            np.zeros(self.slots, np.int32),
            np.zeros((self.slots, patches, vision.patch_dim), np.float32),
            np.zeros((self.slots, patches), np.int32),
            np.zeros((self.slots, patches, 2), np.int32),
            np.zeros((self.slots, length), np.int32),
        )
        for r in requests:
            n = len(r.prompt.tokens)
            out.tokens[r.slot, :n], out.positions[r.slot, :, :n], out.counts[r.slot] = (
                r.prompt.tokens,
                r.prompt.positions,
                n,
            )
            is_image = r.prompt.tokens == self.config.image_token_id
            buffer = fill_patch_buffer(r.prompt.patches, r.prompt.grids, is_image, patches, vision)
            out.patches[r.slot], out.patch_segment_ids[r.slot] = buffer.patches, buffer.segment_ids
            out.patch_positions[r.slot], out.image_slots[r.slot, :n] = buffer.positions, buffer.image_slots
        return out


def _prefill(graphdef, compute, params, cache: Cache, append: Append, *, places: int):
    """Appends to every slot with tokens; returns the cache and the hidden state [S, D] after each slot's last token."""
    model = nnx.merge(graphdef, params)
    x = model.embed(
        append.tokens,
        append.patches,
        append.patch_segment_ids,
        append.patch_positions,
        append.image_slots,
        compute,
    )
    hidden, head = model.decoder.append(x, append.positions, cache.head(places))
    cache = cache.with_head(head)
    last = jnp.take_along_axis(hidden, jnp.maximum(append.counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return dataclasses.replace(cache, lengths=cache.lengths + append.counts), last


def _decode(
    graphdef,
    compute,
    sampling: SamplingConfig,
    terminator,
    params,
    cache,
    hidden,
    key,
    uids,
    turns,
    starts,
    active,
    *,
    places,
):
    """Samples at most max_new_tokens per active slot. The terminator is returned but not appended to the cache.

    Only the first `places` of the cache are read, which the host knows to be enough.
    """
    model = nnx.merge(graphdef, params)
    slots, budget = len(uids), sampling.max_new_tokens
    keys = jax.vmap(lambda u, t: jax.random.fold_in(jax.random.fold_in(key, u), t))(uids, turns)

    def step(carry):
        i, cache, hidden, open_, tokens, logprobs, counts, finished = carry
        token, logprob = _sample(model.logits(hidden[:, None])[:, 0], sampling.temperature, keys, i)
        tokens = tokens.at[:, i].set(jnp.where(open_, token, 0))
        logprobs = logprobs.at[:, i].set(jnp.where(open_, logprob, 0.0))
        counts = counts + open_
        finished = finished | (open_ & (token == terminator))
        open_ = open_ & (token != terminator)
        x = model.decoder.embed_tokens(token[:, None], compute)
        positions = jnp.broadcast_to((starts + i)[:, None, None], (slots, 3, 1))
        new_hidden, cache = model.decoder.append(x, positions, cache)
        cache = dataclasses.replace(cache, lengths=cache.lengths + open_)
        return i + 1, cache, new_hidden[:, 0], open_, tokens, logprobs, counts, finished

    start = (
        jnp.int32(0),
        cache.head(places),
        hidden,
        active,
        jnp.zeros((slots, budget), jnp.int32),
        jnp.zeros((slots, budget), jnp.float32),
        jnp.zeros(slots, jnp.int32),
        jnp.zeros(slots, bool),
    )
    _, head, _, _, tokens, logprobs, counts, finished = jax.lax.while_loop(
        lambda c: (c[0] < budget) & jnp.any(c[3]), step, start
    )
    return cache.with_head(head), tokens, logprobs, counts, finished


def _sample(logits_SV, temperature: float, keys, step):
    """A token per slot and its log-prob under the distribution it was drawn from; greedy at temperature 0."""
    if temperature == 0.0:
        logp = jax.nn.log_softmax(logits_SV)
        token = jnp.argmax(logits_SV, axis=-1)
    else:
        logp = jax.nn.log_softmax(logits_SV / temperature)
        token = jax.vmap(lambda k, p: jax.random.categorical(jax.random.fold_in(k, step), p))(keys, logp)
    return token.astype(jnp.int32), jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def _rung(need: int, smallest: int) -> int:
    """The smallest rung of the ladder smallest * 2^n that holds `need`."""
    rung = smallest
    while rung < need:
        rung *= 2
    return rung


def _check(sampling: SamplingConfig, window: int) -> None:
    for ok, message in (
        (sampling.temperature >= 0, "temperature must not be negative"),
        (sampling.slots >= 1, "slots must be at least 1"),
        (0 < sampling.max_new_tokens < sampling.context, "need 0 < max_new_tokens < context"),
        (sampling.patches >= window, f"patches must hold a window of {window}"),
    ):
        if not ok:
            raise DataError(f"sampling: {message}, got {sampling}")
