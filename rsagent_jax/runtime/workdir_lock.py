"""One trainer to a work directory, and one writer to a journal: <workdir>/trainer.json, or <i>-of-<n>.holder.json
beside the journal, says which process has it, and since when it shows life.

    {"host": "tpu-0", "pid": 4711, "machine": "…", "started": "…", "beat": 12}

Where the holder ran on this machine, its pid and start time tell whether it still does. One of another machine, as of a
shared file system or a bucket, is watched: it writes every BEAT_S, and one that has not for STALE_S is gone. No clocks
are compared. Of several hosts of one run the lead alone holds the directory.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rsagent_jax.runtime import preemption
from rsagent_jax.runtime.paths import create_file, read_bytes, remove_file, write_whole
from rsagent_jax.types import DataError

FILE, JOURNAL = "trainer.json", ".holder.json"
BEAT_S, STALE_S, POLL_S = 10.0, 60.0, 0.5
SETTLE_S = 1.0  # before one that takes over counts on having it
ENDING_S = 5.0  # that a process of this machine may take to end, once it was killed


def hold_workdir(workdir: pathlib.Path) -> None:
    """Keeps it for this process until that ends. DataError where a living process has it."""
    _hold(workdir / FILE, f"{workdir} belongs to a run that is going on", "give another --workdir")


def hold_journal(path: pathlib.Path) -> Callable[[], None]:
    """Keeps a journal's file for this process until the returned function is called, or the process ends. DataError
    where a living process has it."""
    what = f"{path} is being written by another start of this command"
    return _hold(path.with_suffix(JOURNAL), what, "give each its part: --shard=i/n")


def _hold(path: pathlib.Path, what: str, remedy: str) -> Callable[[], None]:
    """Keeps what `path` stands for; returns what gives it back. A process that loses it all the same, stopped for so
    long that another took it for dead, ends at once when it is woken.

    what, remedy: for the message where a living process has it.
    """
    own = _identity()
    if own == _without_beat(holder := _read(path)):
        return lambda: None
    contested = False
    while not create_file(path, json.dumps(own | {"beat": 0})):
        if (holder := _read(path)) is not None and not _is_gone(path, holder):
            raise DataError(
                f"{what}: {_who(holder)}. Wait for its end, or stop it, or {remedy} (who has it stands in {path}; where"
                " this is a copy of its directory, remove that file)"
            )
        if _read(path) == holder:
            remove_file(path)
        contested = True
    if contested:  # another start may have seen the same dead holder, and have removed what this one wrote
        time.sleep(SETTLE_S)
        if _without_beat(_read(path)) != own:
            return _hold(path, what, remedy)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, own, ended), daemon=True)

    def release(seconds: float = ENDING_S) -> None:
        ended.set()
        beats.join(seconds)  # a beat that is being written would bring the file back
        atexit.unregister(release)
        _release(path, own)

    beats.start()
    atexit.register(release)
    preemption.last_words.append(functools.partial(release, preemption.LAST_WORD_S / 2))
    return release


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "machine": _machine(), "started": _started(pid)}


def _machine() -> str:
    """This kernel since its start, and whose pids this process sees; the host's name where there is no /proc."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When, in ticks since the kernel's start; "" where only its existence can be told; None for none."""
    try:
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]  # a zombie has ended
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists("/proc/self/stat"):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """None where there is none; {} for one that is damaged, or being written."""
    try:
        holder = json.loads(read_bytes(path))
        return holder if isinstance(holder, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _without_beat(holder: dict[str, Any] | None) -> dict[str, Any] | None:
    return holder and {name: value for name, value in holder.items() if name != "beat"}


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _is_gone(path: pathlib.Path, holder: dict[str, Any]) -> bool:
    who = _who(holder)
    if holder.get("machine") == _machine():
        until = time.monotonic() + ENDING_S
        while alive := _started(holder["pid"]) == holder.get("started"):
            if time.monotonic() > until:
                break
            time.sleep(POLL_S)
        if not alive:
            print(f"{path.parent}: {who} had it and is gone; this run takes it over")
        return not alive
    print(f"{path.parent}: {who} has it; waiting for a sign of life, {STALE_S:.0f} s at most", flush=True)
    until = time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        if (now := _read(path)) != holder:
            return now is None
    print(f"{path.parent}: {who} shows none; this run takes it over")
    return True


def _beat(path: pathlib.Path, own: dict[str, Any], ended: threading.Event) -> None:
    for beat in range(1, sys.maxsize):
        if ended.wait(BEAT_S):
            return
        with contextlib.suppress(Exception):  # a full disk, a bucket that is away: what the run itself writes says so
            holder = _read(path)
            if holder and _without_beat(holder) != own:
                said = f"{path.parent} has been taken over by {_who(holder)}, since this run showed no sign of life"
                print(f"error: {said}", file=sys.stderr, flush=True)
                os._exit(2)  # nothing more of this one may be written there
            if path.parent.exists() and not ended.is_set():
                write_whole(path, json.dumps(own | {"beat": beat}))


def _release(path: pathlib.Path, own: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        if _without_beat(_read(path)) == own:
            remove_file(path)
