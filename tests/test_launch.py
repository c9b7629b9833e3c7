"""A command that is kept going: on a slice of two hosts that a stand-in for gcloud makes, and on this machine."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rsagent_jax import launch
from rsagent_jax.runtime import command, launching

ROOT = pathlib.Path(__file__).parents[1]
# What a host does: its next line of `plan`, once it has noted that it was started.
PLAY = """
import os, pathlib, signal, sys, time
home, state = pathlib.Path(os.environ["HOME"]), pathlib.Path(os.environ["STAND_IN"], "state")
notes = state.with_name("notes")
with open(notes, "a") as file:
    file.write(home.name + "\\n")
turn = notes.read_text().count(home.name) - 1
what = sys.argv[1].split(",")[turn]
if "|" in what:  # another on each host
    what = what.split("|")[int(home.name[-1])]
if what == "still":
    os.kill(os.getpid(), signal.SIGSTOP)
if what == "taken":
    state.write_text("SUSPENDED")
    os.killpg(0, signal.SIGKILL)
if what == "long":
    signal.signal(signal.SIGTERM, lambda *_: [open(notes, "a").write("told to end\\n"), sys.exit(75)])
    open(notes, "a").write("listens\\n")
    time.sleep(60)
print(f"turn {turn} of {home.name}\\n", end="", flush=True)
time.sleep(float(what.partition(":")[2] or 0))
sys.exit(int(what.partition(":")[0]))
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """The directory of the stand-in; no pause lasts."""
    program = f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/gcloud_stand_in.py "$@"\n'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcloud").write_text(program)
    (tmp_path / "bin/gcloud").chmod(0o755)
    (tmp_path / "play.py").write_text(PLAY)
    (home := tmp_path / "cloud").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(home))
    monkeypatch.setattr(launching, "POLL_S", 0.0)
    monkeypatch.setattr(launching, "NOTICE_S", 5)
    monkeypatch.setattr(launch, "FIRST_S", 0.01)
    return home


@pytest.fixture
def running(cloud):
    """The same, once there is a slice of two hosts."""
    (cloud / "state").write_text("ACTIVE")
    for i in range(2):
        (cloud / f"host_{i}").mkdir()
    return cloud


def on_slice(cloud: pathlib.Path, plan: str, *flags: str) -> int:
    play = [sys.executable, "-S", str(cloud.parent / "play.py"), plan]
    flags = ("--slice=v5e-16", "--name=mine", "--zone=z", "--project=p", "--directory=.", *flags)
    return command.run_command("rsagent_jax.launch", [*flags, "--", *play])


def calls(cloud: pathlib.Path) -> list[list[str]]:
    """Without the words that name them all, and without the questions after its state."""
    found = [json.loads(line)[3:] for line in (cloud / "calls").read_text().splitlines()]
    return [words for words in found if words[0] != "list"]


def test_a_slice_is_made_and_made_again_until_the_command_has_succeeded(cloud, capfd):
    setup = "echo ready >> $STAND_IN/notes"
    assert on_slice(cloud, "1,75,taken,0", "--spot", f"--setup={setup}") == 0
    made = "create mine --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=mine --spot"
    where = ["--zone=z", "--project=p", "--quiet"]
    done = calls(cloud)
    assert [words[0] for words in done] == "create ssh ssh ssh delete create ssh".split()
    assert done[0] == done[5] == made.split() + where
    assert done[4] == ["delete", "mine", "--force", *where]
    assert done[1][:3] == ["ssh", "mine", "--worker=all"] and done[1][5:] == where
    notes = (cloud / "notes").read_text()
    assert notes.count("ready") == 4  # once on each host of each slice
    said = capfd.readouterr().out
    assert said.count("launch: asks for mine, v5e-16, spot") == 2 and "turn 0 of host_1" in said
    assert "crashed with status 1; started again" in said and said.count("was preempted; started again") == 2
    assert "mine is SUSPENDED: deleted, and asked for again" in said and "turn 3 of host_0" in said


def test_it_stops_where_another_start_would_not_help(cloud, capfd):
    assert on_slice(cloud, "2") == 2
    assert on_slice(cloud, "0,3,74,74", "--crashes=3") == 74  # host 0 had its first turn above
    assert [words[0] for words in calls(cloud)] == "create ssh ssh ssh ssh".split()
    said = capfd.readouterr().out
    assert "status 2): not started again" in said and "3 crashes in a row without progress" in said
    (cloud / "state").unlink()
    (cloud / "refused").write_text("ERROR: PERMISSION_DENIED")
    assert on_slice(cloud, "0") == 2
    assert "error: gcloud gives no slice: ERROR: PERMISSION_DENIED" in capfd.readouterr().err


def test_a_slice_that_cannot_be_made_again_counts_as_a_crash(running, capfd):
    (running / "refused").write_text("ERROR: there is none")
    assert on_slice(running, "taken", "--crashes=2") == 1
    assert capfd.readouterr().out.count("gcloud gives no slice: ERROR: there is none") == 2


def test_a_broken_connection_starts_nothing_twice(running, capfd):
    (running / "breaks").touch()
    assert on_slice(running, "0:2") == 0
    assert sorted((running / "notes").read_text().split()) == ["host_0", "host_1"]


def test_a_host_that_stands_still_holds_up_no_other_start(running, monkeypatch):
    monkeypatch.setattr(launching, "OTHERS_S", 3.0)
    monkeypatch.setattr(launching, "NOTICE_S", 1)
    assert on_slice(running, "69|still,0") == 0
    assert (running / "notes").read_text().count("host") == 4


def test_what_an_earlier_launch_left_running_is_stopped_first(running, capfd):
    slice_ = launching.TpuSlice("v5e-16", "mine")
    script = slice_.script([sys.executable, "-S", str(running.parent / "play.py"), "long"])
    left = [
        subprocess.Popen(["bash", "-c", script], env=os.environ | {"HOME": f"{running}/host_{i}"}) for i in range(2)
    ]
    until = time.monotonic() + 60
    while not (running / "notes").exists() or (running / "notes").read_text().count("listens") < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert on_slice(running, "long,0") == 0
    assert (running / "notes").read_text().count("told to end") == 2
    assert [process.wait(60) for process in left] == [launching.INTERRUPTED] * 2  # and are started no more


def take_away(parent: int) -> None:
    """What a slice's end without notice is to the processes below one."""
    for child in pathlib.Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="children are told by /proc")
def test_two_processes_taken_away_three_times_train_as_undisturbed_ones(dataset, tmp_path):
    inside = [f"--config.data.root={dataset}", "--config.segmenter.mode=inprocess", "--config.agent.max_turns=2"]
    collect = ["--config=configs/collect_quickstart.py", f"--workdir={tmp_path}/collect", "--config.limit=12", *inside]
    assert command.run_command("rsagent_jax.collect", collect) == 0
    flags = "policy.lora.rank=2 sft.optim.freeze=() grpo.optim.freeze=() stages=('sft',) sft.steps=8 agent.max_turns=2"
    flags += " sft.checkpoint_every=1 sft.batch.tokens=512 sft.trajectories_per_step=2"
    flags += f" sft.trajectories={tmp_path}/collect cache_dir={tmp_path}/compiled"
    train = ["train.py", "--config=configs/debug.py", *(f"--config.{flag}" for flag in flags.split())]
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}

    def start(name: str) -> subprocess.Popen:
        code = "from rsagent_jax import launch; from rsagent_jax.runtime import command; launch.FIRST_S = 0.1; "
        code += "import sys; sys.exit(command.run_command('rsagent_jax.launch', sys.argv[1:]))"
        argv = [sys.executable, "-c", code, "--local=2", "--", sys.executable, *train, f"--workdir={tmp_path}/{name}"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(argv, cwd=ROOT, env=env, **pipes)

    def metrics(name: str) -> list[dict]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith(("second", "perf/", "compiles"))}
            for line in lines
        ]

    def newest() -> int:
        return max((int(path.name) for path in tmp_path.glob("taken/checkpoints/sft/[0-9]")), default=0)

    runs = []
    try:
        runs.append(start("undisturbed"))
        undisturbed, _ = runs[0].communicate(timeout=400)
        assert runs[0].returncode == 0, undisturbed[-3000:]
        runs.append(start("taken"))
        for _ in range(3):
            before, until = newest(), time.monotonic() + 200
            while newest() == before:
                assert runs[1].poll() is None and time.monotonic() < until
                time.sleep(0.01)
            take_away(runs[1].pid)
        said, _ = runs[1].communicate(timeout=400)
        assert runs[1].returncode == 0, said[-3000:]
    finally:
        for run in runs:  # its children go with it
            run.kill()
    assert said.count("launch: the command crashed with status 137; started again") == 3
    assert said.count("sft: goes on after step") == 6  # by both
    assert metrics("taken") == metrics("undisturbed") and len(metrics("taken")) == 8
