"""Arrow 7: the picture fits the history pool and shows the mask where it is."""

import numpy as np
import pytest
from agent_fakes import disc

from rsagent_jax.agent.overlay import ALPHA, NEGATIVE, OUTLINE, POSITIVE, TINT, draw_overlay

GREY = np.full((200, 400, 3), 100, np.uint8)


@pytest.mark.parametrize(
    ("h", "w", "fit"), [(200, 400, (192, 384)), (400, 200, (384, 192)), (50, 50, (384, 384)), (1, 900, (1, 384))]
)
def test_longer_side_is_the_size(h, w, fit):
    image = draw_overlay(np.zeros((h, w, 3), np.uint8), np.zeros((h, w), bool), 384)
    assert image.shape == (*fit, 3) and image.dtype == np.uint8


def test_inside_is_tinted_outside_untouched():
    image = draw_overlay(GREY, disc(200, 400, 100, 100, 40), 400)
    np.testing.assert_array_equal(image[100, 100], np.round(100 * (1 - ALPHA) + np.array(TINT) * ALPHA))
    np.testing.assert_array_equal(image[100, 300], [100, 100, 100])
    np.testing.assert_array_equal(image[100, 141], OUTLINE)  # the first pixel outside a disc of radius 40
    np.testing.assert_array_equal(image[100, 142], [100, 100, 100])


def test_prompts_are_marked_at_their_scaled_place():
    image = draw_overlay(
        GREY, np.zeros((200, 400), bool), 200, [(100, 50), (300, 150)], (1, 0), box_original=(200, 20, 380, 180)
    )
    np.testing.assert_array_equal(image[25, 50], POSITIVE)
    np.testing.assert_array_equal(image[75, 150], NEGATIVE)
    np.testing.assert_array_equal(image[10, 120], OUTLINE)
    np.testing.assert_array_equal(image[89, 189], OUTLINE)


def test_thin_masks_do_not_vanish():
    mask = np.zeros((800, 800), bool)
    mask[:, 400] = True
    image = draw_overlay(np.zeros((800, 800, 3), np.uint8), mask, 100)
    assert image[50, 50].sum() > 0 and image[50, 20].sum() == 0


def test_inputs_are_not_written_to():
    image, mask = GREY.copy(), disc(200, 400, 50, 50, 20)
    draw_overlay(image, mask, 400, [(5, 5)], (1,), (0, 0, 9, 9))
    np.testing.assert_array_equal(image, GREY)
