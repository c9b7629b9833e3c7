"""ReasonSeg: LISA's drawing rules by hand, ignored regions, cp1252, and one clear message per bad file."""

import numpy as np
import pytest
from PIL import Image

from rsagent_jax.data.sets.reasonseg import draw_shapes, load_reasonseg
from tests.data.sets.small_sets import square, write_image
from tests.data.sets.small_sets import write_reasonseg as write
from tests.refusals import refused


def shape(kind, *points):
    return {"label": "target", "shape_type": kind, "points": [list(p) for p in points]}


def only(tmp_path):
    (sample,) = load_reasonseg(tmp_path)
    return sample


def drawn(tmp_path, *shapes):
    write(tmp_path / "val", "a", *shapes)
    return only(tmp_path).gt_mask


def test_a_polygon_is_filled_with_its_outline_after_truncation(tmp_path):
    # corners 2.9 -> 2 and 6.9 -> 6; outline included: 5 x 5 pixels
    mask = drawn(tmp_path, square(2.9, 2.9, 4))
    assert mask.sum() == 25 and mask[2:7, 2:7].all()


def test_labelmes_rectangles_and_circles_are_drawn_as_such(tmp_path):
    mask = drawn(tmp_path, shape("rectangle", (4, 5), (20, 12)))
    assert mask.sum() == 17 * 8 and mask[5:13, 4:21].all()
    # from any corner to the opposite one
    assert (drawn(tmp_path, shape("rectangle", (20, 12), (4, 5))) == mask).all()
    mask = drawn(tmp_path, shape("circle", (20, 15), (24, 15)))
    # lattice points within 4 of the origin: Gauss's circle problem, N(4) = 49
    assert mask.sum() == 49 and mask[15, 16:25].all() and mask[11:20, 20].all() and not mask[12, 17]


def test_small_regions_lie_on_large_ones_and_ignored_ones_are_neither(tmp_path):
    # target 21 x 21, in it an ignored 11 x 11, in that a target of 5 x 5; drawn in this order whatever the file's
    shapes = [square(12, 12, 4), square(0, 0, 20), square(10, 10, 10, "Ignore this"), square(30, 0, 5, "flag")]
    for order in [(0, 1, 2, 3), (2, 3, 0, 1), (3, 2, 1, 0)]:
        write(tmp_path / "val", "a", *(shapes[k] for k in order))
        sample = only(tmp_path)
        assert sample.gt_mask.sum() == 21 * 21 - 11 * 11 + 5 * 5
        assert sample.ignore_mask.sum() == 11 * 11 - 5 * 5
        assert not (sample.gt_mask & sample.ignore_mask).any() and sample.gt_mask[14, 14] and sample.ignore_mask[11, 11]
    assert np.array_equal(draw_shapes([], 2, 3, "x"), np.zeros((2, 3)))


def test_texts_ids_and_layouts(tmp_path):
    write(tmp_path / "reason_seg/ReasonSeg/train", "b", square(1, 1, 3), text=[" one ", "two", "three"])
    write(tmp_path / "reason_seg/ReasonSeg/train", "a")
    first, every = (load_reasonseg(tmp_path, "train", texts) for texts in ("first", "all"))
    assert first.ids == ["reasonseg/train/a/0", "reasonseg/train/b/0"]
    assert every.ids == ["reasonseg/train/a/0", *(f"reasonseg/train/b/{i}" for i in range(3))]
    assert [s.query for s in every][1:] == ["one", "two", "three"]
    assert not first[0].gt_mask.any()  # two files of the real test split have no polygon
    assert len(load_reasonseg(tmp_path, "train", "all", limit=2)) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_cp1252_is_read_where_the_file_is_not_utf8(tmp_path, encoding):
    write(tmp_path / "val", "a", text=["the café’s sign"], encoding=encoding)
    assert only(tmp_path).query == "the café’s sign"


def test_pictures_are_turned_upright_as_opencv_does(tmp_path):
    write(tmp_path / "val", "a", square(2, 20, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "val/a.jpg", exif=exif)
    assert only(tmp_path).image.shape == (40, 30, 3) and only(tmp_path).gt_mask.sum() == 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "one"}, r"text is not a list of sentences, .*"),
        ({"text": ["  "]}, "text is not a list of sentences: number 1 is blank"),
        ({"shapes": [{"label": "target"}]}, "a shape has no points"),
        ({"shapes": [{"points": []}]}, "shapes is not a list of labelled polygons"),
        ({"is_sentence": "yes"}, "is_sentence is not true or false"),
    ],
)
def test_bad_annotations_are_named_when_opened(tmp_path, change, message):
    write(tmp_path / "val", "a", **change)
    refused(rf"a\.json: {message}; this is not a file of ReasonSeg", load_reasonseg, tmp_path)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        *((shape("polygon") | {"points": points}, "is malformed") for points in (
            [[1, 1, 1]], [[float("nan"), 1]], "abc", [], [[1e9, 1]], [1, 2])),
        (shape("rectangle", (4, 5), (8, 9), (7, 7)), "is a rectangle of 3 points; what is drawn: a polygon, a rect"),
        (shape("circle", (4, 5)), "is a circle of 1 points"),
        (shape("mask", (4, 5), (20, 12)), "is a mask of 2 points"),
        (shape("polygon", (100, 100), (120, 100), (120, 120)), "covers no pixel of the 40 x 30 picture"),
        (shape("polygon", (0.1, 0.1), (0.5, 0.1), (0.5, 0.9)), "is malformed: .*shares of the sides.*multiply by"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_drawn_are_named_when_read(tmp_path, bad, says):
    write(tmp_path / "val", "a", bad)
    samples = load_reasonseg(tmp_path)
    refused(rf"a\.json, shape 0 \(target\) {says}", samples.__getitem__, 0)


def test_missing_and_foreign_files_are_named(tmp_path):
    for stem in "ab":
        write(tmp_path / "val", stem, square(1, 1, 3))
    (tmp_path / "val/a.jpg").unlink()
    refused(r"1 files lack their other half, such as \['a'\]", load_reasonseg, tmp_path)
    refused(r"no ReasonSeg split 'test' under .* There are: val", load_reasonseg, tmp_path, "test")
    write_image(tmp_path / "val/a.jpg")
    for damaged, says in (b'{"text": "\x81', "neither UTF-8 nor cp1252"), ('{"text"'.encode("utf-16"), "UTF-16"):
        (tmp_path / "val/a.json").write_bytes(damaged)
        refused(rf"a\.json .*{says}.*; unpack the data set again", load_reasonseg, tmp_path)
    (tmp_path / "val/a.json").unlink()
    (tmp_path / "val/a.jpg").unlink()
    (tmp_path / "val/._b.json").write_bytes(b"\0\5\x16\x07")  # what macOS's Finder leaves behind is no annotation
    assert only(tmp_path).gt_mask.sum() == 16
