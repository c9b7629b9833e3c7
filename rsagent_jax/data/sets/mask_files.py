"""Mask files -> which pixels are the object. Read exactly, or refused with the remedy: nothing is thresholded by guess.

| the file | the object |
|---|---|
| grey of any depth, 1 bit, float | what is not 0; there is one other value |
| JPEG and what else may lose detail (WebP, AVIF, JPEG 2000) | grey, black and white within a quarter: what is white |
| palette | by index: 0 is not the object, one other is; 255 beside another is VOC's border: neither right nor wrong |
| colour | what is not black; there is one other colour |
| alpha that varies | where it is opaque, unless the colours below are a mask that says something else |

Several objects in one file, soft edges, several pages and a palette whose index 0 is not the black one are refused.
Like pictures, masks are turned upright by their EXIF orientation.
"""

import pathlib

import numpy as np
import PIL.Image

from rsagent_jax.runtime.image_files import image_source, mending
from rsagent_jax.types import DataError
from sam_bridge import images

OBJECT, IGNORED = 1, 255  # as in data/sets/reasonseg.py; 0 is neither
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
_BORDER = 255  # index of a palette
FEW_COLOURS = 16  # of a drawing; a cut-out of a photograph has more


def read_mask(source: str | pathlib.Path | bytes, where: str, remedy: str) -> np.ndarray:
    """A mask file or its bytes -> u8[h, w] of OBJECT, IGNORED and 0. `where` names it in the DataError."""
    with mending(where, remedy):
        source = source if isinstance(source, bytes) else image_source(source)
        image = images.load(source, where, upright=True, exact=True)
    try:
        return _labels(image)
    except ValueError as error:
        raise DataError(f"{where} {error}; {remedy}") from None


def _labels(image: PIL.Image.Image) -> np.ndarray:
    if image.mode == "P":
        return _by_index(image)
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if (alpha != alpha.flat[0]).any() or not alpha.flat[0]:
            return _by_alpha(image, alpha)
    if image.mode == "PA":
        return _by_index(image)
    return _one_level(_levels(image), _is_lossy(image)).astype(np.uint8) * OBJECT


def _levels(image: PIL.Image.Image) -> np.ndarray:
    """One number a pixel, [h, w]: grey as it is; of colours, their place in 24 bits, so that black is 0."""
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode in ("LA", "La"):
        return np.asarray(image)[..., 0]
    colours = np.asarray(image.convert("RGB"))
    if (colours == colours[..., :1]).all():
        return colours[..., 0]
    if _is_lossy(image):
        if np.ptp(colours, axis=2).max() < 32:
            return colours.max(axis=2)
        raise ValueError("holds colours that its compression blurs; save the mask in black and white, as PNG")
    return colours.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def _one_level(levels: np.ndarray, lossy: bool) -> np.ndarray:
    """bool[h, w]: what is not 0. ValueError unless it is all of one level."""
    if lossy:  # of 8 bits, but for JPEG 2000
        white = levels >= 192
        if levels.dtype != np.uint8 or (levels[~white] >= 64).any() or (levels.any() and not white.any()):
            raise ValueError("holds grey levels that its compression blurs; save the mask in black and white, as PNG")
        return white
    found = levels != 0
    values = levels[found]
    if (values.size and (values != values[0]).any()) or (values < 0).any():
        some = np.unique(values)
        raise ValueError(
            f"holds {len(some)} levels or colours beside black, such as {', '.join(f'{v:g}' for v in some[:4])}: a mask"
            " is 0 where the object is not and one other value where it is; save one object alone, without soft edges"
            " (such as v > 127)"
        )
    return found


def _by_index(image: PIL.Image.Image) -> np.ndarray:
    index = np.asarray(image.getchannel("P") if image.mode == "PA" else image)
    used = np.flatnonzero(np.bincount(index.ravel(), minlength=256))
    if clear := _transparent(image, used):
        if 0 in used and 0 not in clear:
            raise ValueError(
                f"has index {min(clear)} for what is transparent and index 0 beside it: which of them is the object?"
                " Save the mask in grey"
            )
        index = np.where(np.isin(index, sorted(clear)), 0, index)
        used = np.flatnonzero(np.bincount(index.ravel(), minlength=256))
    palette = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    if used.tolist() == [0] and len(palette) and palette[0].any() and not clear:
        raise ValueError(
            "has index 0 of its palette everywhere, whose colour is not black: is all of it the object, or nothing?"
            " Save the mask in grey"
        )
    black = [i for i in used if i < len(palette) and not palette[i].any()]
    if black and palette[0].any() and not clear:
        raise ValueError(
            f"has a palette in which index 0 is not black, but index {black[0]} is: which of them is the object? By"
            " index the latter, by colour the former; save the mask in grey"
        )
    border = (index == _BORDER) & bool(set(used.tolist()) - {0, _BORDER})  # alone, it is the object
    found = _one_level(np.where(border, 0, index), lossy=False)
    return np.where(border, IGNORED, found * OBJECT).astype(np.uint8)


def _transparent(image: PIL.Image.Image, used: np.ndarray) -> set[int]:
    """Indices of a palette that show nothing, of those in use."""
    said = image.info.get("transparency")
    clear = [said] if isinstance(said, int) else [i for i, alpha in enumerate(said or b"") if not alpha]
    return set(clear) & set(used.tolist())


def _by_alpha(image: PIL.Image.Image, alpha: np.ndarray) -> np.ndarray:
    """Of a cut-out: what is opaque. Colours that are all one, or many (a photograph), say nothing; a mask in them must
    agree."""
    opaque = _one_level(alpha, lossy=False)
    try:
        colours = _one_level(_levels(image), _is_lossy(image))
    except ValueError:
        shown = np.asarray(image.convert("RGB"))[opaque]
        if len(np.unique(shown, axis=0)) <= min(FEW_COLOURS, len(shown) // 4):  # several objects, not a photograph
            raise
        return opaque.astype(np.uint8) * OBJECT
    if colours.any() and not colours.all() and (colours != opaque).any():
        raise ValueError("holds one mask in its colours and another in its transparency; save it without the latter")
    return opaque.astype(np.uint8) * OBJECT


def _is_lossy(image: PIL.Image.Image) -> bool:
    return image.format in _LOSSY or image.info.get("compression") == "jpeg"
