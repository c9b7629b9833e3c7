"""Batches of fixed shape: nothing is lost, nothing is mixed up, and packing changes no loss and no gradient."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.config.schema import BatchConfig, GrpoConfig
from rsagent_jax.data.packing import Item, fits, pack
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.train import step
from rsagent_jax.train.state import EMPTY
from rsagent_jax.types import Batch
from tests.rollout import small
from tests.rollout.small import random_item as make

GRIDS = ((1, 2, 2), (1, 4, 4), (1, 6, 4), (1, 2, 10), (1, 8, 8))
SHAPE = BatchConfig(rows=2, tokens=96, patches=96)


@functools.cache
def config():
    return small.processor().config


@st.composite
def items(draw):
    out = []
    for number in range(draw(st.integers(0, 6))):
        grids = tuple(draw(st.lists(st.sampled_from(GRIDS), max_size=2)))
        texts = tuple(draw(st.lists(st.integers(1, 12), min_size=len(grids) + 1, max_size=len(grids) + 1)))
        out.append(make(draw(st.integers(0, 99)), texts, grids, advantage=number + 1.0))
    return out


def unpack(batches, shape):
    """Every segment of every row as an Item again; the images come from the row's buffer through the image slots."""
    out, unit = [], config().vision.merge_unit
    for batch in batches:
        for row in range(shape.rows):
            segments = batch.segment_ids[row]
            real = segments[segments > 0]
            assert (np.diff(real) >= 0).all() and (segments[len(real) :] == 0).all()  # contiguous, padding last
            assert sorted(set(real.tolist())) == list(range(1, len(set(real.tolist())) + 1))
            for s in range(1, real.max(initial=0) + 1):
                at = segments == s
                slots = batch.image_slots[row][at]
                places = (slots[slots > 0] - 1)[:, None] * unit + np.arange(unit)
                assert (batch.patch_segment_ids[row][places] > 0).all()
                (advantage,) = set(batch.advantages[row][at].tolist())
                patches = batch.patches[row][places].reshape(-1, config().vision.patch_dim)
                out.append((row, at, patches, advantage, batch))
    return out


def test_a_batch_is_what_its_fields_declare():
    (batch,) = pack([make(1, (4, 3), ((1, 4, 4),))], SHAPE, config())
    small.assert_as_declared(batch)


@settings(max_examples=40)
@given(items())
def test_every_item_appears_exactly_once_and_unchanged(given_items):
    given_items = [i for i in given_items if fits(i, SHAPE, config())]
    batches = pack(given_items, SHAPE, config())
    found = unpack(batches, SHAPE)
    assert sorted(a for *_, a, _ in found) == [i.advantage for i in given_items]
    for row, at, patches, advantage, batch in found:
        item = next(i for i in given_items if i.advantage == advantage)
        np.testing.assert_array_equal(batch.positions[row][:, at], item.positions)
        for name, wanted in (("tokens", item.tokens), ("loss_mask", item.loss_mask), ("old_logprobs", item.logprobs)):
            np.testing.assert_array_equal(getattr(batch, name)[row][at], wanted, err_msg=name)
        np.testing.assert_array_equal(patches, item.patches)  # merged tokens stand in the processor's order
        is_image = item.tokens == config().image_token_id
        np.testing.assert_array_equal(batch.image_slots[row][at] > 0, is_image)
    for batch in batches:
        shapes = {f.name: getattr(batch, f.name).shape for f in dataclasses.fields(Batch)}
        assert shapes["tokens"] == (2, 96) and shapes["positions"] == (2, 3, 96) and shapes["patches"] == (2, 96, 1176)
        padding = batch.segment_ids == 0
        for name in ("tokens", "loss_mask", "advantages", "old_logprobs", "image_slots"):
            assert not getattr(batch, name)[padding].any(), name
        assert not batch.patches[batch.patch_segment_ids == 0].any()


@settings(max_examples=40)
@given(items())
def test_what_fits_is_packed_and_what_does_not_is_an_error(given_items):
    for item in given_items:
        alone = len(item.tokens) <= 96 and padded_patches(item.grids, config().vision) <= 96
        assert fits(item, SHAPE, config()) == alone
        if not alone:
            with pytest.raises(ValueError, match="do not fit a row of 96 and 96"):
                pack([item], SHAPE, config())


def test_rows_are_filled_first_fit_longest_first():
    sizes = (50, 46, 40, 30, 20)
    batches = pack([make(n, (n,)) for n in sizes[::-1]], SHAPE, config())
    # 50 + 46 fill the first row; 40 + 30 + 20 the second: one batch
    assert len(batches) == 1
    lengths = [np.unique(row[row > 0], return_counts=True)[1].tolist() for row in batches[0].segment_ids]
    assert lengths == [[50, 46], [40, 30, 20]]
    assert pack([], SHAPE, config()) == []
    assert [len(pack([make(i, (60,)) for i in range(n)], SHAPE, config())) for n in (1, 2, 3, 5)] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i: {"grids": i.grids[:1], "patches": i.patches[:16]},  # tokens of an image that is not there
        lambda i: {"grids": (*i.grids, (1, 2, 2)), "patches": np.pad(i.patches, ((0, 4), (0, 0)))},
        lambda i: {"patches": i.patches[:-1]},
        lambda i: {"tokens": np.where(np.arange(len(i.tokens)) == 0, config().image_token_id, i.tokens)},
    ],
)
def test_image_tokens_that_are_not_the_merged_patches_are_an_error(wrong):
    good = make(0, (5, 6, 7), ((1, 4, 4), (1, 4, 4)))
    pack([good], SHAPE, config())
    with pytest.raises(ValueError, match="image tokens for|patches were given"):
        pack([dataclasses.replace(good, **wrong(good))], SHAPE, config())


def test_an_image_token_that_the_policy_sampled_is_a_word():
    good = make(0, (5, 6, 7), ((1, 4, 4), (1, 4, 4)))
    tokens, sampled = good.tokens.copy(), good.loss_mask.copy()
    tokens[-2:], sampled[-2:] = config().image_token_id, True
    (batch,) = pack([dataclasses.replace(good, tokens=tokens, loss_mask=sampled)], SHAPE, config())
    assert batch.loss_mask[0][: len(tokens)].tolist() == sampled.tolist()
    assert (batch.image_slots[0] > 0).sum() == 8 and not batch.image_slots[0][len(tokens) - 2 :].any()


@functools.cache
def programs():
    """{objective: jitted (batch) -> Sums}."""
    graphdef, params = small.split(small.model())
    grpo = GrpoConfig(normalize="sequence", kl=0.1, tis_clip=0.0, sampling=small.SAMPLING)

    def one(objective):
        @jax.jit
        def run(batch):
            ref = -1.0 - (batch.tokens % 7) / 7.0  # any function of the token
            return step.micro_step(graphdef, step.Stage(objective), small.COMPUTE, params, EMPTY, batch, ref)

        return run

    return {"sft": one(step.sft_objective), "grpo": one(step.grpo_objective(grpo))}


@functools.cache
def mixed() -> tuple[Item, ...]:
    return (
        make(1, (9, 8, 7), ((1, 4, 4), (1, 6, 4)), advantage=1.0),
        make(2, (20,), (), advantage=-0.5),
        make(3, (6, 5), ((1, 2, 10),), advantage=0.7),
        make(4, (12, 9), ((1, 4, 4),), advantage=-1.2),
    )


def assert_same_sums(a: step.Sums, b: step.Sums):
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
    assert float(a.denominator) == float(b.denominator) > 0
    for name in a.metrics:
        np.testing.assert_allclose(a.metrics[name], b.metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for x, y in zip(jax.tree.leaves(a.grads), jax.tree.leaves(b.grads), strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x) + 1e-5
    assert sum(float(np.abs(x).sum()) for x in jax.tree.leaves(a.grads)) > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_packing_changes_neither_the_loss_nor_a_gradient(objective):
    run = programs()[objective]
    (packed,) = pack(mixed(), SHAPE, config())
    assert packed.segment_ids.max() > 1  # something is shared
    alone = [run(pack([item], SHAPE, config())[0]) for item in mixed()]
    assert_same_sums(run(packed), functools.reduce(step.add, alone))


@pytest.mark.slow
def test_micro_batches_add_up_to_the_large_batch_and_empty_rows_weigh_nothing():
    run = programs()["grpo"]
    (packed,) = pack(mixed(), SHAPE, config())
    halves = [run(pack(half, SHAPE, config())[0]) for half in (mixed()[:2], mixed()[2:])]
    assert_same_sums(run(packed), step.add(*halves))
    sums = run(jax.tree.map(np.zeros_like, packed))
    assert float(sums.loss) == float(sums.denominator) == 0.0
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(sums.grads))


def test_what_stands_in_the_padding_changes_nothing():
    run = programs()["grpo"]
    (packed,) = pack(mixed()[:2], SHAPE, config())
    rng, padding = np.random.default_rng(0), packed.segment_ids == 0
    unused = (packed.patch_segment_ids == 0)[..., None]
    noisy = dataclasses.replace(
        packed,
        tokens=np.where(padding, rng.integers(0, 400, padding.shape), packed.tokens).astype(np.int32),
        advantages=np.where(padding, 9.0, packed.advantages).astype(np.float32),
        old_logprobs=np.where(padding, -9.0, packed.old_logprobs).astype(np.float32),
        patches=np.where(unused, 3.0, packed.patches).astype(np.float32),
    )
    assert_same_sums(run(packed), run(noisy))
