"""The same training on one device, on 8 simulated ones in several meshes, and on 2 processes with 4 each.

Each run is its own process, or two, since the number of devices is set before jax starts. Everything runs through
train.run_stage: sources, rollouts, programs, checkpoints.
"""

import itertools
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest

from rsagent_jax.runtime import processes, sharding
from rsagent_jax.runtime.processes import Share
from rsagent_jax.types import DataError
from tests.models import tiny
from tests.refusals import refused
from tests.rollout import small
from tests.simulated import run_all_simulated

pytestmark = pytest.mark.slow

QUICK = " ".join(f"--{name}={value}" for name, value in tiny.QUICK.items())  # most of the time is compilation
MESHES = {
    "fsdp": {"fsdp": 8},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data": {"data": 8, "fsdp": 1},
}
COMPARED = ("loss", "l2_grads", "tokens")
# Of every rollout, under rollout/; besides tokens_per_s, turns and endings/<status>.
LOGGED = """seconds tokens_per_s weights_seconds device tool_wait prefill decode prefill_tokens copied_tokens
    decode_tokens occupancy kv_mib""".split()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Trajectories of different lengths: processes get different numbers of rows."""
    directory = tmp_path_factory.mktemp("set")
    tasks = [small.task(i, h=56, w=56) for i in range(9)]
    scripts = {f"s{i}": (*(small.click(20 + i + n, 30) for n in range(1 + i % 3)), small.finish(1)) for i in range(9)}
    return small.store(directory, tasks, scripts)


class Run:
    def __init__(self, workdir):
        self.params = dict(np.load(workdir / "params.npz"))
        self.metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def train_on(stored, tmp_path_factory):
    """train_on(stage, mesh, n processes, devices of each, steps, from_run, …) -> Run; each is done once."""
    done, compiled = {}, tmp_path_factory.mktemp("compiled")

    def go(
        stage, mesh, n=1, devices=8, steps=2, start=None, name=None, rank=0, freeze=(), delays=(), grpo=None, stop=None
    ):
        key = (stage, json.dumps(mesh), n, devices, steps, start, rank, freeze, delays, json.dumps(grpo), stop)
        if key not in done:
            workdir = tmp_path_factory.mktemp(name or "run")
            if start:
                shutil.copytree(start / "checkpoints", workdir / "checkpoints")
                shutil.copy(start / "metrics.jsonl", workdir)
            job = dict(stage=stage, mesh=mesh, devices=n * devices, steps=steps, workdir=str(workdir))
            job |= dict(rank=rank, freeze=freeze, delays=delays, grpo=grpo or {}, stop=stop)
            job |= dict(stored=str(stored), weights=str(small.weights()), out=str(workdir / "params.npz"))
            cache = {} if n > 1 else {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
            statuses = () if stop is None else (75,) * n
            argv = ["-m", "tests.mesh_worker", json.dumps(job)]
            (workdir / "said").write_text(run_all_simulated(argv, devices, n, QUICK, statuses, **cache)[0])
            done[key] = workdir
        return done[key]

    return go


def assert_same(got: Run, want: Run):
    assert len(got.metrics) == len(want.metrics)
    for a, b in zip(got.metrics, want.metrics, strict=True):
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    for name, value in want.params.items():
        assert np.abs(got.params[name] - value).max() <= 2e-5, name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_one_device_eight_devices_and_two_processes_train_the_same(train_on, stage):
    want = Run(train_on(stage, {}, devices=1))
    start = dict(np.load(train_on(stage, {}, devices=1, steps=1) / "params.npz"))
    assert max(np.abs(start[k] - v).max() for k, v in want.params.items()) > 1e-4  # a step does something
    for mesh in MESHES.values() if stage == "sft" else [MESHES["data, fsdp, tensor"]]:
        assert_same(Run(train_on(stage, mesh)), want)
    for mesh in (MESHES["fsdp"], MESHES["data, fsdp, tensor"]) if stage == "sft" else [MESHES["fsdp"]]:
        assert_same(Run(train_on(stage, mesh, n=2, devices=4)), want)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_goes_on_on_other_numbers_of_processes_and_devices(train_on, stage):
    """Step 1 on one device, step 2 on 2 processes with 4 each, step 3 on one with 8 and other axes of the mesh."""
    first = train_on(stage, {}, devices=1, steps=1)
    second = train_on(stage, MESHES["fsdp"], n=2, devices=4, start=first)
    third = train_on(stage, MESHES["data, fsdp, tensor"], steps=3, start=second)
    assert_same(Run(third), Run(train_on(stage, {}, devices=1, steps=3)))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stage", "part", "mesh", "n"),
    [
        ("sft", dict(rank=4), "data, fsdp, tensor", 1),
        ("grpo", dict(rank=4), "fsdp", 2),
        ("grpo", dict(freeze=("vision", "merger")), "data, fsdp, tensor", 1),
    ],
)
def test_adapters_and_frozen_parts_train_the_same_on_every_mesh(train_on, stage, part, mesh, n):
    """KL to the base, the tower's work done once, and merged rollouts are in the GRPO runs."""
    want = Run(train_on(stage, {}, devices=1, **part))
    start = jax.tree_util.tree_leaves_with_path(small.split(small.model())[1])
    moved = {jax.tree_util.keystr(k): np.abs(want.params[jax.tree_util.keystr(k)] - v).max() for k, v in start}
    assert all((change > 0) == ("rank" not in part or "kernel" in k) for k, change in moved.items() if "layers" in k)
    assert not any(change for k, change in moved.items() if "vision" in k)
    assert_same(Run(train_on(stage, MESHES[mesh], n=n, devices=8 // n, **part)), want)


@pytest.mark.timeout(900)
def test_slow_tools_on_one_process_neither_change_nor_stop_what_two_of_them_play(train_on):
    """Process 0 waits for every tool call, process 1 for none: they meet at the train step and not before, since the
    tools of process 0 begin when process 1 has played the step."""
    one, two = (
        train_on("grpo", {"fsdp": 2 * len(delays)}, n=len(delays), devices=2, steps=3, delays=delays)
        for delays in ((0.0,), (0.7, 0.0))
    )
    (whole,), parts = ([json.loads(p.read_text()) for p in sorted(d.glob("played_*.json"))] for d in (one, two))
    for step in range(3):
        want = {t["uid"]: t for t in whole[step]["trajectories"]}
        shares = [part[step]["trajectories"] for part in parts]
        # Four groups of two: a group stays where it began, and every other one is here.
        assert [[t["uid"] // 2 for t in share] for share in shares] == [[0, 0, 2, 2], [1, 1, 3, 3]]
        assert {t["turns"] for t in want.values()} <= {2, 3}
        for t in (t for share in shares for t in share):
            assert t["tokens"] == want[t["uid"]]["tokens"]
            if step == 0:  # the same weights, and as many slots per process: to the last bit
                assert t["logprobs"] == want[t["uid"]]["logprobs"]
            np.testing.assert_allclose(t["logprobs"], want[t["uid"]]["logprobs"], rtol=0, atol=1e-4)
    assert_same(Run(two), Run(one))
    slow = Run(two).metrics[-1]
    assert slow["rollout_seconds"] > 1.4 and slow["rollout/tool_wait"] * slow["rollout/seconds"] > 0.6
    assert {name for name in slow if name.startswith("rollout/")} == {f"rollout/{name}" for name in LOGGED}
    assert {"tokens_per_s", "turns", "endings/finished"} <= {*slow}
    # Between the rollouts of steps 2 and 3: a train step and the weights' way to every process, all compiled before.
    assert [part[2]["compiled"] - part[1]["compiled"] for part in (whole, *parts)] == [0, 0, 0]


@pytest.mark.timeout(900)
def test_sigterm_to_one_process_in_a_rollout_stops_both_and_they_go_on_with_what_they_had_played(train_on):
    """Process 1 gets it; process 0, whose tools are slower, hears of it and keeps its part as well."""
    how = dict(n=2, devices=2, steps=3, delays=(0.7, 0.0))
    stopped = train_on("grpo", {"fsdp": 4}, **how, stop=1)
    assert re.search(r"grpo after step 1 is saved, and \d+ trajectories .* of step 2", (stopped / "said").read_text())
    kept = sorted(path.parent.name for path in stopped.glob("checkpoints/grpo/under_way/*/collect.json"))
    assert kept == ["00000-of-00002", "00001-of-00002"]
    resumed = train_on("grpo", {"fsdp": 4}, **how, start=stopped)
    assert "goes on within step 2, of which" in (resumed / "said").read_text()
    assert_same(Run(resumed), Run(train_on("grpo", {"fsdp": 2}, devices=2, steps=3, delays=(0.0,))))
    assert not (resumed / "checkpoints/grpo/under_way").exists()


def alarms_of(workdir) -> list[tuple[int, str]]:
    return [(a["step"], a["alarm"]) for a in map(json.loads, (workdir / "alarms.jsonl").read_text().splitlines())]


@pytest.mark.timeout(900)
def test_two_processes_refill_and_carry_over_together(train_on):
    """Every group is flat, so each of three rounds draws as many anew, and the last round is trained on."""
    flat = dict(refill=2, min_spread=9.0, drop_zero_variance=False)
    one, two = (train_on("grpo", {}, devices=1, grpo=flat), train_on("grpo", {}, n=2, devices=1, grpo=flat))
    assert_same(Run(two), Run(one))
    lead, other = (json.loads((d / "metrics.jsonl").read_text().splitlines()[-1]) for d in (two, two / "process_1"))
    for row in (lead, other):
        assert (row["rounds"], row["refilled"], row["zero_variance"], row["trajectories"]) == (3, 8, 1, 4)
    assert Run(one).metrics[-1]["trajectories"] == 8
    assert alarms_of(one) == alarms_of(two) != []
    # Which groups a step gets depends on which were fast, so figures are no longer those of one process.
    carry = dict(surplus=2, max_staleness=1, drop_zero_variance=False, kl=0.0)
    two = train_on("grpo", {}, n=2, devices=1, steps=3, grpo=carry)
    steps = [[json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (two, two / "process_1")]
    for lead, other in zip(*steps, strict=True):
        assert lead["loss"] == other["loss"] and lead["trajectories"] == other["trajectories"] == 4
        assert lead["staleness_max"] == other["staleness_max"] <= 1
        assert lead["in_flight"] == other["in_flight"] == 1
    assert max(lead["staleness_max"] for lead, _ in zip(*steps, strict=True)) == 1


# ------------------------------------------------------------------------------------------------- who holds what


def share_of(process, per_process, sizes, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    devices = [types.SimpleNamespace(process_index=i // per_process) for i in range(int(np.prod(sizes)))]
    shape = dict(zip(sharding.AXES, sizes, strict=True))
    return processes.row_share(types.SimpleNamespace(devices=np.array(devices).reshape(sizes), shape=shape))


def test_rows_are_shared_by_who_holds_them(monkeypatch):
    assert [share_of(p, 4, (1, 8, 1), monkeypatch) for p in (0, 1)] == [Share(0, 2), Share(1, 2)]
    assert [share_of(p, 4, (2, 2, 2), monkeypatch) for p in (0, 1)] == [Share(0, 2), Share(1, 2)]
    # a tensor group over two processes: both hold the same rows
    assert [share_of(p, 2, (1, 2, 4), monkeypatch) for p in range(4)] == [Share(i // 2, 2) for i in range(4)]
    assert share_of(0, 8, (2, 2, 2), monkeypatch) == Share(0, 1)


def test_rows_that_no_process_holds_evenly_are_a_data_error(monkeypatch):
    for process in range(3):  # the second one has devices of both groups
        says = r"hold the row groups \{0: \[0\], 1: \[0, 1\], 2: \[1\]\}.*mesh.tensor"
        refused(says, share_of, process, 2, (1, 2, 3), monkeypatch)


def test_what_does_not_divide_among_the_processes_is_a_data_error():
    assert Share(1, 4).of(64, "batch.rows") == 16
    refused("batch.rows = 6 must be a multiple of the 4 processes", Share(0, 4).of, 6, "batch.rows")


def test_all_processes_start_or_none_does(monkeypatch):
    """One that could go on must not wait in a collective for another that refused."""

    def refuse():
        raise DataError("seed: 0 there, 1 now")

    assert processes.allgather_sum([1, 2]) == [1, 2] and processes.all_or_none(lambda: "ready") == "ready"
    processes.check_same({"policy.weights": "a"})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for failed_elsewhere in (0, 1):
        gather = lambda mine, other=failed_elsewhere: np.stack([mine, np.full_like(mine, other)])  # noqa: E731
        monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
        assert processes.allgather_sum([3, 0]) == [3 + failed_elsewhere, failed_elsewhere]
        monkeypatch.setattr(processes, "exchange", lambda text, other=failed_elsewhere: [text, "failed 74" * other])
        refused("seed", processes.all_or_none, refuse)
        if not failed_elsewhere:
            assert processes.all_or_none(lambda: "ready") == "ready"
    with pytest.raises(DataError, match="1 of 2 processes failed") as failed:
        processes.all_or_none(lambda: "ready")
    assert failed.value.status == 74
    monkeypatch.setattr(processes, "exchange", lambda own: [own, {"policy.weights": "b", "grpo.data": "c"}])
    processes.check_same({"grpo.data": "c"})
    refused("policy.weights is not the same on all 2 hosts", processes.check_same, {"policy.weights": "a"})


def test_what_processes_said_is_deleted_once_all_have_read_it(monkeypatch):
    """In the next meeting: at the end of this one another may not have read it yet."""
    kept = {}
    there = {f"rsagent_jax/exchange/{n}/1": f'"other {n}"' for n in range(3)}
    store = types.SimpleNamespace(
        key_value_set=kept.__setitem__,
        blocking_key_value_get=lambda key, ms: (kept | there)[key],
        key_value_delete=kept.pop,
    )
    monkeypatch.setattr(processes, "_MEETINGS", itertools.count())
    monkeypatch.setattr(processes.distributed.global_state, "client", store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    for n in range(3):
        assert processes.exchange(f"own {n}") == [f"own {n}", f"other {n}"]
        assert kept == {f"rsagent_jax/exchange/{n}/0": f'"own {n}"'}


@pytest.mark.parametrize(("name", "value"), [("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1"), ("JAX_PROCESS_ID", "0")])
def test_half_told_processes_are_a_data_error(name, value, monkeypatch):
    for other in processes.VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    refused("JAX_COORDINATOR_ADDRESS=.*JAX_NUM_PROCESSES=, JAX_PROCESS_ID=", processes.initialize_distributed)
