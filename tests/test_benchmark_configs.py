"""configs/eval.py: each benchmark by name, opened and evaluated on small files written in its own format."""

import collections
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

import evaluate
from configs import collect_tpu, grpo_mix_tpu, grpo_tpu, segment, sft_tpu
from configs import eval as eval_configs
from rsagent_jax.config.build import build_config
from rsagent_jax.config.schema import CollectConfig, DataConfig, EvalConfig, SegmentConfig, TrainConfig
from rsagent_jax.data.sets import refcoco
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.masks import encode_rle
from rsagent_jax.runtime import command
from tests.data.sets.small_sets import write_lines, write_reasonseg, write_refer
from tests.refusals import refused
from tests.rollout import small

ROOT = pathlib.Path(__file__).parents[1]
SIZE = (64, 48)  # w, h of every picture
BOX = (10, 8, 40, 30)


def make_image() -> Image.Image:
    """A red square, where BOX is, on blue: GrabCut finds it."""
    image = Image.new("RGB", SIZE, (30, 40, 200))
    image.paste((220, 30, 30), BOX)
    return image


def polygon() -> list[int]:
    x1, y1, x2, y2 = BOX
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def refer_files(root: pathlib.Path, name: str) -> None:
    """Per split two references with two sentences each, on picture 1; gRefCOCO: one with a target, one without. The
    train split stands on pictures 1 and 2: the first half of it is held out with the others."""
    folder, split_by = name, eval_configs.SETS[name][0]
    refs = []
    for n, split in enumerate((*eval_configs.SETS[name][1], "train")):
        for k in (0, 1):
            id = 2 * n + k
            sentences = [{"raw": "It", "sent": "it", "sent_id": 10 * id + s, "tokens": ["it"]} for s in (0, 1)]
            image_id = 2 if split == "train" and k else 1
            ann = ([11] if k else [-1]) if name == "grefcoco" else 10 * image_id + 1
            refs.append({"ref_id": id, "ann_id": ann, "image_id": image_id, "split": split, "sentences": sentences})
    write_refer(root, folder, split_by, refs, {11: polygon(), 21: polygon()}, SIZE)
    for path in (root / refcoco.IMAGES).iterdir():
        make_image().save(path, quality=95)


def question_files(root: pathlib.Path) -> None:
    """Every split of MUSE and MMR with one question, GSEval with one of each kind, RefCOCO-M with two sentences."""
    mask = np.zeros(SIZE[::-1], bool)
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    pictures, size = root / "images/mscoco/images", {"height": SIZE[1], "width": SIZE[0]}
    for path in (pictures / "val2017/000000000003.jpg", pictures / "unlabeled2017/000000000004.jpg"):
        path.parent.mkdir(parents=True)
        make_image().save(path, quality=95)
    record = {"coco_url": "http://images.cocodataset.org/val2017/000000000003.jpg", "questions": ["red?"], **size}
    for folder, name in (("muse", "muse"), ("MMR", "mmr")):
        (root / folder).mkdir()
        segmentation = [polygon()] if name == "muse" else encode_rle(mask)
        for split in eval_configs.SETS[name][1]:
            records = [record | {"answers": [[{"segmentation": segmentation}]]}]
            (root / folder / f"{folder}_{split}.json").write_text(json.dumps(records))
    (root / "gseval").mkdir()
    row = {"image_path": "unlabeled2017/000000000004.jpg", "caption": "The red one.", "segmentation": encode_rle(mask)}
    lines = [json.dumps(row | {"idx": k, "class_id": k}) for k in (1, 2, 3, 4)]
    (root / "gseval/GroundingSuite-Eval.jsonl").write_text("\n".join(lines))
    (root / "refcoco_m/images").mkdir(parents=True)
    make_image().save(root / "refcoco_m/images/COCO_train2014_000000000001.jpg", quality=95)
    sample = {"id": 1, "sentences": ["red", "square"], "mask": encode_rle(mask)}
    row = {"file_name": "COCO_train2014_000000000001.jpg", "samples": [sample]}
    (root / "refcoco_m/validation.jsonl").write_text(json.dumps(row))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    question_files(root)
    for name in ("refcoco", "refcoco+", "refcocog", "grefcoco"):
        refer_files(root, name)
    corners = [[BOX[0], BOX[1]], [BOX[2] - 1, BOX[1]], [BOX[2] - 1, BOX[3] - 1], [BOX[0], BOX[3] - 1]]
    for split in ("val", "test", "train"):
        shape = {"label": "target", "points": corners}
        write_reasonseg(root / split, "a", shape, text=["what is red?", "the red one"])
        make_image().save(root / split / "a.jpg", quality=95)
    make_image().save(root / "mine.png")
    red, green = {"query": "red", "segmentation": [polygon()]}, {"query": "green", "mask": None}
    write_lines(root, *({"image": "mine.png"} | record for record in (red, green)), split="mine")
    return root


def run(monkeypatch, workdir, benchmark, root, change=lambda config: None) -> dict:
    """evaluate.py's main in this process; results.json."""
    config = eval_configs.get_config(benchmark)
    config.data.root = str(root)
    config.segmenter.update(mode="inprocess", addresses=(), workers=2)
    change(config)
    workdir.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(command, "use_compilation_cache", lambda *_: None)
        evaluate.main(build_config(EvalConfig, config), workdir=str(workdir))
    return json.loads((workdir / "results.json").read_text())


def test_the_training_mix_leaves_held_out_pictures_out(root, capsys):
    config = grpo_mix_tpu.get_config()
    config.grpo.data.root = str(root)
    config.policy.weights = "x"
    samples = open_samples(build_config(TrainConfig, config).grpo.data)
    shares = collections.Counter(id.split("/")[0] for id in samples.ids)
    # one reference of each set is left, with two sentences; ReasonSeg has two texts for its picture
    assert {p.name: len(p) for p in samples.parts} == {
        "refcoco/unc/train": 2, "refcoco+/unc/train": 2, "refcocog/umd/train": 2, "reasonseg/train": 2
    }  # fmt: skip
    assert shares["refcocog"] == 2 * shares["refcoco"] == 2 * shares["refcoco+"] == 20 * shares["reasonseg"]
    held_out = open_samples(DataConfig(root=str(root), dataset="refcoco", split_by="unc", split="testA"))
    assert not set(held_out.image_keys) & {key for part in samples.parts for key in part.image_keys}
    assert "2 of 4 samples are on pictures of refcoco/unc/val and were left out" in "\n".join(samples.notes)
    config.grpo.data.mix.reasonseg = None
    assert len(open_samples(build_config(TrainConfig, config).grpo.data).parts) == 3


def oracle(row, **more):
    return lambda config: config.bound.update(row=row, **more)


N = {"refcoco": 4, "refcoco+": 4, "refcocog": 4, "grefcoco": 4, "reasonseg": 1, "folder": 2}
N |= {"refcoco_m": 2, "muse": 1, "mmr": 1, "gseval": 1, "gseval-all": 4}


@pytest.mark.parametrize("benchmark", [*eval_configs.NAMES, "folder-mine"])
def test_each_benchmark_is_read_and_judged(monkeypatch, tmp_path, root, benchmark):
    results = run(monkeypatch, tmp_path / "w", benchmark, root, oracle("box"))
    name = benchmark.split("-")[0]
    assert results["n"] == N.get(benchmark, N[name]) and results["giou"] > 0.8  # every sentence; ReasonSeg's first text
    named = "/".join(filter(None, (name, eval_configs.SETS[name][0], benchmark.split("-")[1])))
    assert results["benchmark"] == results["samples"] == named
    assert results["row"] == "oracle: true box" and results["sees_the_truth"] and results["weights_sha256"] is None
    assert ("n_acc" in results) == (name in ("grefcoco", "folder")) and results.get("n_acc", 1.0) == 1.0
    assert results["settings"]["metric"]["unit"] == "sentence" and results["settings"]["metric"]["texts"] == "first"


def test_the_oracle_rows_are_marked_and_can_be_compared(monkeypatch, tmp_path, root, capsys):
    rows = {"box": {}, "best_of_three": {"prompt": "click"}, "clicks": {"clicks": 3}}
    found = {row: run(monkeypatch, tmp_path / row, "refcoco-val", root, oracle(row, **rows[row])) for row in rows}
    assert [r["row"] for r in found.values()] == [
        "oracle: true box", "oracle: best of three masks, true click", "oracle: best of 3 clicks"
    ]  # fmt: skip
    assert found["best_of_three"]["three_masks"] == "one mask each of box, click and both"
    assert found["best_of_three"]["giou"] >= found["box"]["giou"] > 0.8
    assert [r["turns"] for r in found["clicks"]["by_turn"]] == [1, 2, 3, 4]
    best = [r["oracle_best_giou"] for r in found["clicks"]["by_turn"]]
    assert best == sorted(best) and best[-1] == pytest.approx(found["clicks"]["giou"])
    capsys.readouterr()
    assert command.run_command("rsagent_jax.compare", [str(tmp_path / row) for row in rows]) == 0
    assert "clicks (oracle: best of 3 clicks)" in capsys.readouterr().out
    page = (tmp_path / "box/report/index.html").read_text()
    assert "Evaluation: refcoco/unc/val (" in page
    assert "looks at the truth" in page and "oracle: true box" in page


@pytest.mark.slow
def test_a_policy_and_the_untrained_row(monkeypatch, tmp_path, root):
    """A random policy in the tool loop: no oracle, and not taken for a trained one."""

    def tiny(config):
        config.policy.update(weights=str(small.weights()), dtype="float32")
        config.agent.update(prompt="brief", history_size=84, max_pixels=0, max_turns=2)
        config.sampling.update(context=512, patches=128, slots=2, max_new_tokens=40)
        config.bound.row = "untrained"

    results = run(monkeypatch, tmp_path / "w", "folder-mine", root, tiny)
    assert results["row"] == "bound: untrained policy" and not results["sees_the_truth"]
    assert results["weights_sha256"] and results["n"] == 2 and [r["turns"] for r in results["by_turn"]] == [1, 2]

    def checkpoint(config):
        tiny(config)
        stage = tmp_path / "checkpoints/sft"
        if not stage.exists():
            stage.mkdir(parents=True)
            (stage / "policy").symlink_to(small.weights())
        config.policy.weights = str(stage)

    says = r"bound.row is untrained, but .* is a checkpoint of train.py"
    refused(says, run, monkeypatch, tmp_path / "x", "folder-mine", root, checkpoint)


def test_a_benchmark_that_is_not_known_is_said():
    with pytest.raises(ValueError, match="refcocog-val, refcocog-test"):
        eval_configs.get_config("refcocog-testA")
    says = "'refcoco' is unknown; there are refcoco-val"
    refused(says, command.load_config_file, str(ROOT / "configs/eval.py:refcoco"))


def test_the_recipe_of_a_benchmark_is_a_config(tmp_path):
    section = (ROOT / "docs/extend.md").read_text(encoding="utf-8").split("## A benchmark\n", 1)[1]
    file = tmp_path / "my_eval.py"
    file.write_text(re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1])
    config = build_config(EvalConfig, command.load_config_file(str(file)))
    assert config.benchmark == "Kitchens test" and config.metric.empty_below == 10
    assert (config.data.dataset, config.data.split, config.data.root) == ("folder", "test", "kitchens")


def test_configs_of_full_size_have_one_prompt_one_pixel_budget_and_one_context():
    """What trajectories were collected with, both stages train on and evaluations and users are answered with."""
    collected = [collect_tpu.get_config(how) for how in ("remote", "self")]
    collected[0].teacher.remote.url = "http://host:8000/v1"
    collected = [build_config(CollectConfig, config) for config in collected]
    evaluated = build_config(EvalConfig, eval_configs.get_config())
    asked = build_config(SegmentConfig, segment.get_config("full"))
    sft, grpo = (build_config(TrainConfig, module.get_config()) for module in (sft_tpu, grpo_tpu))
    assert {c.agent for c in (*collected, evaluated, asked, sft, grpo)} == {grpo.agent}
    samplings = (collected[1].teacher.own.sampling, evaluated.sampling, asked.sampling, grpo.grpo.sampling)
    assert {s.context for s in samplings} == {sft.sft.batch.tokens} == {grpo.grpo.batch.tokens}
    assert {c.segmenter for c in (*collected, evaluated, sft)} == {grpo.segmenter}  # as many tool calls at a time, too
