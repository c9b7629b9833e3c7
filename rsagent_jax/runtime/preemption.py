"""SIGTERM, as a spot machine or a cluster sends it: what is done is kept, and the command ends within the notice.

A signal sets a flag. Work that comes in pieces looks at it between them by `check`, which raises Preempted; whoever
catches that on its way out keeps what can be gone on with. Of several processes each tells the others through jax's
store, and all_or_none (runtime/processes.py) lets all of them stop at the same place. jax's own service
(multihost_utils.reached_preemption_sync_point) is off: it agrees on the end of a step, which in GRPO is minutes away.

Python runs a signal's handler once the main thread is back from what it computes. So a thread hears of signals here: a
second one, and the end of the notice, end the process whatever it does, as SIGKILL would.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

NOTICE_S = 25.0  # of the thirty that spot machines get
AGAIN_S = 2.0  # within it several signals are one: a process group and a launcher may both pass it on
POLL_S = 0.5  # between two looks at what the other processes say
LAST_WORD_S = 1.0  # that each may take
KEY = "rsagent_jax/preempted"
PREEMPTED = 75  # exit status (EX_TEMPFAIL): stopped by SIGTERM with everything kept; the same command goes on
INTERRUPTED = 128 + signal.SIGINT

last_words: list[Callable[[], None]] = []  # to be done where the process ends at once, which leaves out what atexit has


class Preempted(BaseException):
    """Stops the command, where it can be gone on from. No Exception: no work has failed."""

    def __init__(self, signal_name: str, kept: str = ""):
        """kept: in words, for the terminal."""
        super().__init__(signal_name)
        self.signal_name, self.kept = signal_name, kept


class _Listener:
    """Hears signals, in a thread, and keeps the flag."""

    def __init__(self):
        self.asked, self.asked_at = "", 0.0
        self.waits, self.notice_s = False, NOTICE_S  # whether there is something to be kept by now
        self.meanwhile: Callable[[], None] = lambda: None
        self.tell: Callable[[str], None] = lambda name: None  # the other processes
        self.terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.before: dict[int, Any] = {}
        self.over, self.watcher = threading.Event(), None
        self.take(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup has seen to
            self.take(signal.SIGHUP)
        threading.Thread(target=self._hear, daemon=True).start()

    def take(self, number: int) -> None:
        """The handler does nothing, but without one Python would not write to the pipe."""
        self.before[number] = signal.signal(number, lambda *_: None)

    def close(self) -> None:
        self.over.set()
        if self.watcher:
            self.watcher.join(2 * POLL_S)  # Python does not bear a thread at its end that is in a call
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.writer)  # which ends the thread

    def _hear(self) -> None:
        while numbers := os.read(self.reader, 64):
            for number in set(numbers) & self.before.keys():
                self.ask(signal.Signals(number).name)
        os.close(self.reader)

    def ask(self, name: str) -> None:
        """What a signal does, in any thread. name: of the signal, and where it came."""
        if name == "SIGHUP":  # its terminal is gone: whatever is said there would be an error
            for fd in self.terminals:
                os.dup2(os.open(os.devnull, os.O_RDWR), fd)
        first, self.asked = not self.asked, self.asked or name
        if first:
            self.asked_at = time.monotonic()
            within(LAST_WORD_S + 2 * POLL_S, lambda: self.tell(name))  # the store may be gone already
            if not self.waits:
                self.end(f"stopped by {name} before there was anything to keep; the same command begins again")
            self._say(f"\n{name}: stops as soon as what is done is kept, within {self.notice_s:g} s")
            over = f"the notice of {self.notice_s:g} s is over: ended as it stood; the same command goes on from"
            timer = threading.Timer(self.notice_s, self.end, [f"{over} the last whole checkpoint"])
            timer.daemon = True
            timer.start()
            within(0.0, self.meanwhile)  # it goes on behind this
        elif time.monotonic() - self.asked_at > AGAIN_S:
            self.end(f"{name} again: ended as it stood; the same command goes on from the last whole checkpoint")

    def end(self, line: str) -> None:
        """At once, and as safe as SIGKILL: files change by rename, or are mended by the next start."""
        self._say(line)
        leave(status_of(self.asked))

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())

    def watch(self, store: Any) -> None:
        self.watcher = threading.Thread(target=self._watch, args=(store,), daemon=True)
        self.watcher.start()

    def _watch(self, store: Any) -> None:
        while not self.asked and not self.over.wait(POLL_S):
            said = ()
            with contextlib.suppress(Exception):  # no answer; the watchdog looks for how long
                said = store.key_value_dir_get(KEY)
            if said and not self.over.is_set():
                self.ask(f"{said[0][1]} on process {said[0][0].rpartition('/')[2]}")


_listener: _Listener | None = None


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process with PREEMPTED: at once, or from `defer` on where `check` is called. After one
    of them the process is on its way out, and goes on to listen."""
    global _listener
    if threading.current_thread() is not threading.main_thread():  # which alone hears of signals
        yield
        return
    _listener = _Listener()
    try:
        yield
    finally:
        if not _listener.asked:
            _listener.close()
            _listener = None


def defer(notice_s: float = NOTICE_S, *, interrupts: bool = False) -> None:
    """From now on there is something to keep; the first call counts. interrupts: Ctrl-C waits as well, but a second
    one does not."""
    if _listener and not _listener.waits:
        _listener.waits, _listener.notice_s = True, notice_s
        if interrupts and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _listener.take(signal.SIGINT)


def check() -> None:
    """Raises Preempted once a signal has come, here or to another process."""
    if _listener and _listener.asked:
        raise Preempted(_listener.asked)


def meanwhile(keep: Callable[[], None]) -> None:
    """What to do at once where a signal comes, in a thread, while the work goes on to its next `check`."""
    if _listener:
        _listener.meanwhile = keep


def leave(status: int) -> NoReturn:
    """The end of the process, without that of Python."""
    for word in (*last_words, sys.stdout.flush, sys.stderr.flush):  # a bucket, or the main thread, may hold it up
        within(LAST_WORD_S, word)
    os._exit(status)


def within(seconds: float, call: Callable[[], Any]) -> None:
    """For what may hang, or fail."""

    def go() -> None:
        with contextlib.suppress(Exception):
            call()

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(seconds)


def tell_others(store: Any, index: int) -> None:
    """Process `index` passes on to the others what it hears. store: jax's DistributedRuntimeClient."""

    def tell(name: str) -> None:
        store.key_value_set(f"{KEY}/{index}", name)
        time.sleep(0 if index else 2 * POLL_S)  # the store is host 0's, and goes with it

    if _listener:
        _listener.tell = tell
        _listener.watch(store)


def status_of(signal_name: str) -> int:
    """Ctrl-C is no preemption: nobody should start the command again by himself."""
    return INTERRUPTED if signal_name.startswith("SIGINT") else PREEMPTED


def status_asked() -> int:
    """The exit status of a process that a signal, here or elsewhere, has asked to end; 0 where none has."""
    return status_of(_listener.asked) if _listener and _listener.asked else 0


def _in_a_fork() -> None:
    """Its signals are its own: the pipe is the parent's as well."""
    global _listener
    if _listener:
        signal.set_wakeup_fd(-1)
        for number in _listener.before:
            signal.signal(number, signal.SIG_DFL)
        _listener = None


os.register_at_fork(after_in_child=_in_a_fork)
