"""What stands in a file's place when a download went wrong: a Git-LFS pointer, or a web page."""

from __future__ import annotations

LFS = b"version https://git-lfs"


def impostor(head: bytes) -> str | None:
    """What a file that starts with `head` is instead of itself, with the remedy: "is a Git-LFS pointer, …".

    None for a file that is neither pointer nor page; then what the reader itself found wrong is to be said.
    """
    head = head[:256].removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(LFS):
        return "is a Git-LFS pointer, not the file itself; run `git lfs pull` in the repository it comes from"
    if head[:1] == b"<":  # <!doctype html>, <html>, or the <?xml> of a bucket's error
        return "is a web page (a login or an error that a server answered with), not the file; download it again"
    return None
