"""Paired differences by hand, and refusals where figures are of different things."""

import json

import numpy as np
import pytest

from rsagent_jax import compare
from rsagent_jax.evals.metrics import SampleResult
from rsagent_jax.runtime.command import run_command
from rsagent_jax.types import Status
from tests.refusals import refused
from tests.report.written import write_files, write_lines


def write(workdir, ious, union=1000, turns=2, sentences=0, version="1", **settings):
    """A work directory of evaluate.py with these IoUs; no trajectories but for queries."""
    results = [SampleResult(f"s{i}", round(v * union), union, Status.FINISHED, turns, 0) for i, v in enumerate(ious)]
    settings = {"data": {"root": str(workdir), "split": "val"}} | settings
    example = {"id": "s0", "query": "the | one\nhere", "iou": 0.0, "status": "finished", "ious": [], "gt": {}}
    images = {r.id: f"p{i // sentences}" for i, r in enumerate(results)} if sentences else None
    return write_files(workdir, results, settings, [example | {"image": "", "record": ""}], images, version=version)


def test_differences_by_hand(tmp_path, capsys):
    a = write(tmp_path / "a", [0.5, 0.5, 0.2, 0.8])
    b = write(tmp_path / "b", [0.9, 0.5, 0.1, 0.9], turns=3)
    assert run_command("rsagent_jax.compare", [str(a), str(b), f"--out={tmp_path / 'c.md'}", "--samples=2"]) == 0
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    # (0.4 + 0 - 0.1 + 0.1) / 4; cIoU: 2400 / 4000 against 2000 / 4000; one turn more each
    gaps = last["differences"]["b"]
    assert last["base"] == "a" and gaps["giou"]["value"] == pytest.approx(0.1, abs=1e-6)
    assert gaps["ciou"]["value"] == pytest.approx(0.1, abs=1e-9)
    assert gaps["turns"] == {"value": 1.0, "ci95": [1.0, 1.0]} and "+1.000 [+1.000, +1.000] *" in out
    assert gaps["giou"]["ci95"][0] < 0.1 < gaps["giou"]["ci95"][1]
    assert "2 / 1 / 1" in out
    text = (tmp_path / "c.md").read_text()
    assert "| s0 | the \\| one here | 0.500 | 0.900 | +0.400 |" in text
    assert text.count("\n| s") == 3  # the head of the table, and two samples
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    bars = [{row.replace("\\|", "").count("|") for row in block.splitlines()} for block in tables]
    assert bars == [{10}, {6}]  # nine and five columns in every row


def test_only_samples_that_neither_run_drops_are_paired(tmp_path, capsys):
    """Of 0.1, 0.5, 0.9 against 0.2, 0.6, 0.9: with the first dropped there and the last dropped here, 0.1 is left."""
    for name, ious, lost in (("a", (0.1, 0.5, 0.9), 0), ("b", (0.2, 0.6, 0.9), 2)):
        workdir = write(tmp_path / name, ious)
        rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
        rows = [row | {"dropped": "failure" * (i == lost)} for i, row in enumerate(rows)]
        write_lines(workdir / "predictions.jsonl", rows)
    a, b = (compare.load_evaluation(tmp_path / name) for name in "ab")
    gap = compare.compare(a, b, "b")
    assert (gap.giou.value, gap.ciou.value) == pytest.approx((0.1, 0.1)) and len(a.counted) == len(b.counted) == 2
    assert gap.giou.ci95 == pytest.approx((0.1, 0.1), abs=1e-6)
    assert (gap.left_out, gap.better, gap.worse, gap.same) == (2, 1, 0, 0)
    assert [id for id, *_ in gap.samples] == ["s1"]
    assert run_command("rsagent_jax.compare", [str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "1 / 0 / 0 (2 left out)" in said
    assert json.loads(said.splitlines()[-1])["differences"]["b"]["left_out"] == 2
    write_lines(tmp_path / "b/predictions.jsonl", [row | {"dropped": "failure"} for row in rows])
    refused("no sample counts in both", compare.compare, a, compare.load_evaluation(tmp_path / "b"), "b")


def test_settings_that_differ_are_named(tmp_path, capsys):
    a, b = (
        write(tmp_path / k, [0.5], segmenter={"backend": k}, metric={"unit": "sentence"}) for k in ("sam2", "grabcut")
    )
    assert run_command("rsagent_jax.compare", [str(a), str(b)]) == 0
    assert "settings of sam2 and grabcut: settings.segmenter.backend: 'sam2' and 'grabcut'\n" in capsys.readouterr().out


def test_intervals_are_paired(tmp_path):
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 0.8, 200)
    a = write(tmp_path / "a", hard, union=10**6)
    b = write(tmp_path / "b", hard + 0.1 + rng.normal(0, 0.01, 200), union=10**6)
    found = compare.compare(*(compare.load_evaluation(x) for x in (a, b)), "b")
    for difference in (found.giou, found.ciou):
        # 2 * 1.96 * 0.01 / sqrt(200) = 0.0028, though either mean alone is uncertain by 0.06
        width = difference.ci95[1] - difference.ci95[0]
        assert width == pytest.approx(0.0028, rel=0.25) and difference.clear
        assert difference.ci95[0] < 0.1 < difference.ci95[1]
    again = compare.compare(compare.load_evaluation(a), compare.load_evaluation(a), "a")
    assert (again.giou.value, again.giou.ci95, again.same) == (0.0, (0.0, 0.0), 200)


def test_intervals_are_resampled_by_picture(tmp_path, capsys):
    rng = np.random.default_rng(1)
    base, gain = np.repeat(rng.uniform(0.1, 0.5, 40), 3), np.repeat(rng.normal(0.1, 0.1, 40), 3)
    a = write(tmp_path / "a", base, union=10**6, sentences=3)
    b = write(tmp_path / "b", base + gain, union=10**6, sentences=3)
    found = compare.compare(*map(compare.load_evaluation, (a, b)), "b")
    width = lambda d: d.ci95[1] - d.ci95[0]  # noqa: E731
    # three sentences that gain alike are one: sqrt(3) times the width of 120 of their own
    single = [write(tmp_path / f"single{k}", ious, union=10**6) for k, ious in enumerate((base, base + gain))]
    alone = compare.compare(*map(compare.load_evaluation, single), "b")
    assert width(found.ciou) == pytest.approx(3**0.5 * width(alone.ciou), rel=0.15)
    assert width(found.giou) == pytest.approx(2 * 1.96 * gain.std() / 40**0.5, rel=0.15)
    assert run_command("rsagent_jax.compare", [str(a), str(b)]) == 0
    assert "paired bootstrap over pictures." in capsys.readouterr().out


def test_several_against_the_first_are_told_apart_by_their_paths(tmp_path, capsys):
    paths = [write(tmp_path / name / "eval", [0.1 * i, 0.5]) for i, name in enumerate("abc")]
    assert run_command("rsagent_jax.compare", list(map(str, paths))) == 0
    out = capsys.readouterr().out
    assert all(f"{name}/eval" in out for name in "abc") and out.count("differ most") == 2


def test_samples_of_an_earlier_version_are_paired_by_id_and_it_is_said(tmp_path, capsys):
    a, b = write(tmp_path / "a", [0.5, 0.6]), write(tmp_path / "old", [0.6, 0.7], version="")
    assert run_command("rsagent_jax.compare", [str(a), str(b)]) == 0
    assert "a and old; 2 samples are paired by id alone: an earlier version" in capsys.readouterr().out
    assert run_command("rsagent_jax.compare", [str(a), str(write(tmp_path / "new", [0.6, 0.7]))]) == 0
    assert "by id alone" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    a = write(tmp_path / "a", [0.5, 0.6])
    two = [0.5, 0.6]
    cases = [
        (write(tmp_path / "fewer", [0.5]), "do not cover the same samples: 1 are in one only"),
        (
            write(tmp_path / "changed", two, version="2"),
            "or ignored pixels of 2 differ as they were decoded, such as ['s0', 's1']",
        ),
        (write(tmp_path / "rules", two, metric={"unit": "all"}), "differ in settings.metric.unit: None and 'all'"),
        (write(tmp_path / "split", two, data={"split": "test"}), "differ in settings.data.split: 'val' and"),
        (tmp_path / "none", "results.json is missing"),
        (a, "the same directory is given twice"),
    ]
    for other, message in cases:
        assert run_command("rsagent_jax.compare", [str(a), str(other)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and "\n" not in error.strip()
    assert run_command("rsagent_jax.compare", [str(a)]) == 2
    assert run_command("rsagent_jax.compare", [str(a), str(tmp_path / "fewer"), f"--out={a}"]) == 2
    assert "is a folder; give a file" in capsys.readouterr().err
    refused("do not cover", compare.compare, *(compare.load_evaluation(x) for x in (a, tmp_path / "fewer")), "x")
