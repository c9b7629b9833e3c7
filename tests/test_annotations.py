"""benchmarks/annotations.py: sentences are paired once, masks and predictions are judged by both annotations."""

import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from rsagent_jax.data.sets.refcoco import load_refcoco
from rsagent_jax.masks import encode_rle
from tests.data.sets.small_sets import write_image

ROOT = pathlib.Path(__file__).parents[1]


def write_old(root):
    """Two objects of one picture of 20 x 10: columns 0 … 3 ("left", "the one") and 10 … 13 ("right", "the one")."""
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": 1, "split": "val",
         "sentences": [{"raw": text, "sent": text, "sent_id": 10 * n + k} for k, text in enumerate(texts)]}
        for n, texts in ((1, ("left", "the one", "old only")), (2, ("right", "the one")))
    ]  # fmt: skip
    boxes = {1: [0, 0, 4, 0, 4, 10, 0, 10], 2: [10, 0, 14, 0, 14, 10, 10, 10]}
    name = "COCO_train2014_000000000001.jpg"
    instances = {"images": [{"id": 1, "file_name": name, "height": 10, "width": 20}]}
    instances["annotations"] = [{"id": n, "image_id": 1, "segmentation": [box]} for n, box in boxes.items()]
    (root / "refcoco").mkdir()
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs))
    (root / "refcoco/instances.json").write_text(json.dumps(instances))
    write_image(root / "images/mscoco/images/train2014" / name, size=(20, 10))
    write_image(root / "refcoco_m/images" / name, size=(20, 10))


def columns(first, last):
    mask = np.zeros((10, 20), bool)
    mask[:, first:last] = True
    return encode_rle(mask)


def test_the_annotations_share_by_hand(tmp_path):
    write_old(tmp_path)
    samples = [
        {"id": 1, "sentences": ["Left", "the one", "new only"], "mask": columns(0, 5)},  # old: 4 of these 5 columns
        {"id": 2, "sentences": ["right"], "mask": columns(10, 12)},  # 2 of old's 4
    ]
    row = {"file_name": "COCO_train2014_000000000001.jpg", "samples": samples}
    (tmp_path / "refcoco_m/validation.jsonl").write_text(json.dumps(row))
    # The policy draws 5 columns and 2: by RefCOCO 4/5 and 2/4, by RefCOCO-M both right.
    masks = {"refcoco/unc/val/1/10": columns(0, 5), "refcoco/unc/val/2/20": columns(10, 12)}
    assert masks.keys() <= set(load_refcoco(tmp_path, "refcoco", "unc", "val").ids)
    lines = [json.dumps({"id": id, "mask": mask}) for id, mask in masks.items()]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    argv = [sys.executable, "benchmarks/annotations.py", f"--root={tmp_path}", f"--workdir={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["pairs"], result["ambiguous"], result["not_in_refcoco"]) == (2, 1, 1)
    agreement = {"giou": pytest.approx((0.8 + 0.5) / 2), "ciou": pytest.approx((40 + 20) / (50 + 40)), "n": 2}
    assert result["RefCOCO's masks, by RefCOCO-M"] == agreement == result["the policy, by RefCOCO"]
    assert result["the policy, by RefCOCO-M"]["giou"] == 1 and result["annotation_share"] == pytest.approx(1)
    (tmp_path / "refcoco_m/validation.jsonl").unlink()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "data.get refcoco_m gets it" in done.stderr
