"""Files by name from a Hugging Face hub, `org/name` or `org/name@revision`: one download a host, taken up where it
stopped, checked against the hub's own sums.

The library does the work, and the environment counts as everywhere: HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_HUB_OFFLINE. Here are the room on the disk beforehand, the sums afterwards, and an error that says what to do.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")  # what the hub calls a large file by; small ones have git's sums
GB = 1e9


class HubError(ValueError):
    """What was asked for cannot be had from the hub. The message says why and what to do."""


def is_repository(name: str) -> bool:
    """Whether it has the form of a repository's name and nothing of that name is on this disk."""
    return REPOSITORY.fullmatch(str(name)) is not None and not pathlib.Path(name).exists()


def download(name: str, patterns: Sequence[str]) -> pathlib.Path:
    """The directory, in the hub's cache, of the files whose names match; HubError without any.

    Without a hub (HF_HUB_OFFLINE, no network) a copy that is whole is used, and said so.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

    repository, revision = REPOSITORY.fullmatch(name).groups()
    with _explained(name, f"{constants.ENDPOINT}"):
        try:
            asked = dict(revision=revision, allow_patterns=patterns)
            files = snapshot_download(repository, dry_run=True, tqdm_class=Silent, **asked)
        except DryRunError:
            directory = pathlib.Path(snapshot_download(repository, tqdm_class=Silent, **asked))
            print(f"{name}: {constants.ENDPOINT} was not asked; taken from the copy of {directory.name[:12]} here")
            return directory
        if not files:
            raise HubError(f"{name} on {constants.ENDPOINT} has no file {' or '.join(patterns)}; give another name")
        if missing := [file for file in files if file.will_download]:
            _check_room(name, sum(file.file_size for file in missing), pathlib.Path(constants.HF_HUB_CACHE))
        # The commit, not the revision: a branch may move between two calls.
        commit = files[0].commit_hash
        directory = pathlib.Path(snapshot_download(repository, revision=commit, allow_patterns=patterns))
        _verify([directory / file.filename for file in files], pathlib.Path(constants.HF_HOME) / "checked_sha256")
    return directory


def _check_room(name: str, needed: int, cache: pathlib.Path) -> None:
    there = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(there).free
    print(f"{name}: {needed / GB:.2f} GB to download into {cache}")
    if needed > free:
        raise HubError(
            f"{name} needs {needed / GB:.2f} GB more and {there} has {free / GB:.2f} GB free; make room, or let HF_HOME"
            " name a directory with more"
        )


def _verify(files: list[pathlib.Path], checked: pathlib.Path) -> None:
    """A large file's name in the cache is its sha256. One with other content is removed, so that it is got again.

    checked: where an empty file for each sum says that it was found right, so that one reading is enough.
    """
    blobs = {file.resolve().name: file for file in files if SHA256.fullmatch(file.resolve().name)}
    fresh = [name for name in blobs if not (checked / name).exists()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = dict(zip(fresh, pool.map(sha256_of, (blobs[name] for name in fresh)), strict=True))
    for name in fresh:
        if found[name] != name:
            blobs[name].resolve().unlink()
            blobs[name].unlink()
        else:
            with contextlib.suppress(OSError):  # a cache that others keep: it is read again next time
                checked.mkdir(exist_ok=True)
                (checked / name).touch()
    if bad := [blobs[name].name for name in fresh if found[name] != name]:
        raise HubError(f"{', '.join(bad)}: other bytes than the hub's (their sha256 differs), removed; run again")


def sha256_of(file: pathlib.Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(name: str, endpoint: str) -> Iterator[None]:
    """The library's errors as a HubError in a line."""
    from huggingface_hub import errors

    at = f"{name} on {endpoint}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{at} is gated: accept its terms on its page, and set HF_TOKEN to a token of yours") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{at}: there is no such revision; give a branch, tag or commit of it after the @") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name} is no directory here, and {endpoint} has no such repository for this token (HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # IncompleteSnapshotError is one
        raise HubError(
            f"{name} is no directory here, its copy from the hub is not here as a whole, and {endpoint} cannot be asked"
            " (no network, or HF_HUB_OFFLINE is set);"
            " download it where there is a network, or give a directory"
        ) from error
    except (errors.HTTPError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise HubError(f"{name}: the disk is full; make room, or let HF_HOME name another directory") from error
        said = str(error).split("\n")[0][:200]
        raise HubError(f"{at}: the download broke off ({said}); run again, it goes on where it stopped") from error
