"""One table of many hosts, and the command that prints it."""

import json
import pathlib
import shlex
import types

import jax
import pytest

from rsagent_jax import doctor
from rsagent_jax.fitness import hosts
from rsagent_jax.fitness.finding import Finding, Verdict
from rsagent_jax.fitness.hosts import Page, compare_hosts, gather_pages, pages_table
from rsagent_jax.runtime import command
from tests.simulated import run_all_simulated

ROOT = pathlib.Path(__file__).parents[2]
OK, SLOW, WRONG, NOT_RUN = Verdict


def page(host: int, rate: float, trip: float = 1.0, version: str = "jax 1") -> Page:
    return Page(host, f"h{host}", (
        Finding("versions", OK, version, alike=version),
        Finding("products", OK, f"{rate:g} TFLOP/s", value=rate),
        Finding("round trip", OK, f"{trip:g} ms", value=trip, higher_is_better=False),
    ))  # fmt: skip


def test_a_host_far_from_the_median_is_slow_and_one_with_other_versions_is_wrong():
    pages = compare_hosts([page(0, 100), page(1, 70), page(2, 95, trip=2.0), page(3, 105, version="jax 2")])
    verdicts = [[f.verdict for f in p.findings] for p in pages]
    assert verdicts == [[OK, OK, OK], [OK, SLOW, OK], [OK, OK, SLOW], [WRONG, OK, OK]]
    slow, wrong = pages[1].findings[1], pages[3].findings[0]
    assert "0.72 of the hosts' median" in slow.against and slow.remedy  # 70 of 97.5
    assert wrong.against == "most hosts: jax 1" and "the same on all" in wrong.remedy
    lines = pages_table(pages).splitlines()
    assert lines[0].startswith("OK       versions") and "[hosts: 0 h0, 1 h1, 2 h2]" in lines[0]
    assert lines[1].startswith("wrong    versions") and "[hosts: 3 h3]  jax 2" in lines[1] and "-> install" in lines[2]
    assert any(line.startswith("slow     products") and "[hosts: 1 h1]" in line for line in lines)
    assert "[hosts: all]" in pages_table([page(i, 100) for i in range(4)])


def test_a_host_that_says_nothing_is_a_line(monkeypatch):
    class Store:
        def blocking_key_value_get(self, key, milliseconds):
            assert 0 < milliseconds <= 500
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax, "process_index", lambda: 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.distributed, "global_state", types.SimpleNamespace(client=Store()))
    own, silent = gather_pages([Finding("a", OK, "1")], 0.5)
    assert own.findings[0].verdict is OK and silent.findings[0].verdict is WRONG
    assert "host 1 did not answer within" in silent.findings[0].figure and silent.findings[0].remedy


@pytest.mark.parametrize(("verdict", "status"), [(OK, 0), (SLOW, 0), (NOT_RUN, 0), (WRONG, 1)])
def test_the_page_its_json_and_the_exit_status(verdict, status, tmp_path, monkeypatch, capsys):
    findings = [Finding("products", verdict, "1 TFLOP/s", "2 nominal", "mend it", value=1.0)]
    monkeypatch.setattr(doctor, "run_checks", lambda *_: (findings, False))
    argv = ["--config=configs/debug.py", f"--workdir={tmp_path}"]
    assert command.run_command("rsagent_jax.doctor", argv) == status
    *table, counts, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert table[0] == f"{verdict:7}  products  1 TFLOP/s  (2 nominal)" and counts.startswith(f"1 {verdict}; ")
    assert said["ok"] == (status == 0) and said["hosts"][0]["findings"][0]["verdict"] == verdict
    assert json.loads((tmp_path / "doctor.json").read_text()) == said
    assert f">{verdict}</span>" in (tmp_path / "doctor.html").read_text()
    for bad in ("problems.py", "debug.py --config.policy.weights=nowhere", "debug.py --config.slice=v6e-9"):
        assert command.run_command("rsagent_jax.doctor", f"--config=configs/{bad}".split()) == 2
    assert "did you mean v6e-8" in capsys.readouterr().err


def test_the_commands_of_its_page_are_commands():
    block = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8").split("```\n")[1]
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert len(lines) == 2 and all(line[:3] == ["python", "-m", "rsagent_jax.doctor"] for line in lines)
    for line in lines:
        assert command.parse_arguments(doctor.main, line[3:])[1]["config"].stages


@pytest.mark.slow
def test_two_processes_make_one_table():
    """With the checks that take no time. One of the first process, which all meet at, is taken to hang."""
    code = """if True:
        import sys
        from rsagent_jax.fitness import checks
        checks.CHECKS = tuple(c for c in checks.CHECKS if c.name in ("versions", "devices", "mesh", "hub"))
        from rsagent_jax import doctor
        from rsagent_jax.runtime import command, processes
        run_checks = doctor.run_checks
        doctor.run_checks = lambda *examined: (run_checks(*examined)[0], processes.is_lead())
        sys.exit(command.run_command("rsagent_jax.doctor", ["--config=configs/debug.py"]))"""
    lead, other = run_all_simulated(["-c", code], 1, 2)
    assert "[hosts: all]  2 x cpu, 1 on each of 2 hosts" in lead and not other
    assert [host["host"] for host in json.loads(lead.splitlines()[-1])["hosts"]] == [0, 1]
