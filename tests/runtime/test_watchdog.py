"""Hosts that die, stop, are cut off, fail or hang: what the others say and when, and what the next start finds.

Every host is a process (tests/watched_worker.py) with times that are a tenth of a run's: silent for 4 s is gone.
"""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rsagent_jax.data.pipeline import Pipeline
from rsagent_jax.runtime.progress import PROGRESS, _Progress
from rsagent_jax.runtime.watchdog import HOST_LOST
from tests.simulated import ROOT, start_simulated

pytestmark = pytest.mark.slow

SOON_S = 60.0  # on a busy machine; jax itself would give another status


@contextlib.contextmanager
def hosts(count: int, *flags: str, **how):
    """They run, and have made five steps."""
    running = start_simulated(["tests/watched_worker.py", *flags], 1, count, **how)
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def until_step(process, step: int) -> None:
    for line in process.stdout:
        if line.startswith(f"step {step}"):
            return
    raise AssertionError(process.stderr.read()[-3000:])


def ends(process) -> tuple[int, str]:
    """Exit status, and the last line of stderr."""
    _, error = process.communicate(timeout=SOON_S)
    return process.returncode, error.strip().splitlines()[-1]


def wait_and_see(running, gone: int, says: str) -> None:
    """All but host `gone` end soon, with the status of a lost host and a line with this in it."""
    for process in (p for i, p in enumerate(running) if i != gone):
        status, line = ends(process)
        assert status == HOST_LOST and re.search(says, line), (status, line)


@pytest.mark.parametrize(
    ("count", "gone", "how", "says"),
    [
        (2, 1, signal.SIGKILL, r"no sign of life for \d+ s of host 1 of 2 .*, last heard of in its \w+ of step \d"),
        (2, 0, signal.SIGKILL, r"host 0 of 2 .* cannot be reached any more"),
        (2, 0, signal.SIGSTOP, r"host 0 of 2 .* cannot be reached any more"),
        (4, 2, signal.SIGSTOP, r"no sign of life for \d+ s of host 2 of 4 .*\(this one: \w+ of step \d+\). Nothing"),
    ],
)
def test_others_end_and_name_a_host_that_is_killed_or_stopped(count, gone, how, says):
    with hosts(count) as running:
        until_step(running[0], 5)
        running[gone].send_signal(how)
        wait_and_see(running, gone, says)
        assert running[gone].poll() == (-signal.SIGKILL if how == signal.SIGKILL else None)


class Cable:
    """Forwards TCP to an address, until it is cut: then nothing passes any more, and no connection is closed."""

    def __init__(self, address: str):
        host, port = address.split(":")
        self.to, self.cut, self.ends = (host, int(port)), threading.Event(), []
        self.door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.door.getsockname()[1]}"
        threading.Thread(target=self.connect, daemon=True).start()

    def connect(self) -> None:
        while True:
            near = self.door.accept()[0]
            if self.cut.is_set():
                continue
            far = self._reach()
            self.ends += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self.forward, args=pair, daemon=True).start()

    def _reach(self) -> socket.socket:
        while True:  # its other end may not listen yet
            with contextlib.suppress(OSError):
                return socket.create_connection(self.to)
            time.sleep(0.05)

    def forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.cut.is_set():
                    target.sendall(data)


def test_a_host_that_is_cut_off_ends_and_so_do_the_others():
    """The hosts meet in jax's store alone: a collective's own connections do not go by the cable."""
    cables = []

    def reach(i: int, address: str) -> str:
        if i == 0:
            return address
        cables.append(Cable(address))
        return cables[-1].address

    with hosts(3, "--outside", reach=reach) as running:
        until_step(running[0], 5)
        cables[0].cut.set()  # of host 1
        (status, line), *others = [ends(process) for process in (running[1], running[0], running[2])]
        assert status == HOST_LOST and "host 0 of 3" in line and "cannot be reached any more" in line
        assert all(status == HOST_LOST and "of host 1 of 3" in line for status, line in others)


def test_one_that_fails_ends_the_others_with_its_status_and_its_reason():
    with hosts(3, "--fails=0/6") as running:  # which holds the store that the others hear it from
        until_step(running[0], 5)
        said = [ends(process) for process in running]
    assert said[0] == (2, "error: the segmenter stays away")
    for status, line in said[1:]:
        assert status == 2 and "has ended with status 2 in its rollout of step 6: the segmenter stays away" in line


def test_one_that_hangs_is_named_and_not_those_that_wait_for_it():
    with hosts(2, "--hangs=1/6", "--hang_s=40") as running:
        until_step(running[0], 5)
        for status, line in map(ends, running):
            assert status == HOST_LOST
            says = r"error: host 1 of 2 .* has not got on in its rollout of step 6 for \d+ s \((?!40 )\d+ s are allowed"
            assert re.search(says, line)


def test_a_process_alone_that_hangs_ends():
    with hosts(1, "--hangs=0/3", "--hang_s=40") as running:
        until_step(running[0], 1)
        status, line = ends(running[0])
    assert status == HOST_LOST and line.startswith("error: this process has not got on in its rollout of step 3 for ")


def test_a_killed_host_leaves_no_save_half_and_one_that_fails_to_save_ends_all(tmp_path):
    """Killed while it saves, in every step; then without room on host 1, from the third step of the next start on."""
    saves = f"--saves={tmp_path}"
    with hosts(2, saves) as running:
        until_step(running[0], 5)
        running[1].kill()
        wait_and_see(running, 1, "host 1 of 2")
    with hosts(2, saves, "--full=1/3") as running:
        said = [process.communicate(timeout=300) for process in running]
        assert [process.returncode for process in running] == [74, 74], said
    first, other = (int(re.search(r"restored (\d+)", out)[1]) for out, _ in said)
    assert first == other >= 4
    assert re.search(f"/{first + 3} cannot be written .*the last whole one is {first + 2}", said[1][1])


# ------------------------------------------------------------------------------------------------ abort() in a library

ABORTS = """
import os, sys
from rsagent_jax.runtime import watchdog
dog = watchdog.WATCHDOG
dog.index, dog.count, dog.address = 1, 2, sys.argv[1]
watchdog.BEAT_S, watchdog.POLL_S, watchdog.GRACE_S = float(sys.argv[2]), 0.1, 0.5
dog._catch_abort()
os.abort()
"""


@pytest.mark.parametrize(
    ("speaks", "status", "says"),
    [
        (True, -signal.SIGABRT, "error: a library has aborted this process in its start. Nothing was saved half"),
        (False, HOST_LOST, "error: host 0 of 2, where all meet, cannot be reached any more"),  # stopped, or in its end
        (None, HOST_LOST, "error: host 0 of 2, where all meet, cannot be reached any more"),
    ],
)
def test_an_abort_says_whether_host_0_is_still_there(speaks, status, says):
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = f"127.0.0.1:{door.getsockname()[1]}"

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    door.accept()[0].sendall(b"x")

        if speaks:
            threading.Thread(target=answer, daemon=True).start()
        elif speaks is None:
            door.close()
        answers_s = "60" if speaks else "0.3"  # an answer is waited for, and silence is not
        code = [sys.executable, "-c", ABORTS, address, answers_s]
        ended = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=SOON_S)
    assert ended.returncode == status and ended.stderr.strip().startswith(says), ended


# ------------------------------------------------------------------------------------------------- one's own progress


def test_how_long_a_part_may_take(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = _Progress()
    assert progress.told() == {"number": 0, "where": "start", "idle": 0.0, "limit": 0.0, "late": False}  # no limit
    progress.limit(first_s=600.0, answer_s=30.0)

    def after(seconds: float) -> dict:
        clock[0] += seconds
        return progress.told()

    progress.enter("update", 1)
    assert after(631)["late"] and not after(-2)["late"]  # the first time
    progress.enter("batch", 1)
    progress.enter("update", 2)
    assert (after(12)["limit"], progress.told()["late"]) == (90.0, False)  # 60 + 30
    progress.enter("batch", 2)
    progress.enter("update", 3)
    assert after(0)["limit"] == 120.0  # ten times twelve
    progress._compiles("/jax/core/compile/backend_compile_duration", 1.0)
    assert after(0)["limit"] == 630.0
    progress.enter_part("rollout")
    progress.get_on()
    assert after(91)["late"] and after(0)["where"] == "update of step 3 (rollout)"
    progress.get_on()
    assert not after(0)["late"] and progress.told()["number"] == 5
    for _ in range(2):
        progress.enter_part("writing", slow=True)
        assert not after(629)["late"]


def test_readers_that_hang_are_seen():
    hangs, goes_on = threading.Event(), threading.Event()

    class Hangs(list):
        def __getitem__(self, index):
            hangs.set()
            return goes_on.wait()

    def draw():
        Pipeline(Hangs([1, 2]), seed=0, threads=1).draw(1)

    PROGRESS.enter("batch", 7)
    reader = threading.Thread(target=draw, daemon=True)
    reader.start()
    assert hangs.wait(60)
    assert PROGRESS.told()["where"] == "batch of step 7 (reading)"
    goes_on.set()
    reader.join()
