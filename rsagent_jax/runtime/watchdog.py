"""Ends this process, with one line, where another host of the slice is gone or where nothing gets on any more.

The main thread may be in a collective that never returns, so two threads beside it look after that. One tells the
others, on jax's key-value store, which phase this process is in, and reads what they tell. The other decides: a host
that has been silent for SILENT_S is gone; one that has ended by an error is named with it; and where all hosts that are
behind have been in one place for longer than it may take (runtime/progress.py), they hang. Hosts that wait for them are
never to blame, however long it takes. The first to find something out writes it for all, and each ends at once:
checkpoints and files get their names when they are whole.
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from rsagent_jax.config.import_path import first_line
from rsagent_jax.runtime import preemption
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.types import DataError

HOST_LOST = 69  # exit status (EX_UNAVAILABLE): another start may go well
BEAT_S, POLL_S = 2.0, 0.5
SILENT_S = 30.0  # without a sign of life a host is gone
GRACE_S = 5.0  # for this process to end by itself, once another has ended by an error
KEY = "rsagent_jax/watchdog"
GOES_ON = "Nothing was saved half: the same command on all hosts goes on from what was saved last"
# What an error of a collective begins with. It may be no more than the trace of a host that is gone.
_COLLECTIVE = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


class _Watchdog:
    """Of this process, which is host `index` of `count`."""

    def __init__(self):
        self.index, self.count, self.store, self.address = 0, 1, None, ""
        self.told: dict[int, dict[str, Any]] = {}  # by others
        self.heard: dict[int, float] = {}  # when each of them last told something new
        self.answered = 0.0  # when the store did
        self.verdict: list | None = None  # status and line, of the host that was first
        self.ended: list | None = None  # status and reason of this one
        self.why, self.status = "", 0
        self.deciding, self.quiet = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def limited(self, first_s: float, answer_s: float) -> Iterator[None]:
        """Ends the process where its main thread hangs within, as PROGRESS.limit says; for first_s = 0 it may."""
        if first_s:
            PROGRESS.limit(first_s, answer_s)
            self._start()
        try:
            yield
        finally:
            PROGRESS.limit(0.0, 0.0)

    def _start(self) -> None:
        if not self.deciding.is_set():
            self.deciding.set()
            threading.Thread(target=self._decide, daemon=True).start()

    def join(self, index: int, count: int, store: Any, address: str) -> None:
        """Looks after the other hosts as well, and lets them look after this one.

        store: jax's DistributedRuntimeClient; address: host:port of its service, which is host 0's.
        """
        self.index, self.count, self.store, self.address = index, count, store, address
        self.answered = time.monotonic()
        self.heard = dict.fromkeys(set(range(count)) - {index}, self.answered)
        self.talker = threading.Thread(target=self._talk, daemon=True)
        self.talker.start()
        atexit.register(self.end)  # of an error that nobody has caught
        self._catch_abort()
        self._start()

    ############################## What is told and heard ##############################

    def _tell(self) -> None:
        told = PROGRESS.told() | {"host": socket.gethostname()}
        told |= {"ended": self.ended} if self.ended else {}
        self.store.key_value_set(f"{KEY}/{self.index}", json.dumps(told), allow_overwrite=True)

    def _talk(self) -> None:
        while not self.quiet.is_set():
            with contextlib.suppress(Exception):  # no answer; `_found` looks for how long
                if not self.ended:
                    self._tell()
                said = {name.rpartition("/")[2]: json.loads(text) for name, text in self.store.key_value_dir_get(KEY)}
                self.answered, self.verdict = time.monotonic(), said.pop("verdict", None)
                for index in self.heard:
                    if (new := said.get(str(index), {})) != self.told.get(index, {}):
                        self.told[index], self.heard[index] = new, self.answered
            self.quiet.wait(BEAT_S)

    ############################## What is decided ##############################

    def _decide(self) -> None:
        before = time.monotonic()
        while self.deciding.is_set():
            time.sleep(POLL_S)
            now = time.monotonic()
            if (asleep := now - before) > GRACE_S:  # this process was stopped, and has heard nobody meanwhile
                self.answered += asleep
                PROGRESS.moved += asleep
                self.heard = {index: at + asleep for index, at in self.heard.items()}
            before = now
            if (found := self._found(now)) and self.deciding.is_set():
                self._end_all(*found)

    def _found(self, now: float) -> tuple[int, str] | None:
        """The exit status, and what has happened."""
        if self.verdict:
            return tuple(self.verdict)
        ended = {i: told["ended"] for i, told in self.told.items() if "ended" in told}
        for i, (status, why) in ended.items():
            if why and now - self.heard[i] > GRACE_S:
                return status, f"{self._name(i)} has ended with status {status} in its {self._where(i)}: {why}"
        if self.index and now - self.answered > SILENT_S:
            return HOST_LOST, self._unreachable()
        if line := self._silent(SILENT_S):
            return HOST_LOST, line
        at = {i: self.told.get(i, {}) for i in self.heard if i not in ended} | {self.index: PROGRESS.told()}
        last = min(told.get("number", 0) for told in at.values())
        behind = {i: told for i, told in at.items() if told.get("number", 0) == last}
        if not all(told.get("late") for told in behind.values()):
            return None
        each = [
            f"{self._name(i)} has not got on in its {told['where']} for {told['idle']:.0f} s ({told['limit']:.0f} s are"
            " allowed)"
            for i, told in sorted(behind.items(), key=lambda item: -item[1]["idle"])
        ]
        return HOST_LOST, "; ".join(each)

    def _name(self, index: int) -> str:
        if self.count == 1:
            return "this process"
        host = socket.gethostname() if index == self.index else self.told.get(index, {}).get("host")
        return f"host {index} of {self.count}" + (f" ({host})" if host else "")

    def _where(self, index: int) -> str:
        return self.told.get(index, {}).get("where", "start")

    def _silent(self, seconds: float) -> str:
        """Who has been for so long, in words; "" for nobody."""
        silent = {i: self.answered - at for i, at in self.heard.items() if "ended" not in self.told.get(i, {})}
        each = [f"{self._name(i)}, last heard of in its {self._where(i)}" for i, s in silent.items() if s > seconds]
        return f"no sign of life for {max(silent.values()):.0f} s of {'; of '.join(each)}" if each else ""

    def _unreachable(self) -> str:
        return f"{self._name(0)}, where all meet, cannot be reached any more, last heard of in its {self._where(0)}"

    ############################## How it ends ##############################

    def _end_all(self, status: int, line: str, reachable: bool = True) -> NoReturn:
        own = f" (this one: {PROGRESS.told()['where']})" if self.count > 1 else ""
        os.write(2, f"\nerror: {line}{own}. {GOES_ON}\n".encode())  # the main thread may hold sys.stderr
        self.ended = [status, line]
        if self.store and reachable:
            preemption.within(BEAT_S, self._tell)
            preemption.within(BEAT_S, lambda: self.store.key_value_set(f"{KEY}/verdict", json.dumps([status, line])))
            time.sleep(0 if self.index else 2 * BEAT_S)  # host 0's store goes when all have read it
        preemption.leave((status == HOST_LOST and preemption.status_asked()) or status)

    def end(self, status: int | None = None) -> None:
        """Of a process that ends by itself: tells the others. After an error that was explained it does not return, nor
        wait for them where jax waits for all. Others, as a preemption, are everybody's: each host saves what it has."""
        self.deciding.clear()
        if self.store is None or self.ended:
            return
        self.ended = [self.status if status is None else status, self.why]
        with contextlib.suppress(Exception):
            self._tell()
        if not self.why:
            self.quiet.set()
            self.talker.join(BEAT_S)  # Python does not bear a thread at its end that is in a call
            return
        until = time.monotonic() + (0 if self.index else GRACE_S + 3 * BEAT_S)
        while time.monotonic() < until and not all("ended" in self.told.get(i, {}) for i in self.heard):
            time.sleep(POLL_S)
        preemption.leave(self.ended[0])

    def explain(self, error: BaseException) -> None:
        """Keeps what ends this process, for the others. It may be no more than the trace of a host that is gone: what
        that was is found meanwhile, and ends this one."""
        named = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        self.why = f"{named}{first_line(error)}"[:500]
        self.status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        chain = [error, error.__cause__, error.__context__]
        if self.store and any(_COLLECTIVE.search(str(e)) for e in chain if e):
            time.sleep(SILENT_S + GRACE_S + 3 * BEAT_S)

    def _catch_abort(self) -> None:
        """jax ends a process at once when its service, on host 0, is gone, and after its own time-out: a thread of its
        calls abort(). That may be before the sockets of a host that was killed are closed."""

        @ctypes.CFUNCTYPE(None, ctypes.c_int)
        def aborted(_: int) -> None:  # where it returns the process is aborted
            for _ in range(2):
                if line := self._silent(SILENT_S / 2) if self._speaks() else self._unreachable():
                    self._end_all(HOST_LOST, line, reachable=False)
                time.sleep(POLL_S)
            where = PROGRESS.told()["where"]
            os.write(2, f"\nerror: a library has aborted this process in its {where}. {GOES_ON}\n".encode())

        self.aborted = aborted  # as long as this
        ctypes.CDLL(None).signal(signal.SIGABRT, aborted)

    def _speaks(self) -> bool:
        """Whether jax's service is there: gRPC's servers speak first."""
        host, _, port = self.address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), BEAT_S) as connection:
                return bool(connection.recv(1))
        except OSError:
            return False


WATCHDOG = _Watchdog()  # of this process
