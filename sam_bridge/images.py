"""Any picture -> u8[h, w, 3] RGB, the one form that crosses the bridge. The only place that decodes a picture.

| input | becomes |
|---|---|
| grey [h, w] or [h, w, 1] | three equal channels |
| 1 bit, bool | 0 and 255 |
| 16 bits | v / 257, rounded; colour files of 16 bits: their high bytes |
| 32-bit grey, files only | as 16 bits; a value outside 0 … 65535 is refused |
| floating point | refused: its range is anybody's guess |
| grey or colour with alpha, a transparent colour | blended with white |
| palette, CMYK, YCbCr | their RGB |
| several frames or pages | the first |
| EXIF orientation | applied (`upright`), so a mask lies as the photograph is seen |

A file may have MAX_PIXELS (types.py), whatever Pillow's own limit is. COCO's own files keep their stored orientation,
because its annotations are drawn on the pixels as stored (rsagent_jax/data/sets/refcoco.py). Thumbnails in a camera's
raw file (DNG, NEF, …) are not taken for the photograph.
"""

from __future__ import annotations

import io
import pathlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from sam_bridge.file_kinds import HEAD, kind_of
from sam_bridge.types import MAX_PIXELS

if TYPE_CHECKING:
    import PIL.Image

_ORIENTATION, _SUBFILE_TYPE = 0x0112, 254  # tags of EXIF and TIFF
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


class ImageError(ValueError):
    """The picture cannot be used. The message says why."""


class TooLarge(ImageError):
    """It has more than MAX_PIXELS, and was not decoded."""


def to_rgb(image: np.ndarray) -> np.ndarray:
    """See the table above. Returns the array itself when it is u8[h, w, 3] already."""
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        what = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"a picture is [h, w] or [h, w, channels], not {what}")
    if image.dtype == bool:
        image = image.astype(np.uint8) * np.uint8(255)
    elif image.dtype == np.uint16:
        image = ((image.astype(np.uint32) * 2 + 257) // 514).astype(np.uint8)  # v / 257, rounded, in whole numbers
    elif image.dtype != np.uint8:
        raise ImageError(f"a picture of {image.dtype} has no known range: give 8 or 16 bits")
    if image.ndim == 2:
        image = image[..., None]
    channels = image.shape[2]
    if channels not in (1, 2, 3, 4):
        raise ImageError(f"a picture has 1 to 4 channels, not {channels}")
    if channels in (2, 4):
        alpha = image[..., -1:].astype(np.uint32)
        image = ((image[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def read(source: str | pathlib.Path | bytes, where: str = "", upright: bool = True) -> np.ndarray:
    """A picture file, or its bytes -> u8[h, w, 3] RGB. FileNotFoundError, or ImageError that names it (`where`)."""
    return _named(where or str(source), _rgb, load(source, where, upright))


def stored_size(path: str | pathlib.Path) -> tuple[int, int]:
    """(w, h) of a picture file by its head, nothing decoded; (0, 0) of what is no picture, which `read` explains."""
    try:
        with _open(path) as image:
            return image.size
    except Exception:  # noqa: BLE001 damaged bytes raise nearly anything
        return 0, 0


def from_pillow(image: PIL.Image.Image, upright: bool = True) -> np.ndarray:
    """An opened picture -> u8[h, w, 3] RGB. ImageError as of a file."""
    return _named("the picture", lambda image: _rgb(_turned(image) if upright else image), image)


def load(
    source: str | pathlib.Path | bytes, where: str = "", upright: bool = True, exact: bool = False
) -> PIL.Image.Image:
    """A picture file, or its bytes, as a PIL.Image.Image in its own mode, pixels decoded; for readers of masks.

    exact: refuse what would be read in part: several frames, colour of 16 bits. Raises as `read` does.
    """
    where = where or str(source)
    if not isinstance(source, bytes):
        try:
            source = pathlib.Path(source).read_bytes()
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise ImageError(f"{where} cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    try:
        return _named(where, lambda data: _load(data, upright, exact), source)
    except ImageError as error:
        kind = kind_of(source[:HEAD])
        raise (ImageError(f"{where} is not a readable picture: {kind}") if kind else error) from None


_OPENING = threading.Lock()


def _open(source: str | pathlib.Path | io.BytesIO) -> PIL.Image.Image:
    """By its head alone. Pillow would warn at a limit of its own, and refuse at twice that."""
    import PIL.Image

    with _OPENING:
        limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            return PIL.Image.open(source)
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


def _load(data: bytes, upright: bool, exact: bool) -> PIL.Image.Image:
    image = _open(io.BytesIO(data))
    w, h = image.size
    if w * h > MAX_PIXELS:
        raise TooLarge(f"{w} x {h} pixels are above the limit of {MAX_PIXELS / 1e6:.0f} megapixels: shrink it")
    if image.format == "TIFF" and (image.tag_v2.get(_SUBFILE_TYPE, 0) & 1 or kind_of(data[:HEAD])):
        raise ImageError("its first picture is a thumbnail, as in a camera's raw file: convert it to JPEG or PNG")
    if exact and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"holds {image.n_frames} frames or pages; save one alone")
    if exact and any(";16" in str(tile[3]) for tile in image.tile) and not image.mode.startswith("I"):
        raise ImageError("holds colour or alpha of 16 bits; save it with 8 bits, or as grey of 16")
    image.load()
    return _turned(image) if upright else image


def _named(where: str, step, argument):
    """`step(argument)`; whatever a decoder raises becomes an ImageError that names the picture."""
    import PIL
    import PIL.Image

    try:
        return step(argument)
    except ImageError as error:
        raise type(error)(f"{where}: {error}") from None
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{where} is not a readable picture (JPEG, PNG, WebP, TIFF, …), or is cut short") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 damaged bytes raise nearly anything: struct.error, SyntaxError, zlib.error
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{where} is not a readable picture ({why})") from None


def _turned(image: PIL.Image.Image) -> PIL.Image.Image:
    """By its EXIF orientation, as every viewer shows it."""
    from PIL.Image import Transpose

    turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    if turn is None:
        return image
    turned = image.transpose(Transpose[turn])
    turned.format = image.format
    return turned


def _rgb(image: PIL.Image.Image) -> np.ndarray:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "F":
        raise ImageError("holds floating-point values, which have no known range; save it as an 8-bit PNG first")
    if image.mode.startswith("I"):  # 16 or 32 bits of grey, which convert("RGB") would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("32-bit grey outside 0 … 65535 has no known range: save 8 or 16 bits")
        values = values.astype(np.uint16)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 65535
        return to_rgb(values)
    if image.has_transparency_data:
        return to_rgb(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))
