"""Collecting: nothing lost or doubled by a kill or by shards, the same set whatever the order, filters that count."""

import base64
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from agent_fakes import DiscSegmenter
from PIL import Image

from rsagent_jax import collect as command
from rsagent_jax.collecting import collection, filter
from rsagent_jax.collecting.collector import Collector, attempt_id, collection_resume_fingerprint, teacher_policy
from rsagent_jax.config import schema
from rsagent_jax.config.schema import CollectConfig, FilterConfig, SegmenterConfig, TeacherConfig
from rsagent_jax.data import trajectories
from rsagent_jax.data.npz import pack_record, read_arrays
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.rollout.driver import Driver, pixel_limits
from rsagent_jax.rollout.policy import TextPolicy
from rsagent_jax.runtime import journal as journals
from rsagent_jax.runtime.command import run_command
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.runtime.processes import Share
from rsagent_jax.tiny import synthetic
from sam_bridge.types import About, FailureKind
from tests.collecting.test_endpoint import Server, good
from tests.refusals import refused
from tests.rollout import small

ROOT = pathlib.Path(__file__).parents[1]
# sample -> its turns: good; not good enough; a malformed turn; the same click twice; never finished
SCRIPTS = {
    "s0": [small.click(56, 56), small.finish(1)],
    "s1": [small.click(80, 56), small.finish(1)],
    "s2": ["nonsense", small.click(56, 56), small.finish(1)],
    "s3": [small.click(56, 56), small.click(56, 56), small.finish(1)],
    "s4": ["nonsense"] * 3,
    "s5": [small.click(56, 56), small.zoom(20, 20, 90, 80), small.finish(1)],
}


class Scripted:
    def __init__(self, config, rng):
        pass

    def act(self, state, gt_mask):
        time.sleep(np.random.default_rng().uniform(0, 0.005))  # trajectories end in another order each time
        return SCRIPTS["s" + state.query.split()[-1]][len(state.turns)]


@pytest.fixture
def samples(tmp_path):
    out = []
    for i in range(6):
        sample = small.sample(i)
        Image.fromarray(sample.image).save(tmp_path / f"{i}.png")
        out.append(dataclasses.replace(sample, path=str(tmp_path / f"{i}.png")))
    return out


CONFIG = CollectConfig(processor="x", agent=small.AGENT, segmenter=SegmenterConfig(workers=3), concurrent=4)
CURRENT = {f"s{i}{attempt}": f"sample {i}" for i in range(6) for attempt in ("", "#0", "#1")}
DISCS = About("discs", "discs of one size")


def collect(workdir, samples, make=Scripted, config=CONFIG, segmenter=None, policy=None, checksum=""):
    """One run over what is left, by `policy` or teachers that `make` makes; (collector, what was left)."""
    own = config.teacher.own
    tries = own.tries if own.weights else 1
    work = [(attempt_id(f"s{i}", t, tries), (tries * i + t, i)) for i in range(len(samples)) for t in range(tries)]
    with contextlib.closing(opened(workdir, config, checksum)) as journal:
        collector = Collector(config, small.processor(), samples, segmenter or DiscSegmenter(14.0), journal, checksum)
        left = journal.left(work, "trajectories")
        collector.collect(left, len(work), policy or teacher_policy(config, small.processor(), make))
    filter.write_rules(workdir, config.filter)
    return collector, left


def opened(workdir, config=CONFIG, checksum=""):
    settings = collection_resume_fingerprint(config, DISCS, pixel_limits(config.agent, small.processor()), checksum)
    return Journal(workdir / filter.ATTEMPTS, Share(), settings, CURRENT)


def done(workdir):
    return {id for id, failed in journals.survey(workdir / filter.ATTEMPTS).items() if not failed}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stamp(directory):
    return json.loads((directory / "collect.json").read_text())


def same_arrays(item, played):
    for field in ("tokens", "positions", "loss_mask", "patches"):
        np.testing.assert_array_equal(getattr(item, field), getattr(played, field))


def test_the_filter_keeps_drops_and_counts(tmp_path, samples):
    workdir = tmp_path / "w"
    assert collect(workdir, samples)[0].failures.counts == {}
    found = filter.write_kept_set(workdir, workdir, FilterConfig())
    kept = lines(workdir / "trajectories.jsonl")
    assert [row["id"] for row in kept] == ["s0", "s5"] and set(kept[0]) == {"id", "iou", "turns", "status"}
    assert kept[1] == {"id": "s5", "iou": pytest.approx(1.0), "turns": 3, "status": "finished"}
    wanted = {"final IoU below 0.9": 1, "malformed or refused call": 1, "repeated action": 1, "invalid": 1}
    assert found.dropped == wanted and found.kept == 2
    said = stamp(workdir)
    assert said["records"] == 2 and said["verdicts"] == wanted | {"kept": 2} and said["filter"]["min_iou"] == 0.9
    every = filter.write_kept_set(workdir, tmp_path / "all", FilterConfig(min_iou=0.0, malformed=True, repeats=True))
    assert every.kept == 5 and every.dropped == {"invalid": 1}
    short = filter.write_kept_set(workdir, tmp_path / "short", FilterConfig(max_turns=2))
    assert short.dropped["more than 2 turns"] == 1
    page = (workdir / "report/index.html").read_text()
    assert "malformed or refused call" in page and page.count("<article") == 6 and "Cannot be shown" not in page


def test_records_are_what_the_driver_makes_with_images_by_reference(tmp_path, samples):
    workdir = tmp_path / "w"
    collect(workdir, samples)
    filter.write_kept_set(workdir, workdir, FilterConfig(), per_file=1)
    names = sorted(p.name for p in workdir.glob("*.array_record"))
    assert names == [f"trajectories-0000{i}.array_record" for i in (0, 1)]
    records = trajectories.open_records(workdir)
    policy = TextPolicy(small.scripted(SCRIPTS), small.processor())
    ((wanted, _),) = Driver(policy, DiscSegmenter(14.0), small.processor(), small.AGENT).run([small.task(5)])
    decode = lambda: trajectories.decode_record(records[1], small.processor())  # noqa: E731
    item = decode()
    same_arrays(item, wanted)
    assert item.grids == wanted.grids and len(item.grids) == 3
    header = trajectories.record_header(records[1])
    assert header["provenance"]["seed"] == 0 and len(header["provenance"]["config_sha256"]) == 16
    assert len(records[1]) < 40_000  # no picture of 112 x 112 x 3 in it
    Image.fromarray(samples[0].image).save(samples[5].path)
    refused(r"5\.png is not the picture .* its pixels have changed", decode)
    pathlib.Path(samples[5].path).unlink()
    refused(r"5\.png is missing: .*rsagent_jax.refilter --root", decode)


def test_what_is_not_worth_imitating_can_be_left_out_of_sft(tmp_path, samples):
    """A malformed turn, and a mask that is no better than the one before; the context stays whole."""
    collect(tmp_path / "w", samples)
    filter.write_kept_set(tmp_path / "w", tmp_path / "all", FilterConfig(min_iou=0.0, malformed=True, repeats=True))
    for record in trajectories.open_records(tmp_path / "all"):
        whole = trajectories.decode_record(record, small.processor())
        useful = trajectories.decode_record(record, small.processor(), "useful")
        np.testing.assert_array_equal(useful.tokens, whole.tokens)
        first = whole.loss_mask & ~np.append(False, whole.loss_mask[:-1])
        turn = np.where(whole.loss_mask, np.cumsum(first) - 1, -1)
        wanted = {"s2": {1, 2}, "s3": {0, 2}}.get(trajectories.record_header(record)["id"], set(range(turn.max() + 1)))
        assert set(turn[useful.loss_mask]) == wanted and useful.loss_mask.sum() == np.isin(turn, list(wanted)).sum()
    header = trajectories.record_header(record)
    del header["useful"]
    older = pack_record(header, {k: v for k, v in read_arrays(record).items() if k != "header"})
    assert trajectories.decode_record(older, small.processor()).loss_mask.any()
    refused(
        "does not say which of its turns are useful", trajectories.decode_record, older, small.processor(), "useful"
    )


def test_pictures_may_move_or_be_inside_the_record(tmp_path, samples, capsys):
    workdir, new = tmp_path / "w", tmp_path / "new"
    collect(workdir, [*samples[:5], dataclasses.replace(samples[5], path="")])
    new.mkdir()
    for i in range(6):
        pathlib.Path(samples[i].path).rename(new / f"{i}.png")
    arguments = [f"--collected={workdir}", f"--out={tmp_path / 'study'}", "--min_iou=0.5,0.9", "--max_turns=4"]
    assert run_command("rsagent_jax.refilter", [*arguments, f"--root={tmp_path}={new}"]) == 0
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:2] for line in table] == [["0.50", "2"], ["0.90", "2"]]
    for record in trajectories.open_records(tmp_path / "study/iou-0.90"):
        assert len(trajectories.decode_record(record, small.processor()).patches)
    assert run_command("rsagent_jax.refilter", [*arguments, f"--root=/nowhere={new}"]) == 2
    assert f"--root=/nowhere={new}: none of the 2 pictures lies below /nowhere" in capsys.readouterr().err
    assert run_command("rsagent_jax.refilter", [*arguments, "--min_iou=high"]) == 2
    assert run_command("rsagent_jax.refilter", [f"--collected={tmp_path / 'none'}", f"--out={tmp_path / 'x'}"]) == 2
    assert "filter.json cannot be read" in capsys.readouterr().err
    for wrong in ("nan", "1.5", "0.901,0.904"):
        assert run_command("rsagent_jax.refilter", [*arguments, f"--min_iou={wrong}"]) == 2


def test_refilter_takes_the_collections_own_filter_where_nothing_else_is_said(tmp_path, samples, capsys):
    own = FilterConfig(min_iou=0.5, max_turns=4, repeats=True)
    collect(tmp_path / "w", samples, config=dataclasses.replace(CONFIG, filter=own))
    kept = {}
    for name, said in {"own": [], "strict": ["--no-repeats", "--min_iou=0.9"], "short": ["--max_turns=2"]}.items():
        arguments = [f"--collected={tmp_path / 'w'}", f"--out={tmp_path / name}", *said]
        assert run_command("rsagent_jax.refilter", arguments) == 0
        folder = next((tmp_path / name).iterdir())
        kept[folder.name, name] = [row["id"] for row in lines(folder / "trajectories.jsonl")]
    assert kept == {
        ("iou-0.50", "own"): ["s0", "s3", "s5"],
        ("iou-0.90", "strict"): ["s0", "s5"],
        ("iou-0.50", "short"): ["s0"],
    }
    assert stamp(tmp_path / "own/iou-0.50")["filter"] == dataclasses.asdict(own)


def test_the_segmenters_failures_leave_no_set_and_a_changed_sample_is_played_again(
    tmp_path, samples, monkeypatch, capsys
):
    class Samples(list):
        ids = [f"s{i}" for i in range(6)]
        notes = ()
        queries = dict.fromkeys(range(6), "as ever")

        def __getitem__(self, i):  # refused as an index refuses
            entry = types.SimpleNamespace(id=self.ids[i], query="q", load=lambda: list.__getitem__(self, i))
            return SampleIndex("samples", [entry])[0]

        def fingerprint(self, i):
            return f"{i} {self.queries[i]}"

    away = DiscSegmenter(14.0, fail=[FailureKind.UNAVAILABLE] * 100)
    back = DiscSegmenter(14.0)
    away.about = back.about = DISCS
    data, workdir = Samples(samples), tmp_path / "w"
    workdir.mkdir()
    config = dataclasses.replace(CONFIG, processor=str(small.weights()), segmenter=SegmenterConfig(give_up_after=2))

    def run(segmenter, config=config):
        monkeypatch.setattr(collection, "open_samples", lambda _: data)
        monkeypatch.setattr(collection, "open_segmenter", lambda _: contextlib.nullcontext(segmenter))
        for module in (command, collection):
            monkeypatch.setattr(module, "import_path", lambda *_: Scripted)
        command.main(config, workdir=str(workdir))

    patient = dataclasses.replace(config, segmenter=SegmenterConfig(give_up_after=0))
    # s4 never asks it
    refused(r"5 of 6 samples are not measured \(segmenter, unavailable 5\)", run, away, patient)
    filter.write_kept_set(workdir, tmp_path / "part", FilterConfig())
    assert stamp(tmp_path / "part")["not_collected"] == {"segmenter, unavailable": 5}
    refused("failed 2 trajectories in a row", run, away)
    assert not (workdir / "collect.json").exists() and done(workdir) == {"s4"}
    run(back)
    assert len(done(workdir)) == 6 and stamp(workdir)["records"] == 2
    shutil.copytree(workdir, tmp_path / "begun")
    (path,) = (tmp_path / "begun" / filter.ATTEMPTS).glob("*.jsonl")
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if '"s4"' not in line))
    capsys.readouterr()
    assert run_command("rsagent_jax.refilter", [f"--collected={tmp_path / 'begun'}", f"--out={tmp_path / 'few'}"]) == 0
    assert "\nNot collected: 1 of 6 (not played yet 1); shares are of the others\n" in capsys.readouterr().out
    assert stamp(next((tmp_path / "few").iterdir()))["not_collected"] == {filter.NOT_YET: 1}
    data.queries[0] = "another question"
    capsys.readouterr()
    asked = len(back.requests)
    run(back)
    assert len(back.requests) == asked + 1 and "changed since, done again: 1 (s0)" in capsys.readouterr().out
    data.ids = ["other", *data.ids[1:]]
    refused(r"samples that the data no longer has, such as \['s0'\]", run, back)
    data.ids, data.queries[3] = ["s0", *data.ids[1:]], "changed"
    wide = {"image": np.zeros((10, 2010, 3), np.uint8), "gt_mask": np.zeros((10, 2010), bool)}
    data[3] = dataclasses.replace(samples[3], **wide)
    stops = dataclasses.replace(config, data=schema.DataConfig(unreadable="stop"))
    refused(r"3\.png: image of 10x2010 pixels", run, back, stops)
    run(back)
    assert stamp(workdir)["not_collected"] == {"unreadable sample": 1} and done(workdir) == {*data.ids} - {"s3"}
    assert "3.png: image of 10x2010 pixels" in stamp(workdir)["unreadable"]["s3"]
    data[3] = samples[3]
    run(back)
    assert stamp(workdir)["not_collected"] == {} and len(done(workdir)) == 6


def test_a_remote_teacher_is_asked_side_by_side_and_counted(tmp_path, samples):
    from rsagent_jax.collecting.endpoint import Endpoint, Remote

    def answer(body):
        text = body["messages"][1]["content"][1]["text"]
        script = SCRIPTS["s" + text.split('"')[1].split()[-1]]
        turn = sum(m["role"] == "assistant" for m in body["messages"])
        if "number 1" in text:
            return 400, {}, '{"error": {"message": "too long"}}'
        return good(script[turn]) if len(server.asked) % 3 else (200, {}, '{"choices": [')

    with Server([answer]) as server:
        teacher = schema.RemoteConfig(url=server.url, model="m", backoff_s=0.001, retries=20, price_out=1e6)
        config = dataclasses.replace(CONFIG, teacher=TeacherConfig(remote=teacher))
        collector, _ = collect(tmp_path / "w", samples, make=Remote, config=config)
    assert collector.failures.counts == {"endpoint, refused": 1}
    assert "too long" in collector.failures.examples["endpoint, refused"][0]
    turns = sum(len(script) for id, script in SCRIPTS.items() if id != "s1")
    usage = Endpoint.shared(teacher).told()
    assert usage["tokens_out"] == 10 * turns == usage["cost"]
    assert usage["requests"] == turns + usage["retries"] + 1 and usage["retries"] > 0
    assert filter.write_kept_set(tmp_path / "w", tmp_path / "w", FilterConfig()).kept == 2


OWN = dataclasses.replace(CONFIG, teacher=TeacherConfig(own=schema.OwnConfig(weights="w", tries=2)))


def test_our_own_policy_tries_each_sample_and_the_first_good_try_is_kept(tmp_path, samples):
    """Which try is good: of s0 both, of s1 none, of s2 the second."""
    good = {0: (True, True), 1: (False, False), 2: (False, True)}

    def act(task, state):
        number, attempt = int(task.sample.id[1:]), task.uid % 2
        return [small.click(*((56, 56) if good[number][attempt] else (80, 56))), small.finish(1)][len(state.turns)]

    policy = TextPolicy(act, small.processor(), slots=3)
    collector, played = collect(tmp_path, samples[:3], config=OWN, policy=policy, checksum="abc")
    assert collector.failures.counts == {} and len(played) == 6
    found = filter.write_kept_set(tmp_path, tmp_path / "one", FilterConfig())
    assert [row["id"] for row in lines(tmp_path / "one/trajectories.jsonl")] == ["s0#0", "s2#1"]
    assert found.dropped == {"1 of the sample kept already": 1, "final IoU below 0.9": 3}
    arguments = [f"--collected={tmp_path}", f"--out={tmp_path / 'study'}", "--min_iou=0.9", "--per_sample=2"]
    assert run_command("rsagent_jax.refilter", arguments) == 0
    both = [row["id"] for row in lines(tmp_path / "study/iou-0.90/trajectories.jsonl")]
    assert both == ["s0#0", "s0#1", "s2#1"]
    header = trajectories.record_header(trajectories.open_records(tmp_path / "one")[0])
    assert header["provenance"]["teacher"] == "own policy" and header["provenance"]["weights_sha256"] == "abc"
    refused("results of other settings", opened, tmp_path, config=OWN, checksum="other weights")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sampled_ids_are_stored_as_they_were_and_a_kill_changes_nothing(tmp_path, samples):
    """The engine with random weights: what it says is no call, but its ids must come back bit for bit."""
    engine, whole, cut = small.engine(seed=3), tmp_path / "whole", tmp_path / "cut"
    collect(whole, samples[:2], config=OWN, policy=engine, checksum="abc")
    path = next((whole / filter.ATTEMPTS).glob("*.jsonl"))
    rows = {row["id"]: row for row in lines(path)[1:]}
    assert set(rows) == {"s0#0", "s0#1", "s1#0", "s1#1"} and all(row["sampled_tokens"] for row in rows.values())
    tasks = [small.Task(samples[i], i, 2 * i + t) for i in (0, 1) for t in (0, 1)]
    played = [t for t, _ in Driver(engine, DiscSegmenter(14.0), small.processor(), small.AGENT).run(tasks)]
    for uid, trajectory in enumerate(played):
        item = trajectories.decode_record(base64.b64decode(rows[f"s{uid // 2}#{uid % 2}"]["record"]), small.processor())
        same_arrays(item, trajectory)
    assert len({tuple(t.tokens[t.loss_mask].tolist()) for t in played}) == 4  # tries differ
    (cut / filter.ATTEMPTS).mkdir(parents=True)
    (cut / filter.ATTEMPTS / path.name).write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:3]) + b"\n")
    _, left = collect(cut, samples[:2], config=OWN, policy=engine, checksum="abc")
    again = {row["id"]: row for row in lines(cut / filter.ATTEMPTS / path.name)[1:]}
    assert len(left) == 2 and {i: r["record"] for i, r in again.items()} == {i: r["record"] for i, r in rows.items()}


DIES = """
import itertools, os, signal, sys
from rsagent_jax.runtime import command, journal
add, rows = journal.Journal.add, itertools.count(1)
journal.Journal.add = lambda *row: (add(*row), next(rows) == 6 and os.kill(os.getpid(), signal.SIGKILL))
command.run_command("rsagent_jax.collect", sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_kill_of_the_command(tmp_path):
    synthetic.write_dataset(tmp_path / "data", train=16, val=1, test=1, seed=5, progress=False)
    flags = ["--config=configs/collect_quickstart.py", f"--config.data.root={tmp_path / 'data'}"]
    flags += ["--config.segmenter.mode=inprocess", "--config.limit=30", f"--workdir={tmp_path / 'w'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", DIES, *flags], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "w" / "collect.json").exists()
    for shard, says in (("0/2", "are left to the others"), ("1/2", "goes on: ")):  # on two machines
        done = [sys.executable, "-m", "rsagent_jax.collect", *flags, f"--shard={shard}"]
        done = subprocess.run(done, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0 and says in done.stdout, done.stderr
    rows = [row for path in (tmp_path / "w" / filter.ATTEMPTS).glob("*.jsonl") for row in lines(path)[1:]]
    assert len(rows) == len({row["id"] for row in rows}) == 30
    good = [row for row in rows if filter.verdict(row, FilterConfig(min_iou=0.8, repeats=True)) == "kept"]
    kept = [row["id"] for row in sorted(good, key=lambda row: row["uid"])]
    assert [row["id"] for row in lines(tmp_path / "w" / "trajectories.jsonl")] == kept
    assert len(trajectories.open_records(tmp_path / "w")) == len(kept) > 10
