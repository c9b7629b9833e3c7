"""fp32 parity with transformers on tiny random models: blocks, merger, logits, gradients, packed rows; bf16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rsagent_jax.models.qwen25_vl.compute import Compute  # noqa: E402

from . import tiny  # noqa: E402
from .tiny import CASE, CASES  # noqa: E402

BLOCK = 1e-5
LOGITS = 1e-4
RELATIVE = 1e-4
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.slow
@each_case
def test_every_block_is_within_1e_5_of_hugging_face_and_the_logits_within_1e_4(case):
    ours, theirs = (m.activations for m in tiny.measured(case))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.std() > 0.2, f"{name} is nearly constant: the comparison would say nothing"
        error = np.abs(ours[name] - value).max()
        assert error <= (LOGITS if name == "logits" else BLOCK), f"{name}: {error:.1e} of {np.abs(value).max():.1f}"


@each_case
def test_gradients_of_the_sft_loss_are_within_1e_4_of_torch_for_every_parameter(case):
    ours, theirs = tiny.measured(case)
    assert abs(ours.loss - theirs.loss) <= 1e-5
    for name, want in theirs.gradients.items():
        got = ours.gradients[name]
        if want is None:  # torch never reached it: the vision tower of a text-only row
            assert name.startswith("visual.")
            assert not case.grids
            assert not got.any()
            continue
        assert got.shape == want.shape and np.linalg.norm(want) > 1e-6, name
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error <= RELATIVE, f"{name}: relative error {error:.1e}"


def test_the_window_comparison_would_notice_a_full_block():
    pair = tiny.pair(CASE["two images"])
    visual = pair.hf.model.visual
    seq = tiny.sequence(pair.case, seed=104)
    right = tiny.hf_logits(pair.hf, seq)
    try:
        visual.fullatt_block_indexes = range(pair.case.depth)
        wrong = tiny.hf_logits(pair.hf, seq)
    finally:
        visual.fullatt_block_indexes = pair.case.fullatt
    assert np.abs(right - wrong).max() > 100 * LOGITS


def test_packed_rows_of_a_batch_read_as_each_sequence_alone_whatever_stands_in_the_padding():
    case = CASE["tall, left-over windows"]
    pair = tiny.pair(case)
    a, b = tiny.sequence(case, 1, ((1, 18, 4), (1, 4, 6))), tiny.sequence(case, 2, ((1, 8, 10),))
    c, d = tiny.sequence(case, 3, ()), tiny.sequence(case, 4, ((1, 2, 2), (1, 10, 10)))
    program = tiny.jitted(pair.ours, lambda m, row: m.logits(m(row)))

    def run(*rows):
        packed = [tiny.pack(list(parts), pair.config, length=112, capacity=576) for parts in rows]
        spoilt = [spoil(row, seed) for seed, row in enumerate(packed)]
        stack = lambda rows: jax.tree.map(lambda *pieces: np.concatenate(pieces), *rows)  # noqa: E731
        clean, dirty = (np.asarray(program(stack(rows))) for rows in (packed, spoilt))
        for row, x, y in zip(packed, clean, dirty, strict=True):
            assert np.array_equal(x[row.segment_ids[0] > 0], y[row.segment_ids[0] > 0])
        return clean

    together = run((a, b, c), (d, a))
    alone = {}
    for first, second in ((a, b), (c, d)):
        alone[id(first)], alone[id(second)] = run((first,), (second,))
    for row, parts in zip(together, ((a, b, c), (d, a)), strict=True):
        at = 0
        for part in parts:
            n = len(part.tokens)
            assert np.abs(row[at : at + n] - alone[id(part)][:n]).max() <= 1e-5
            assert np.abs(row[at : at + n] - tiny.hf_logits(pair.hf, part)).max() <= LOGITS
            at += n


def spoil(row, seed):
    """The same row with other things in its padding."""
    text, seen = row.segment_ids > 0, row.patch_segment_ids[..., None] > 0
    noise = np.random.default_rng(seed).integers(0, tiny.VOCAB, row.tokens.shape)
    return dataclasses.replace(
        row,
        tokens=np.where(text, row.tokens, noise).astype(np.int32),
        patches=np.where(seen, row.patches, 50.0).astype(np.float32),
        patch_positions=np.where(seen, row.patch_positions, 99).astype(np.int32),
    )


def test_a_patch_buffer_that_is_not_whole_windows_is_refused():
    """With two rows of 1.5 windows each, a window would hold patches of both."""
    case = CASE["two images"]
    pair = tiny.pair(case)
    row = tiny.pack([tiny.sequence(case, 8, ((1, 4, 4),))], pair.config, capacity=96)
    with pytest.raises(ValueError, match="96.*64"):
        tiny.logits(pair.ours, row)


def test_bf16_runs_and_stays_near_fp32():
    pair = tiny.pair(CASE["tall, left-over windows"])
    seq = tiny.sequence(pair.case, seed=9)

    def half(model, row):
        hidden = model(row, Compute("bfloat16"))
        return hidden, model.logits(hidden)

    hidden, logits = tiny.jitted(pair.ours, half)(tiny.pack([seq], pair.config))
    whole = tiny.hf_logits(pair.hf, seq)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert np.linalg.norm(logits[0] - whole) <= 0.02 * np.linalg.norm(whole)  # bf16 keeps 8 bits: 0.4 % a rounding


def test_the_logits_of_tied_and_untied_heads_come_from_the_right_matrix():
    for case in (CASE["two images"], CASE["tall, left-over windows"]):
        pair = tiny.pair(case)
        head = np.asarray(pair.ours.decoder.head_VD)
        assert (pair.ours.decoder.lm_head is None) == case.tied
        assert np.array_equal(head, pair.hf.lm_head.weight.detach().numpy())
        assert np.array_equal(head, np.asarray(pair.ours.decoder.embed[...])) == case.tied
