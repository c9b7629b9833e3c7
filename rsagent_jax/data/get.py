"""Gets data sets: says where each comes from, fetches what may be fetched, lays it out, and looks at what is there.

  python -m rsagent_jax.data.get refcoco+ gseval … --root=DIR [--base_url=MIRROR] [--nofetch]

Without a name it lists all there are. Pictures that a set needs are fetched with it. A stopped command goes on where it
was; archives stay in <root>/downloads and may be deleted. What takes a hand (a form, a drive folder) is told step by
step; run the same command again when it is done. Ends with the table of rsagent_jax.data_check. Exit status 1 if that
finds something wrong or a step waits for you, 2 if a file could not be had.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import glob
import os
import pathlib
from collections.abc import Sequence

from rsagent_jax.config.import_path import closest
from rsagent_jax.config.ranges import Count, CountOrZero
from rsagent_jax.data.download import obtain_all
from rsagent_jax.data.sources import SOURCES, Source, files_of
from rsagent_jax.runtime.paths import is_remote, write_whole
from rsagent_jax.types import DataError

MIRROR = "RSAGENT_DATA_URL"  # in place of --base_url


def main(
    *names: str,  # data sets, such as refcoco, refcocog, reasonseg; none: a list of all
    root: str = "",  # the folder for all of them, on this machine, later --config.data.root
    base_url: str = "",  # a mirror that holds the files by their names; else RSAGENT_DATA_URL; the hub's: HF_ENDPOINT
    jobs: Count = 4,  # files at a time
    fetch: bool = True,  # --nofetch: only say what would be done
    samples: CountOrZero = 200,  # of each split that rsagent_jax.data_check decodes; 0 = all
) -> int:
    wanted = with_needs(names or SOURCES)
    for name in wanted:
        describe(name, SOURCES[name])
    if not names or not fetch:
        return 0
    if is_remote(root):
        raise DataError(
            f"--root={root}: archives are unpacked on a disk. Get them into a directory of this machine, then copy it:"
            f" gcloud storage rsync --recursive --exclude='^downloads/' DIR {root}"
        )
    folder = command.make_workdir(root, "root")
    downloads = command.make_workdir(str(folder / "downloads"), "root")
    todo = [name for name in wanted if not is_there(name, folder, downloads)]
    files = [file for name in todo for file in files_of(name, base_url or os.environ.get(MIRROR, ""))]
    obtain_all(files, folder, downloads, jobs)
    waiting = [name for name in wanted if not all(any(folder.glob(p)) for p in SOURCES[name].gives)]
    for name in {*todo} - {*waiting}:
        write_whole(downloads / f"{name}.done", "all of its files\n")
    for name in waiting:
        say_steps(name, SOURCES[name], folder)
    status = [1] if waiting else []
    for row in (row for name in names if name not in waiting for row in SOURCES[name].checks):
        flags = [f"--config=configs/eval.py:{row}", f"--config.data.root={folder}", f"--out={folder}/check/{row}"]
        print(f"\n{row}")
        status.append(command.run_command("rsagent_jax.data_check", [*flags, f"--samples={samples}"]))
        if status[-1] == 130:  # Ctrl-C
            break
    return max(status, default=0)


def with_needs(names: Sequence[str]) -> list[str]:
    """The names after what they need, each once. DataError for a name that is unknown."""
    for name in names:
        if name not in SOURCES:
            raise DataError(f"no data set is called {name!r}{closest(name, SOURCES)}; there are {', '.join(SOURCES)}")
    return list(dict.fromkeys(n for name in names for n in (*SOURCES[name].needs, name)))


def describe(name: str, source: Source) -> None:
    print(f"{name}\n  page     {source.page}\n  licence  {source.licence}")
    for file in source.files:
        size = f"{file.size / 1e6:,.1f} MB" if file.size else "size not published"
        print(f"  file     {file.url} ({size}, sha256 {file.sha256 or 'not published'})")
    if source.hub:
        print(f"  files    data/ of {source.hub}, by the sizes and checksums that the hub lists")
    for step in source.steps:
        print(f"  by hand  {step.format(root='<root>')}")


def is_there(name: str, root: pathlib.Path, downloads: pathlib.Path) -> bool:
    """All that it gives is under the root, and this command has not left it half done."""
    patterns = [glob.escape(file.name) for file in SOURCES[name].files] or ["*.parquet"] * bool(SOURCES[name].hub)
    begun = [path for pattern in patterns for path in downloads.glob(f"{pattern}*")]
    done, given = downloads / f"{name}.done", all(any(root.glob(pattern)) for pattern in SOURCES[name].gives)
    if done.exists() and not given:  # deleted since: it is to be unpacked again
        for path in (done, *(path for path in begun if path.suffix == ".done")):
            path.unlink()
    return given and (not begun or done.exists())


def say_steps(name: str, source: Source, root: pathlib.Path) -> None:
    print(f"\n{name} waits for you ({source.page}):")
    lacks = ", ".join(p for p in source.gives if not any(root.glob(p)))
    steps = source.steps or (f"its archive was unpacked, but holds no {lacks}: look at the page",)
    for number, step in enumerate((*steps, "run the same command again"), start=1):
        print(f"  {number}. {step.format(root=root)}")
