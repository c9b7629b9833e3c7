"""Every kind of picture becomes u8[h, w, 3] in the one way that the table in images.py says."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from sam_bridge import images


def test_each_row_of_the_table_by_hand():
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert images.to_rgb(rgb) is rgb
    grey = np.array([[0, 7], [255, 128]], np.uint8)
    for form in (grey, grey[..., None]):
        np.testing.assert_array_equal(images.to_rgb(form), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(images.to_rgb(grey > 100)[..., 0], [[0, 0], [255, 255]])
    # 128 and 129 lie around half of 257; 65535 is 255 * 257.
    sixteen = np.array([[0, 128, 129, 257, 65535]], np.uint16)
    np.testing.assert_array_equal(images.to_rgb(sixteen)[0, :, 0], [0, 0, 1, 1, 255])
    # Alpha 0 is white, 255 the colour, 51 (a fifth) of 100 is 0.2 * 100 + 0.8 * 255 = 224.
    rgba = np.array([[[9, 8, 7, 0], [9, 8, 7, 255], [100, 100, 100, 51]]], np.uint8)
    np.testing.assert_array_equal(images.to_rgb(rgba), [[[255] * 3, [9, 8, 7], [224] * 3]])
    np.testing.assert_array_equal(images.to_rgb(rgba[..., 2:])[0, :, 0], [255, 7, 224])


def test_sixteen_bits_are_rounded_as_a_division_would():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(images.to_rgb(values)[..., 0], np.round(values / 257.0))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((4, 4)), "known range"),
        (np.zeros(4, np.uint8), r"not uint8\[4\]"),
        (np.zeros((2, 2, 5), np.uint8), "1 to 4 channels"),
        ("picture.png", "not str"),
    ],
)
def test_what_has_no_one_reading_is_refused(bad, says):
    with pytest.raises(images.ImageError, match=says):
        images.to_rgb(bad)


def test_files(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(rgb)
    for name, saved in (("rgb", picture), ("palette", picture.quantize(4)), ("grey", picture.convert("L"))):
        saved.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(images.read(tmp_path / f"{name}.png"), np.asarray(saved.convert("RGB")))
    deep = rng.integers(0, 65536, (5, 7), dtype=np.uint16)
    PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(images.read(tmp_path / "deep.png")[..., 0], np.round(deep / 257.0))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned a quarter clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(images.read(tmp_path / "turned.png"), np.rot90(rgb, -1))
    (tmp_path / "broken.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("broken", "text"):
        with pytest.raises(images.ImageError, match=f"{name}.png"):
            images.read(tmp_path / f"{name}.png")
    with pytest.raises(FileNotFoundError):
        images.read(tmp_path / "nothing.png")
