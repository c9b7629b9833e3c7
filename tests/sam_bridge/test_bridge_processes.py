"""Real processes: the command line's refusals, a side-car killed in use, no orphans, pure imports."""

import concurrent.futures
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rsagent_jax.runtime.listening import free_port
from sam_bridge.backends import Options
from sam_bridge.client import SamClient
from sam_bridge.spawn import SideCar, spawn_segmenter
from sam_bridge.types import FailureKind, SegmenterError, SegmentRequest
from tests.sam_bridge.fakes import BOX, failure, healthy, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)


def state(stat: Path) -> str:
    """Of a process or thread by its file of /proc; Z once it has ended, whether somebody has asked how or not."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def gone(pid: int) -> bool:
    return state(Path(f"/proc/{pid}/stat")) == "Z"


@pytest.fixture(scope="module")
def side_car():
    side_car = SideCar("grabcut")
    yield side_car
    side_car.close()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend=nothing"], "options: grabcut, sam2"),
        (["--backend=sam2"], "--checkpoint=FILE.pt"),
        (["--backend=no.such:thing"], "cannot be imported"),
        (["--backend=grabcut", "--address=0.0.0.0:50051"], "--insecure"),
        (["--backend=grabcut", "--address={taken}"], "already in use; is another one running?"),
        (["--backend=grabcut", "--address=127.0.0.1:0", "--metrics_address=0.0.0.0:0"], "--insecure"),
        (["--backend=grabcut", "--address=127.0.0.1:0", "--device=cuda"], "only the sam2 back end"),
        (["--backend=grabcut", "--address=127.0.0.1:0", "--tls_cert=cert.pem"], "--tls_key"),
    ],
)
def test_command_line_refuses_with_one_line_and_status_2(side_car, arguments, says):
    done = run("-m", "sam_bridge", *(a.format(taken=side_car.address) for a in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_every_option_says_what_it_is():
    text = " ".join(run("-m", "sam_bridge", "--help").stdout.split())
    for option in dataclasses.fields(Options):
        assert f"--{option.name} {option.name.upper()} of sam2: {option.metadata['help']}" in text, option.name


def test_killed_in_use_no_call_is_lost_and_masks_stay_the_same(image, local):
    first = local.segment(image, BOX)
    refined = SegmentRequest(points=((100.0, 34.0),), labels=(1,), refine_logits_id=first.logits_id)
    expected = [first.mask, local.segment(image, refined).mask]
    with SideCar("grabcut") as side_car, side_car.connect() as client:
        client.segment(image, BOX)
        stop, wrong, answered = threading.Event(), [], []

        def use():
            while not stop.is_set():
                for request, mask in zip((BOX, refined), expected, strict=True):
                    try:
                        same = np.array_equal(client.segment(image, request).mask, mask)
                    except SegmenterError as error:
                        wrong.append(error)
                    else:
                        answered.append(same)

        users = [threading.Thread(target=use) for _ in range(3)]
        for user in users:
            user.start()
        for restarts in (1, 2):
            until(lambda enough=4 * restarts: len(answered) >= enough or wrong)  # it is killed in use
            pid = side_car.pid
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: side_car.pid != pid)
            assert side_car.restarts == restarts
        # A mask made before the kill can still be refined: the client makes it again.
        np.testing.assert_array_equal(client.segment(image, refined).mask, expected[1])
        stop.set()
        for user in users:
            user.join()
        last = side_car.pid
    assert not wrong and all(answered) and len(answered) > 6
    until(lambda: gone(last))


@pytest.mark.parametrize("fork_holds_the_pipe", [False, True])
def test_parents_death_ends_the_child(fork_holds_the_pipe):
    """A fork that outlives the parent keeps the child's stdin open; then the changed parent pid tells."""
    fork = "os.fork() or (time.sleep(30), os._exit(0))" if fork_holds_the_pipe else "None"
    code = (
        "import os, time; from sam_bridge.spawn import SideCar; s = SideCar('grabcut');"
        f"{fork}; print(s.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    assert not gone(pid)
    parent.kill()
    parent.wait()
    until(lambda: gone(pid), 20)
    parent.stdout.close()


def test_ordinary_exit_without_close_ends_the_child():
    done = run("-c", "from sam_bridge.spawn import SideCar; print(SideCar('grabcut').pid)")
    assert done.returncode == 0
    until(lambda: gone(int(done.stdout)))


def test_one_that_lives_but_answers_nothing_is_killed_and_restarted(image, monkeypatch):
    monkeypatch.setattr("sam_bridge.spawn.HEALTH_TIMEOUT_S", 1.0)
    monkeypatch.setattr("sam_bridge.spawn.HEALTH_EVERY_S", 0.2)
    with SideCar("grabcut") as side_car, side_car.connect() as client:
        mask, pid = client.segment(image, BOX).mask, side_car.pid
        time.sleep(1.0)
        assert side_car.restarts == 0  # one that answers is left alone
        os.kill(pid, signal.SIGSTOP)
        threads = Path(f"/proc/{pid}/task")
        until(lambda: {state(file) for file in threads.glob("*/stat")} == {"T"})  # one by one; till then one may answer
        np.testing.assert_array_equal(client.segment(image, BOX).mask, mask)
        assert side_car.restarts == 1 == client.counters()["restarts"]
        until(lambda: gone(pid))


def test_check_draws_what_came_back(side_car, tmp_path):
    out = tmp_path / "check.png"
    done = run("-m", "sam_bridge.check", f"--address={side_car.address}", f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all held" in done.stdout and "FAILS" not in done.stdout and "the box finds the disc" in done.stdout
    with PIL.Image.open(out) as image:
        assert image.size == (4 * 320, 240 + 18)
        red = np.asarray(image)[18:, :320].astype(int)
    disc = red[105, 125] - red[20, 300]  # the middle of the disc against a corner: tinted
    assert disc[0] > 80
    nobody = run("-m", "sam_bridge.check", "--address=127.0.0.1:9", "--wait_s=0.3", f"--out={out}")
    assert nobody.returncode == 2 and nobody.stderr.startswith("check failed: unavailable")


@pytest.mark.parametrize("grace_s", [20.0, 0.0])
def test_sigterm_drains(grace_s):
    """A call under way when SIGTERM comes is answered within the grace, and given up without one; status 0."""
    metrics = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "sam_bridge", "--backend=tests.sam_bridge.fakes:Slow", "--address=127.0.0.1:0"]
    open_ = metrics.replace("127.0.0.1", "0.0.0.0")
    command += [f"--grace_s={grace_s}", f"--metrics_address={open_}", "--insecure"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = f"sam_bridge: {open_} can be reached from other machines without TLS and a token, as --insecure allows\n"
    assert child.stderr.readline() == said
    address = child.stdout.readline().split("sam_bridge ready address=")[1].split()[0]
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=60) as page:
        assert b"sam_bridge_encodes_total 0.0" in page.read()
    with SamClient([address]) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        image = np.zeros((8, 8, 3), np.uint8)
        client.segment(image, SegmentRequest(box=(0, 0, 1, 1)))  # quick: the connection and the image are there
        client.wait_s = 0.2
        call = pool.submit(client.segment, image, SegmentRequest(box=(0, 0, 4 if grace_s else 8, 4)))
        assert [child.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
        child.terminate()
        if grace_s:
            assert call.result(60).mask.sum() == 16
        else:
            assert failure(call.result, 60).kind is FailureKind.UNAVAILABLE
    assert child.wait(60) == 0
    child.stdout.close()
    child.stderr.close()


def test_side_car_that_cannot_start_says_why():
    error = failure(SideCar, "sam2")
    assert error.kind is FailureKind.UNAVAILABLE and "--checkpoint" in error.detail


def test_the_health_service_answers_for_the_process_and_for_the_bridge(side_car):
    assert healthy(side_car.address) and healthy(side_car.address, "sam_bridge.v1.SamBridge")


def test_an_unknown_mode_names_those_that_there_are():
    """What each of them gives: tests/agent/test_segmenter.py."""
    with pytest.raises(ValueError, match="options: spawn, connect, inprocess"):
        spawn_segmenter("magic").__enter__()
