"""Hundreds of GRPO steps beside a side-car and a remote reward: what grows from step to step, of every process.

  make quickstart && python benchmarks/soak.py --out=runs/soak [--steps=300]

Writes scenes of 1024 x 1024 pixels, starts a GrabCut side-car, a judge on a loopback HTTP server, and train.py with the
quickstart's sizes, but 2 prompts x 4 samples a step and a learning rate at which trajectories stay as long as they are.
The trainer is stopped twice and started again, by SIGTERM after step 10 and by SIGKILL after step 20; what is compared
is all of its last start. After each step every process is looked at from outside (/proc). A figure at step k is the
median of the last WINDOW steps; drift is from the first mark to the last.

rss, uss     MiB; uss is what the process shares with no other
fds, threads open files, threads
seconds      of a step, without validation and checkpoint
cpu          processor seconds of the trainer between two steps, which other jobs on the machine change less
compiles     programs compiled after the first mark
TensorBoard  whether it shows each step once and in order
"""

import argparse
import collections
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MARKS, WINDOW = (30, 100, 200, 300), 10
STOPS = ((10, signal.SIGTERM, 75), (20, signal.SIGKILL, -signal.SIGKILL))  # after step, signal, exit status
LIMITS = {"rss": 0.03, "uss": 0.03, "fds": 0.0, "threads": 0.0, "seconds": 0.1, "cpu": 0.1}  # drift


class Judge(BaseHTTPRequestHandler):
    """Answers as a model behind an OpenAI-compatible endpoint does, with a score that depends on what was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        said = {"role": "assistant", "content": f"SCORE: {sum(body[-4000:]) % 11}"}
        choice = {"index": 0, "message": said, "finish_reason": "stop"}
        answer = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_) -> None:
        pass


def serve() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    print(server.server_port, flush=True)
    server.serve_forever()


def start(log: pathlib.Path, *command: str, speaks: bool = True, env: dict[str, str] | None = None) -> subprocess.Popen:
    """A Python process of this repository. What it says goes to `log`; speaks: on stdout to us."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | (env or {})
    with log.open("ab") as file:
        how = dict(stdout=subprocess.PIPE if speaks else file, stderr=file, text=True, cwd=ROOT, env=environment)
        return subprocess.Popen([sys.executable, *command], **how)


def train_command(options: argparse.Namespace, address: str, port: int) -> list[str]:
    data, val, judge = "grpo.data", "validation.sets.val.data", "grpo.reward.judge.terms.judge"
    fields = f"""
    stages=('grpo',) policy.weights={options.weights} cache_dir={options.out}/compiled loggers=('tensorboard',)
    segmenter.mode=connect segmenter.addresses=('{address}',) agent.max_turns=3
    {data}.root={options.out}/data grpo.steps={options.steps} grpo.prompts=2 grpo.group=4 grpo.minibatches=1
    grpo.batch.rows=1 grpo.sampling.slots=8 grpo.optim.lr=1e-6 grpo.read.workers=1 grpo.checkpoint_every=8
    grpo.dump_every=10 grpo.dump_keep=2 validation.every=25 {val}.root={options.out}/data {val}.split=val
    {val}.dataset=grefcoco {val}.split_by=unc {val}.limit=4 grpo.reward.judge.weight=0.5
    {judge}.function=rsagent_jax.collecting.judge:judge_mask {judge}.arguments.model=m
    {judge}.arguments.url=http://127.0.0.1:{port}/v1"""
    flags = [f"--config.{field}" for field in fields.split()]
    return ["train.py", "--config=configs/quickstart.py", f"--workdir={options.out}/train", *flags]


def figures(pid: int) -> dict[str, float]:
    proc = pathlib.Path(f"/proc/{pid}")
    memory = dict(line.split()[:2] for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
    ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]  # utime, stime
    return {
        "rss": int(memory["Rss:"]) / 1024,
        "uss": (int(memory["Private_Clean:"]) + int(memory["Private_Dirty:"])) / 1024,
        "fds": len(os.listdir(proc / "fd")),
        "threads": len(os.listdir(proc / "task")),
        "cpu": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    }


def family(trainer: int) -> dict[str, int]:
    """Process ids of the trainer and of the readers that it started, by role."""
    tasks = pathlib.Path(f"/proc/{trainer}/task").glob("*/children")
    children = sorted(int(pid) for file in tasks for pid in file.read_text().split())
    readers = [pid for pid in children if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
    return {"trainer": trainer} | {f"reader {i}": pid for i, pid in enumerate(readers)}


def watch(trainer: subprocess.Popen, beside: dict[str, int], log: pathlib.Path, until: int) -> Iterator[dict]:
    """The line of every step as it is logged, with `processes`; ends after step `until`, or with the trainer. A start
    that goes on drops some lines first, so what is new is told by the line and not by its place."""
    known, size = set(_lines(log)), -1
    while trainer.poll() is None:
        if log.exists() and log.stat().st_size != size:
            size = log.stat().st_size
            new = [line for line in _lines(log) if line not in known]
            known |= set(new)
            for row in map(json.loads, new):
                if row["step"] > 0:
                    yield row | {"processes": {k: figures(pid) for k, pid in (family(trainer.pid) | beside).items()}}
                if row["step"] >= until:
                    return
        time.sleep(0.1)


def _lines(log: pathlib.Path) -> list[bytes]:
    """Whole ones."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def run(options: argparse.Namespace) -> list[dict]:
    """The trainer's lines with what was seen of every process then; `start`: which start of it wrote the line."""
    from benchmarks.train_step import GLIBC
    from rsagent_jax.tiny.synthetic import write_dataset  # without jax

    out, rows, started = options.out, [], []
    write_dataset(out / "data", 48, 8, 0, size=options.size, progress=False)
    try:
        # Caches so small that they are full after a few steps, and have to let go from then on.
        side_car = "-m sam_bridge --backend=grabcut --address=127.0.0.1:0 --cache_mb=32 --logits_mb=4".split()
        started = [start(out / "sidecar.log", *side_car), start(out / "judge.log", __file__, "--serve")]
        address = re.search(r"address=(\S+)", started[0].stdout.readline())[1]
        command = train_command(options, address, int(started[1].stdout.readline()))
        beside = {"side-car": started[0].pid, "reward server": started[1].pid}
        for number, (after, sent, status) in enumerate((*STOPS, (options.steps, None, 0))):
            trainer = start(out / "train.log", *command, speaks=False, env={} if options.plain_malloc else GLIBC)
            started.append(trainer)
            for row in watch(trainer, beside, out / "train/metrics.jsonl", after):
                rows.append(row | {"start": number})
                with (out / "soak.jsonl").open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if sent:
                trainer.send_signal(sent)
            if (got := trainer.wait(600)) != status:
                raise SystemExit(f"train.py ended with status {got} after step {after}, not {status}: {out}/train.log")
    finally:
        for process in started:
            process.kill()
    return rows


def series(rows: list[dict]) -> dict[tuple[str, str], dict[int, float]]:
    """(process, figure) -> its value by step, of the trainer's last start."""
    rows = [row for row in rows if row["start"] == rows[-1]["start"]]
    out: dict[tuple[str, str], dict[int, float]] = collections.defaultdict(dict)
    for before, row in itertools.pairwise(rows):
        for name, seen in row["processes"].items():
            for figure in ("rss", "uss", "fds", "threads"):
                out[name, figure][row["step"]] = seen[figure]
        now, then = (r["processes"]["trainer"]["cpu"] for r in (row, before))
        out["trainer", "cpu"][row["step"]] = now - then
        apart = ("seconds/validation", "seconds/checkpoint")
        out["trainer", "seconds"][row["step"]] = row["seconds"] - sum(row.get(part, 0.0) for part in apart)
    return out


def at_mark(values: dict[int, float], mark: int) -> float:
    return statistics.median(v for step, v in values.items() if mark - WINDOW < step <= mark)


def board_values(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value)s by tag as TensorBoard shows them: files in the order of their names, and a START forgets what is
    at its step or later (event_accumulator.py, _CheckForRestartAndMaybePurge)."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    kept: list[Event] = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                kept = [e for e in kept if e.step < event.step]
            kept.append(event)
    values = collections.defaultdict(list)
    for e in kept:
        for value in e.summary.value:
            values[value.tag].append((e.step, value.simple_value))
    return values


def report(rows: list[dict], marks: list[int], board: list[int]) -> dict[str, float]:
    """Prints the table; what is beyond its limit, by name."""
    exceeded = {}
    print(f"{'':<24}" + "".join(f"{f'step {mark}':>11}" for mark in marks) + f"{'drift':>9}")
    for (process, figure), values in series(rows).items():
        shown = [at_mark(values, mark) for mark in marks]
        drift = shown[-1] / shown[0] - 1
        if beyond := drift > LIMITS[figure]:
            exceeded[f"{process} {figure}"] = drift
        cells = "".join(f"{value:11.2f}" for value in shown)
        print(f"{process + ' ' + figure:<24}{cells}{drift:9.1%}  {'exceeded' if beyond else 'OK'}")
    compiles = sum(row["compiles"] for row in rows if row["step"] > marks[0])
    whole = board == list(range(1, marks[-1] + 1))
    for name, bad, text in (
        ("compiles", compiles, f"{compiles:.0f} after step {marks[0]}"),
        ("TensorBoard", not whole, f"{len(board)} steps shown"),
    ):
        exceeded |= {name: float(bad)} if bad else {}
        print(f"{name:<24}{text}  {'exceeded' if bad else 'OK'}")
    return exceeded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=os.path.abspath, default="runs/soak", help="a directory that is not there")
    parser.add_argument("--steps", type=int, default=MARKS[-1])
    parser.add_argument("--size", type=int, default=1024, help="side of the pictures, pixels")
    parser.add_argument("--weights", type=os.path.abspath, default=ROOT / "runs/quickstart/train/checkpoints/sft")
    parser.add_argument("--plain_malloc", action="store_true", help="glibc's own settings, not the quickstart's")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the judge, in a process of its own
    options = parser.parse_args()
    if options.serve:
        return serve()
    options.out = pathlib.Path(options.out)
    if options.out.exists() or options.steps < MARKS[0] + WINDOW:
        parser.error(f"--out names a directory that is not there, and --steps are {MARKS[0] + WINDOW} or more")
    options.out.mkdir(parents=True)
    rows, marks = run(options), [mark for mark in MARKS if mark < options.steps] + [options.steps]
    board = board_values(options.out / "train/tensorboard/grpo")["grpo/loss"]
    exceeded = report(rows, marks, [step for step, _ in board])
    told = {f"{process} {figure}": [at_mark(v, m) for m in marks] for (process, figure), v in series(rows).items()}
    print(json.dumps({"marks": marks, "exceeded": exceeded, **told}))
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
