"""One trainer to a work directory: living ones are refused, those of the dead are taken over."""

import json
import os
import subprocess
import sys
import time

import pytest

from rsagent_jax.runtime import workdir_lock
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.runtime.processes import Share
from tests.refusals import refused


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"BEAT_S": 0.05, "STALE_S": 0.4, "POLL_S": 0.02, "SETTLE_S": 0.0, "ENDING_S": 0.1}.items():
        monkeypatch.setattr(workdir_lock, name, seconds)
    monkeypatch.setattr(workdir_lock.atexit, "register", lambda *_: None)
    monkeypatch.setattr(workdir_lock, "_beat", lambda *_: None)


def written(workdir, **other) -> dict:
    holder = workdir_lock._identity() | {"beat": 3} | other
    workdir_lock.write_whole(workdir / workdir_lock.FILE, json.dumps(holder))
    return holder


@pytest.mark.parametrize(
    "holder",
    [{"pid": 2**22 + 1}, {"started": "1"}, {"machine": "another", "host": "tpu-1"}],
    ids=["gone", "reused", "far"],
)
def test_a_work_directory_of_a_run_that_is_gone_is_taken_over(tmp_path, quick, capsys, holder):
    written(tmp_path, **holder)
    workdir_lock.hold_workdir(tmp_path)
    workdir_lock.hold_workdir(tmp_path)  # the same process may start twice
    assert json.loads((tmp_path / workdir_lock.FILE).read_text())["beat"] == 0
    assert "this run takes it over" in capsys.readouterr().out


def test_a_work_directory_of_a_living_run_is_refused(tmp_path, quick, monkeypatch):
    parent = os.getppid()
    holder = written(tmp_path, pid=parent, started=workdir_lock._started(parent))
    refused(f"belongs to a run that is going on: process {parent} on .*--workdir", workdir_lock.hold_workdir, tmp_path)
    far = holder | {"machine": "another", "host": "tpu-1", "pid": 7}
    written(tmp_path, **far)
    monkeypatch.setattr(workdir_lock, "STALE_S", 60.0)
    monkeypatch.setattr(workdir_lock.time, "sleep", lambda _: written(tmp_path, **far | {"beat": 4}))
    refused("process 7 on tpu-1", workdir_lock.hold_workdir, tmp_path)
    assert json.loads((tmp_path / workdir_lock.FILE).read_text()) == far | {"beat": 4}


def test_of_two_that_take_over_at_once_one_has_it(tmp_path, quick, monkeypatch):
    """Both have seen the dead one; the other removes what this one wrote, and is there while this one settles."""
    parent = os.getppid()
    written(tmp_path, pid=2**22 + 1)
    other = lambda _: written(tmp_path, pid=parent, started=workdir_lock._started(parent))  # noqa: E731
    monkeypatch.setattr(workdir_lock.time, "sleep", other)
    refused(f"belongs to a run that is going on: process {parent} ", workdir_lock.hold_workdir, tmp_path)


HOLDS = """
import pathlib, sys, time
from rsagent_jax.runtime import workdir_lock
workdir_lock.BEAT_S = 0.05
workdir_lock.hold_workdir(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_run_that_lost_its_work_directory_ends_and_one_that_ends_gives_it_back(tmp_path):
    start = lambda seconds: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", HOLDS, str(tmp_path), seconds], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with start("0.3") as first:
        assert first.wait(60) == 0 and not (tmp_path / workdir_lock.FILE).exists()
    with start("60") as second:
        assert second.stdout.readline() == "held\n"
        while json.loads((tmp_path / workdir_lock.FILE).read_text())["beat"] < 2:
            time.sleep(0.02)
        while second.poll() is None:  # a beat that is being written may cover it
            (tmp_path / workdir_lock.FILE).write_text(json.dumps({"host": "tpu-1", "pid": 7}))
            time.sleep(0.02)
        assert second.returncode == 2 and "has been taken over by process 7 on tpu-1" in second.stderr.read()


def test_a_journal_is_written_by_one_process_at_a_time(tmp_path, quick):
    """An evaluation or a collection that is started twice would play everything twice."""
    book = Journal(tmp_path, Share(), {}, {})
    holder = tmp_path / "00000-of-00001.holder.json"
    mine = holder.read_text()
    parent = os.getppid()
    holder.write_text(json.dumps(json.loads(mine) | {"pid": parent, "started": workdir_lock._started(parent)}))
    refused(f"another start of this command: process {parent} on .*--shard=i/n", Journal, tmp_path, Share(), {}, {})
    Journal(tmp_path, Share(1, 2), {}, {}).close()  # another part of it is nobody's yet
    holder.write_text(mine)
    book.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000-of-00001.jsonl", "00001-of-00002.jsonl"]
