"""Pictures larger than a segmenter looks at: the same mask with and without the bridge, in the picture's own size."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_bridge import shrink
from sam_bridge.local import LocalSegmenter, image_hash
from sam_bridge.types import SegmentRequest, check_request
from tests.sam_bridge.fakes import BOX, failure, iou


@pytest.fixture
def small_limits(monkeypatch):
    """Pictures above 64 x 64 pixels are shrunk to 48 x 48."""
    monkeypatch.setattr(shrink, "LARGEST_AS_IT_IS", 64 * 64)
    monkeypatch.setattr(shrink, "SHRUNK", 48 * 48)


def test_a_photograph_above_the_limit_of_the_wire_has_its_object_found_at_its_own_size(local, serve, connect):
    """24 megapixels are 72 MB, which no message may hold."""
    truth = np.zeros((4000, 6000), bool)
    truth[1001:3003, 1507:4111] = True
    image = np.where(truth[..., None], np.uint8([220, 40, 30]), np.uint8([40, 90, 160]))
    click = SegmentRequest(points=((2500.0, 2000.0),), labels=(1,))
    client = connect(serve(LocalSegmenter(local.backend)).address)
    ours, theirs = local.segment(image, click), client.segment(image, click)
    assert ours.mask.shape == (4000, 6000) and ours.mask.dtype == bool
    assert iou(ours.mask, truth) > 0.99
    np.testing.assert_array_equal(theirs.mask, ours.mask)
    assert theirs.logits_id == ours.logits_id and client.counters()["puts"] == 1


def test_client_and_local_agree_on_boxes_clicks_and_refined_masks_forgotten_ones_too(
    small_limits, local, serve, connect, image
):
    own = LocalSegmenter(local.backend)
    client = connect(serve(local).address)
    key = image_hash(shrink.shrink(image))
    for request in (BOX, SegmentRequest(points=((40.2, 50.9), (128.0, 96.0)), labels=(1, 0))):
        ours, theirs = own.segment(image, request), client.segment(image, request)
        click = SegmentRequest(points=((60.0, 20.0),), labels=(0,), refine_logits_id=ours.logits_id)
        for one, other in ((ours, theirs), (own.segment(image, click), client.segment(image, click))):
            np.testing.assert_array_equal(one.mask, other.mask)
            assert one.mask.shape == image.shape[:2] and 0 < one.mask.sum() < one.mask.size
            assert (one.score, one.logits_id) == (other.score, other.logits_id)
        assert own.logits.get(f"{key}/{ours.logits_id}") is not None  # the hash is of what is sent
    local.logits._kept.clear()
    np.testing.assert_array_equal(client.segment(image, click).mask, own.segment(image, click).mask)
    assert client.counters()["puts"] == client.counters()["remade"] == 1


def test_candidates_come_back_in_the_pictures_size(small_limits, fake, serve, connect, image):
    backend = fake()
    request = SegmentRequest(box=(0.0, 0.0, 64.0, 96.0), candidates=True)  # the left half
    reply = connect(serve(LocalSegmenter(backend)).address).segment(image, request)
    assert backend.seen == (42, 55, 3)  # 96 x 128 in 48 * 48 pixels: 41.57 x 55.43
    assert [m.shape for m in reply.candidates] == [(96, 128)] * 2
    # 27 of 55 columns are the left half: its edge lies at 27 * 128 / 55 = 62.8
    assert [np.flatnonzero(m.any(axis=0))[[0, -1]].tolist() for m in reply.candidates] == [[0, 62], [63, 127]]


def test_a_picture_up_to_the_limit_is_not_touched(image):
    assert shrink.shrink(image) is image
    edge = np.broadcast_to(np.uint8(7), (4096, 4096, 3))
    assert shrink.shrink(edge) is edge
    seen = []
    request = SegmentRequest(box=(0.0, 0.0, 9.0, 9.0))
    shrink.ask_shrunk(image, request, lambda *asked: seen.append(asked))
    assert seen[0][0] is image and seen[0][1] is request


def test_errors_speak_of_the_callers_picture(local, connect):
    large = np.broadcast_to(np.uint8(0), (5000, 4000, 3))
    client = connect("127.0.0.1:1")  # nobody is asked
    for segmenter in (local, client):
        for image, request, kind, words in (
            (large, SegmentRequest(points=((4001.0, 5.0),), labels=(1,)), "invalid_prompt", "4000 x 5000 pixels"),
            (large, SegmentRequest(box=(4000.0, 5.0, 4010.0, 9.0)), "invalid_prompt", "4000 x 5000 pixels"),
            (
                np.broadcast_to(np.uint8(0), (30000, 40000, 3)),
                SegmentRequest(box=(0.0, 0.0, 9.0, 9.0)),
                "invalid_image",
                "40000 x 30000 pixels is above the limit of 268 megapixels",
            ),
        ):
            error = failure(segmenter.segment, image, request)
            assert error.kind == kind and words in error.detail


sides = st.integers(1, 1 << 15)


@given(sides, sides, sides, sides, st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_places_scale_with_the_picture_and_stay_inside(h, w, small_h, small_w, at):
    px, py = at[0] * w, at[1] * h
    (x0, x1), (y0, y1) = sorted(v * w for v in at[2:4]), sorted(v * h for v in at[4:])
    request = SegmentRequest((x0, y0, x1, y1), ((px, py), (w, h), (0, 0)), (1, 0, 0), "abc", True)
    scaled = shrink.scale(request, (h, w), (small_h, small_w))
    assert scaled.points[1:] == ((small_w, small_h), (0, 0))  # corners to the very corners
    wanted = np.array([(px, py), (x0, y0), (x1, y1)]) * (small_w / w, small_h / h)
    np.testing.assert_allclose([scaled.points[0], scaled.box[:2], scaled.box[2:]], wanted, rtol=1e-12, atol=1e-300)
    check_request(dataclasses.replace(scaled, box=None), small_h, small_w)  # inside whenever the original was
    assert dataclasses.replace(scaled, box=request.box, points=request.points) == request


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.data())
def test_enlarging_moves_no_edge(h, w, factor, data):
    y0, y1 = sorted(data.draw(st.tuples(st.integers(0, h), st.integers(0, h))))
    mask, wanted = np.zeros((h, w), bool), np.zeros((h * factor, w * factor), bool)
    mask[y0:y1], wanted[y0 * factor : y1 * factor] = True, True
    np.testing.assert_array_equal(shrink.enlarge(mask, h * factor, w * factor), wanted)
    np.testing.assert_array_equal(shrink.enlarge(mask.T, w * factor, h * factor), wanted.T)
