"""Every kind of picture becomes u8[h, w, 3] in the one way that the table in images.py says."""

import io
import pathlib
import re
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.runtime import image_files
from rsagent_jax.types import DataError
from sam_bridge import images
from sam_bridge.file_kinds import kind_of

ROOT = pathlib.Path(__file__).parents[2]
RAMP = np.linspace(0, 65535, 60)[None].repeat(40, 0)  # black to white: mean 127.5 of 255
RGB = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_each_row_of_the_table_by_hand():
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert images.to_rgb(rgb) is rgb
    grey = np.array([[0, 7], [255, 128]], np.uint8)
    for form in (grey, grey[..., None]):
        np.testing.assert_array_equal(images.to_rgb(form), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(images.to_rgb(grey > 100)[..., 0], [[0, 0], [255, 255]])
    sixteen = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(images.to_rgb(sixteen)[..., 0], np.round(sixteen / 257.0))
    # Alpha 0 is white, 255 the colour, 51 (a fifth) of 100 is 0.2 * 100 + 0.8 * 255 = 224.
    rgba = np.array([[[9, 8, 7, 0], [9, 8, 7, 255], [100, 100, 100, 51]]], np.uint8)
    np.testing.assert_array_equal(images.to_rgb(rgba), [[[255] * 3, [9, 8, 7], [224] * 3]])
    np.testing.assert_array_equal(images.to_rgb(rgba[..., 2:])[0, :, 0], [255, 7, 224])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((4, 4)), "known range"),
        (np.zeros((4, 4), np.int32), "known range"),
        (np.zeros(4, np.uint8), r"not uint8\[4\]"),
        (np.zeros((2, 2, 5), np.uint8), "1 to 4 channels"),
        ("picture.png", "not str"),
    ],
)
def test_what_has_no_one_reading_is_refused(bad, says):
    with pytest.raises(images.ImageError, match=says):
        images.to_rgb(bad)


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "CMYK"])
def test_files(tmp_path, mode):
    """Other depths, alpha, orientations and damaged bytes: below."""
    image = RGB.quantize(4) if mode == "P" else RGB.convert(mode)
    image.save(tmp_path / "x.tif")
    found = images.read(tmp_path / "x.tif")
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    assert found.flags.writeable
    with pytest.raises(FileNotFoundError):
        images.read(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    ("ramp", "kind"),
    [
        (RAMP.astype(np.uint16), "PNG"),
        (RAMP.astype(np.uint16), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        ((RAMP.astype(np.uint16) / 257).round().astype(np.uint8), "PNG"),
    ],
)
def test_a_ramp_of_any_depth_has_the_mean_of_a_ramp(ramp, kind):
    image = images.read(saved(PIL.Image.fromarray(ramp), kind), "x")
    assert image.min() == 0 and image.max() == 255 and abs(image.mean() - 127.5) < 0.5
    assert (image == np.round(RAMP.astype(np.uint16) / 257)[..., None]).all()


def test_alpha_of_every_kind_is_blended_with_white_and_the_first_frame_counts():
    rgb = np.full((4, 6, 3), 40, np.uint8)
    alpha = np.zeros((4, 6), np.uint8)
    alpha[:, :3] = 255
    wanted = np.where(alpha[..., None] > 0, rgb, 255)
    palette = PIL.Image.fromarray((alpha == 0).astype(np.uint8), "P")
    palette.putpalette([40, 40, 40, 9, 9, 9])
    for data in (
        saved(PIL.Image.fromarray(np.dstack([rgb, alpha]))),
        saved(PIL.Image.fromarray(np.dstack([rgb[..., 0], alpha]), "LA")),
        saved(palette, transparency=1),
        saved(PIL.Image.fromarray(np.where(alpha > 0, 40, 7).astype(np.uint8)), transparency=7),
        saved(PIL.Image.fromarray(np.dstack([rgb, alpha])), "WEBP", lossless=True),
        saved(PIL.Image.fromarray(wanted), save_all=True, append_images=[PIL.Image.fromarray(255 - wanted)]),
    ):
        np.testing.assert_array_equal(images.read(data, "x"), wanted)


def test_every_orientation_is_turned_upright_or_left_as_stored():
    rgb = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    upright = {2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.transpose(1, 0, 2), 6: np.rot90(rgb, -1)}
    upright |= {7: np.rot90(rgb, 2).transpose(1, 0, 2), 8: np.rot90(rgb), 1: rgb, 99: rgb}
    for orientation, wanted in upright.items():
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        data = saved(PIL.Image.fromarray(rgb), exif=exif)
        np.testing.assert_array_equal(images.read(data, "x"), wanted)
        np.testing.assert_array_equal(images.read(data, "x", upright=False), rgb)


WHOLE = {kind: saved(RGB, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_whatever_a_decoder_raises_names_the_file(kind, data):
    damaged = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = images.read(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), "photos/x.jpg")
    except images.ImageError as error:
        assert "photos/x.jpg" in str(error)
    else:
        assert image.dtype == np.uint8 and image.shape[2] == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photograph: convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "a camera's raw file: convert it"),
        (b"II*\0\x10\0\0\0CR\x02\0", "a camera's raw file"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's raw file"),
        (b"\n<!DOCTYPE html><html>404", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer, not the file itself: run git lfs pull"),
        (b"<svg xmlns=''/>", "an SVG drawing"),
    ],
)
def test_what_a_file_is_instead_is_said_by_its_first_bytes(data, says, tmp_path):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(images.ImageError, match=rf"x\.jpg is not a readable picture: {re.escape(says)}"):
        images.read(tmp_path / "x.jpg")
    assert all(kind_of(whole) is None for whole in WHOLE.values())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (saved(PIL.Image.fromarray((RAMP / 65535).astype(np.float32)), "TIFF"), "x: .*floating-point.*as an 8-bit PNG"),
        (saved(RGB, "TIFF", tiffinfo={254: 1}), "x: .*raw file: convert it"),  # its thumbnail is not the photograph
        (ROOT, "x cannot be opened"),
        ("a\0b.jpg", "x cannot be opened"),
    ],
)
def test_what_has_no_picture_to_read_is_refused_with_the_remedy(source, says):
    with pytest.raises(images.ImageError, match=says):
        images.read(source, "x")


def png_of(width: int, height: int) -> bytes:
    """The head of one, with no pixels behind it."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.filterwarnings("error")
def test_a_large_picture_is_measured_by_our_limit_and_not_by_pillows(tmp_path, monkeypatch):
    file = tmp_path / "wide.png"
    file.write_bytes(png_of(20_000, 20_000))
    says = r"wide\.png: 20000 x 20000 pixels are above the limit of 268 megapixels: shrink it$"
    with pytest.raises(images.TooLarge, match=says):
        images.read(file)
    with pytest.raises(DataError, match=says):  # nothing to be put back
        image_files.read_image(file)
    assert images.stored_size(file) == (20_000, 20_000)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)  # of which the 2,000 are four times as many
    assert images.read(saved(RGB), "x").shape == (40, 50, 3) and PIL.Image.MAX_IMAGE_PIXELS == 500


def test_no_other_module_decodes_pictures():
    """But for the tiny world's backgrounds, which are scikit-image's own files."""
    opens = re.compile(r"Image\.open\(|imread\(|imdecode\(")
    sources = [*(ROOT / "rsagent_jax").rglob("*.py"), *(ROOT / "sam_bridge").rglob("*.py"), *ROOT.glob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in sources if opens.search(path.read_text())}
    assert found == {"sam_bridge/images.py", "rsagent_jax/tiny/scenes.py"}
