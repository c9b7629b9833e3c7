"""The seam: every layout by its config, pictures of other sets left out, mixes by weight."""

import collections
import dataclasses
import json
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rsagent_jax import data_check
from rsagent_jax.config.build import build_config, template
from rsagent_jax.config.data import MixPart
from rsagent_jax.config.schema import CollectConfig, DataConfig, EvalConfig, TrainConfig
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.runtime.command import parse_arguments
from tests.data.sets.small_sets import write_image, write_lines, write_reasonseg
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[3]
TFDS = ROOT / "tests/golden/ref_coco/tfrecord"


def lines(root, names):
    for name in names:
        write_image(root / name)
    return write_lines(root, *({"image": name, "mask": None} for name in names))


def test_every_layout_is_opened_by_its_config(dataset, tmp_path):
    root = str(dataset)
    assert open_samples(DataConfig(root=root, split="val", limit=2)).name == "refcocog/umd/val"
    assert len(open_samples(DataConfig(root=root, split="val", limit=2))) == 2
    assert len(open_samples(DataConfig(root=str(TFDS), layout="tfds", split="val", unit="reference"))) == 3
    for stem in "ab":
        write_reasonseg(tmp_path / "rs/val", stem)
    assert len(open_samples(DataConfig(root=str(tmp_path / "rs"), dataset="reasonseg", split="val"))) == 2
    path = str(lines(tmp_path / "mine", ["a.png"]))
    assert open_samples(DataConfig(root=path, dataset="folder")).ids == ["folder/train/1"]
    says = r"data.dataset must be one of refcoco, .*or module:function .*did you mean refcoco\?"
    refused(says, build_config, CollectConfig, {"processor": "p", "data": {"root": root, "dataset": "refcocoo"}})


def test_a_loader_of_ones_own_is_that_of_the_recipe(tmp_path):
    text = (ROOT / "docs/extend.md").read_text().partition("## A dataset\n")[2]
    (tmp_path / "box_set.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    (tmp_path / "val.csv").write_text("a.png,2,3,7,5,a box, with a comma\na.png,0,0,1,1,another\n")
    data = {"root": str(tmp_path), "dataset": f"{tmp_path}/box_set.py:load", "split": "val"}
    samples = open_samples(build_config(CollectConfig, {"processor": "p", "data": data}).data)
    assert samples.ids == ["boxes/val/0", "boxes/val/1"] and samples[0].query == "a box, with a comma"
    assert samples[0].gt_mask.sum() == 5 * 2 and samples[0].gt_mask[3:5, 2:7].all()
    assert samples.image_keys == [str(tmp_path / "a.png")] * 2 and samples.fingerprint(0) != samples.fingerprint(1)
    assert pickle.loads(pickle.dumps(samples))[1].gt_mask.sum() == 1
    assert len(open_samples(DataConfig(**data, limit=1))) == 1
    says = r"test\.csv is missing: data\.root must be the folder that holds it"
    refused(says, open_samples, DataConfig(**data | {"split": "test"}))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def load(root, split, limit): return [root]", "returned a list, not a SampleIndex"),
        ("def load(root, split, limit):\n    return 1 / 0", r"failed: .*own\.py, line 2: ZeroDivisionError: division"),
        ("def load(root): pass", r"takes \(root\), but is called with .*split='train'"),
        ("def lod(root, split, limit): pass", "has no 'load'; did you mean 'lod'"),
    ],
)
def test_a_loader_that_does_not_work_is_told_so(tmp_path, code, says):
    (tmp_path / "own.py").write_text(code)
    refused(rf"own\.py:load'.*{says}", open_samples, DataConfig(dataset=f"{tmp_path}/own.py:load"))


def test_a_loader_gets_the_fields_that_it_names(dataset, tmp_path):
    code = "from rsagent_jax.data.sets.refcoco import load_refcoco\ndef load(root, split, limit, unit, raw):\n"
    (tmp_path / "named.py").write_text(code + "    return load_refcoco(root, split=split, unit=unit, raw=raw)\n")
    own = DataConfig(root=str(dataset), dataset=f"{tmp_path}/named.py:load", unit="reference", raw=True)
    samples, same = open_samples(own), open_samples(dataclasses.replace(own, dataset="refcocog"))
    assert samples.ids == same.ids and samples[0].query == same[0].query


def test_pictures_of_other_sets_are_left_out_and_counted(copied, tmp_path):
    path = copied / "refcocog/refs(umd).p"
    refs = pickle.loads(path.read_bytes())
    shared = [r | {"split": "val", "ref_id": 7} for r in refs if r["split"] == "train"][:1]
    path.write_bytes(pickle.dumps(refs + shared, protocol=2))
    whole = open_samples(DataConfig(root=str(copied)))
    left = open_samples(DataConfig(root=str(copied), exclude=("refcocog/umd/val", "refcocog/umd/test")))
    key = f"coco/{shared[0]['image_id']}"
    gone = [i for i, k in zip(whole.ids, whole.image_keys, strict=True) if k == key]
    assert gone and left.ids == [i for i in whole.ids if i not in gone]
    assert left.notes == (
        f"{len(gone)} of {len(whole)} samples are on pictures of refcocog/umd/val and were left out",
        f"0 of {len(left)} samples are on pictures of refcocog/umd/test and were left out",
    )
    assert open_samples(DataConfig(root=str(copied), exclude=("refcocog/umd/val",), limit=3)).ids == left.ids[:3]
    # a user's copy of a COCO picture is the same picture
    mine = lines(tmp_path / "mine", [f"{shared[0]['image_id']:012d}.jpg", "other.jpg"])
    config = DataConfig(root=str(mine), dataset="folder", exclude=("refcocog/umd/val",), exclude_root=str(copied))
    assert open_samples(config).ids == ["folder/train/2"]
    config = DataConfig(root=str(copied), split="val", exclude=("refcocog/umd/val",))
    refused("nothing of refcocog/umd/val is left", open_samples, config)


def mixed(tmp_path, weights, sizes):
    parts = []
    for n, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        root = lines(tmp_path / f"part{n}", [f"{i}.png" for i in range(size)])
        parts.append(MixPart(name=str(n), weight=weight, data=DataConfig(root=str(root), dataset="folder")))
    return open_samples(DataConfig(mix=tuple(parts)))


def test_a_mix_holds_every_sample_and_the_shares_of_the_weights(tmp_path):
    mix = mixed(tmp_path, (3.0, 1.0), (6, 4))
    # 4 samples at a quarter take 16 in all, so 12 of the 6: each of them twice
    assert len(mix) == 16 and mix.name == "12 of folder/train + 4 of folder/train"
    part = collections.Counter(pathlib.Path(mix[i].path).parent.name for i in range(len(mix)))
    assert part == {"part0": 12, "part1": 4}
    assert sorted(collections.Counter(s.path for s in mix).values()) == [1] * 4 + [2] * 6


def test_a_mix_in_a_config_file_is_a_group_by_name(tmp_path):
    root = lines(tmp_path / "mine", ["a.png", "b.png"])
    config = template(TrainConfig)
    config.policy.weights = "x"
    config.grpo.data.root = str(root)
    config.grpo.data.mix = {"a": {"weight": 2.0, "data": {"dataset": "folder"}}, "b": {"data": {"dataset": "folder"}}}
    data = build_config(TrainConfig, config).grpo.data
    assert [(p.name, p.weight, p.data.dataset) for p in data.mix] == [("a", 2.0, "folder"), ("b", 1.0, "folder")]
    assert len(open_samples(data)) == 6
    config.grpo.data.mix.a.weight = -1.0
    refused(r"grpo.data.mix.a.weight must be above 0, got -1.0", build_config, TrainConfig, config)
    config.grpo.data.mix.a.weight = 1.0
    config.grpo.data.limit = 3
    refused("data.limit does not reach into a mix", build_config, TrainConfig, config)


# ------------------------------------------------------------------------------------------------ data_check


def run_check(root, out, *more):
    command = [sys.executable, "-m", "rsagent_jax.data_check", "--config=configs/eval_quickstart.py", f"--out={out}"]
    return subprocess.run(
        [*command, f"--config.data.root={root}", *more], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_check_reports_broken_pictures_and_draws_the_rest(copied, tmp_path):
    image = sorted((copied / "images/mscoco/images/train2014").glob("*.jpg"))[-1]
    image.write_bytes(image.read_bytes()[:400])
    (copied / "synthetic.json").unlink()
    refcocog = ("--config.data.dataset=refcocog", "--config.data.split_by=umd")
    done = run_check(copied, tmp_path / "out", "--samples=0", *refcocog)
    assert done.returncode == 1, done.stderr
    assert "3 of 4 samples looked at were read" in done.stdout and f"{image} is not a readable picture" in done.stdout
    assert "DIFFERS" in done.stdout  # four synthetic samples are not RefCOCOg's 5023 references
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert len(report["unreadable"]) == 1 and report["read"] == 3
    with Image.open(tmp_path / "out/contact_sheet.png") as sheet:
        assert sheet.size == (4 * 288, 328) and len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000


def test_check_finds_what_cannot_be_shown_and_keeps_its_place_in_the_exit_status(tmp_path, monkeypatch, capsys):
    root = lines(tmp_path / "mine", ["a.png", "thin.png", "limit.png"])
    Image.new("RGB", (2010, 10)).save(root / "thin.png")  # 201:1
    Image.new("RGB", (2000, 10)).save(root / "limit.png")  # 200:1 is shown
    config = template(EvalConfig)
    config.policy.weights, config.data.root, config.data.dataset, config.data.split = "x", str(root), "folder", "train"
    assert data_check.main(build_config(EvalConfig, config), out=str(tmp_path), samples=0) == 1
    said = capsys.readouterr().out
    assert re.search("UNREADABLE folder/train/2: .*image of 10x2010 pixels.*crop it", said) and "2 of 3 samples" in said


def test_published_counts_are_compared_for_whole_splits_only(copied, monkeypatch):
    data = DataConfig(root=str(copied), split="val")
    samples = open_samples(data)
    images = len(set(samples.image_keys))
    assert "synthetic" in data_check.count_row(samples, data)["verdict"]
    (copied / "synthetic.json").unlink()
    for published, verdict in [((6, images, len(samples)), "ok"), ((6, images, 4896), "DIFFERS")]:
        monkeypatch.setitem(data_check.PUBLISHED, "refcocog/umd/val", published)
        assert data_check.count_row(samples, data)["verdict"] == verdict
    limited = DataConfig(root=str(copied), split="val", limit=2)
    assert "not compared" in data_check.count_row(open_samples(limited), limited)["verdict"]
    # the papers' totals of sentences
    totals = {"refcoco/unc": 142_210, "refcoco+/unc": 141_564, "refcocog/umd": 95_010}
    for name, total in totals.items():
        assert sum(n[2] for key, n in data_check.PUBLISHED.items() if key.startswith(name)) == total


def test_the_config_file_says_whose_it_is():
    kinds = {"grpo_tpu": TrainConfig, "eval_quickstart": EvalConfig, "collect_quickstart": CollectConfig}
    for file, kind in kinds.items():
        _, flags = parse_arguments(data_check.main, [f"--config={ROOT}/configs/{file}.py"])
        assert type(flags["config"]) is kind
    refused("--config=configs/X.py is required", parse_arguments, data_check.main, [])
    assert run_check("/nowhere", "/dev/null/x").returncode == 2
