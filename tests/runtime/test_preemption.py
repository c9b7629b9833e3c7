"""What signals do to a command that can be gone on with: in processes of their own, whose main thread is stuck in C."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.simulated import ROOT

# The handlers of Python never run here: a mutex that is locked twice, and cannot be interrupted.
STUCK = """
import ctypes, sys
from rsagent_jax.runtime import preemption
preemption.AGAIN_S = 0.0
with preemption.listening():
    preemption.last_words.append(lambda: print("last word", flush=True))
    {more}
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
LOOP = """
import sys, time
from rsagent_jax.runtime import preemption
from rsagent_jax.runtime.preemption import Preempted
try:
    with preemption.listening():
        {more}
        print("ready", flush=True)
        for _ in range(500):
            preemption.check()
            time.sleep(0.01)
except Preempted as stop:
    preemption.leave(preemption.status_of(stop.signal_name))
"""


def on_hangup(handler: signal.Handlers) -> Callable[[], object]:
    """For a child: tests that run under nohup would pass on to it that it ignores the signal."""
    return lambda: signal.signal(signal.SIGHUP, handler)


def end_of(code: str, more: str, *signals: int, hangup: signal.Handlers = signal.SIG_DFL) -> tuple[int, str]:
    """Exit status and what is said on stderr by a program that these signals come to, one after another."""
    argv = [sys.executable, "-c", code.format(more=more)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, cwd=ROOT, preexec_fn=on_hangup(hangup), **pipes)
    try:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, process.stderr.read()
        said = ""
        for number in signals:
            process.send_signal(number)
            while "stops as soon as" not in said and (line := process.stderr.readline()):  # the first has been heard
                said += line
        said += process.stderr.read()
        return process.wait(), said
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("more", "signals", "said"),
    [
        ("", [signal.SIGTERM], "stopped by SIGTERM before there was anything to keep"),
        ("preemption.defer(0.3)", [signal.SIGTERM], "the notice of 0.3 s is over"),
        ("preemption.defer(60)", [signal.SIGTERM, signal.SIGTERM], "SIGTERM again: ended as it stood"),
        ("preemption.defer(60)", [signal.SIGHUP, signal.SIGTERM], "SIGTERM again: ended as it stood"),
    ],
)
def test_the_process_ends_whatever_its_main_thread_does(more, signals, said):
    status, err = end_of(STUCK, more, *signals)
    assert (status, said in err.splitlines()[-1]) == (75, True), err
    assert len([line for line in err.splitlines() if line]) == (2 if more else 1)


def test_work_in_pieces_stops_between_them():
    assert end_of(LOOP, "preemption.defer(60)", signal.SIGTERM)[0] == 75
    assert end_of(LOOP, "preemption.defer(60)", signal.SIGTERM, signal.SIGTERM)[0] == 75  # passed on by two, at once
    interrupts = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); preemption.defer(60, {})"
    assert end_of(LOOP, interrupts.format("interrupts=True"), signal.SIGINT)[0] == 130
    status, err = end_of(LOOP, interrupts.format(""), signal.SIGINT)  # as Python does
    assert status != 75 and "KeyboardInterrupt" in err


def test_a_dropped_session_stops_it_and_nohup_keeps_it():
    assert end_of(LOOP, "preemption.defer(60)", signal.SIGHUP)[0] == 75
    status, err = end_of(LOOP, "preemption.defer(60)", signal.SIGHUP, hangup=signal.SIG_IGN)
    assert (status, err) == (0, "")
    main, terminal = pty.openpty()
    code = LOOP.replace("except Preempted as stop:", "except Preempted as stop:\n    print('kept', file=sys.stderr)")
    child = subprocess.Popen(
        [sys.executable, "-c", code.format(more="preemption.defer(60)")],
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=on_hangup(signal.SIG_DFL),
    )  # fmt: skip
    os.close(terminal)
    with os.fdopen(main, "rb", buffering=0) as screen:
        assert screen.readline() == b"ready\r\n"  # whose end may come after the word
    # from now on whatever it says there is an error
    child.send_signal(signal.SIGHUP)
    assert child.wait(100) == 75


def test_a_signal_to_a_forked_child_is_its_own():
    fork = "import os, signal; preemption.defer(60); reads, writes = os.pipe(); child = os.fork()"
    waits = "child or (os.write(writes, b'1'), time.sleep(60), os._exit(1)); os.read(reads, 1)"
    kill = "os.kill(child, signal.SIGTERM); print(os.waitpid(child, 0)[1], file=sys.stderr)"
    assert end_of(LOOP, f"{fork}; {waits}; {kill}") == (0, f"{int(signal.SIGTERM)}\n")
