"""What the files of a checkpoint held when it was finished: their sizes and checksums, looked at before it is used.

    <folder>/checksums.json     {"params/d/1f…": [bytes, "crc32 8c736521"], …}

Orbax checks its indexes and not what arrays hold: a flipped byte in one of them is restored as another number. A bucket
keeps a checksum of every object, so there nothing is read for it ("crc32c …"). Of files whose checksum is of the other
kind, as of a checkpoint that was copied out of a bucket, the sizes are compared.
"""

import concurrent.futures
import itertools
import json
import pathlib
import zlib
from collections.abc import Sequence

import jax

from rsagent_jax.runtime import paths, processes

MANIFEST = "checksums.json"
ORBAX = ("commit_success.txt", "_CHECKPOINT_METADATA")  # its own, of times alone; written after everything else
THREADS, PIECE = 8, 1 << 22
SHOWN = 3  # files named


def write_checksums(folder: pathlib.Path) -> None:
    """Of all files below; called by the process that finishes the folder. DataError where it cannot be written."""
    found = _checksums(folder, [name for name in _names(folder) if _counts(name)])
    paths.write_whole(folder / MANIFEST, json.dumps(found, indent=0), sync=True)


def find_damage(folder: pathlib.Path, under: str = "") -> str:
    """What is wrong with the files whose names begin with `under`, in words; "" where they are as they were written, or
    where there is no such folder. All processes call it together, and each reads its part."""
    if not folder.exists():
        return ""
    try:
        entries = json.loads(paths.read_bytes(folder / MANIFEST)).items()
        wanted = {name: (int(size), str(text)) for name, (size, text) in entries}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {error!r}"
    there, problems = set(filter(_counts, _names(folder))), []
    mine = sorted(name for name in wanted if name.startswith(under))[jax.process_index() :: jax.process_count()]
    try:
        found = _checksums(folder, [name for name in mine if name in there])
    except OSError as error:
        if paths.is_remote(folder):
            raise
        problems, mine = [f"it cannot be read ({paths.storage_problem(error)})"], []
    for name in mine:
        (size, text), (size_now, text_now) = wanted[name], found.get(name, (0, ""))
        if name not in found:
            problems.append(f"{name} is missing")
        elif size != size_now:
            problems.append(f"{name} has {size_now} bytes, not {size}")
        elif text != text_now and text.split()[0] == text_now.split()[0]:
            problems.append(f"{name} has other content")
    problems += [f"{name} is no part of it" for name in sorted(there - wanted.keys()) if name.startswith(under)]
    said = list(dict.fromkeys(itertools.chain(*processes.exchange(problems))))
    return "; ".join(said[:SHOWN]) + f"; and {len(said) - SHOWN} more" * (len(said) > SHOWN)


def _counts(name: str) -> bool:
    """Hidden ones are of file systems and desktops: .nfs0001, .DS_Store."""
    file = name.rpartition("/")[2]
    return name != MANIFEST and file not in ORBAX and not file.startswith(".")


def _names(folder: pathlib.Path) -> list[str]:
    return [str(file).removeprefix(f"{folder}/") for file in paths.files_below(folder)]


def _checksums(folder: pathlib.Path, names: Sequence[str]) -> dict[str, tuple[int, str]]:
    if paths.is_remote(folder):
        listed = paths.listed_checksums(folder)
        return {name: listed[name] for name in names}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))


def _checksum(path: pathlib.Path) -> tuple[int, str]:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return paths.file_size(path), f"crc32 {value:08x}"
