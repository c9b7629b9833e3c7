"""The hosts of a slice, as a command that only starts others sees them: who is who, and what all go by.

Each host runs the same command (rsagent_jax.reproduce). It starts children that take the devices and meet there by
themselves (runtime/processes.py); their parents meet here, at the next port, through jax's coordination service, and
touch no device. What ends one of them ends all: at once where it can still say so, else by runtime/watchdog.py. Each
takes its child with it.
"""

import contextlib
import ctypes
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from rsagent_jax.runtime.preemption import NOTICE_S, PREEMPTED, Preempted
from rsagent_jax.runtime.watchdog import HOST_LOST
from rsagent_jax.types import DataError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT, USUAL_PORT = "JAX_COORDINATOR_PORT", 8482  # of a TPU VM, and jax's own where it is not set
HEARTBEAT_S = 100  # of jax's, which takes a host for dead after half of it or more: runtime/watchdog.py is before it
SHUTDOWN_S = 10  # of jax's, for one another
POLL_S = 0.5
GONE = "rsagent_jax/hosts/gone"
GRACE_S = 10.0  # for a child to end by itself once that of another host has failed
KILL_S = NOTICE_S + 3.0  # after SIGTERM, in which it keeps what it has done
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux; looked up here, since a forked child should do little


def has_tpu() -> bool:
    """Whether this host has TPU chips, by their device files (accel on v4, vfio on later ones), and may use them."""
    files = (file for pattern in ("accel[0-9]*", "vfio/[0-9]*") for file in pathlib.Path("/dev").glob(pattern))
    return "tpu" in os.environ.get("JAX_PLATFORMS", "tpu") and any(files)


def hold_place(port: int, index: int) -> None:
    """Keeps this machine's place at a meeting until the process ends. DataError where another process has it.

    Without it a second start would not fail: grpc shares its ports, and a client that reaches the service of the first
    start ends that one on all hosts. Linux alone has such names, which end with whoever has them.
    """
    if sys.platform != "linux":
        return
    place = socket.socket(socket.AF_UNIX)
    try:
        place.bind(f"\0rsagent_jax/{port}/{index}")
    except OSError:
        place.close()
        raise DataError(
            f"the same command, or another that joins the hosts of a slice, runs on this machine (port {port}): wait"
            f" for its end, or stop it. {PORT} keeps two apart that share no chips"
        ) from None
    place.detach()  # open as long as the process


def join_hosts() -> "Hosts":
    """Meets the others; one host alone where nothing says that there are more."""
    if not has_tpu() and not any(map(os.environ.get, VARIABLES)):
        return Hosts()
    from jax._src import distributed

    from rsagent_jax.runtime.processes import initialize_distributed

    initialize_distributed(beside=1, shutdown_timeout_seconds=SHUTDOWN_S)
    state = distributed.global_state
    return Hosts(state.process_id, state.num_processes, state.client)


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Preempted within, on its way out of which a host stops its command and tells the others."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a process group and a launcher may both pass it on
        raise Preempted("SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class HostGone(DataError):
    """Another host has ended."""

    status = HOST_LOST


class Hosts:
    """`count` of them, of which this is number `index`; all call the same methods in the same order."""

    def __init__(self, index: int = 0, count: int = 1, store: Any = None):
        """store: jax's DistributedRuntimeClient, or None for one host."""
        self.index, self.count, self.store = index, count, store
        self.names = (f"rsagent_jax/hosts/{n}" for n in itertools.count())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Tells the others what ended this one."""
        if self.count > 1 and error is not None and not isinstance(error, HostGone):
            self.store.key_value_set(f"{GONE}/{self.index}", json.dumps(str(error)[:300] or kind.__name__))

    @property
    def is_lead(self) -> bool:
        return self.index == 0

    def from_lead(self, say: Callable[[], str]) -> str:
        """What the first host says, on all of them."""
        if self.count == 1:
            return say()
        name = next(self.names)
        if self.is_lead:
            self.store.key_value_set(f"{name}/0", json.dumps(said := say()))
            return said
        while not (said := self._told(name)):
            time.sleep(POLL_S)
        return json.loads(said[0])

    def check_same(self, values: dict[str, str]) -> None:
        """DataError, on every host that was given anything else than the first."""
        said = json.loads(self.from_lead(lambda: json.dumps(values)))
        if differ := [name for name, value in values.items() if said.get(name) != value]:
            raise DataError(f"host {self.index} was given another {' and '.join(differ)} than host 0: start the same"
                            " command on all, with one work directory that they share")  # fmt: skip

    def run(self, argv: Sequence[str], everywhere: bool) -> int:
        """Runs a command on every host, or on the first, and waits for all. Its exit status, the same on all: 0 where
        it ended well, PREEMPTED where it was on one, else the least of theirs; 128 + n after signal n.

        Where it failed on one, the others have GRACE_S to end by themselves before they are stopped.
        """
        child = subprocess.Popen(argv, preexec_fn=die_with_parent) if everywhere or self.is_lead else None
        try:
            if self.count == 1:
                return exit_status(child.wait())
            return self._wait(child, self.count if everywhere else 1)
        finally:  # nothing goes on behind the back of whoever stopped this
            if child and child.poll() is None:
                _stop(child)

    def _wait(self, child: subprocess.Popen | None, runs: int) -> int:
        name, told, failed_at, stopped = next(self.names), child is None, None, False
        while True:
            if not told and child.poll() is not None:
                status = exit_status(child.returncode)
                status = HOST_LOST if stopped and status == PREEMPTED else status  # by us, for another's sake
                self.store.key_value_set(f"{name}/{self.index}", str(status))
                told = True
            statuses = [int(text) for text in self._told(name)]
            if len(statuses) == runs:
                rank = {PREEMPTED: 0, HOST_LOST: 2}
                return min(filter(None, statuses), key=lambda s: (rank.get(s, 1), s), default=0)
            failed_at = failed_at or (any(statuses) and time.monotonic())
            if failed_at and not told and time.monotonic() - failed_at > GRACE_S:
                stopped = True
                _stop(child)
            time.sleep(POLL_S)

    def _told(self, name: str) -> list[str]:
        """What has been said under a name so far. HostGone once another host has ended, Preempted where it was."""
        if gone := self.store.key_value_dir_get(GONE):
            host, why = gone[0][0].rpartition("/")[2], json.loads(gone[0][1])
            if why.startswith("SIGTERM"):
                raise Preempted(f"SIGTERM on host {host}")
            raise HostGone(f"host {host} has ended ({why}): start the same command on all hosts again")
        return [text for _, text in self.store.key_value_dir_get(name)]


def exit_status(code: int) -> int:
    """Of what subprocess tells: 128 + n after signal n."""
    return code if code >= 0 else 128 - code


def _stop(child: subprocess.Popen) -> None:
    child.terminate()
    try:
        child.wait(KILL_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def die_with_parent() -> None:
    """In a child: it ends when its parent does, however that ended."""
    if _PRCTL:
        _PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
