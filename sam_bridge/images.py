"""Any picture -> u8[h, w, 3] RGB, the one form that crosses the bridge. Done once, before the first call.

| input | becomes |
|---|---|
| grey [h, w] or [h, w, 1] | three equal channels |
| grey and alpha [h, w, 2], RGBA [h, w, 4] | blended with white |
| bool | 0 and 255 |
| 16 bits | v / 257, rounded |
| files: EXIF orientation | applied, so a mask lies as the photograph is seen; palette and CMYK to RGB |

Floating point is refused: its range is anybody's guess. COCO's own files keep their stored orientation, because its
annotations are drawn on the pixels as stored (rsagent_jax/data/refcoco.py).
"""

from __future__ import annotations

import pathlib

import numpy as np


class ImageError(ValueError):
    """The picture cannot be used. The message says why."""


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


def read(path: str | pathlib.Path) -> np.ndarray:
    """A picture file -> u8[h, w, 3] RGB, upright. FileNotFoundError, or ImageError naming the file."""
    import PIL.Image
    import PIL.ImageOps

    try:
        with PIL.Image.open(path) as picture:
            picture = PIL.ImageOps.exif_transpose(picture)
            if picture.mode == "F":
                raise ImageError(f"{path} holds floating-point values; save it as an 8-bit PNG first")
            if picture.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
                return to_rgb(np.asarray(picture).clip(0, 65535).astype(np.uint16))
            if picture.has_transparency_data:
                return to_rgb(np.asarray(picture.convert("RGBA")))
            return np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{path} is not a picture that can be read (JPEG, PNG, WebP, …), or is cut short") from None
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read as a picture: {getattr(error, 'strerror', None) or error}") from None
