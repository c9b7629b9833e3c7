"""Files from the web, whole or not at all: fetched in parts that are kept, checked, and unpacked without surprises.

<folder>/NAME.partial      what has come so far; the next start goes on from there (HTTP Range)
<folder>/NAME              whole and checked
<folder>/NAME.rejected     came whole but is another file, or damaged; the next start fetches it anew
<folder>/NAME.done         unpacked: NAME may be deleted, nothing is fetched again
"""

import concurrent.futures
import dataclasses
import glob
import http.client
import json
import os
import pathlib
import shutil
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence

import tqdm

from rsagent_jax.runtime.paths import write_whole, writing
from rsagent_jax.types import DataError
from sam_bridge.file_kinds import kind_of_file
from sam_bridge.hub import sha256_of

HUB = "https://huggingface.co"
CHUNK, TIMEOUT_S = 1 << 18, 60  # bytes, seconds without any
TRIES, PAUSE_S = 5, 2.0  # a transfer that breaks is taken up so often without a new byte, after growing pauses
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)  # damaged, unknown, encrypted


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file of a source. Size and checksum are None where nobody publishes them: none is made up."""

    url: str
    to: str = ""  # folder below the data's root that it is unpacked into
    size: int | None = None  # bytes
    sha256: str | None = None

    @property
    def name(self) -> str:
        return pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(self.url).path)).name


def obtain_all(files: Sequence[RemoteFile], root: pathlib.Path, downloads: pathlib.Path, jobs: int) -> None:
    """Fetches and unpacks what is not done yet, `jobs` at a time. One DataError lists all files that failed."""
    files = [file for file in files if not (downloads / f"{file.name}.done").exists()]
    have = sum(
        p.stat().st_size for f in files for p in downloads.glob(f"{glob.escape(f.name)}*") if p.suffix != ".rejected"
    )
    need = sum((file.size or 0) * (1 + file.name.endswith(".zip")) for file in files) - have
    if need > (free := shutil.disk_usage(root).free):
        raise DataError(f"{root} has room for {free / 1e9:.1f} GB, and {need / 1e9:.1f} GB are needed: make room")
    sizes, stopped = [file.size for file in files], threading.Event()
    total = None if None in sizes else sum(sizes)
    bar = tqdm.tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="get", disable=not files)

    def report(count: int) -> None:
        if stopped.is_set():
            raise DataError("stopped")
        bar.update(count)

    def obtain(file: RemoteFile) -> str | None:
        try:
            path, sha256 = download_file(file, downloads, report)
            done = {"url": file.url, "sha256": sha256, "files": unpack(path, file, root)}
        except DataError as error:
            return str(error)
        write_whole(downloads / f"{file.name}.done", json.dumps(done) + "\n")
        tqdm.tqdm.write(f"  {file.name}: {done['files']} files under {root / file.to}, sha256 {sha256}")
        return None

    with bar, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            problems = [problem for problem in pool.map(obtain, files) if problem]
        except KeyboardInterrupt:  # or the pool waits until all has come
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if problems:
        raise DataError("\n".join(problems))


def hub_endpoint() -> str:
    """The hub's address without a slash at its end; HF_ENDPOINT names another one."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def open_url(url: str, start: int = 0) -> http.client.HTTPResponse:
    """Answers from byte `start` on; a hub is shown the token of HF_TOKEN, and nobody that it leads on to. What cannot
    be mended by trying again is a DataError, all else an OSError."""
    from huggingface_hub import get_token

    headers = {"User-Agent": "rsagent-jax"} | ({"Range": f"bytes={start}-"} if start else {})
    is_hubs = url.startswith(f"{hub_endpoint()}/")
    try:
        request = urllib.request.Request(url, headers=headers)
        if is_hubs and (token := get_token()):  # of HF_TOKEN, or of a login that is stored
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code in (408, 416, 429) or error.code >= 500:
            raise
        if is_hubs and error.code in (401, 403):
            raise DataError(
                f"{url} answers {error.code} {error.reason}: accept the terms on its page, if it has some, and set"
                " HF_TOKEN to a token that may read it"
            ) from None
        raise DataError(f"{url} answers {error.code} {error.reason}: it has moved, or may not be fetched") from None
    except ValueError as error:
        raise DataError(f"{url} is no address: {error}") from None


def download_file(
    file: RemoteFile, folder: pathlib.Path, report: Callable[[int], object] = lambda n: None
) -> tuple[pathlib.Path, str]:
    """The checked file in `folder`, and its sha256. One DataError says what failed; what has come is kept.

    `report` is told of every number of bytes that comes.
    """
    path, partial, tries = folder / file.name, folder / f"{file.name}.partial", 0
    if path.exists():  # put there by hand, or not unpacked yet
        return path, check_file(path, file)
    while True:
        have = _size(partial)
        try:
            _take_up(file.url, partial, report)
            break
        except (OSError, http.client.HTTPException) as error:
            tries = 1 if _size(partial) > have else tries + 1
            if tries == TRIES:
                raise DataError(
                    f"{file.url} could not be fetched ({error}). {_size(partial)} bytes are kept in {partial}: run the"
                    f" same command again to go on, or put the file there by hand as {path}"
                ) from None
            time.sleep(PAUSE_S * tries)
    digest = check_file(partial, file)
    os.replace(partial, path)
    return path, digest


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _take_up(url: str, partial: pathlib.Path, report: Callable[[int], object]) -> None:
    """Appends what is missing. OSError or HTTPException where the transfer broke; DataError where the disk is full."""
    have = _size(partial)
    try:
        response = open_url(url, have)
    except urllib.error.HTTPError as error:
        if error.code == 416 and (error.headers.get("Content-Range") or "").endswith(f"/{have}"):
            return  # nothing is missing
        if error.code == 416:
            partial.unlink()  # of a longer file
        raise
    with response:
        if response.status == 206 and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            raise ConnectionError(f"it answers with {response.headers.get('Content-Range')}, not from byte {have} on")
        have = have if response.status == 206 else 0  # a server without Range sends all of it again
        total = response.headers.get("Content-Length")
        wanted = have + int(total) if total else None
        with writing(partial):
            output = partial.open("r+b" if have else "wb")
        with output:
            output.seek(have)
            while data := response.read(CHUNK):
                with writing(partial):
                    output.write(data)
                have += len(data)
                report(len(data))
            with writing(partial):
                output.flush()
        if wanted not in (None, have):
            raise ConnectionError(f"it ended after {have} of {wanted} bytes")


def check_file(path: pathlib.Path, file: RemoteFile) -> str:
    """Its sha256. DataError where it is not the file that it should be; it is renamed then, not deleted."""
    if file.size not in (None, size := _size(path)):
        raise _rejected(path, file, f"has {size} bytes, not {file.size}")
    digest = sha256_of(path)
    if file.sha256 not in (None, digest):
        raise _rejected(path, file, f"has the sha256 {digest}, not {file.sha256}")
    if file.name.endswith(".zip") and not zipfile.is_zipfile(path):
        raise _rejected(path, file, "is no zip archive, or cut short")
    return digest


def _rejected(path: pathlib.Path, file: RemoteFile, problem: str) -> DataError:
    rejected = path.with_name(f"{file.name}.rejected")
    kind = kind_of_file(path) or ""
    os.replace(path, rejected)
    return DataError(
        f"{file.url} {problem}{f' (it is {kind})' if 'HTML' in kind else ''}. It is kept as {rejected}; run the same"
        " command again to fetch it anew. If it comes the same, the source has changed: look at its page"
    )


def unpack(path: pathlib.Path, file: RemoteFile, root: pathlib.Path) -> int:
    """Lays a file out under root/file.to by its kind: a zip, a parquet of pictures, or itself. How many files."""
    into = root / file.to
    if path.suffix == ".zip":
        try:
            return _unpack_zip(path, into)
        except BAD_ZIP as error:
            raise _rejected(path, file, f"is damaged ({error}); what was unpacked of it stays") from None
    if path.suffix == ".parquet":
        return _unpack_parquet(path, file, into)
    with writing(into / file.name):
        into.mkdir(parents=True, exist_ok=True)
    write_whole(into / file.name, path.read_bytes())
    return 1


def _unpack_zip(path: pathlib.Path, into: pathlib.Path) -> int:
    """Each member whole or not at all; those that are there already stay. DataError before anything is written where a
    member would land outside of `into`, or is a link."""
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
        bad = [m.filename for m in members if _escapes(m.filename) or stat.S_ISLNK(m.external_attr >> 16)]
        if bad:
            raise DataError(
                f"{path} was not unpacked: {len(bad)} of its members lie outside of the folder or are links, such as"
                f" {bad[0]!r}; this is not the archive of its source. Delete it, and look at the source's page"
            )
        for member in members:
            target = into / member.filename
            if target.exists() and target.stat().st_size == member.file_size:
                continue
            data = archive.read(member)  # checks its CRC; the largest is an instances.json
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)
        return len(members)


def _escapes(name: str) -> bool:
    parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
    return ".." in parts or parts[:1] == ("/",) or ":" in name


def _unpack_parquet(path: pathlib.Path, file: RemoteFile, into: pathlib.Path) -> int:
    """images/<file_name>, and a line of <name>.jsonl with the other columns, per row with `image` and `file_name`."""
    import pyarrow
    import pyarrow.parquet

    lines, images = [], into / "images"
    with writing(images):
        images.mkdir(parents=True, exist_ok=True)
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=32):
            for row in batch.to_pylist():
                target = images / pathlib.PurePosixPath(row["file_name"]).name
                data = row.pop("image")["bytes"]
                if not target.exists() or target.stat().st_size != len(data):
                    write_whole(target, data)
                lines.append(json.dumps(row))
    except (pyarrow.ArrowException, KeyError, TypeError) as error:
        raise _rejected(path, file, f"is no parquet of rows with image and file_name ({error!r})") from None
    write_whole(into / f"{path.stem}.jsonl", "\n".join(lines) + "\n")
    return len(lines) + 1
