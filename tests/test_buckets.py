"""gs:// wherever a directory is named, against a bucket on loopback (tests/loopback_bucket.py)."""

import json
import os
import pathlib
import time
import types

import numpy as np
import pytest

from rsagent_jax.config.recipe import RecipeConfig, RecipeStage, plan_steps
from rsagent_jax.config.schema import DataConfig
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.evals.metrics import SampleResult
from rsagent_jax.models.qwen25_vl.load import policy_directory, weights_checksum
from rsagent_jax.report.reproduction import STAMP, seconds_of
from rsagent_jax.runtime import checksums, command, local_copies, paths, workdir_lock
from rsagent_jax.runtime.journal import Journal, read_journal
from rsagent_jax.runtime.loggers import TensorBoard
from rsagent_jax.runtime.processes import Share
from rsagent_jax.runtime.train_log import MetricsLog
from rsagent_jax.tiny.synthetic import write_dataset
from rsagent_jax.types import Status, StorageError
from tests.data.sets import test_coco_questions as coco_questions
from tests.data.sets.small_sets import square, write_image, write_reasonseg
from tests.data.sets.small_sets import write_lines as folder_lines
from tests.loopback_bucket import LoopbackBucket
from tests.refusals import refused
from tests.report.written import write_files

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


def test_gathered_lines_are_one_part_and_many_are_sent_at_once(bucket, monkeypatch):
    monkeypatch.setattr(paths, "MERGE", 4)
    path = run_path("run/a.jsonl")
    file = paths.AppendFile(path, gather=True)
    for i in range(6):
        file.add(f"{i}\n")
    assert bucket.names("") == ["run/a.jsonl/part-00000001-00000004"]  # two wait
    file.close()
    file = paths.AppendFile(path, gather=True)
    file.add("6\n")
    file.close()
    assert bucket.names("")[1:] == ["run/a.jsonl/part-00000005-00000007"]
    assert paths.read_lines(path) == b"0\n1\n2\n3\n4\n5\n6\n"


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
    assert any(name.startswith("run/tensorboard/grpo/events") for name in bucket.names("run/"))


def test_a_bucket_that_vanishes_loses_nothing_that_was_done(bucket):
    folder = run_path("run/shards")
    book = Journal(folder, Share(), SETTINGS, CURRENT)
    for i in range(3):
        book.add({"id": f"s{i}"})
    until = time.monotonic() + 60
    while len(paths.read_lines(book.path).splitlines()) < 4:  # by itself
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(bucket.names("run/shards/00000-of-00001.jsonl/")) == 2  # the settings, and a part of three lines
    bucket.stop()
    try:
        book.add({"id": "s3"})  # waits for a second
        refused("the bucket does not answer.*kept: run the same command again", book.close)
        refused("the bucket does not answer", book.add, {"id": "s4"})
        with pytest.raises(StorageError, match="gs://bucket/run cannot be written: the bucket does not"):
            command.make_workdir("gs://bucket/run")
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


def test_a_stage_may_be_given_in_a_bucket(bucket):
    collect = RecipeStage(name="collect", command="x.py", given="gs://bucket/collected")
    sft = RecipeStage(name="sft", command="x.py", arguments=("{collect}", "{sft}"))
    steps = plan_steps(RecipeConfig(stages=(collect, sft)), command.make_workdir("gs://bucket/run"))
    assert steps["collect"].directory == run_path("collected") and seconds_of(steps["collect"]) == 0.0
    assert steps["sft"].argv == ("x.py", "gs://bucket/collected", "gs://bucket/run/sft")
    assert seconds_of(steps["sft"]) is None


@pytest.mark.parametrize(("name", "value", "said"), [("forbidden", True, "no right"), ("left", 0, "does not answer")])
def test_a_bucket_that_refuses_or_is_away_does_not_say_that_a_stage_is_not_done(bucket, name, value, said):
    config = RecipeConfig(stages=(RecipeStage(name="sft", command="x.py"),))
    step = plan_steps(config, run_path())["sft"]
    paths.write_whole(step.directory / STAMP, json.dumps({"seconds": 3, "key": step.key, "nonce": "n", "nonces": {}}))
    before = getattr(bucket.storage, name, None)
    setattr(bucket.storage, name, value)
    try:
        with pytest.raises(Exception) as caught:
            seconds_of(step)
        assert said in paths.bucket_problem(caught.value)
    finally:
        setattr(bucket.storage, name, before)
    assert seconds_of(step) == 3
    paths.write_whole(step.directory / STAMP, "half a st")
    assert seconds_of(step) is None


# --------------------------------------------------------------------------------------------- data and weights


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_dataset(str(folder), train=4, val=1, test=2)
    return folder


def test_samples_are_those_of_a_local_folder(bucket, scenes):
    local_copies.put_files(scenes, run_path("data"))
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
    local_copies.put_files(base, run_path("base"))
    assert weights_checksum("gs://bucket/base") == weights_checksum(str(base))
    copy = policy_directory("gs://bucket/base")
    assert copy == local_copies.fetch_folder(run_path("base")) and copy.is_dir()
    paths.write_whole(run_path("base/config.json"), "{}")
    assert local_copies.fetch_folder(run_path("base")) != copy


@pytest.mark.parametrize("fields", [
    {"dataset": "reasonseg", "split": "val"}, {"dataset": "folder"}, {"dataset": "mmr", "split": "val"},
    {"dataset": "gseval", "split": "all"}, {"dataset": "refcoco_m", "split": "val"},
], ids=lambda fields: fields["dataset"])  # fmt: skip
def test_every_layout_is_read_from_a_bucket(bucket, tmp_path, fields):
    write_reasonseg(tmp_path / "ReasonSeg/val", "a", square(1, 1, 3))
    write_image(tmp_path / "a.png", size=(30, 24))
    folder_lines(tmp_path, {"image": "a.png", "query": "it", "segmentation": [[0, 0, 10, 0, 10, 10]]})
    coco_questions.write(tmp_path, "MMR/MMR_val.json", [coco_questions.muse_records()[1]])
    coco_questions.write(tmp_path, "gseval/GroundingSuite-Eval.jsonl", coco_questions.gseval_rows()[:1])
    coco_questions.write(tmp_path, "refcoco_m/validation-0.jsonl", [coco_questions.refcoco_m_row()])
    pictures = tmp_path / "images/mscoco/images"
    of_gseval = pathlib.PurePath(coco_questions.gseval_rows()[0]["image_path"]).parts[-2:]
    of_refcoco_m = tmp_path / "refcoco_m/images" / coco_questions.refcoco_m_row()["file_name"]
    for path in (pictures / "train2014/COCO_train2014_000000000001.jpg", pictures.joinpath(*of_gseval), of_refcoco_m):
        write_image(path, size=(30, 24))
    local_copies.put_files(tmp_path, run_path("sets"))
    here, there = (open_samples(DataConfig(root=str(root), **fields)) for root in (tmp_path, run_path("sets")))
    assert here.ids == there.ids and len(there) > 0
    np.testing.assert_array_equal(here[0].image, there[0].image)
    np.testing.assert_array_equal(here[0].gt_mask, there[0].gt_mask)
    assert there.fingerprint(0) and there[0].path.startswith("gs://bucket/sets/")


def test_a_copy_that_nobody_uses_is_removed(bucket, tmp_path):
    for name in ("a", "b"):
        paths.write_whole(run_path(f"{name}/x"), name)
    old, left = local_copies.fetch_folder(run_path("a")), tmp_path / "cache/rsagent_jax/buckets/.partial-x"
    left.mkdir()
    long_ago = time.time() - 86400 * (local_copies.KEPT_DAYS + 1)
    os.utime(old, (long_ago, long_ago))
    assert local_copies.fetch_folder(run_path("a")) == old  # used, so kept
    new = local_copies.fetch_folder(run_path("b"))
    assert old.is_dir() and left.is_dir()
    for folder in (old, left):
        os.utime(folder, (long_ago, long_ago))
    (old.parent / "removed").symlink_to("by another process")  # listed, and no longer there
    paths.write_whole(run_path("b/x"), "changed")
    assert local_copies.fetch_folder(run_path("b")) != new
    assert not old.exists() and not left.exists() and new.is_dir()


# ------------------------------------------------------------------------------------------------ commands


def run(name: str, *flags: str) -> int:
    return command.run_command(f"{ROOT}/{name}" if name.endswith(".py") else f"rsagent_jax.{name}", flags)


def test_commands_read_and_write_buckets_and_say_when_one_vanishes_in_the_middle(bucket, scenes, tmp_path, capsys):
    local_copies.put_files(scenes, run_path("data"))
    for name in ("a", "b"):
        results = [SampleResult(f"s{n}", 10 + n, 100, Status.FINISHED, 2, 0) for n in range(3)]
        write_files(tmp_path / name, results, {"metric": {"unit": "sentence"}}, [], benchmark="x")
        local_copies.put_files(tmp_path / name, run_path(name))
    data, inside = "--config.data.root=gs://bucket/data", "--config.segmenter.mode=inprocess"
    check = f"--config={ROOT}/configs/eval_quickstart.py", data
    collect = f"--config={ROOT}/configs/collect_quickstart.py", "--workdir=gs://bucket/collect", data, inside
    base, recipe = f"{ROOT}/assets/tiny-base", f"--config={ROOT}/configs/reproduce_quickstart.py"
    study = "--collected=gs://bucket/collect", "--out=gs://bucket/study", "--min_iou=0.5"
    tokens = "--trajectories=gs://bucket/collect", f"--processor={base}", "--out=gs://bucket/t.html"
    scene = "--out=gs://bucket/scenes", "--train=1", "--val=0", "--test=0"
    assert run("tiny.synthetic", *scene) == 0 and run("tiny.synthetic", *scene, "--seed=1") == 2
    assert "gs://bucket/scenes holds synthetic scenes made with other settings" in capsys.readouterr().err
    commands = {
        "collect": ((*collect, "--config.limit=4"), "collect/collect.json"),
        "refilter": (study, "study/iou-0.50/collect.json"),
        "data_check": ((*check, "--out=gs://bucket/check"), "check/check.json"),
        "evaluate.py": ((*check, "--workdir=gs://bucket/eval", inside, "--config.bound.row=box"), "eval/results.json"),
        "show_tokens": (tokens, "t.html"),
        "compare": (("gs://bucket/a", "gs://bucket/b", "--out=gs://bucket/c.md"), "c.md"),
        "reproduce": ((recipe, "--workdir=gs://bucket/w", "--only=report"), "w/table.md"),
    }
    for name, (flags, made) in commands.items():
        capsys.readouterr()
        for answered in (1, 5):
            bucket.storage.left = answered
            assert run(name, *flags) == 74, name
            said = capsys.readouterr().err
            assert said.count("error: ") == 1 and "the bucket does not answer" in said, (name, said)
            bucket.storage.left = None
            assert not bucket.names(made)
        assert run(name, *flags) == 0, capsys.readouterr().err
        assert bucket.names(made)


def test_what_a_checkpoint_of_a_bucket_held_is_known_from_its_listing(bucket, monkeypatch):
    step = run_path("run/checkpoints/sft/4")
    for name in ("params/d/a", "params/d/b", "optimizer/d/c"):
        paths.write_whole(step / name, name)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "_checksum", None)  # nothing is read
        checksums.write_checksums(step)
        assert checksums.find_damage(step) == ""
        paths.write_whole(step / "params/d/a", "params/d/A")
        paths.remove_file(step / "optimizer/d/c")
        paths.write_whole(step / "notes.txt", "mine")
        said = "optimizer/d/c is missing; params/d/a has other content; notes.txt is no part of it"
        assert checksums.find_damage(step) == said
        assert checksums.find_damage(step, "params/") == "params/d/a has other content"
    paths.move_folder(step, step.with_name("4.damaged"))
    assert not bucket.names("run/checkpoints/sft/4/") and len(bucket.names("run/checkpoints/sft/4.damaged/")) == 4


def test_one_trainer_to_a_work_directory_in_a_bucket(bucket, monkeypatch):
    for name, seconds in {"STALE_S": 0.3, "POLL_S": 0.05}.items():
        monkeypatch.setattr(workdir_lock, name, seconds)
    monkeypatch.setattr(workdir_lock, "_beat", lambda *_: None)
    lock = run_path(f"run/{workdir_lock.FILE}")
    workdir_lock.hold_workdir(run_path())
    own = json.loads(paths.read_bytes(lock))
    assert not paths.create_file(lock, "{}") and json.loads(paths.read_bytes(lock)) == own
    paths.write_whole(lock, json.dumps({"host": "tpu-1", "pid": 7, "machine": "another", "beat": 3}))
    workdir_lock.hold_workdir(run_path())  # it shows no sign of life
    assert json.loads(paths.read_bytes(lock)) == own
    workdir_lock._release(lock, {name: value for name, value in own.items() if name != "beat"})
    assert not bucket.names("run/")
