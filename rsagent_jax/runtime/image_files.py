"""Picture files of samples and records, read by `sam_bridge.images`; what is wrong is a DataError with the remedy."""

import contextlib
import hashlib
import io
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from rsagent_jax.runtime.paths import is_remote, make_directory, open_path, read_bytes, write_whole, writing
from rsagent_jax.types import DataError
from sam_bridge import images
from sam_bridge.frozen import remember


def read_image(
    source: str | pathlib.Path | bytes, remedy: str = "put it back", upright: bool = False, where: str = ""
) -> np.ndarray:
    """A picture file, or its bytes -> u8[h, w, 3] RGB, whatever it holds; see the table in sam_bridge/images.py.

    `upright` applies the EXIF orientation. COCO's annotations are drawn on the pixels as stored, so not there.
    `remedy` is what its owner can do where it is missing or cannot be read; `where` names bytes in the DataError.
    """
    with mending(where or source, remedy):
        return images.read(source if isinstance(source, bytes) else image_source(source), where or str(source), upright)


def image_source(path: str | pathlib.Path) -> str | pathlib.Path | bytes:
    """What sam_bridge.images reads: the path itself, or the bytes of a bucket's object."""
    return read_bytes(open_path(path)) if is_remote(path) else path


@contextlib.contextmanager
def mending(where: str | pathlib.Path, remedy: str) -> Iterator[None]:
    """What `sam_bridge.images` finds wrong with the picture `where` is a DataError that ends with the remedy."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{where} is missing: {remedy}") from None
    except images.TooLarge as error:
        raise DataError(str(error)) from None
    except images.ImageError as error:
        raise DataError(f"{error}; {remedy}") from None


def checksum(image: np.ndarray) -> str:
    """16 hex digits of a picture's pixels."""
    return remember(image, "checksum", lambda image: hashlib.sha256(np.ascontiguousarray(image)).hexdigest()[:16])


def png(image: np.ndarray) -> bytes:
    """u8[h, w, 3] or u8[h, w] as a PNG; little compressed, which is quick."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def keep_image(workdir: pathlib.Path, image: np.ndarray) -> str:
    """The path of a PNG below `workdir` for a picture that is no file of its own, written once. DataError if it cannot
    be written."""
    path = workdir / "pictures" / f"{checksum(image)}-{'x'.join(map(str, image.shape))}.png"
    with writing(path):
        make_directory(path.parent)
        if not path.exists():
            write_whole(path, png(image))
    return str(path)


def image_by_checksum(
    path: str | pathlib.Path, sha256: str, size: tuple[int, int], remedy: str = "put it back"
) -> np.ndarray:
    """The picture of a record: as stored or turned upright, whichever has these pixels and this size (h, w).

    The record's masks and points belong to those pixels alone, so a DataError where neither has them.
    """
    for upright in (False, True):
        image = read_image(path, remedy, upright)
        if image.shape[:2] == tuple(size) and checksum(image) == sha256:
            return image
    raise DataError(
        f"{path} is not the picture that the record was made on: its pixels have changed, or are read by another rule"
        f" than then; {remedy}"
    )
