"""Runs train.py or evaluate.py in a fork, counts its events, and ends it at one of them (benchmarks/kill.py).

An event of the kind "file" is one that changes a file or a folder of --workdir, just before it does, or synchronises a
file: SIGKILL leaves half of a line there that was about to be. One of the kind "work" is a call of the
engine, of a tool or of a reward term, the packing of a batch, or the end of a part of a step. Its phase is that of
runtime/progress.py; what is written below checkpoints/ is of the phase "checkpoint", in whatever phase Orbax's threads
do it.
"""

import collections
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

from rsagent_jax.runtime import command, preemption, workdir_lock
from rsagent_jax.runtime.progress import PROGRESS

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
WORK = {
    "rollout.engine": ("Engine.step",),
    "agent.environment": ("run_tool",),
    "rewards": ("final_iou", "iou_gain", "format_ok"),
    "train.batch_source": ("pack_evenly",),
    "train.throughput": ("StepClock.lap",),
}
PHASES = {"validation": "update"}  # the line of metrics.jsonl is written in it
TIMEOUT_S, POLL_S = 900.0, 0.02


@dataclasses.dataclass(frozen=True)
class Point:
    """The event, counted from 1, at which a run gets a signal; phase "": of any."""

    phase: str
    kind: str
    at: int
    signal: str


@dataclasses.dataclass(frozen=True)
class Run:
    status: int  # exit status; minus the signal's number where that ended it
    text: str  # what it printed
    counts: dict[str, int]  # of "phase kind"
    signalled: bool
    seconds: float  # from the signal, or the start, to the exit
    turns: int  # that the step under way had drawn at the end


def run(name: str, flags: list[str], folder: pathlib.Path, point: Point | None = None) -> Run:
    """What the console script rsagent-NAME does with these flags and --workdir=FOLDER, up to its end."""
    report, log = folder.with_suffix(".json"), folder.with_suffix(".log")
    report.unlink(missing_ok=True)
    start = time.monotonic()
    if (child := os.fork()) == 0:
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            _Events(report, folder, point).listen()
            sys.argv = [f"rsagent-{name}", *flags, f"--workdir={folder}"]
            command.console_script()
        except SystemExit as end:
            preemption.leave(end.code or 0)
        except BaseException:  # noqa: BLE001 the fork must not go on as what it is a fork of
            sys.excepthook(*sys.exc_info())
        finally:
            preemption.leave(1)
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - start > TIMEOUT_S:
            os.kill(child, signal.SIGKILL)
        time.sleep(POLL_S)
    said = json.loads(report.read_text())
    seconds = time.monotonic() - (said["sent"] or start)
    status = os.waitstatus_to_exitcode(ended[1])
    return Run(status, log.read_text(errors="replace"), said["counts"], bool(said["sent"]), seconds, said["turns"])


class _Events:
    def __init__(self, report: pathlib.Path, workdir: pathlib.Path, point: Point | None):
        self.report, self.workdir, self.point = report, f"{workdir}/", point
        self.counts, self.turns = collections.Counter(), collections.Counter()
        self.lock, self.sent = threading.RLock(), None

    def listen(self) -> None:
        for name, functions in WORK.items():
            for function in functions:
                _before(importlib.import_module(f"rsagent_jax.{name}"), function, lambda *_: self.happens("work"))
        _before(importlib.import_module("rsagent_jax.rollout.driver"), "Driver._add", self.drawn)
        _before(os, "fsync", lambda fd: self.happens("file", os.readlink(f"/proc/self/fd/{fd}"), synchronised=True))
        sys.addaudithook(self.audit)
        preemption.last_words.append(self.write)

    def audit(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        path = str(arguments[0]) if writes or event in CHANGES else ""
        holder = workdir_lock.FILE in path or workdir_lock.JOURNAL in path  # its beat follows the clock
        if path.startswith(self.workdir) and not holder:
            self.happens("file", path)

    def happens(self, kind: str, path: str = "", synchronised: bool = False) -> None:
        phase = PHASES.get(PROGRESS.phase, PROGRESS.phase)
        if phase == "batch":
            phase = "reward" if PROGRESS.part == "reward" else "rollout"
        if "/checkpoints/" in path:
            phase = "checkpoint"
        with self.lock:
            for name in {phase, ""}:
                self.counts[f"{name} {kind}"] += 1
            p = self.point
            here = p and not self.sent and p.phase in (phase, "") and p.kind == kind
            if here and self.counts[f"{p.phase} {kind}"] == p.at:
                self.end(path if synchronised else "")

    def end(self, synchronised: str) -> None:
        self.sent, number = time.monotonic(), signal.Signals[self.point.signal]
        if synchronised.endswith(".jsonl") and number == signal.SIGKILL:
            *_, last = pathlib.Path(synchronised).read_bytes().splitlines()
            os.truncate(synchronised, os.path.getsize(synchronised) - 1 - len(last) // 2)
        self.write()
        os.kill(os.getpid(), number)

    def drawn(self, *_: object) -> None:
        self.turns[PROGRESS.step] += 1

    def write(self) -> None:
        said = {"counts": self.counts, "sent": self.sent, "turns": self.turns[PROGRESS.step]}
        self.report.write_text(json.dumps(said))


def _before(module, name: str, call) -> None:
    """`call` gets the arguments of every call of the function, first."""
    *owner, name = name.split(".")
    place = getattr(module, owner[0]) if owner else module
    function = getattr(place, name)

    @functools.wraps(function)
    def both(*args, **kwargs):
        call(*args)
        return function(*args, **kwargs)

    setattr(place, name, both)
