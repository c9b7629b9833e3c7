"""What a path may be: a place on this machine (pathlib), or gs://bucket/path (etils.epath, without a mount).

This module alone knows the difference. An object of a bucket is written as a whole or not at all, and nothing can be
appended to it, so a file that grows line by line is a folder of parts there:

    metrics.jsonl/part-00000001-00000256      lines 1 to 256, merged
    metrics.jsonl/part-00000257-00000257      a line since then, or those of a second

A part whose numbers another one covers is left over from a merge that was cut short, and does not count.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import pathlib
import re
import shutil
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rsagent_jax.types import DataError, StorageError

os.environ.setdefault("EPATH_USE_TF", "false")  # else etils imports TensorFlow wherever it is installed
# Else gcsfs asks for every bucket's kind, which takes a right of its own, and warns where it has not got it.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
SCHEME = "gs://"
MERGE = 256  # lines in a merged part
SEND_S = 1.0  # that a gathered line waits
# Modules whose errors are the bucket's, and how tensorstore begins its own.
CLIENTS = ("gcsfs", "fsspec", "aiohttp", "google.api_core", "google.auth", "google.cloud")
_TENSORSTORE = re.compile(r"Error (reading|writing|opening|deleting|listing) .*gs://", re.DOTALL)
# How what a hand has to mend begins, in the words of `bucket_problem` and `storage_problem`.
_BY_HAND = re.compile(
    "there is no such bucket|this machine has no right|Permission denied|Operation not permitted|No such file"
    "|File exists|Not a directory|Is a directory|File name too long"
)
_PART = re.compile(r"part-(\d{8})-(\d{8})")


def is_remote(path: str | os.PathLike) -> bool:
    return str(path).startswith(SCHEME)


def open_path(text: str | os.PathLike) -> pathlib.Path:
    """A path of this machine with ~ filled in, or an epath.Path of a bucket. DataError for any other address."""
    text = os.fspath(text)
    if not is_remote(text):
        if "://" in text:
            raise DataError(f"{text} is neither a path of this machine nor gs://bucket/path")
        return pathlib.Path(text).expanduser()
    from etils import epath

    file_system()
    return epath.Path(text)


def absolute(path: pathlib.Path) -> pathlib.Path:
    """epath would put a bucket's below the working directory."""
    return path if is_remote(path) else path.absolute()


def absolute_name(path: str) -> str:
    """The same of a text, without . and .. in it."""
    return path if is_remote(path) else os.path.abspath(path)


@functools.cache
def file_system() -> Any:
    """gcsfs, as epath uses it as well."""
    try:
        import fsspec
        import gcsfs  # noqa: F401 found by fsspec
        import google.cloud.storage  # noqa: F401 by Orbax
    except ImportError as error:
        raise DataError(f"gs:// needs the extra gcs ({error}): pip install -e .[gcs]") from None
    # A listing must show what tensorstore and other hosts wrote.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    for name in ("gcsfs", "absl"):  # they, the latter for Orbax, print what is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs", finalize_on_close=True)


def bucket_used() -> bool:
    """Whether this process has opened any."""
    return file_system.cache_info().currsize > 0


# ------------------------------------------------------------------------------------------------- whole files


def read_bytes(path: pathlib.Path) -> bytes:
    """OSError where it is missing or cannot be read."""
    return file_system().cat_file(str(path)) if is_remote(path) else path.read_bytes()


def file_size(path: pathlib.Path) -> int:
    """Bytes."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def files_below(path: pathlib.Path) -> list[pathlib.Path]:
    """Of all folders below, in no order."""
    if is_remote(path):
        return [open_path(SCHEME + name) for name in file_system().find(str(path))]
    return [file for file in path.rglob("*") if file.is_file()]


@functools.lru_cache(maxsize=64)
def remote_versions(folder: str) -> dict[str, str]:
    """What tells one state of each object of a folder from another, by name; one listing for all of them."""
    return {e["name"].rpartition("/")[2]: object_version(e) for e in file_system().ls(folder, detail=True)}


def listed_checksums(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """(bytes, "crc32c …") of every object below a folder of a bucket, by its name from there; one listing."""
    entries = file_system().find(str(folder), detail=True).values()
    prefix = f"{str(folder).removeprefix(SCHEME)}/"
    return {e["name"].removeprefix(prefix): (e["size"], f"crc32c {e.get('crc32c', '')}") for e in entries}


def object_version(entry: dict[str, Any]) -> str:
    return " ".join(str(entry.get(key, "")) for key in ("size", "md5Hash", "crc32c"))


def write_whole(path: pathlib.Path, content: str | bytes, *, sync: bool = False) -> None:
    """The file as a whole or not at all; text as UTF-8. sync: also where the machine loses its power after it."""
    data = content if isinstance(content, bytes) else content.encode()
    with writing(path):
        if is_remote(path):
            file_system().pipe_file(str(path), data)
            return
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # other shards write it, too
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def create_file(path: pathlib.Path, text: str) -> bool:
    """Writes it where there is none; False where there is one. DataError where it cannot be written."""
    with writing(path):
        try:
            if path.exists():
                return False
            if is_remote(path):  # the service refuses it where another has been faster
                file_system().pipe_file(str(path), text.encode(), mode="create")
            else:
                with path.open("x") as file:
                    try:
                        file.write(text)
                        file.flush()
                    except OSError:
                        remove_file(path)  # or an empty one would stand for it
                        raise
        except FileExistsError:
            return False
    return True


def make_directory(path: pathlib.Path) -> None:
    """Its parents as well. A bucket has no folders."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_file(path: pathlib.Path) -> None:
    """Nothing where there is none."""
    with contextlib.suppress(FileNotFoundError):
        file_system().rm_file(str(path)) if is_remote(path) else path.unlink()


def remove_folder(path: pathlib.Path) -> None:
    """With all that is in it, as far as that can be done."""
    if is_remote(path):
        with contextlib.suppress(FileNotFoundError):
            file_system().rm(str(path), recursive=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def move_folder(path: pathlib.Path, target: pathlib.Path) -> None:
    """In place of what is at `target`; in a bucket object by object."""
    if is_remote(path):
        if target.exists():
            file_system().rm(str(target), recursive=True)
        file_system().mv(str(path), str(target), recursive=True)
        return
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """OSErrors within, and whatever a bucket's client raises, are DataErrors about `path`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if said := bucket_problem(error):
            raise storage_kind(error)(f"{path} cannot be written: {said}") from None
        if not isinstance(error, OSError):
            raise
        if isinstance(error, FileNotFoundError) and not path.parent.exists():
            raise DataError(
                f"{path} cannot be written: there is no {path.parent}, or it has been removed. Put it back as it was,"
                " or give another, and run the same command again"
            ) from None
        mend = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend that"
        raise storage_kind(error)(
            f"{path} cannot be written ({error.strerror or error}). What was written is kept: {mend} and run the same"
            " command again"
        ) from None


def check_writable(path: pathlib.Path) -> None:
    """Makes the directory and writes to it, now and not after an hour of work. OSError or DataError."""
    if is_remote(path):
        with writing(path):
            probe = path / f".probe-{uuid.uuid4().hex[:8]}"
            file_system().pipe_file(str(probe), b"1")
            remove_file(probe)
        return
    make_directory(path)
    with tempfile.TemporaryFile(dir=path):
        pass


# --------------------------------------------------------------------------------------- files that grow by lines


class AppendFile:
    """Appends to a file; in a bucket, a part at a time."""

    def __init__(self, path: pathlib.Path, gather: bool = False):
        """Nothing is touched before the first `add`. `gather`: lines for a bucket may wait for SEND_S, so that a
        request holds nobody up; a kill then loses them."""
        self.path, self.gather = path, gather and is_remote(path)
        self.number: int | None = None  # lines in the bucket
        self.unmerged = 0  # lines in parts that are to be merged
        self.waiting: list[str] = []
        self.lock, self.timer = threading.Lock(), None  # of what waits
        self.sending = threading.Lock()
        self.problem: Exception | None = None  # of the first line that could not be sent

    def add(self, text: str) -> None:
        """A line, on the disk or in the bucket when this returns; of a gathered one, when `close` does, and no request
        is waited for until MERGE of them wait. DataError if it, or an earlier one, cannot be written."""
        if not is_remote(self.path):
            with writing(self.path), self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            return
        with self.lock:
            self.waiting.append(text)
            gathered = self.gather and not self.problem and len(self.waiting) < MERGE
            if gathered and self.timer is None:
                self.timer = threading.Timer(SEND_S, self._send_later)
                self.timer.daemon = True
                self.timer.start()
        if not gathered:
            self._send()

    def _send_later(self) -> None:
        with contextlib.suppress(Exception):  # the next `add` or `close` raises it
            self._send()

    def _send(self) -> None:
        """What waits, as one part; `add` goes on gathering meanwhile."""
        with self.sending:
            if self.problem:
                raise self.problem
            with self.lock:
                self.timer = self.timer and self.timer.cancel()
                lines, self.waiting = self.waiting, []
            try:
                with writing(self.path):
                    self._write_part(lines)
            except Exception as error:
                self.problem = error
                raise

    def _write_part(self, lines: Sequence[str]) -> None:
        if not lines:
            return
        if self.number is None:
            self.number = max((last for _, last in _all_parts(self.path)), default=0)
            self._merge()  # of a start before this
        part = (self.number + 1, self.number + len(lines))
        file_system().pipe_file(_part(self.path, *part), "".join(lines).encode())
        self.number = part[1]
        self.unmerged += _lines(part)
        if self.unmerged >= MERGE:
            self._merge()

    def _merge(self) -> None:
        """The last part and the small ones right before it, into one; what is older stays as it is."""
        parts = _parts(self.path)
        start = len(parts) - 1
        while start > 0 and _lines(parts[start - 1]) < MERGE:
            start -= 1
        if len(last := parts[start:]) > 1:
            merged = _part(self.path, last[0][0], last[-1][1])
            file_system().pipe_file(merged, b"".join(_read_parts(self.path, last)))
            file_system().rm([_part(self.path, *part) for part in last])
        self.unmerged = 0

    def close(self) -> None:
        """DataError where a line cannot be written."""
        self._send()
        with self.sending, writing(self.path):
            if self.unmerged:
                self._merge()


def open_lines(path: pathlib.Path) -> IO[bytes]:
    """A file to read from its beginning, parts joined."""
    parts = _parts(path) if is_remote(path) else []
    if not is_remote(path):
        return path.open("rb")
    if not parts:
        return io.BytesIO(read_bytes(path))
    joined = tempfile.TemporaryFile()  # noqa: SIM115 whoever asked for it closes it
    try:
        joined.writelines(_read_parts(path, parts))
    except FileNotFoundError:  # its writer has merged some since
        joined.close()
        return open_lines(path)
    joined.seek(0)
    return joined


def read_lines(path: pathlib.Path) -> bytes:
    """All of it at once."""
    with open_lines(path) as file:
        return file.read()


def write_lines(path: pathlib.Path, content: bytes) -> None:
    """In place of what is there, as a whole or not at all; more may be appended."""
    if not is_remote(path):
        return write_whole(path, content, sync=True)
    with writing(path):
        parts = _parts(path)
        file_system().pipe_file(_part(path, 1, parts[-1][1] if parts else 1), content)
        if covered := set(_all_parts(path)) - set(_parts(path)):
            file_system().rm([_part(path, *part) for part in covered])


def _part(path: pathlib.Path, first: int, last: int) -> str:
    return f"{path}/part-{first:08d}-{last:08d}"


def _lines(part: tuple[int, int]) -> int:
    return part[1] - part[0] + 1


def _all_parts(path: pathlib.Path) -> list[tuple[int, int]]:
    try:
        names = file_system().ls(str(path), detail=False)
    except FileNotFoundError:
        return []
    found = (_PART.fullmatch(name.rpartition("/")[2]) for name in names)
    return [(int(match[1]), int(match[2])) for match in found if match]


def _parts(path: pathlib.Path) -> list[tuple[int, int]]:
    """Those that count, in order."""
    kept: list[tuple[int, int]] = []
    for first, last in sorted(_all_parts(path), key=lambda part: (part[0], -part[1])):
        if not kept or last > kept[-1][1]:
            kept.append((first, last))
    return kept


def _read_parts(path: pathlib.Path, parts: Sequence[tuple[int, int]], at_once: int = 16) -> Iterator[bytes]:
    for start in range(0, len(parts), at_once):
        names = [_part(path, *part) for part in parts[start : start + at_once]]
        contents = file_system().cat(names)
        yield from (contents[name.removeprefix(SCHEME)] for name in names)


# ---------------------------------------------------------------------------------------------- what goes wrong


def bucket_problem(error: BaseException) -> str:
    """What a bucket's client raised, in words, and the remedy; "" for an error of something else."""
    chain = _chain(error)
    if not bucket_used() or not any(map(_is_clients, chain)):
        return ""
    said = next((text for e in chain if (text := " ".join(str(e).split()))), type(chain[0]).__name__)[:300]
    if any(isinstance(e, FileNotFoundError) for e in chain) or "NOT_FOUND" in said:
        return f"there is no such bucket or object ({said}); make the bucket, or give another"
    words = re.sub(r"\S*/\S*", "", said)  # without paths: a step may be 403
    if re.search(
        r"\b40[13]\b|Forbidden|Unauthorized|PERMISSION_DENIED|Anonymous|[Cc]redentials|UNAUTHENTICATED", words
    ):
        return (
            f"this machine has no right to it ({said}); give its service account roles/storage.objectAdmin there, or"
            " run: gcloud auth application-default login"
        )
    return (
        f"the bucket does not answer ({said}). What was written there is kept: run the same command again when it is"
        " back"
    )


def storage_problem(error: BaseException) -> str:
    """What kept a file from being written, of an error of Orbax's or tensorstore's, in words."""
    for e in _chain(error):
        if isinstance(e, OSError) and e.strerror:
            return f"{e.strerror}: {e.filename}" if e.filename else e.strerror
    said = " ".join(str(error).split())
    found = re.search(r"No space left on device|Permission denied|Read-only file system|Disk quota exceeded", said)
    return found[0] if found else said[:300]


def storage_kind(error: BaseException) -> type[DataError]:
    """Which error an error of storage is for whoever starts the command: DataError where a hand is needed first, since
    something is missing or forbidden."""
    by_hand = _BY_HAND.match(bucket_problem(error) or storage_problem(error))
    return DataError if by_hand else StorageError


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error, and what it was raised from."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def _is_clients(error: BaseException) -> bool:
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    where = (type(error).__module__, *frames)
    return any(name.startswith(CLIENTS) for name in where) or _TENSORSTORE.search(str(error)) is not None
