"""Where rsagent_jax.launch runs a command: on all hosts of a Cloud TPU slice, through gcloud, or on this machine.

What gcloud does itself is left to it: keys, which hosts there are, ssh to all of them at once, the queue for a slice.
It repeats a command whose connection broke, up to ten times; HOST_SCRIPT, which it is given, starts the command the
first time and else goes on listening to it.
"""

import dataclasses
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence

from rsagent_jax.runtime.hosts import VARIABLES, die_with_parent, exit_status
from rsagent_jax.runtime.listening import free_port
from rsagent_jax.runtime.preemption import INTERRUPTED, PREEMPTED
from rsagent_jax.types import DataError

TPUS = {  # a slice's kind -> the accelerator type's, and the runtime version
    "v5e": ("v5litepod", "v2-alpha-tpuv5-lite"),
    "v6e": ("v6e", "v2-alpha-tpuv6e"),
    "v5p": ("v5p", "v2-alpha-tpuv5"),
}
ACTIVE, LOST = "ACTIVE", ("SUSPENDED", "FAILED")  # states of a queued resource; it waits, or is being made, in others
POLL_S = 20.0
NOTICE_S = 30  # for a command to save and to end, once it was told to
OTHERS_S = 90  # for other processes to notice that one has failed, and to end
USER_ERROR = 2  # exit status of every command (runtime/command.py)
# {run} names one start of the command, and its files, on every host. The file that is named for the host's boot has the
# process group of the last start. If that is another one, it is stopped first; a launch that still listens to it ends.
HOST_SCRIPT = """
run=~/.rsagent_launch/{run}; last=~/.rsagent_launch/$(cat /proc/sys/kernel/random/boot_id); lines=20
if [ ! -e $run.log ]; then
  if [ -s $last ]; then
    read -r group earlier < $last
    echo {interrupted} > $earlier.status
    kill -TERM -- -$group 2>/dev/null
    for second in $(seq {notice}); do kill -0 -- -$group 2>/dev/null || break; sleep 1; done
    kill -KILL -- -$group 2>/dev/null
  fi
  mkdir -p ~/.rsagent_launch && : > $run.log && lines=+1
  setsid bash -c {inner} < /dev/null >> $run.log 2>&1 &
  echo $! $run > $last
fi
read -r group started < $last
tail -n $lines -s 0.5 -f --pid=$group $run.log
exit $(cat $run.status)
"""


class GcloudError(Exception):
    """What gcloud said when it failed."""


@dataclasses.dataclass
class TpuSlice:
    """A slice that is made, and made anew when it has been taken away, by a queued resource of the same name."""

    size: str  # such as v5e-16
    name: str
    zone: str = ""  # gcloud's own setting if empty, as of the project
    project: str = ""
    spot: bool = False
    setup: str = ""  # a shell command, once on every host
    directory: str = "."  # of a host, below its home, where commands run
    seen: bool = False  # whether it has been there since this object was made

    def __post_init__(self):
        if not re.fullmatch(rf"({'|'.join(TPUS)})-\d+", self.size):
            raise DataError(f"--slice={self.size}: {', '.join(TPUS)} and a number, such as v5e-16, are known here")

    def run(self, argv: Sequence[str]) -> int:
        """The command's exit status: that of the first host where it is not 0; PREEMPTED where the slice is gone.
        DataError where gcloud is missing, or refuses the first slice."""
        try:
            self.provide()
        except GcloudError as error:
            if not self.seen:
                raise DataError(f"gcloud gives no slice: {error}") from None
            print(f"launch: gcloud gives no slice: {error}", flush=True)
            return 1
        self.seen = True
        status = self._run_on_hosts(f"--command={self.script(argv)}")
        try:
            return PREEMPTED if status and self.state()[0] != ACTIVE else status
        except GcloudError as error:
            print(f"launch: {error}", flush=True)
            return status

    def _run_on_hosts(self, command: str) -> int:
        """gcloud's exit status, or that of the first host to fail where another has not ended OTHERS_S later: it may
        stand still, and is stopped by the next start. A host that does not answer is given up by ssh."""
        where = ("--worker=all", "--ssh-flag=-oServerAliveInterval=30", command)
        process = self._gcloud_process("tpu-vm", "ssh", self.name, *where, stderr=subprocess.PIPE)
        end = lambda: os.killpg(process.pid, signal.SIGKILL)  # noqa: E731 with the ssh of each host
        failed, timer = 0, threading.Timer(OTHERS_S, end)
        try:
            for line in process.stderr:
                print(line, end="", file=sys.stderr, flush=True)
                if not failed and (match := re.search(r"worker \d+ failed with exit status (\d+)", line)):
                    failed = int(match[1])
                    timer.start()
            status = exit_status(process.wait())
        finally:
            timer.cancel()
            if process.poll() is None:
                end()
        return failed if status == 128 + signal.SIGKILL else status

    def provide(self) -> None:
        """Waits until the slice is there."""
        asked = False
        while (state := self.state())[0] != ACTIVE:
            if state[0] in LOST:
                if asked:
                    raise GcloudError(" ".join(state))
                print(f"launch: {self.name} is {' '.join(state)}: deleted, and asked for again", flush=True)
                self._gcloud("queued-resources", "delete", self.name, "--force")
                state = ("",)
            if not state[0]:
                self.create()
                asked = True
            time.sleep(POLL_S)

    def create(self) -> None:
        kind, _, count = self.size.partition("-")
        print(f"launch: asks for {self.name}, {self.size}{', spot' * self.spot}", flush=True)
        options = [f"--accelerator-type={TPUS[kind][0]}-{count}", f"--runtime-version={TPUS[kind][1]}"]
        options += [f"--node-id={self.name}", *["--spot"] * self.spot]
        self._gcloud("queued-resources", "create", self.name, *options)

    def state(self) -> tuple[str, ...]:
        """Of the queued resource, and why it failed; ("",) for none."""
        fields = "--format=value(state.state,state.failedData.error.message)"
        listed = self._gcloud("queued-resources", "list", f"--filter=name~/{self.name}$", fields)
        return tuple(filter(None, listed.split("\t"))) or ("",)

    def script(self, argv: Sequence[str]) -> str:
        """What a host's shell is given."""
        run, mark = uuid.uuid4().hex[:12], f"~/.rsagent_launch/{hashlib.sha256(self.setup.encode()).hexdigest()[:12]}"
        inner = f"cd ~/{shlex.quote(self.directory)} || exit {USER_ERROR}; {shlex.join(argv)}"
        if self.setup:  # its own exit status may mean anything
            inner = f"test -e {mark} || {{ (cd; {self.setup}\n) && touch {mark}; }} || exit 1; {inner}"
        inner = f"({inner}); echo $? > ~/.rsagent_launch/{run}.status"
        return HOST_SCRIPT.format(run=run, notice=NOTICE_S, interrupted=INTERRUPTED, inner=shlex.quote(inner))

    def _gcloud_process(self, *words: str, **streams: int) -> subprocess.Popen:
        where = [f"--{flag}={value}" for flag in ("zone", "project") if (value := getattr(self, flag))]
        try:
            argv = ["gcloud", "compute", "tpus", *words, *where, "--quiet"]
            return subprocess.Popen(argv, stdin=subprocess.DEVNULL, text=True, start_new_session=True, **streams)
        except FileNotFoundError:
            raise DataError("gcloud is not installed (cloud.google.com/sdk); --local=1 runs on this machine") from None

    def _gcloud(self, *words: str) -> str:
        """What it prints. GcloudError with its last words where it fails."""
        process = self._gcloud_process(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, error = process.communicate()
        if process.returncode:
            raise GcloudError(" ".join(error.split())[-600:])
        return out.strip()


@dataclasses.dataclass(frozen=True)
class LocalProcesses:
    """`count` processes on this machine, which find each other as the hosts of a slice do."""

    count: int

    def run(self, argv: Sequence[str]) -> int:
        """The command's exit status: 0 where all have ended well, PREEMPTED where one was told to end, USER_ERROR
        where one says so, else that of the first that failed. DataError where there is no such program."""
        address = f"127.0.0.1:{free_port()}"
        children: list[subprocess.Popen] = []
        try:
            for i in range(self.count):
                who = dict(zip(VARIABLES, (address, str(self.count), str(i)), strict=True)) if self.count > 1 else {}
                children.append(subprocess.Popen(argv, env=os.environ | who, preexec_fn=die_with_parent))
            codes = _wait(children)
        except OSError as error:
            raise DataError(f"{argv[0]}: {error.strerror}") from None
        except KeyboardInterrupt:  # the terminal has told the children as well
            _wait(children, NOTICE_S)
            raise
        finally:
            for end in (subprocess.Popen.terminate, subprocess.Popen.kill):
                for child in children:
                    end(child)  # nothing where it has ended
                _wait(children, NOTICE_S)
        return next((code for code in (PREEMPTED, USER_ERROR, *filter(None, codes)) if code in codes), 0)


def _wait(children: Sequence[subprocess.Popen], at_most_s: float = float("inf")) -> list[int]:
    """The exit status of those that have ended: of all, or OTHERS_S after the first failure, or after `at_most_s`."""
    until = time.monotonic() + at_most_s
    while True:
        codes = [exit_status(code) for child in children if (code := child.poll()) is not None]
        if any(codes):
            until = min(until, time.monotonic() + OTHERS_S)
        if len(codes) == len(children) or time.monotonic() > until:
            return codes
        time.sleep(0.2)
