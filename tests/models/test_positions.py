"""Integer geometry against Hugging Face's own functions, exactly."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.models.qwen25_vl.positions import (
    fill_patch_buffer,
    merged_tokens,
    mrope_positions,
    padded_patches,
    patch_layout,
)
from rsagent_jax.models.qwen25_vl.vision import rotary_angles

from . import tiny
from .tiny import CASE, IMAGE

VISION = Qwen25VLConfig.from_hf(CASE["text only"].raw_config()).vision
GRIDS = ((1, 10, 6), (1, 4, 18), (1, 8, 8), (1, 12, 20), (1, 2, 2), (1, 18, 4), (1, 16, 16), (1, 2, 30))
grids = st.lists(st.tuples(st.just(1), *[st.integers(1, 9).map(lambda n: 2 * n)] * 2), max_size=4).map(tuple)
quick = settings(max_examples=25, deadline=None)


def hf_positions(seq):
    """Hugging Face's get_rope_index, [3, T]."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")

    class Model:  # the method reads these two numbers of the config and nothing else
        config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=4))
        get_vision_position_ids = modeling.Qwen2_5_VLModel.get_vision_position_ids

    tokens = torch.from_numpy(seq.tokens.astype(np.int64))[None]
    kinds, sizes = (tokens == IMAGE).int(), torch.tensor(seq.grids) if seq.grids else None
    return modeling.Qwen2_5_VLModel.get_rope_index(Model(), tokens, kinds, sizes)[0][:, 0].numpy()


@quick
@given(grids=grids, seed=st.integers(0, 99))
def test_positions_equal_hugging_faces_exactly_with_any_number_of_images(grids, seed):
    seq = tiny.sequence(CASE["text only"], seed, grids)
    got, end = mrope_positions(seq.tokens, grids, IMAGE)
    assert np.array_equal(got, hf_positions(seq))
    assert end == got.max() + 1


@quick
@given(grids=grids, seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 400), max_size=5))
def test_positions_appended_in_pieces_equal_the_whole(grids, seed, cuts):
    """Turns are appended piece by piece; a piece may end anywhere but inside an image."""
    seq = tiny.sequence(CASE["text only"], seed, grids)
    whole, whole_end = mrope_positions(seq.tokens, grids, IMAGE)
    is_image = seq.tokens == IMAGE
    inside = np.append(is_image[1:] & is_image[:-1], False)  # a cut after token i would split an image
    stops = sorted({c + 1 for c in cuts if c < len(seq.tokens) and not inside[c]} | {len(seq.tokens)})
    pieces, start, at, used = [], 0, 0, 0
    for stop in stops:
        starts = int(np.sum(np.diff(is_image[at:stop].astype(int), prepend=0) == 1))
        piece, start = mrope_positions(seq.tokens[at:stop], grids[used : used + starts], IMAGE, start)
        pieces.append(piece)
        at, used = stop, used + starts
    assert np.array_equal(np.concatenate(pieces, axis=1), whole) and start == whole_end


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, g: (t, g[:1]), "only 1 images"),
        (lambda t, g: (t, g + ((1, 2, 2),)), "3 images were given"),
        (lambda t, g: (np.delete(t, np.flatnonzero(t == IMAGE)[0]), g), "image 0 needs 4"),
        (lambda t, g: (t[: np.flatnonzero(t == IMAGE)[-1]], g), "image 1 needs 6"),
    ],
    ids=["too few grids", "too many grids", "a placeholder short", "cut inside an image"],
)
def test_placeholders_that_do_not_match_the_images_are_refused(change, message):
    seq = tiny.sequence(CASE["text only"], 0, ((1, 4, 4), (1, 6, 4)))
    with pytest.raises(ValueError, match=message):
        mrope_positions(*change(seq.tokens, seq.grids), IMAGE)


@pytest.mark.parametrize("window_size", [16, 32, 48])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_are_hugging_faces_left_over_windows_included(grid, window_size):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("transformers.vision_utils")
    config = dataclasses.replace(VISION, window_size=window_size)
    source, coords, merged_place = patch_layout(grid, config)
    index, bounds = utils.get_vision_window_index(torch.tensor([grid]), 2, window_size, config.patch_size)
    patches = (index.numpy()[:, None] * 4 + np.arange(4)).reshape(-1)
    theirs = np.empty(len(patches), int)  # the window of every patch
    theirs[patches] = np.searchsorted(bounds.numpy(), np.arange(len(patches)), side="right")
    real = source >= 0
    assert np.array_equal(np.sort(source[real]), np.sort(patches))
    # As the tower masks: two places see each other when they share a bin and a window of the image.
    bin_number = np.arange(len(real)) // config.window_patches
    cells = coords // (config.window_side * config.spatial_merge_size)
    ours = np.column_stack([bin_number, cells])[real]
    sees = (ours[:, None] == ours[None]).all(-1)
    of_place = theirs[source[real]]
    assert np.array_equal(sees, of_place[:, None] == of_place[None])
    wanted = utils.get_vision_position_ids(torch.tensor([grid]), 2).numpy()
    assert np.array_equal(coords[real], wanted[source[real]]) and not coords[~real].any()
    assert len(source) == padded_patches((grid,), config)
    merged_order = source[::4][merged_place] // 4  # the merged token that stands at the place of token m
    assert np.array_equal(merged_order, np.arange(merged_tokens(grid)))


def test_left_over_windows_share_bins():
    published = dataclasses.replace(VISION, patch_size=14, window_size=112)
    places = {28: 13 * 64, 32: 16 * 64, 2: 64}  # an overlay: 9 full windows, 6 halves, a quarter
    assert {n: padded_patches(((1, n, n),), published) for n in places} == places
    assert padded_patches(((1, 28, 36), (1, 28, 28)), published) == (16 + 13) * 64


@pytest.mark.parametrize("head_dim", [8, 16, 80])
def test_vision_angles_equal_hugging_faces(head_dim):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    config = SimpleNamespace(
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
        head_dim=head_dim,
        hidden_size=0,
        num_attention_heads=1,
    )
    places = np.stack(np.meshgrid(np.arange(60), np.arange(60), indexing="ij"), -1).reshape(-1, 2)
    embedding = modeling.Qwen2_5_VLVisionRotaryEmbedding(config)
    embedding(torch.zeros(1), torch.from_numpy(places))  # torch's first cosines in a process: 1.5e-4 off now and then
    theirs = embedding(torch.zeros(1), torch.from_numpy(places))
    ours = rotary_angles(places[None], head_dim)
    for got, want in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(got)[0] - want.numpy()).max() <= 1e-5


@quick
@given(sizes=grids.filter(len), seed=st.integers(0, 9), extra=st.integers(0, 2))
def test_a_patch_buffer_holds_every_patch_once_and_every_slot_finds_its_own(sizes, seed, extra):
    seq = tiny.sequence(CASE["text only"], seed, sizes)
    total = len(seq.patches)
    patches = np.repeat(np.arange(1, total + 1, dtype=np.float32)[:, None], VISION.patch_dim, axis=1)
    capacity = padded_patches(sizes, VISION) + extra * VISION.window_patches
    is_image = seq.tokens == IMAGE
    buffer = fill_patch_buffer(patches, sizes, is_image, capacity, VISION)
    held = buffer.patches[:, 0][buffer.segment_ids > 0]
    assert np.array_equal(np.sort(held), np.arange(1, total + 1))
    assert not buffer.patches[buffer.segment_ids == 0].any()
    ends = np.cumsum([int(np.prod(g)) for g in sizes])
    assert np.array_equal(buffer.segment_ids[buffer.segment_ids > 0], np.searchsorted(ends, held - 1, side="right") + 1)
    slots = buffer.image_slots[is_image] - 1  # the m-th image token reads patches 4m .. 4m + 3
    assert np.array_equal(buffer.patches[:, 0].reshape(-1, 4)[slots].reshape(-1), np.arange(1, total + 1))
    assert not buffer.image_slots[~is_image].any()


@pytest.mark.parametrize(
    ("tokens", "rows", "capacity", "message"),
    [
        (4, 16, 0, "64 patch places, the buffer has 0"),
        (3, 16, 64, "3 image tokens for 4"),
        (4, 15, 64, "15 patches"),
        (4, 20, 64, "20 patches"),
    ],
    ids=["too small a buffer", "a token short", "a patch short", "patches left over"],
)
def test_a_buffer_whose_numbers_do_not_agree_is_refused(tokens, rows, capacity, message):
    patches = np.zeros((rows, VISION.patch_dim), np.float32)
    with pytest.raises(ValueError, match=message):
        fill_patch_buffer(patches, ((1, 4, 4),), np.ones(tokens, bool), capacity, VISION)
