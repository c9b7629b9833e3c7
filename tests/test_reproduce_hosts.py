"""The recipe on several hosts of a slice: what runs where, and what a host that fails or ends means for the others."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from jax._src.clusters.cloud_tpu_cluster import coordinator_port

from rsagent_jax import ablate, reproduce
from rsagent_jax.report.reproduction import STAMP
from rsagent_jax.runtime import command, hosts, processes
from rsagent_jax.runtime.hosts import Hosts
from rsagent_jax.runtime.listening import free_port
from rsagent_jax.runtime.preemption import Preempted
from rsagent_jax.types import DataError
from tests.loopback_bucket import LoopbackBucket
from tests.simulated import run_all_simulated


class Store(dict):
    """jax's key-value store, within one process."""

    key_value_set = dict.__setitem__

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return sorted((name, text) for name, text in list(self.items()) if name.startswith(f"{prefix}/"))


def on_two_hosts(*works) -> list:
    """What each of them returns or raises; `works[i]` is given host i."""
    store, out = Store(), [None, None]

    def go(i: int) -> None:
        try:
            with Hosts(i, 2, store) as here:
                out[i] = works[i](here)
        except (DataError, SystemExit) as error:
            out[i] = error

    threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    return out


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in (("POLL_S", 0.02), ("GRACE_S", 0.2), ("KILL_S", 1.0)):
        monkeypatch.setattr(hosts, name, value)


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_command_that_fails_on_one_host_ends_on_all_with_one_status():
    fails, hangs = python("raise SystemExit(4)"), python("import time; time.sleep(60)")
    assert on_two_hosts(lambda h: h.run(hangs, True), lambda h: h.run(fails, True)) == [4, 4]
    assert on_two_hosts(lambda h: h.run(fails, False), lambda h: h.run(hangs, False)) == [4, 4]  # the lead's alone
    deaf = python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    killed = python("import os; os.kill(os.getpid(), 9)")
    assert on_two_hosts(lambda h: h.run(killed, True), lambda h: h.run(deaf, True)) == [137, 137]
    assert on_two_hosts(lambda h: h.run(python(""), True), lambda h: h.run(python(""), True)) == [0, 0]


def test_what_runs_on_one_host_is_not_run_by_the_others(tmp_path):
    def run(here, everywhere):
        return here.run(python(f"open({str(tmp_path / f'{everywhere}')!r}, 'a').write('{here.index}')"), everywhere)

    for everywhere, hosts_ in (False, "0"), (True, "01"):
        assert on_two_hosts(*[lambda h, e=everywhere: run(h, e)] * 2) == [0, 0]
        assert "".join(sorted((tmp_path / f"{everywhere}").read_text())) == hosts_


def test_a_host_that_ends_ends_the_others_and_what_they_run():
    def leave(here):
        time.sleep(0.1)
        raise SystemExit(143)

    first, other = on_two_hosts(lambda h: h.run(python("import time; time.sleep(60)"), True), leave)
    assert str(first) == "host 1 has ended (143): start the same command on all hosts again"
    assert isinstance(other, SystemExit)
    _, other = on_two_hosts(leave, lambda h: h.from_lead(lambda: ""))
    assert str(other) == "host 0 has ended (143): start the same command on all hosts again"


@pytest.mark.parametrize(
    ("made", "config", "write"),
    [
        (reproduce, "configs/reproduce_quickstart.py", "write_report"),
        (ablate, "configs/ablations/turns.py", "write_ablation"),
    ],
)
def test_a_host_that_is_stopped_between_stages_tells_the_others(monkeypatch, tmp_path, made, config, write):
    """Under --only=report, which meets nobody: another start may have this machine's place."""
    told, heard, met = [], [], []
    flags = [f"--config={config}", f"--workdir={tmp_path}", "--only=report"]
    monkeypatch.setattr(reproduce, "join_hosts", lambda: met.append(1) or Hosts())
    monkeypatch.setattr(Hosts, "__exit__", lambda self, kind, error, _: told.append(kind))
    monkeypatch.setattr(made, write, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("by nobody"))
    try:
        assert command.run_command(made.__name__, flags) == command.PREEMPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [Preempted] and not heard and not met


def test_hosts_that_were_given_something_else_are_told():
    def compare(here):
        here.check_same({"--workdir": f"w{here.index}", "--only": ""})
        return here.from_lead(lambda: "on")

    _, other = on_two_hosts(compare, compare)
    assert "host 1 was given another --workdir than host 0" in str(other)
    assert Hosts().run(python("raise SystemExit(3)"), False) == 3


def test_parents_meet_beside_the_port_of_their_children(monkeypatch):
    asked, places, usual = [], [], int(coordinator_port)
    for name in (*hosts.VARIABLES, hosts.PORT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "has_tpu", lambda: True)
    monkeypatch.setattr(processes, "hold_place", lambda port, index: places.append((port, index)))
    monkeypatch.setattr(
        processes.jax.distributed, "initialize", lambda *a, **k: asked.append((a, os.getenv(hosts.PORT)))
    )
    processes.initialize_distributed()
    processes.initialize_distributed(beside=1)
    assert hosts.PORT not in os.environ
    for name, value in zip(hosts.VARIABLES, ("h:70", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    processes.initialize_distributed(beside=1)
    assert asked == [((), str(usual)), ((), str(usual + 1)), (("h:71", 2, 1), None)]
    assert places == [(usual, 0), (usual + 1, 0), (71, 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="the names are Linux's")
def test_a_second_start_is_refused_and_leaves_the_first_alone(monkeypatch, tmp_path, capsys):
    """Without it, it meets the first one's service, and jax ends both."""
    port = free_port()
    code = f"from rsagent_jax.runtime.hosts import hold_place; hold_place({port + 1}, 0); print(flush=True); input()"
    first = subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    for name, value in zip(hosts.VARIABLES, (f"127.0.0.1:{port}", "1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *a, **k: joined.append(a))
    flags = ["--config=configs/reproduce_quickstart.py", f"--workdir={tmp_path}"]
    assert command.run_command("rsagent_jax.reproduce", flags) == 2
    assert "runs on this machine" in capsys.readouterr().err
    assert command.run_command("rsagent_jax.reproduce", [*flags, "--only=report"]) == 0  # beside it, and alone
    assert (tmp_path / "table.md").exists() and not joined
    first.communicate(b"\n")
    hosts.hold_place(port + 1, 0)  # its place is free again


def test_a_failed_stage_ends_with_its_status_on_all_hosts_where_the_work_is_in_a_bucket(tmp_path):
    """And not with jax's fatal error: host 0, which holds its service, must wait for the others."""
    (tmp_path / "fails.py").write_text("raise SystemExit(5)")
    config = (
        "config = template(RecipeConfig)\n    config.stages = ConfigDict({'a': {'command': %r}})\n    return config"
    )
    head = "from ml_collections import ConfigDict\nfrom rsagent_jax.config.build import template\n"
    head += "from rsagent_jax.config.recipe import RecipeConfig\ndef get_config():\n    "
    (tmp_path / "recipe.py").write_text(head + config % str(tmp_path / "fails.py"))
    bucket = LoopbackBucket()
    argv = ["-m", "rsagent_jax.reproduce", f"--config={tmp_path}/recipe.py", "--workdir=gs://bucket/w"]
    first, other = run_all_simulated(argv, 1, 2, statuses=(5, 5), **bucket.environment)
    bucket.stop()
    assert "gIoU" in first and "w/table.md" in bucket.names("w/")
    assert "== 1/1 a: runs on host 0\n" in other and "gIoU" not in other


@pytest.mark.slow
def test_two_hosts_share_what_joins_them_and_do_all_else_once(tmp_path):
    flags = ["--config=configs/reproduce_quickstart.py", f"--workdir={tmp_path}", "--only=data,collect"]
    flags.append("--config.stages.data.more=('--train=9','--val=0','--test=0')")
    flags.append("--config.stages.collect.more=('--config.limit=6','--config.segmenter.mode=inprocess')")
    first, other = run_all_simulated(["-m", "rsagent_jax.reproduce", *flags], 1, 2)
    for once in " references to an object", " of 6 trajectories":  # by host 0
        assert (first.count(once), other.count(once)) == (1, 0)
    assert sorted(path.name for path in (tmp_path / "collect/attempts").glob("0*")) == [
        "00000-of-00002.jsonl", "00001-of-00002.jsonl"
    ]  # fmt: skip
    assert all((tmp_path / name / STAMP).exists() for name in ("data", "collect")) and (tmp_path / "table.md").exists()
