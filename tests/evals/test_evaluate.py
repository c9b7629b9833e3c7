"""evaluate.py's main in this process, with an oracle and a segmenter that is away when the test says so."""

import contextlib
import json

import numpy as np
import PIL.Image
import pytest
from agent_fakes import DiscSegmenter, disc

import evaluate
from configs import eval as eval_configs
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import EvalConfig
from rsagent_jax.data.sets.index import SampleIndex
from rsagent_jax.report.comparison import compare
from rsagent_jax.report.evaluation import load_evaluation
from rsagent_jax.report.rows import RowIndex
from rsagent_jax.runtime.journal import Journal
from rsagent_jax.types import StorageError
from sam_bridge.types import About, FailureKind, SegmenterError
from tests.refusals import refused

N = 6
QUERIES = [f"disc {i}" for i in range(N)]


class Away(DiscSegmenter):
    """Answers but for the objects of these pictures, told apart by their size."""

    def __init__(self, lost=(), backend="discs"):
        super().__init__()
        self.lost, self.about, self.asked = set(lost), About(backend, f"{backend} of one size"), 0

    def segment(self, image, request):
        self.asked += 1
        if image.shape[0] - 100 in self.lost:
            raise SegmenterError(FailureKind.UNAVAILABLE, "nobody there")
        return super().segment(image, request)


def write_mask(root, i, x=50):
    PIL.Image.fromarray(disc(100 + i, 100, x, 40, 20).astype(np.uint8) * 255).save(root / f"m{i}.png")


def write_lines(root, queries=QUERIES):
    rows = [{"id": f"s{i}", "image": f"{i}.png", "mask": f"m{i}.png", "query": q} for i, q in enumerate(queries)]
    (root / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for i in range(N):
        PIL.Image.fromarray(np.full((100 + i, 100, 3), 90, np.uint8)).save(root / f"{i}.png")
        write_mask(root, i)
    write_lines(root)
    return root


@pytest.fixture
def run(monkeypatch, tmp_path, root):
    """run(segmenter, shard) -> results.json, or None where there is none."""

    def call(segmenter=None, shard="0/1", workdir=tmp_path / "w", **changes):
        segmenter = segmenter or Away()
        config = eval_configs.get_config("folder-mine")
        config.data.root = str(root)
        config.bound.row = "box"
        config.segmenter.update(mode="inprocess", addresses=(), workers=1)
        for path, value in changes.items():
            section, name = path.split("__")
            config[section][name] = value
        workdir.mkdir(exist_ok=True)
        monkeypatch.setattr(evaluate, "open_segmenter", lambda _: contextlib.nullcontext(segmenter))
        evaluate.main(build_config(EvalConfig, config), workdir=str(workdir), shard=shard)
        path = workdir / "results.json"
        return json.loads(path.read_text()) if path.exists() else None

    return call


def test_a_sample_that_the_segmenter_failed_is_played_again_and_counts_for_nothing(run, tmp_path, capsys):
    whole = run(workdir=tmp_path / "whole")
    refused(r"2 of 6 samples are not measured \(segmenter, unavailable 2\).*run the same", run, Away([1, 4]))
    assert not (tmp_path / "w/results.json").exists()
    assert "not done 2: segmenter, unavailable\n    folder/mine/s1: nobody there" in capsys.readouterr().out
    back = Away()
    results = run(back)
    assert back.asked == 2 and "goes on: 4 of 6 samples are done" in capsys.readouterr().out
    for key in ("n", "giou", "ciou", "giou_ci95", "failures", "by_turn", "behaviour"):
        assert results[key] == whole[key]
    assert results["giou"] > 0.9 and results["failures"]["env_failed"] == 0


def test_an_oracle_has_no_budget_of_tokens(run, tmp_path):
    assert run(agent__max_tokens=5)["giou"] == run(workdir=tmp_path / "w2")["giou"] > 0.5


def test_an_oracle_lets_go_of_the_pictures_that_it_has_played(run, monkeypatch):
    drivers, made = [], evaluate.bounds.oracle_driver
    monkeypatch.setattr(evaluate.bounds, "oracle_driver", lambda *args: drivers.append(made(*args)) or drivers[0])
    assert run(bound__row="best_of_three")["n"] == N and drivers[0].segmenter.expected == {}


def test_failures_in_a_row_end_the_command_and_what_was_done_is_kept(run, tmp_path):
    away = Away(range(1, N))
    refused("failed 2 trajectories in a row.*What was done is kept", run, away, segmenter__give_up_after=2)
    assert away.asked <= 4  # one that answers, two that fail, and what was under way
    assert run(Away(), segmenter__give_up_after=2)["n"] == N


def test_a_user_may_accept_failures_by_one_switch(run, capsys):
    results = run(Away([1, 4]), metric__failure_policy="zero")
    assert (results["n"], results["failures"]["env_failed"]) == (6, 2)
    assert results["segmenter_failures"] == {"segmenter, unavailable": 2}
    assert "failed: segmenter, unavailable 2" in capsys.readouterr().out
    dropped = run(Away([4]), metric__failure_policy="dropped")  # tried again each time
    assert (dropped["n"], dropped["dropped"]["failure"]) == (5, 1) and dropped["giou"] > 0.9


def test_what_has_changed_is_measured_again(run, root, tmp_path, capsys):
    assert run(workdir=tmp_path / "before")["giou"] == run()["giou"] > 0.9
    segmenter = Away()
    assert run(segmenter)["n"] == N and segmenter.asked == 0
    for i in range(N):
        write_mask(root, i, x=20)
    capsys.readouterr()
    moved = run(segmenter)
    assert segmenter.asked == N and "changed since, done again: 6 (folder/mine/s0, " in capsys.readouterr().out
    fresh = run(workdir=tmp_path / "other")
    assert (moved["giou"], moved["ciou"]) == (fresh["giou"], fresh["ciou"]) and moved["giou"] > 0.9
    before, after, again = (load_evaluation(tmp_path / name) for name in ("before", "w", "other"))
    assert compare(after, again, "other").by_id_alone == 0
    refused("do not cover the same samples: question, picture, target.* of 6 differ", compare, before, after, "w")
    write_lines(root, ["another question", *QUERIES[1:4]])
    assert run(segmenter)["n"] == 4 and segmenter.asked == N + 1
    assert "no longer in the data, left out: 2" in capsys.readouterr().out
    (index := RowIndex(tmp_path / "w")).refresh()
    assert len(index.rows) == 4 and index.notes() == []
    write_lines(root, ["yet another", *QUERIES[1:4]])
    refused("1 of 4 samples are not measured", run, Away([0]))
    # and no old figure stands in its place
    assert not (tmp_path / "w/results.json").exists()


def test_every_iou_that_is_shown_is_by_the_rules_of_the_figures(run, tmp_path):
    assert run()["giou"] > 0.9
    index, rules = RowIndex(tmp_path / "w"), {"metric__empty_below": 10**6}
    index.refresh()
    assert all(row.values["iou"] > 0.9 for row in index.rows.values()) and index.notes() == []
    assert run(**rules)["giou"] == 0.0  # nothing is played again
    index.refresh()
    assert len(index.rows) == N and all(row.values["iou"] == 0.0 for row in index.rows.values())
    assert index.notes() == ["IoU of w is by its own rules: empty_below 1000000"]
    assert {example.ious for example in load_evaluation(tmp_path / "w").examples} == {(0.0,)}
    refused("not measured", run, Away([1]), **rules, workdir=tmp_path / "under way")
    (index := RowIndex(tmp_path / "under way")).refresh()
    assert len(index.rows) == N and all(row.values["iou"] == 0.0 for row in index.rows.values())


def test_unreadable_samples_are_named_counted_and_in_no_figure(run, root, tmp_path, capsys):
    (root / "1.png").write_bytes((root / "1.png").read_bytes()[:60])
    (root / "2.png").unlink()
    results = run()
    assert results["n"] == 4 and results["giou"] > 0.9
    assert set(results["unreadable"]) == {"folder/mine/s1", "folder/mine/s2"}
    (index := RowIndex(tmp_path / "w")).refresh()
    assert len(index.rows) == 4 and [note.split()[0] for note in index.notes()] == ["2"]
    out = capsys.readouterr().out
    assert "n 4 " in out and "failed: unreadable 2" in out and "1.png is not a readable picture" in out
    refused("1.png is not a readable picture", run, data__unreadable="stop")
    for i in range(N):
        (root / f"{i}.png").unlink(missing_ok=True)
    refused("none of the 6 samples can be read", run)


def test_a_bucket_that_is_away_is_no_unreadable_sample(run, monkeypatch):
    def away(self, i):
        raise StorageError("the bucket does not answer")

    monkeypatch.setattr(SampleIndex, "__getitem__", away)
    refused("the bucket does not answer", run)


def test_a_result_without_what_was_played_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(Journal, "add", lambda self, row: None)  # lost on its way
    refused("6 samples that were done are not in .*run the same command again", run)
    assert not (tmp_path / "w/results.json").exists()


def test_shards_join_and_those_of_two_back_ends_do_not(run, tmp_path, capsys):
    assert run(shard="0/2") is None and "3 samples are left to the others" in capsys.readouterr().out
    refused('segmenter.backend: "discs" there, "boxes" now', run, Away(backend="boxes"), shard="1/2")
    refused("1 of 3 samples are not measured", run, Away([3]), shard="1/2")
    assert run(shard="0/2") is None and "1 samples are left to the others" in capsys.readouterr().out
    results = run(shard="1/2")
    assert results["n"] == N and results["segmenter"] == {"backend": "discs", "identity": "discs of one size"}
    assert results["settings"]["segmenter"]["backend"] == "discs"  # not grabcut, the config's default
    assert (results["ci_unit"], results["pictures"]) == ("picture", N)
    predictions = [json.loads(line) for line in (tmp_path / "w/predictions.jsonl").read_text().splitlines()]
    assert [p["picture"].rsplit("/", 1)[1] for p in predictions] == [f"{i}.png" for i in range(N)]
