"""gs:// wherever a directory is named, against a bucket on loopback (tests/loopback_bucket.py)."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from rsagent_jax.config.schema import DataConfig
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.models.qwen25_vl.load import policy_directory, weights_checksum
from rsagent_jax.runtime import command, paths
from rsagent_jax.runtime.journal import Journal, read_journal
from rsagent_jax.runtime.loggers import TensorBoard
from rsagent_jax.runtime.processes import Share
from rsagent_jax.runtime.train_log import MetricsLog
from rsagent_jax.tiny.synthetic import write_dataset
from tests.loopback_bucket import LoopbackBucket
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS, CURRENT = {"seed": 1}, {f"s{i}": "made of this" for i in range(9)}


@pytest.fixture(scope="module")
def server():
    server = LoopbackBucket()
    yield server
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path) -> LoopbackBucket:
    """Empty; a client that is refused does not wait before it asks again."""

    async def at_once(_):
        pass

    import gcsfs.retry

    for name, value in (server.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=at_once))
    for name in server.names(""):
        server.storage.delete_file("bucket", name)
    paths.remote_versions.cache_clear()
    return server


def run_path(name: str = "run") -> pathlib.Path:
    return paths.open_path(f"gs://bucket/{name}")


# ------------------------------------------------------------------------------------- files that grow by lines


def test_lines_are_parts_that_are_joined_and_merged_as_they_come(bucket, monkeypatch):
    monkeypatch.setattr(paths, "MERGE", 4)
    path = run_path("run/a.jsonl")
    file = paths.AppendFile(path)
    for i in range(6):
        file.add(f"{i}\n")
    parts = ["part-00000001-00000004", "part-00000005-00000005", "part-00000006-00000006"]
    assert bucket.names("") == [f"run/a.jsonl/{part}" for part in parts]
    assert paths.read_lines(path) == b"0\n1\n2\n3\n4\n5\n"
    file = paths.AppendFile(path)  # of another start, after a kill
    file.add("6\n")
    assert bucket.names("")[1:] == [f"run/a.jsonl/part-{n}" for n in ("00000005-00000006", "00000007-00000007")]
    file.close()
    paths.write_lines(path, b"0\n1\n")
    file.add("new\n")
    assert bucket.names("") == [f"run/a.jsonl/part-{n}" for n in ("00000001-00000007", "00000008-00000008")]
    assert paths.read_lines(path) == b"0\n1\nnew\n"


def test_a_merge_that_was_cut_short_doubles_no_line(bucket):
    path = run_path("run/a.jsonl")
    for name, text in ("00000001-00000002", "0\n1\n"), ("00000001-00000001", "0\n"), ("00000002-00000002", "1\n"):
        paths.write_whole(path / f"part-{name}", text)
    assert paths.read_lines(path) == b"0\n1\n"
    paths.AppendFile(path).add("2\n")
    assert paths.read_lines(path) == b"0\n1\n2\n"


def test_a_log_of_metrics_reads_as_a_local_one(bucket, tmp_path):
    contents = []
    for workdir in (tmp_path, run_path()):
        log = MetricsLog(workdir, [TensorBoard(workdir, {})])
        for step in (1, 2, 3):
            log.write("grpo", step, {"loss": step / 4})
            log.examples(step, {"id": f"s{step}"})
        log.rewind("grpo", 2)
        log.write("grpo", 3, {"loss": 9.0})
        log.close()
        contents.append([paths.read_lines(workdir / name) for name in ("metrics.jsonl", "rollouts.jsonl")])
    assert contents[0] == contents[1]
    assert [json.loads(line)["loss"] for line in contents[1][0].splitlines()] == [0.25, 0.5, 9.0]
    assert any(name.startswith("run/tensorboard/events") for name in bucket.names("run/"))


def test_a_bucket_that_vanishes_loses_nothing_that_was_done(bucket):
    folder = run_path("run/shards")
    book = Journal(folder, Share(), SETTINGS, CURRENT)
    for i in range(3):
        book.add({"id": f"s{i}"})
    bucket.stop()
    try:
        refused("the bucket does not answer.*kept: run the same command again", book.add, {"id": "s3"})
        refused("gs://bucket/run cannot be written: the bucket does not", command.make_workdir, "gs://bucket/run")
    finally:
        bucket.start()
    book = Journal(folder, Share(), SETTINGS, CURRENT)
    assert book.done == {"s0", "s1", "s2"}
    book.add({"id": "s3"})
    book.close()
    assert [row["id"] for _, row in read_journal(folder, SETTINGS, CURRENT)] == ["s0", "s1", "s2", "s3"]
    refused("holds results of other settings", Journal, folder, Share(), {"seed": 2}, CURRENT)


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_bucket_that_cannot_be_used_is_said_before_anything_starts(bucket, monkeypatch):
    refused(
        "gs://none/x cannot be written: there is no such bucket.*make the bucket", command.make_workdir, "gs://none/x"
    )
    refused("s3://b/x is neither", command.make_workdir, "s3://b/x")
    bucket.storage.forbidden = True
    try:
        refused("no right to it.*roles/storage.objectAdmin.*gcloud auth", command.make_workdir, "gs://bucket/run")
    finally:
        bucket.storage.forbidden = False
    assert command.make_workdir("gs://bucket/run") == run_path()
    assert not bucket.names("run")


def test_what_a_reader_meets_is_one_line_too(bucket, capsys):
    code = command.run_command("rsagent_jax.data_check", [
        f"--config={ROOT}/configs/eval_quickstart.py", "--config.data.root=gs://none/data", "--out=gs://bucket/out",
    ])  # fmt: skip
    assert code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_an_error_of_anything_else_is_not_the_buckets(bucket):
    run_path()
    assert paths.bucket_problem(ValueError("403")) == paths.bucket_problem(ValueError("gs://bucket/x is odd")) == ""
    said = 'Error writing "w/0" in OCDBT database at gs://bucket/x/: UNAVAILABLE'  # tensorstore's
    assert "run the same command again when it is back" in paths.bucket_problem(ValueError(said))


# --------------------------------------------------------------------------------------------- data and weights


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_dataset(str(folder), train=4, val=1, test=2)
    return folder


def test_samples_are_those_of_a_local_folder(bucket, scenes):
    paths.put_files(scenes, run_path("data"))
    here, there = (open_samples(DataConfig(root=str(root), split="train")) for root in (scenes, "gs://bucket/data"))
    assert here.ids == there.ids
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.gt_mask, b.gt_mask)
    assert there[0].path.startswith("gs://bucket/data/")
    before = [there.fingerprint(i) for i in range(len(there))]
    name = there[0].path.removeprefix("gs://bucket/")
    paths.write_whole(run_path(name), b"another picture")
    paths.remote_versions.cache_clear()  # of another start
    changed = [i for i, old in enumerate(before) if there.fingerprint(i) != old]
    assert changed == [i for i in range(len(there)) if there.entries[i].image == f"gs://bucket/{name}"]


def test_weights_are_fetched_once_and_again_where_they_changed(bucket):
    base = ROOT / "assets/tiny-base"
    paths.put_files(base, run_path("base"))
    assert weights_checksum("gs://bucket/base") == weights_checksum(str(base))
    copy = policy_directory("gs://bucket/base")
    assert copy == paths.fetch_folder(run_path("base")) and copy.is_dir()
    paths.write_whole(run_path("base/config.json"), "{}")
    assert paths.fetch_folder(run_path("base")) != copy


# ------------------------------------------------------------------------------------------------ the whole loop

VARIED = """
def by_tokens(trajectory, sample):
    return float(trajectory.tokens.sum() % 97) / 97
"""
CLOCK = ("second", "tokens_per_s", "rollout/")  # metrics of time, and of what time decides


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_debug_run_in_a_bucket_killed_and_resumed_is_that_of_a_disk(bucket, tmp_path):
    write_dataset(f"{tmp_path}/data", train=24, val=2, test=4)
    paths.put_files(tmp_path / "data", run_path("data"))
    (tmp_path / "varied.py").write_text(VARIED)
    inside, cache = "--config.segmenter.mode=inprocess", f"--config.cache_dir={tmp_path}/compiled"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def start(*words: str) -> subprocess.Popen:
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([sys.executable, *words, inside], cwd=ROOT, env=environment, **streams)

    def finish(process: subprocess.Popen) -> str:
        said, _ = process.communicate(timeout=280)
        assert process.returncode == 0, said[-3000:]
        return said

    def train(workdir: str | pathlib.Path) -> subprocess.Popen:
        return start(
            "train.py", "--config=configs/debug.py", f"--workdir={workdir}", cache,
            "--config.sft.trajectories=gs://bucket/collect", "--config.grpo.data.root=gs://bucket/data",
            "--config.sft.steps=3", "--config.sft.checkpoint_every=1", "--config.grpo.steps=1",
            "--config.grpo.min_spread=0", "--config.grpo.reward.final.terms.final_iou.function=varied:by_tokens",
        )  # fmt: skip

    finish(start(
        "-m", "rsagent_jax.collect", "--config=configs/collect_quickstart.py", "--workdir=gs://bucket/collect",
        "--config.data.root=gs://bucket/data", "--config.limit=12",
    ))  # fmt: skip
    finish(train(tmp_path / "local"))
    killed = train("gs://bucket/train")
    until = time.monotonic() + 200
    while not bucket.names("train/checkpoints/sft/1/commit_success.txt"):
        assert killed.poll() is None and time.monotonic() < until, killed.communicate()[0][-3000:]
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert "goes on after step" in finish(train("gs://bucket/train"))
    logs = [paths.read_lines(w / "metrics.jsonl").splitlines() for w in (tmp_path / "local", run_path("train"))]
    local, remote = ([json.loads(line) for line in log] for log in logs)
    assert [(row["stage"], row["step"]) for row in remote] == [("sft", 1), ("sft", 2), ("sft", 3), ("grpo", 1)]
    for here, there in zip(local, remote, strict=True):
        assert here.keys() == there.keys()
        assert {k: v for k, v in here.items() if not any(c in k for c in CLOCK)} == {
            k: v for k, v in there.items() if not any(c in k for c in CLOCK)
        }
    assert len(paths.read_lines(run_path("train/config_history.jsonl")).splitlines()) == 2
    finish(start(
        "evaluate.py", "--config=configs/eval_quickstart.py", "--workdir=gs://bucket/eval", cache,
        "--weights=gs://bucket/train/checkpoints/grpo", "--config.data.root=gs://bucket/data",
        "--config.sampling.slots=8",  # the programs of training
    ))  # fmt: skip
    assert json.loads(paths.read_bytes(run_path("eval/results.json")))["n"] == 5
    assert len(paths.read_bytes(run_path("eval/report/index.html"))) > 10_000
    for words in (
        ("export", "--checkpoint=gs://bucket/train/checkpoints/grpo", "--out=gs://bucket/hf"),
        ("refilter", "--collected=gs://bucket/collect", "--out=gs://bucket/study", "--min_iou=0.5"),
        ("data_check", f"--config={ROOT}/configs/eval_quickstart.py", "--config.data.root=gs://bucket/data", "--out=gs://bucket/check"),
        ("show_tokens", "--trajectories=gs://bucket/collect", f"--processor={ROOT}/assets/tiny-base", "--out=gs://bucket/t.html"),
    ):  # fmt: skip
        assert command.run_command(f"rsagent_jax.{words[0]}", words[1:]) == 0, words
    assert weights_checksum("gs://bucket/hf")
    assert {"study/iou-0.50/collect.json", "check/check.json", "t.html"} <= {*bucket.names("")}
