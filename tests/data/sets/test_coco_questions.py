"""MUSE, MMR, GSEval and RefCOCO-M in their own files: which picture, which text, which pixels; and what is refused."""

import json

import numpy as np
import pytest

from rsagent_jax.config.schema import DataConfig
from rsagent_jax.data.sets.coco_questions import load_gseval, load_multi_target, load_refcoco_m
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.masks import encode_rle
from tests.data.sets.small_sets import write_image
from tests.refusals import refused

SIZE = {"height": 24, "width": 30}
POLYGONS = [[2, 2, 12, 2, 12, 12, 2, 12]], [[8, 8, 20, 8, 20, 20, 8, 20]]  # 10 x 10 and 12 x 12, 4 x 4 shared
PICTURES = "images/mscoco/images"


def rle(y1, y2, x1, x2):
    mask = np.zeros((24, 30), bool)
    mask[y1:y2, x1:x2] = True
    return encode_rle(mask)


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = name.endswith(".jsonl")
    path.write_text("\n".join(map(json.dumps, content)) + "\n" if lines else json.dumps(content))


def targets(*segmentations):
    return [{"segmentation": s, "bbox": [0, 0, 1, 1], "category_name": "x"} for s in segmentations]


def muse_records():
    several = targets(*POLYGONS, [[3, 3, 3, 3, 3, 3]])  # the last covers no pixel
    by_url = {"coco_url": "http://images.cocodataset.org/val2017/000000000002.jpg", **SIZE}
    by_name = {"file_name": "COCO_train2014_000000000001.jpg", **SIZE}
    return [
        by_url | {"questions": [" Which two? ", "What else?"], "answers": [several, []], "ann_list": several},
        by_name | {"questions": ["Which?"], "answers": [targets(rle(0, 2, 0, 5), POLYGONS[0])], "ann_list": []},
    ]


def test_muse(tmp_path):
    write(tmp_path, "muse/muse_test_less.json", muse_records())
    for name in ("val2017/000000000002.jpg", "train2014/COCO_train2014_000000000001.jpg"):
        write_image(tmp_path / PICTURES / name, size=(30, 24))
    samples = open_samples(DataConfig(root=str(tmp_path), dataset="muse", split="test_less"))
    assert samples.ids == ["muse/test_less/0/0", "muse/test_less/1/0"] and samples.image_keys == ["coco/2", "coco/1"]
    assert samples.notes == ("1 of 3 questions have no target and were left out",)
    first, second = samples
    assert first.query == "Which two?" and first.gt_mask.sum() == 100 + 144 - 16
    assert second.gt_mask.sum() == 100 + 10 and second.gt_mask[:2, :5].all()
    assert len(load_multi_target(tmp_path, "muse", "test_less", limit=1)) == 1
    before = [samples.fingerprint(i) for i in (0, 1)]
    records = muse_records()
    records[0]["answers"][0].pop(1)
    write(tmp_path, "muse/muse_test_less.json", records)
    after = load_multi_target(tmp_path, "muse", "test_less")
    assert after.fingerprint(0) != before[0] and after.fingerprint(1) == before[1]


def test_mmr(tmp_path):
    record = {"file_name": "train2017/000000000003.jpg", "image_id": 3, "coco_url": "http://x/y/z.jpg", **SIZE}
    record |= {"questions": ["the handle and the lid?"], "answers": [targets(rle(0, 4, 0, 4), rle(2, 6, 2, 6))]}
    write(tmp_path, "MMR/MMR_test_part_only.json", [record | {"text_answers": ["{seg} and {seg}"], "raw_answers": []}])
    write_image(tmp_path / PICTURES / "train2017/000000000003.jpg", size=(30, 24))
    samples = open_samples(DataConfig(root=str(tmp_path), dataset="mmr", split="test_part_only"))
    assert samples.ids == ["mmr/test_part_only/0/0"] and samples.image_keys == ["coco/3"]
    assert samples[0].gt_mask.sum() == 16 + 16 - 4


def gseval_row(k):
    row = {"idx": 10 * k, "image_path": f"unlabeled2017/{k:012d}.jpg", "class_id": k, "label": "dog"}
    return row | {"caption": f"Dog {k}.", "box": [0.3, 0.2, 5.5, 5.2], "segmentation": rle(0, k, 0, 5)}


def gseval_rows():
    return [gseval_row(k) for k in (1, 2, 3, 4)]


def test_gseval(tmp_path):
    write(tmp_path, "gseval/GroundingSuite-Eval.jsonl", gseval_rows())
    write_image(tmp_path / PICTURES / "unlabeled2017/000000000002.jpg", size=(30, 24))
    assert load_gseval(tmp_path).ids == ["gseval/10", "gseval/20", "gseval/30", "gseval/40"]
    part = open_samples(DataConfig(root=str(tmp_path), dataset="gseval", split="part"))
    assert part.ids == ["gseval/20"] and part[0].query == "Dog 2." and part[0].gt_mask.sum() == 10
    refused("data.split of gseval is one of all, stuff, part, multi, single, not 'val'", load_gseval, tmp_path, "val")


def refcoco_m_row(**more):
    sample = {"id": 5, "sentences": ["left", "RIGHT "], "mask": rle(0, 3, 0, 3), "bbox": [0, 0, 3, 3]}
    return {"image_id": 1, "file_name": "COCO_train2014_000000000001.jpg", "samples": [sample | more]}


def test_refcoco_m(tmp_path):
    write(tmp_path, "refcoco_m/validation-00000-of-00002.jsonl", [refcoco_m_row()])
    write(tmp_path, "refcoco_m/validation-00001-of-00002.jsonl", [refcoco_m_row(id=6, sentences=["x"])])
    write_image(tmp_path / "refcoco_m/images/COCO_train2014_000000000001.jpg", size=(30, 24))
    samples = open_samples(DataConfig(root=str(tmp_path), dataset="refcoco_m", split="val"))
    assert samples.ids == ["refcoco_m/val/5/0", "refcoco_m/val/5/1", "refcoco_m/val/6/0"]
    assert samples[1].query == "RIGHT" and samples[1].gt_mask.sum() == 9 and samples.image_keys == ["coco/1"] * 3
    refused("refcoco_m has the split val only, not 'testA'", load_refcoco_m, tmp_path, "testA")
    write(tmp_path, "refcoco_m/validation-00000-of-00002.jsonl", [refcoco_m_row(sentences=[None])])
    refused("record 0 has a sentence that is no text", load_refcoco_m, tmp_path)


def test_another_picture_is_refused(tmp_path):
    write(tmp_path, "gseval/GroundingSuite-Eval.jsonl", gseval_rows())
    says = r"unlabeled2017/000000000001.jpg is missing: docs/data.md"
    refused(says, lambda: load_gseval(tmp_path)[0])
    write_image(tmp_path / PICTURES / "unlabeled2017/000000000001.jpg", size=(24, 30))
    says = r"is 24 x 30 pixels, but its masks are drawn for 30 x 24 \(sample gseval/10\)"
    refused(says, lambda: load_gseval(tmp_path)[0])


def change(**fields):
    return lambda records: records[0].update(fields)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change(answers=[]), "muse_val.json, record 0 has 2 questions and 0 answers"),
        (change(height="24"), "record 0 lacks a proper height"),
        (change(questions=None, answers=None), "record 0 lacks a proper questions, answers"),
        (change(questions=[1, 2]), "question 0 is no text, or its answer no list"),
        (change(answers=[targets("x"), []]), "record 0, answer 0 lacks a proper segmentation"),
        (change(answers=[["x"], []]), "record 0, answer 0 is no JSON object"),
        (change(coco_url=None), "record 0 names no picture: it has neither file_name nor coco_url"),
        (lambda records: records.insert(0, 3), "record 0 is no JSON object"),
        (lambda records: records.clear(), "muse/val: there is no sample in it"),
    ],
)
def test_bad_records_are_named(tmp_path, damage, says):
    records = muse_records()
    damage(records)
    write(tmp_path, "muse/muse_val.json", records)
    refused(says, load_multi_target, tmp_path)


def test_bad_files_are_named(tmp_path):
    says = r"muse_val.json is missing; .* has: no such file. python -m rsagent_jax.data.get muse gets it, or says how"
    refused(says, load_multi_target, tmp_path)
    write(tmp_path, "muse/muse_val.json", {"a": 1})
    refused("holds no list of records: this is not a file of muse", load_multi_target, tmp_path)
    (tmp_path / "muse/muse_val.json").write_text("<html>")
    refused("is not JSON .an HTML page, as a download that failed leaves one.", load_multi_target, tmp_path)
    refused("has: muse_val.json", load_multi_target, tmp_path, "muse", "test_many")
    write(tmp_path, "gseval/GroundingSuite-Eval.jsonl", [gseval_rows()[0] | {"segmentation": {"counts": "x"}}])
    refused(r"record 0 has a mask without its size \[height, width\]", load_gseval, tmp_path)
