"""Copies between a bucket and this machine: for what only reads, or only writes, local files."""

import contextlib
import fnmatch
import hashlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence

from rsagent_jax.runtime.paths import file_system, files_below, is_remote, object_version, writing
from rsagent_jax.types import DataError

KEPT_DAYS, PARTIAL_DAYS = 30, 2  # of a copy on this machine since its last use; of one that a kill cut short


def fetch_folder(path: pathlib.Path, patterns: Sequence[str] = ("*",)) -> pathlib.Path:
    """The folder itself; of a bucket, one on this machine with those of its files that match, fetched once a host.

    For what only reads local files: safetensors, tokenizers, ArrayRecord. A copy that nobody has asked for in KEPT_DAYS
    is removed by the next fetch. DataError where there is no room.
    """
    if not is_remote(path):
        return path
    entries = [e for e in file_system().ls(str(path), detail=True) if e["type"] == "file"]
    versions = {e["name"].rpartition("/")[2]: object_version(e) for e in entries}
    versions = {n: v for n, v in sorted(versions.items()) if any(fnmatch.fnmatch(n, p) for p in patterns)}
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rsagent_jax" / "buckets"
    folder = cache / hashlib.sha256(f"{path} {versions}".encode()).hexdigest()[:24]
    if folder.is_dir():
        os.utime(folder)
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            days = (time.time() - old.stat().st_mtime) / 86400
            if days > (PARTIAL_DAYS if old.name.startswith(".partial-") else KEPT_DAYS):
                shutil.rmtree(old, ignore_errors=True)
    needed = sum(e["size"] for e in entries if e["name"].rpartition("/")[2] in versions)
    if (free := shutil.disk_usage(cache).free) < needed:
        raise DataError(
            f"{path}: its files take {needed / 1e9:.1f} GB, {cache} has {free / 1e9:.1f} GB of free space; make room,"
            " or set XDG_CACHE_HOME"
        )
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as partial:
        whole = pathlib.Path(partial) / "whole"
        whole.mkdir()
        file_system().get([f"{path}/{name}" for name in versions], [str(whole / name) for name in versions])
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(whole, folder)
    return folder


@contextlib.contextmanager
def local_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`path` itself, or a place on this machine, not made yet, whose files are put there at the end: for what only
    writes local files."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield (here := pathlib.Path(folder) / path.name)
        put_files(here, path)


def put_files(folder: pathlib.Path, path: pathlib.Path) -> None:
    """What is below a folder of this machine, into a bucket."""
    with writing(path):
        for file in sorted(files_below(folder)):
            file_system().put_file(str(file), f"{path}/{file.relative_to(folder)}")
