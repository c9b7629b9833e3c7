"""Arrow 5: coordinates survive every chain of views, and the pixels agree with the coordinates."""

import numpy as np
import pytest
from agent_fakes import LIMITS, make_image
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rsagent_jax.agent.views import MIN_ZOOM_SIDE, PixelLimits, View, fit, fixed_size, round_size
from rsagent_jax.types import ParseError
from tests.refusals import refused

QWEN = PixelLimits()
sides = st.integers(1, 3000)


@pytest.mark.parametrize(
    ("size", "expected"),
    [  # computed by Hugging Face's smart_resize, transformers 5.23, default limits of Qwen2.5-VL
        ((384, 384), (392, 392)),
        ((840, 840), (840, 840)),
        ((1024, 1024), (1036, 1036)),
        ((480, 640), (476, 644)),
        ((70, 98), (56, 112)),  # 2.5 and 3.5 both go to the even neighbour
        ((10, 1999), (28, 812)),  # rounds to 0 rows and is then grown to min_pixels
        ((4000, 6000), (2912, 4368)),
        ((20, 20), (56, 56)),
    ],
)
def test_round_size_known_values(size, expected):
    assert round_size(*size, QWEN) == expected


@settings(max_examples=300)
@given(sides, sides, st.sampled_from([QWEN, LIMITS, PixelLimits(14, 196, 10_000)]))
def test_round_size_properties(h, w, limits):
    if max(h, w) / min(h, w) > 200:
        refused("200", fixed_size, h, w, limits)
        return
    h_bar, w_bar = round_size(h, w, limits)
    assert h_bar % limits.factor == 0 and w_bar % limits.factor == 0 and min(h_bar, w_bar) >= limits.factor
    assert h_bar * w_bar >= limits.min_pixels
    if max(h, w) / min(h, w) < 10:
        assert h_bar * w_bar <= limits.max_pixels
        assert round_size(h_bar, w_bar, limits) == (h_bar, w_bar)
    h_fix, w_fix = fixed_size(h, w, limits)
    assert round_size(h_fix, w_fix, limits) == (h_fix, w_fix)
    assert fixed_size(w, h, limits) == (w_fix, h_fix)


def test_a_picture_of_nearly_200_to_1_is_shown_as_transformers_shows_it():
    """29 x 5700 is 197:1, and the size that Hugging Face's smart_resize gives for it 204:1."""
    assert round_size(29, 5700, QWEN) == (28, 5712)
    assert fit(29, 5700, QWEN) is QWEN
    view = View.whole(29, 5700, QWEN)
    assert view.size_view == (5712, 28) and view.rotate(1).size_view == (28, 5712)
    assert view.render(make_image(29, 5700)).shape == (28, 5712, 3)


@settings(max_examples=500)
@given(st.integers(1, 3000), st.floats(1, 200), st.booleans(), st.integers(1, 30), st.floats(1, 400), st.floats(0, 1))
def test_every_picture_up_to_200_to_1_has_a_view_under_any_limits(short, ratio, turned, factor, most, least):
    """`most`: the largest area in cells of factor x factor; `least`: the smallest as a share of it."""
    h, w = short, int(short * ratio)
    h, w = (w, h) if turned else (h, w)
    high = int(most * factor**2)
    limits = PixelLimits(factor, max(1, int(high * least)), high)
    lowered = fit(h, w, limits)
    assert lowered == fit(h, w, lowered) and lowered.max_pixels == high
    w_view, h_view = View.whole(h, w, lowered).size_view
    assert w_view % factor == h_view % factor == 0 and min(w_view, h_view) > 0
    assert lowered.min_pixels <= w_view * h_view <= high
    if lowered != limits:
        assert lowered.min_pixels == max(1, high // 4) < limits.min_pixels
        refused("fits no size", View.whole, h, w, limits)


@pytest.mark.parametrize("size", [(10, 2010), (2001, 10), (1, 201)])
def test_a_picture_beyond_200_to_1_is_refused_with_the_remedy(size):
    refused(rf"{size[0]}x{size[1]} pixels .* more than 200 times the shorter; crop it", fit, *size, QWEN)
    refused("is empty", View.whole, 0, 5, LIMITS)


@pytest.mark.parametrize("bad", [(28, 0, 100), (28, 3136, 783), (28, 1000, 900), (0, 1, 1)])
def test_impossible_limits_are_refused(bad):
    refused("pixel limits: need 1 <= min_pixels", PixelLimits, *bad)


@st.composite
def views(draw, low=30, high=500):
    """A view after up to four random zooms and turns."""
    view = View.whole(draw(st.integers(low, high)), draw(st.integers(low, high)), LIMITS)
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            view = view.rotate(draw(st.integers(1, 3)))
        else:
            w, h = view.size_view
            x1, x2 = draw(st.floats(0, 0.4)) * w, draw(st.floats(0.6, 1)) * w
            y1, y2 = draw(st.floats(0, 0.4)) * h, draw(st.floats(0.6, 1)) * h
            zoomed = view.zoom((x1, y1, x2, y2))
            view = view if isinstance(zoomed, ParseError) else zoomed
    return view


@settings(max_examples=200, deadline=None)
@given(views(), st.lists(st.tuples(st.floats(-50, 600), st.floats(-50, 600)), min_size=1, max_size=5))
def test_points_and_boxes_come_back(view, points):
    points = np.array(points)
    np.testing.assert_allclose(view.to_view(view.to_original(points)), points, atol=1e-6)
    np.testing.assert_allclose(view.to_original(view.to_view(points)), points, atol=1e-6)
    x1, y1, x2, y2 = 10.0, 12.5, 40.0, 13.0
    np.testing.assert_allclose(view.box_to_original(view.box_to_view((x1, y1, x2, y2))), (x1, y1, x2, y2), atol=1e-6)
    x1, y1, x2, y2 = view.box_to_view((x1, y1, x2, y2))
    assert x1 < x2 and y1 < y2
    # the view's own frame is exactly the crop's frame
    np.testing.assert_allclose(view.box_to_original((0, 0, *view.size_view)), view.region_original, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(views(low=60, high=300), st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_pixels_agree_with_coordinates(view, u, v):
    x1, y1, x2, y2 = view.region_original
    x, y = int(x1 + u * (x2 - x1)), int(y1 + v * (y2 - y1))
    w, h = view.size_original
    image = np.zeros((h, w, 3), np.uint8)
    image[y, x] = 255
    rendered = view.render(image)
    assert rendered.shape == (view.size_view[1], view.size_view[0], 3) and rendered.dtype == np.uint8
    # the centre of mass of the marker in the picture is where to_view says; bicubic's negative lobes are clipped off,
    # and 8 bits are coarse where the view shrinks
    weight = rendered[..., 0].astype(float)
    assume(weight.sum() > 0)
    ys, xs = np.mgrid[: weight.shape[0], : weight.shape[1]]
    centre = np.array([(weight * xs).sum(), (weight * ys).sum()]) / weight.sum()
    scale = max(view.size_view[0] / min(x2 - x1, y2 - y1), view.size_view[1] / min(x2 - x1, y2 - y1), 1.0)
    np.testing.assert_allclose(centre, view.to_view(np.array([[x, y]]))[0], atol=0.5 * scale)


@given(st.integers(0, 3), st.integers(0, 111), st.integers(0, 55))
def test_turned_pixels_are_exact(turns, x, y):
    image = make_image(56, 112)
    view = View.whole(56, 112, LIMITS).rotate(turns)
    assert view.size_view == ((112, 56) if turns % 2 == 0 else (56, 112))
    x_view, y_view = view.to_view(np.array([[x, y]]))[0]
    assert (x_view, y_view) == (round(x_view), round(y_view))
    np.testing.assert_array_equal(view.render(image)[int(y_view), int(x_view)], image[y, x])


def test_rotation_is_counter_clockwise_and_closes():
    view = View.whole(56, 112, LIMITS)
    # the top right corner goes to the top left
    np.testing.assert_allclose(view.rotate(1).to_view(np.array([[111, 0]])), [[0, 0]], atol=1e-9)
    assert view.rotate(1).rotate(3) == view.rotate(2).rotate(2) == view


def test_identity_view_keeps_every_pixel_and_coordinate():
    image = make_image(112, 140)
    view = View.whole(112, 140, LIMITS)
    assert view.size_view == (140, 112)
    np.testing.assert_array_equal(view.render(image), image)
    assert view.render(image) is not image
    np.testing.assert_array_equal(view.affine_view_original, [[1, 0, 0], [0, 1, 0]])
    assert view.affine_view_original.dtype == np.float64


def test_whole_view_is_the_ratio_of_sizes():
    """Qwen2.5-VL's convention: a box is scaled by w'/w and h'/h, here 644/640 and 476/480."""
    view = View.whole(480, 640, QWEN)
    np.testing.assert_allclose(view.box_to_view((64, 48, 320, 480)), (64.4, 47.6, 322, 476), atol=1e-9)


def test_zoom_hand_computed():
    view = View.whole(224, 224, LIMITS).zoom((56, 28, 168, 84))
    assert view.region_original == (56, 28, 168, 84) and view.size_view == (112, 56)
    # crop of 112 x 56 shown at its own size: original (60, 30) is pixel (4, 2); turned once it is (2, 112 - 1 - 4)
    np.testing.assert_allclose(view.to_view(np.array([[60, 30]])), [[4, 2]], atol=1e-9)
    np.testing.assert_allclose(view.rotate(1).to_view(np.array([[60, 30]])), [[2, 107]], atol=1e-9)
    # inside the turned view, a box around that pixel leads back to it
    assert view.rotate(1).zoom((0, 72, 40, 112)).region_original == (56, 28, 96, 68)


def test_zoom_guards():
    view = View.whole(448, 448, LIMITS)
    assert view.zoom((10, 10, 10, 200)).reason == "empty_box"
    assert view.zoom((500, 500, 600, 600)).reason == "empty_box"
    assert view.zoom((10, 10, 10 + MIN_ZOOM_SIDE - 1, 200)).reason == "zoom_too_small"
    assert view.zoom((0, 0, 448, 20)).reason == "zoom_too_thin"
    assert isinstance(view.zoom((10, 10, 10 + MIN_ZOOM_SIDE, 200)), View)
    assert view.zoom((300, 200, 100, 0)) == view.zoom((100, 0, 300, 200))  # corners in any order


def test_zoom_under_limits_that_fit_no_shape_is_refused():
    tight = PixelLimits(28, 84 * 84, 84 * 84)  # 9 cells exactly: no 5:2 picture has that many
    view = View.whole(100, 100, tight)
    assert view.size_view == (84, 84)
    assert view.zoom((0, 0, 84, 30)).reason == "zoom_too_thin"
    refused("fits no size", View.whole, 36, 100, tight)


def test_clipping_counts_coordinates():
    view = View.whole(112, 140, LIMITS)
    points, clipped = view.clip_points(np.array([[-1, 5], [140, 112], [139, 111], [0, 0]]))
    assert clipped == 3 and points.tolist() == [[0, 5], [139, 111], [139, 111], [0, 0]]
    assert view.clip_box((0, 0, 140, 112)) == ((0, 0, 140, 112), 0)
    assert view.clip_box((150, -3, 20, 40)) == ((20, 0, 140, 40), 2)
