"""Side-cars as child processes: started, watched, restarted and never orphaned; and one way to get any segmenter."""

import atexit
import collections
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sam_bridge import backends
from sam_bridge.client import SamClient
from sam_bridge.local import LocalSegmenter
from sam_bridge.types import FailureKind, Segmenter, SegmenterError
from sam_bridge.wire import READY

log = logging.getLogger(__name__)

MODES = ("spawn", "connect", "inprocess")
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 5.0  # between restarts, doubling
HEALTH_EVERY_S, HEALTH_TIMEOUT_S, HEALTH_MISSES = 5.0, 10.0, 3  # a child that lives but answers nothing is killed
STEADY_S = 30.0  # a child that lived this long earns the shortest backoff again
START_TIMEOUT_S = 180.0  # reading the largest checkpoint from a slow disk
TERMINATE_S = 5.0  # between SIGTERM and SIGKILL
STDERR_LINES = 20  # kept for the error message of a child that cannot start


class SideCar(contextlib.AbstractContextManager):
    """A supervised `python -m sam_bridge` child. The child exits when this process does, even when that is killed.

    `address` and `pid` are those of the child of the moment: a restarted one listens on another port. `restarts` counts
    the starts after the first, failed ones included.
    """

    def __init__(
        self, backend: str = "grabcut", options: backends.Options = backends.DEFAULTS, arguments: Sequence[str] = ()
    ):
        """Returns when the child is healthy; raises SegmenterError(UNAVAILABLE) when the first start fails.

        `arguments`: more of `python -m sam_bridge`'s.
        """
        self.backend = backend
        changed = {name: value for name, value in vars(options).items() if value != getattr(backends.DEFAULTS, name)}
        self.arguments = (*(f"--{name}={value}" for name, value in changed.items()), *arguments)
        self.address, self.pid, self.restarts = "", 0, 0
        self._owner = os.getpid()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._listener: Callable[[str], None] = lambda address: None
        self._stderr: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        first = self._start()
        atexit.register(self.close)
        self._thread = threading.Thread(
            target=self._supervise, args=(first,), name="sam_bridge supervisor", daemon=True
        )
        self._thread.start()

    def connect(self, **options) -> SamClient:
        """A client (`options`: SamClient's) that follows the child from restart to restart; the caller closes it."""
        name = self.address
        client = SamClient([name], **options)
        with self._lock:
            self._listener = lambda address: client.move(name, address)
            self._listener(self.address)
        return client

    def close(self, *, at_once: bool = False) -> None:
        """Ends the child and the watching. May be called more than once. at_once: calls under way are given up."""
        if os.getpid() != self._owner:  # a fork of ours is exiting; the side-car is not its own
            return
        self._closing.set()
        atexit.unregister(self.close)
        with self._lock:
            child = self._child
        if child is not None:
            child.kill() if at_once else child.terminate()
            try:
                child.wait(TERMINATE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._thread.join(0 if at_once else None)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """At once where no work has failed, but somebody wants an end: KeyboardInterrupt, a preemption."""
        self.close(at_once=kind is not None and not issubclass(kind, Exception))

    def _supervise(self, child: subprocess.Popen | None) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            born = time.monotonic()
            try:
                child = child or self._start()
                status = self._attend(child)
                child.stdin.close()
                child.stdout.close()
                if not self._closing.is_set():
                    log.warning("side-car %d ended with status %d; starting another", child.pid, status)
            except SegmenterError as error:
                if not self._closing.is_set():
                    log.error("%s", error.detail)
            child = None
            if time.monotonic() - born > STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            if not self._closing.wait(backoff_s):
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                self.restarts += 1

    def _attend(self, child: subprocess.Popen) -> int:
        """Waits for the child's end and returns its status; ends it when it has stopped answering."""
        misses = 0
        while True:
            try:
                return child.wait(HEALTH_EVERY_S)
            except subprocess.TimeoutExpired:
                misses = 0 if _serving(self.address, HEALTH_TIMEOUT_S) else misses + 1
            if misses >= HEALTH_MISSES and not self._closing.is_set():
                log.error("side-car %d lives but answers nothing; killing it", child.pid)
                child.kill()
                return child.wait()

    def _start(self) -> subprocess.Popen:
        """Starts a child, waits until it is healthy, tells the listener."""
        command = [sys.executable, "-m", "sam_bridge", f"--backend={self.backend}", "--address=127.0.0.1:0"]
        command += [f"--parent_pid={os.getpid()}", *self.arguments]
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        with self._lock:
            if self._closing.is_set():
                raise SegmenterError(FailureKind.UNAVAILABLE, "the supervisor is closing")
            # Its own session: Ctrl-C in the terminal is for the parent, which may still need masks to finish its step.
            child = self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # never written to; its end tells the child that we are gone
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        threading.Thread(target=self._forward, args=(child,), daemon=True).start()
        overdue = threading.Timer(START_TIMEOUT_S, child.kill)  # ends a readline that would wait for ever
        overdue.start()
        try:
            address = self._await_ready(child)
        finally:
            overdue.cancel()
        with self._lock:
            self.address, self.pid = address, child.pid
            self._listener(address)
        return child

    def _await_ready(self, child: subprocess.Popen) -> str:
        line = child.stdout.readline()
        if line.startswith(READY):
            address = line.removeprefix(READY).split()[0]
            if _serving(address, START_TIMEOUT_S):
                return address
        child.kill()
        status = child.wait()
        said = " | ".join(self._stderr) or "it said nothing"
        detail = f"side-car {self.backend!r} did not become ready (status {status}): {said}"
        raise SegmenterError(FailureKind.UNAVAILABLE, detail)

    def _forward(self, child: subprocess.Popen) -> None:
        """The child's stderr goes on to ours; the last lines are kept for an error message."""
        with child.stderr:
            for line in child.stderr:
                self._stderr.append(line.rstrip())
                print(line, end="", file=sys.stderr, flush=True)


def _serving(address: str, timeout_s: float) -> bool:
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            log.warning("health check of %s failed: %s", address, error.details())
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING


@contextlib.contextmanager
def spawn_segmenter(
    mode: str = "spawn",
    backend: str = "grabcut",
    addresses: Sequence[str] = (),
    *,
    options: backends.Options = backends.DEFAULTS,
    **connection,
) -> Iterator[Segmenter]:
    """A segmenter for as long as the `with` block lasts.

    spawn: a side-car of our own, restarted when it dies. connect: side-cars that run already at `addresses`; one error
    within `wait_s` when one of them does not answer. inprocess: the back end itself, without a bridge. `options` are
    for the first and the last, `connection` (SamClient's keywords) for the first two. All have `counters()`.
    """
    if mode not in MODES:
        raise ValueError(f"unknown segmenter mode {mode!r}; options: {', '.join(MODES)}")
    if mode == "inprocess":
        with contextlib.closing(LocalSegmenter(backends.load_backend(backend, options))) as segmenter:
            yield segmenter
    elif mode == "connect":
        with SamClient(addresses, **connection) as client:
            client.info()
            yield client
    else:
        with SideCar(backend, options) as side_car, side_car.connect(**connection) as client:
            yield client
