"""Keeps a command going until it has succeeded, through preemptions and crashes: on a TPU slice, or on this machine.

  python -m rsagent_jax.launch --slice=v5e-16 --spot --setup='git clone …' -- .venv/bin/python train.py …
  python -m rsagent_jax.launch --local=1 -- python train.py --config=configs/quickstart.py --workdir=runs/mine

Asks for the slice (a queued resource), sets up its hosts, runs the command on all of them and prints what they print.
A slice that was taken away is asked for again. A command that was preempted (status 75) is started again. So is one
that crashed, or whose disk was full or whose bucket did not answer (74), after a pause that doubles each time, until it
has crashed --crashes times in a row without progress: a new checkpoint, or line of a journal, in its --workdir, where
that can be seen from here. A mistake of the user's (status 2) ends it at once; not so where there was progress, as when
a side-car goes away in the middle. The exit status is the command's. Ctrl-C ends a local command. On a slice it goes
on, until the same launch stops it and starts it again.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import re
import time
from collections.abc import Sequence

from rsagent_jax.config.ranges import Count, CountOrZero
from rsagent_jax.runtime.hosts import stopped_by_sigterm
from rsagent_jax.runtime.launching import USER_ERROR, LocalProcesses, TpuSlice
from rsagent_jax.runtime.paths import bucket_problem, file_size, open_path
from rsagent_jax.runtime.preemption import INTERRUPTED
from rsagent_jax.types import DataError

FIRST_S, LONGEST_S = 10.0, 600.0  # pauses before a start


def main(
    *run: str,  # the command, after --: the same on every host
    local: CountOrZero = 0,  # processes on this machine instead of a slice
    slice: str = "",  # its kind and size, such as v5e-16, v6e-8, v5p-8
    name: str = "rsagent",  # of the slice, and of the request for it
    zone: str = "",  # of Google Cloud; gcloud's own setting if left out
    project: str = "",  # likewise
    spot: bool = False,  # a slice that costs less and may be taken away
    setup: str = "",  # a shell command that readies a new host, from its home directory
    directory: str = "rsagent-jax",  # below a host's home: where the command runs there
    crashes: Count = 5,  # in a row without progress, after which it gives up
) -> int:
    if not run:
        raise DataError("the command is missing: python -m rsagent_jax.launch … -- python train.py …")
    if bool(local) == bool(slice):
        raise DataError("one of --slice=v5e-16 (a TPU slice) and --local=1 (processes on this machine) is needed")
    place = LocalProcesses(local) if local else TpuSlice(slice, name, zone, project, spot, setup, directory)
    try:
        with stopped_by_sigterm():
            return keep_going(place, run, crashes)
    except KeyboardInterrupt:
        if slice:
            print(f"launch: the command goes on on {name}; deleting that ends it (docs/tpu.md)", flush=True)
        raise


def keep_going(place: LocalProcesses | TpuSlice, run: Sequence[str], crashes: int) -> int:
    """The command's last exit status, once it has succeeded or is given up."""
    best, crashed = progress(run), 0
    while True:
        status, before = place.run(run), best
        best = max(before, progress(run))
        if status in (0, INTERRUPTED):
            return status
        if status == USER_ERROR and best == before:
            print("launch: the command cannot work as it is (status 2): not started again", flush=True)
            return status
        crashed = 0 if best > before else crashed + (status != command.PREEMPTED)
        if crashed >= crashes:
            print(f"launch: {crashed} crashes in a row without progress; the last status is {status}", flush=True)
            return status
        wait = min(FIRST_S * 2 ** max(0, crashed - 1), LONGEST_S)
        why = "was preempted" if status == command.PREEMPTED else f"crashed with status {status}"
        print(f"launch: the command {why}; started again in {wait:.0f} s", flush=True)
        time.sleep(wait)


def progress(run: Sequence[str]) -> int:
    """How far the work in the command's --workdir has come, a number that only grows: checkpoints' steps, journals'
    bytes (in a bucket, lines). 0 where nothing of it can be seen from here."""
    match = re.search(r"--workdir[= ](\S+)", " ".join(run))
    newest, journals = {}, 0
    try:
        for depth in ("", "*/") if match else ():  # a recipe has a directory for each of its stages
            workdir = open_path(match[1])
            for path in (*workdir.glob(f"{depth}checkpoints/*/*"), *workdir.glob(f"{depth}*/*-of-*.jsonl/part-*")):
                if number := re.fullmatch(r"(?:part-\d+-)?(\d+)", path.name):
                    newest[path.parent] = max(newest.get(path.parent, 0), int(number[1]))
            journals += sum(file_size(path) for path in workdir.glob(f"{depth}*/*-of-*.jsonl") if path.is_file())
    except Exception as error:
        if not (isinstance(error, DataError | OSError) or bucket_problem(error)):
            raise
        return 0
    return sum(newest.values()) + journals
