"""Greedy generation with the KV cache over three turns that add images, token for token the same as transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rsagent_jax.models.qwen25_vl.compute import PLAIN
from rsagent_jax.models.qwen25_vl.language import Cache
from rsagent_jax.models.qwen25_vl.positions import fill_patch_buffer, mrope_positions

from . import tiny
from .tiny import EOS, IMAGE, SPECIAL

NEW = 7  # tokens sampled a turn
NEVER = [*SPECIAL, EOS]  # a sampled image token would have no image; a turn has NEW tokens
PIECE, PATCHES, CAPACITY = 48, 192, 120  # tokens appended at once, patch places, cache places
UNTIED = tiny.Case("untied", (), seed=14, kv_heads=2, layers=3, mrope_section=(1, 1, 2), fullatt=(1,), gain=3.0)
TIED = tiny.Case("tied", (), seed=15, kv_heads=1, tied=True, fullatt=(0,), gain=3.0)
# images that each turn adds, per slot: contexts of different lengths; slot 1 begins with text only; slot 2 skips turn 1
TURNS = (
    (((1, 8, 8),), (), ((1, 4, 10), (1, 6, 4))),
    (((1, 4, 18),), ((1, 10, 6),), None),
    (((1, 2, 2), (1, 6, 6)), ((1, 6, 8),), ((1, 12, 4),)),
)


def piece(case, turn, slot, grids):
    return tiny.sequence(case, 1000 * case.seed + 10 * turn + slot, grids)


@functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.QUICK)
def append(graphdef, state, args, positions, cache, counts):
    """The logits after the last real token of each slot's piece, f32[S, V]."""
    model = nnx.merge(graphdef, state)
    hidden, cache = model.decoder.append(model.embed(*args), positions, cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    return model.logits(last)[:, 0], dataclasses.replace(cache, lengths=cache.lengths + counts)


@functools.partial(jax.jit, static_argnums=0, compiler_options=tiny.QUICK)
def decode(graphdef, state, tokens, positions, cache, counts):
    """The logits after one more token in each slot, f32[S, V]."""
    model = nnx.merge(graphdef, state)
    hidden, cache = model.decoder.append(model.decoder.embed_tokens(tokens, PLAIN), positions, cache)
    return model.logits(hidden)[:, 0], dataclasses.replace(cache, lengths=cache.lengths + counts)


class Slots:
    """A batch of contexts that grow: one program appends a piece to each slot, one decodes a token in each."""

    def __init__(self, model, slots=3):
        self.model = nnx.split(model)
        self.config = model.config
        self.cache = Cache.empty(model.config.text, slots, CAPACITY, jnp.float32)
        self.next_position = np.zeros(slots, np.int64)

    def append(self, pieces):
        """Right-padded; a None leaves its slot as it is. f32[S, V]."""
        rows, positions = [], []
        for slot, seq in enumerate(pieces):
            if seq is None:
                seq = tiny.Sequence(np.zeros(0, np.int32), np.zeros((0, self.config.vision.patch_dim), np.float32), ())
            place, self.next_position[slot] = mrope_positions(
                seq.tokens, seq.grids, IMAGE, int(self.next_position[slot])
            )
            tokens = np.pad(seq.tokens, (0, PIECE - len(seq.tokens)))
            b = fill_patch_buffer(seq.patches, seq.grids, tokens == IMAGE, PATCHES, self.config.vision)
            rows.append((tokens, b.patches, b.segment_ids, b.positions, b.image_slots))
            positions.append(np.pad(place, ((0, 0), (0, PIECE - place.shape[1]))))
        args = tuple(jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True))
        counts = jnp.asarray([0 if seq is None else len(seq.tokens) for seq in pieces], jnp.int32)
        logits, self.cache = append(*self.model, args, jnp.asarray(np.stack(positions)), self.cache, counts)
        return np.asarray(logits)

    def decode(self, tokens, active):
        """One token in each active slot. f32[S, V]."""
        positions = np.broadcast_to(self.next_position[:, None, None], (len(tokens), 3, 1)).astype(np.int32)
        tokens, active = jnp.asarray(tokens, jnp.int32)[:, None], jnp.asarray(active, jnp.int32)
        logits, self.cache = decode(*self.model, tokens, jnp.asarray(positions), self.cache, active)
        self.next_position += np.asarray(active)
        return np.asarray(logits)

    def generate(self, pieces):
        """NEW greedy tokens in each slot that was given a piece; the last one is fed too, it is part of the context."""
        active = np.array([p is not None for p in pieces])
        logits, out, margins = self.append(pieces), [], []
        for _ in range(NEW):
            logits = logits.copy()
            logits[:, NEVER] = -np.inf
            tokens = np.where(active, logits.argmax(-1), 0)
            margins.append(np.diff(np.sort(logits[active], -1)[:, -2:]).min())
            out.append(tokens)
            logits = self.decode(tokens, active)
        assert min(margins) > 1e-4, "two tokens are nearly tied: take another seed, this one would prove nothing"
        return np.stack(out, axis=1), logits


def joined(parts):
    return tiny.Sequence(
        np.concatenate([p.tokens for p in parts]).astype(np.int32),
        np.concatenate([p.patches for p in parts]),
        sum((p.grids for p in parts), ()),
    )


def hf_generate(hf, seq, use_cache=True):
    import torch

    hf.model.rope_deltas = None
    settings = dict(do_sample=False, max_new_tokens=NEW, suppress_tokens=NEVER, pad_token_id=0)
    with torch.no_grad():
        out = hf.generate(**tiny.hf_inputs(seq), use_cache=use_cache, **settings)
    return out[0, len(seq.tokens) :].numpy()


@pytest.mark.parametrize("case", [UNTIED, TIED], ids=lambda case: case.name)
def test_three_turns_that_add_images_are_token_for_token_those_of_transformers(case):
    pytest.importorskip("torch")
    pair = tiny.pair(case)
    slots = Slots(pair.ours)
    context = [[] for _ in range(3)]
    for turn, images in enumerate(TURNS):
        pieces = [None if grids is None else piece(case, turn, slot, grids) for slot, grids in enumerate(images)]
        tokens, logits = slots.generate(pieces)
        for slot, seq in enumerate(pieces):
            if seq is None:
                continue
            context[slot].append(seq)
            whole = joined(context[slot])
            assert np.array_equal(tokens[slot], hf_generate(pair.hf, whole)), (turn, slot)
            context[slot].append(tiny.Sequence(tokens[slot], seq.patches[:0], ()))
            after = tiny.hf_logits(pair.hf, joined(context[slot]))[-1]  # transformers reads everything anew
            assert np.abs(logits[slot] - after).max() <= 1e-4
    assert slots.cache.lengths.tolist() == [sum(len(p.tokens) for p in parts) for parts in context]


def test_transformers_generates_the_same_without_its_cache():
    """The reference above is no artefact of transformers' own cache and rope deltas."""
    pytest.importorskip("torch")
    pair = tiny.pair(UNTIED)
    seq = joined([piece(UNTIED, 0, 0, ((1, 8, 8),)), piece(UNTIED, 1, 0, ((1, 4, 18),))])
    assert np.array_equal(hf_generate(pair.hf, seq), hf_generate(pair.hf, seq, use_cache=False))


def test_a_cache_filled_in_pieces_equals_the_whole_row():
    """Prefill in two padded pieces, then token by token, against one pass over the row. No torch.

    The cache has just the places that the row needs: the padding of the last piece falls over its end.
    """
    model = tiny.random_model(UNTIED, seed=3)
    parts = [tiny.sequence(UNTIED, i, ((1, 8, 8), (1, 4, 4))[i // 2 :]) for i in range(3)]
    room = CAPACITY - sum(len(part.tokens) for part in parts)
    words = np.random.default_rng(3).integers(3, IMAGE, room).astype(np.int32)
    end = tiny.Sequence(words, parts[0].patches[:0], ())
    whole = tiny.logits(model, tiny.pack([joined([*parts, end])], model.config))
    assert 0 < room < PIECE - len(parts[-1].tokens), "the last piece's padding should not fit"
    slots, at = Slots(model), 0
    for part in parts:
        at += len(part.tokens)
        got = slots.append([None, part, None])
        assert np.abs(got[1] - whole[at - 1]).max() <= 1e-5
    for token in words:
        got = slots.decode(np.array([0, token, 0]), np.array([False, True, False]))
        assert np.abs(got[1] - whole[at]).max() <= 1e-5
        at += 1
    assert slots.cache.lengths.tolist() == [0, len(whole), 0]
