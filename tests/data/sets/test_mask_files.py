"""Every way to save one mask of 300 pixels: read as 300, or refused with the remedy."""

import io

import numpy as np
import pytest
from PIL import Image

from rsagent_jax.data.sets.folder import load_folder
from rsagent_jax.data.sets.mask_files import read_mask
from tests.data.sets.small_sets import write_lines
from tests.refusals import refused

H, W = 40, 60
OBJECT = np.zeros((H, W), bool)
OBJECT[5:20, 10:30] = True
BORDER = np.zeros((H, W), bool)
BORDER[4:21, 9:31] = True
BORDER &= ~OBJECT
BLANK = np.full((H, W), 255, np.uint8)
ALPHA = OBJECT.astype(np.uint8) * 255
HALF = ALPHA * (np.arange(W) > 20).astype(np.uint8)  # of the object
SOFT = np.where(BORDER, 100, ALPHA).astype(np.uint8)
PHOTO = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
VOC = [0, 0, 0, 128, 0, 0, *[0] * 759, 224, 224, 192]  # a palette


def grey(value, dtype=np.uint8):
    return Image.fromarray((OBJECT * value).astype(dtype))


def coloured(*channels):
    return Image.fromarray(np.dstack(channels))


def palette(index, colours):
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette(colours)
    return image


def labels(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return read_mask(buffer.getvalue(), "m.png", "it is named in line 3")


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (grey(255), "PNG", {}),
        (grey(1), "PNG", {}),
        (Image.fromarray(OBJECT), "PNG", {}),
        (grey(1, np.uint16), "PNG", {}),
        (grey(1000, np.uint16), "PNG", {}),
        (grey(65535, np.uint16), "TIFF", {}),
        (grey(7, np.int32), "TIFF", {}),
        (grey(1, np.float32), "TIFF", {}),
        (grey(0.5, np.float32), "TIFF", {}),
        (grey(255), "JPEG", {"quality": 75}),
        (grey(255), "JPEG", {"quality": 95}),
        (grey(255), "WEBP", {"quality": 80}),
        (grey(255), "GIF", {}),
        (coloured(OBJECT * np.uint8(220), OBJECT * np.uint8(30), OBJECT * np.uint8(9)), "PNG", {}),
        (coloured(BLANK, BLANK, BLANK, ALPHA), "PNG", {}),
        (coloured(PHOTO, ALPHA), "PNG", {}),
        (coloured(PHOTO * 0, ALPHA), "PNG", {}),
        (coloured(ALPHA, ALPHA, ALPHA, ALPHA), "PNG", {}),
        (coloured(ALPHA, ALPHA, ALPHA, BLANK), "PNG", {}),
        (Image.fromarray(np.dstack([BLANK, ALPHA]), "LA"), "PNG", {}),
        (palette(OBJECT, [0] * 768), "PNG", {}),
        (palette(OBJECT, VOC), "PNG", {}),
        (palette(OBJECT * 255, VOC), "PNG", {}),
        (palette(OBJECT, [255, 0, 0] * 256), "PNG", {"transparency": 0}),
    ],
)
def test_what_says_300_is_300(image, kind, options):
    np.testing.assert_array_equal(labels(image, kind, **options), OBJECT.astype(np.uint8))


@pytest.mark.parametrize(
    ("image", "kind", "says"),
    [
        (Image.fromarray(SOFT), "PNG", "2 levels or colours beside black, such as 100, 255.*without soft edges"),
        (Image.fromarray(np.where(OBJECT, 255, 9).astype(np.uint8)), "PNG", "such as 9, 255"),
        (Image.fromarray(SOFT / np.float32(255)), "TIFF", "such as 0.392157, 1"),
        (Image.fromarray(np.where(OBJECT, np.nan, 0).astype(np.float32)), "TIFF", "such as nan"),
        (grey(-1, np.int32), "TIFF", "such as -1"),
        (Image.fromarray(SOFT), "JPEG", "grey levels that its compression blurs.*as PNG"),
        (grey(1), "JPEG", "grey levels that its compression blurs"),
        (coloured(ALPHA, ALPHA * 0, ALPHA * 0), "JPEG", "colours that its compression blurs"),
        (Image.fromarray(PHOTO), "PNG", "levels or colours beside black"),
        (palette(OBJECT, [255, 255, 255, 0, 0, 0]), "PNG", "index 0 is not black, but index 1 is"),
        (
            palette(OBJECT * 0, [255, 255, 255]),
            "PNG",
            "index 0 of its palette everywhere.*all of it the object, or nothing",
        ),
        (palette(OBJECT + 2 * BORDER, VOC), "PNG", "2 levels or colours"),
        (coloured(BLANK, BLANK, BLANK, SOFT), "PNG", "such as 100, 255"),
        (coloured(ALPHA, ALPHA, ALPHA, 255 - ALPHA), "PNG", "one mask in its colours and another"),
        (coloured(ALPHA, HALF, ALPHA * 0, ALPHA), "PNG", "2 levels or colours"),  # a red and a yellow one, cut out
    ],
)
def test_what_says_two_things_is_refused(image, kind, says):
    refused(rf"m\.png.*{says}.*; it is named in line 3", labels, image, kind)


def test_a_transparent_background_of_a_palette_is_index_0_and_changes_nothing_else():
    border = np.where(BORDER, 255, OBJECT)
    np.testing.assert_array_equal(labels(palette(border, VOC), transparency=0), labels(palette(border, VOC)))
    white = [255, 255, 255, 0, 0, 0]  # background white and transparent, object black
    np.testing.assert_array_equal(labels(palette(OBJECT, white), transparency=0), OBJECT)
    np.testing.assert_array_equal(labels(palette(2 - OBJECT, VOC), transparency=2), OBJECT)
    refused("2 levels or colours", labels, palette(OBJECT + 2 * BORDER, VOC), transparency=0)
    refused("index 1 for what is transparent", labels, palette(OBJECT, VOC), transparency=1)


def test_empty_and_full_masks():
    assert not labels(grey(0)).any() and labels(Image.fromarray(BLANK)).all()
    assert not labels(Image.fromarray(np.zeros((H, W, 4), np.uint8))).any()
    assert not labels(grey(0), "JPEG").any() and labels(Image.fromarray(BLANK), "JPEG").all()


def test_vocs_border_is_neither_right_nor_wrong(tmp_path):
    image = palette(np.where(BORDER, 255, OBJECT), VOC)
    found = labels(image)
    assert ((found == 1) == OBJECT).all() and ((found == 255) == BORDER).all()
    image.save(tmp_path / "m.png")
    Image.fromarray(PHOTO).save(tmp_path / "a.png")
    Image.fromarray(np.broadcast_to(np.arange(W) > 50, (H, W))).save(tmp_path / "i.png")
    first, second = load_folder(write_lines(tmp_path, {"mask": "m.png"}, {"mask": "m.png", "ignore": "i.png"}))
    assert (first.gt_mask == OBJECT).all() and (first.ignore_mask == BORDER).all()
    assert second.ignore_mask.sum() == BORDER.sum() + 9 * H


def test_parts_and_broken_files_are_refused():
    refused("holds 2 frames or pages", labels, grey(255), "TIFF", save_all=True, append_images=[grey(0)])
    for damaged in (b"", b"<html>", b"\x89PNG\r\n\x1a\n"):
        says = r"m\.png is not a readable picture.*; it is named in line 3"
        refused(says, read_mask, damaged, "m.png", "it is named in line 3")


def test_masks_are_turned_upright_with_their_pictures():
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(labels(grey(255), exif=exif), np.rot90(OBJECT, -1))
