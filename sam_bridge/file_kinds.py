"""What a file is by its first bytes, for the message about one that is not what it should be."""

import pathlib

HEAD = 512  # bytes that are enough
_CONVERT = "convert it to JPEG or PNG"
_RAW = f"a camera's raw file: {_CONVERT}"
_ARCHIVE = "a packed archive: unpack it"
_BRANDS = {b"avif": "an AVIF picture", b"avis": "an AVIF picture", b"crx ": "a camera's raw file"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC photograph"
)
_STARTS = (
    (0, b"version https://git-lfs", "a Git-LFS pointer, not the file itself: run git lfs pull"),
    (0, b"PK\x03\x04", _ARCHIVE),
    (0, b"\x1f\x8b", _ARCHIVE),
    (257, b"ustar", _ARCHIVE),
    (0, b"%PDF", f"a PDF: {_CONVERT}"),
    (8, b"CR\x02", _RAW),  # Canon, inside a TIFF's header
    (0, b"FUJIFILMCCD-RAW", _RAW),
    (0, b"IIRO", _RAW),  # Olympus
    (0, b"IIRS", _RAW),
    (0, b"MMOR", _RAW),
    (0, b"IIU\x00", _RAW),  # Panasonic
    (0, b"\xff\x0a", f"a JPEG XL picture: {_CONVERT}"),
    (0, b"\x00\x00\x00\x0cJXL ", f"a JPEG XL picture: {_CONVERT}"),
)


def kind_of(head: bytes) -> str | None:
    """What `head`, the first HEAD bytes of a file, say that it is, with the remedy; None where they say nothing."""
    if not head:
        return "an empty file (0 bytes)"
    if head[4:8] == b"ftyp":
        return f"{_BRANDS.get(head[8:12], 'a video')}: {_CONVERT}"
    for offset, magic, kind in _STARTS:
        if head.startswith(magic, offset):
            return kind
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, as a download that failed leaves one"
    if text.startswith((b"<svg", b"<?xml")):
        return f"an SVG drawing or other XML: {_CONVERT}"
    return None


def kind_of_file(path: pathlib.Path) -> str | None:
    """`kind_of` a file; that it cannot be read, where it cannot."""
    try:
        with path.open("rb") as file:
            return kind_of(file.read(HEAD))
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
