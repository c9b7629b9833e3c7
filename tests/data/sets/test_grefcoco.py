"""gRefCOCO: several targets are one mask, none is an empty one; its pickle and its JSON read the same."""

import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from rsagent_jax.data.sets import refcoco
from tests.data.sets.small_sets import write_refer
from tests.refusals import refused

SQUARES = {11: [2, 2, 12, 2, 12, 12, 2, 12], 12: [8, 8, 20, 8, 20, 20, 8, 20], 21: [0, 0, 5, 0, 5, 5, 0, 5]}


def ref(ref_id, ann_id, image_id=1, split="val", text="the squares"):
    sentence = {"raw": text, "sent": text.lower(), "sent_id": ref_id * 10, "tokens": text.split()}
    kind = {"category_id": [-1] if ann_id == [-1] else [1] * len(ann_id), "sent_ids": [ref_id * 10]}
    return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": [sentence], **kind}


REFS = [ref(1, [11, 12]), ref(2, [-1], text="The DOG"), ref(3, [11]), ref(4, [21], 2, "testA")]


@pytest.fixture
def root(tmp_path):
    write_refer(tmp_path, "grefcoco", "unc", REFS, SQUARES, (30, 24))
    return tmp_path


def load(root, split="val"):
    return refcoco.load_refcoco(root, "grefcoco", "unc", split)


def test_multi_target_no_target_and_single_target(root):
    several, none, one = load(root)
    # 10 x 10 and 12 x 12 pixels, 4 x 4 of them shared
    assert several.gt_mask.sum() == 100 + 144 - 16
    parts = coco_mask.decode(coco_mask.frPyObjects([SQUARES[11], SQUARES[12]], 24, 30))
    np.testing.assert_array_equal(several.gt_mask, parts.any(axis=2))
    assert none.gt_mask.shape == (24, 30) and not none.gt_mask.any() and none.query == "the dog"
    assert one.gt_mask.sum() == 100
    assert load(root).image_keys == ["coco/1"] * 3
    assert load(root, "testA").ids == ["grefcoco/unc/testA/4/40"]


def test_the_json_file_is_read_where_there_is_no_pickle(root):
    wanted = load(root).ids
    (root / "grefcoco/grefs(unc).p").unlink()
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(REFS))
    assert load(root).ids == wanted and not load(root)[1].gt_mask.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": 11}, "reference number 0 is not with proper ann_id"),
        ({"ann_id": ["11"]}, "ann_id that is no list of numbers"),
        ({"ann_id": [11, 99]}, "names annotation 99, which"),
        ({"ann_id": [21]}, "its annotation 21 is on image 2"),
        ({"ref_id": 3, "sentences": REFS[2]["sentences"]}, r"1 sample ids occur more than once, such as .*/3/30"),
    ],
)
def test_bad_references_are_named(root, change, message):
    (root / "grefcoco/grefs(unc).p").write_bytes(pickle.dumps([REFS[0] | change, *REFS[1:]], protocol=2))
    refused(message, load, root)
