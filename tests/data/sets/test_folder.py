"""A folder of pictures with JSON lines: every kind of mask, and all bad lines in one message."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rsagent_jax.data.sets.folder import load_folder
from tests.data.sets.small_sets import write_image, write_lines
from tests.refusals import refused

SHAPE = (20, 30)
GOOD = {"image": "a.png", "query": " The mug ", "mask": "m.png"}
FORM = 'the form is one JSON object per line: {"image": "a.jpg"'


@pytest.fixture
def root(tmp_path):
    write_image(tmp_path / "a.png", size=SHAPE[::-1])
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:7, 3:9] = 7  # any value but black
    Image.fromarray(mask).save(tmp_path / "m.png")
    return tmp_path


def write(root, *records):
    """Of each record the fields that are not `...`."""
    return load_folder(write_lines(root, *({k: v for k, v in (GOOD | r).items() if v is not ...} for r in records)))


def test_every_kind_of_mask(root):
    rle, polygon = {"size": list(SHAPE), "counts": [0, 40, 560]}, [[0, 0, 10, 0, 10, 10, 0, 10]]
    drawn = ({"mask": ..., "segmentation": value} for value in (polygon, rle))
    samples = write(root, {}, {"mask": None}, *drawn, {"mask": None, "ignore": "m.png", "id": "mine"})
    # 5 rows of 6; nothing; 10 x 10; the first two columns of 20
    assert [s.gt_mask.sum() for s in samples] == [30, 0, 100, 40, 0]
    assert samples[3].gt_mask[:, :2].all() and samples[4].ignore_mask.sum() == 30 and samples[0].ignore_mask is None
    assert samples.ids == [f"folder/train/{x}" for x in (1, 2, 3, 4, "mine")]
    assert {s.query for s in samples} == {"The mug"} and len(load_folder(root, limit=2)) == 2


def test_copies_of_coco_pictures_are_known_as_such(root):
    names = ["COCO_train2014_000000000042.jpg", "000000000042.jpg", "other.jpg"]
    samples = write(root, *({"image": name} for name in names))
    assert samples.image_keys == ["coco/42", "coco/42", str(root / "other.jpg")]


def test_numbered_pictures_of_several_folders_are_the_users_own(root):
    names = [f"{folder}/000000000042.jpg" for folder in ("cam0", "cam1")]
    samples = write(root, *({"image": name} for name in (*names, "val2017/000000000042.jpg", "cam0/000000000043.jpg")))
    assert samples.pictures == [*(str(root / name) for name in names), "coco/42", "coco/43"]
    assert samples.image_keys == [*["coco/42"] * 3, "coco/43"]  # another set is held out by the number, to be sure


def test_a_question_that_no_prompt_takes_whole_is_refused(root):
    samples = write(root, {"query": " ".join(["red"] * 125)}, {"query": " ".join(["red"] * 126)})  # 499, 503 characters
    assert len(samples[0].query) == 499
    refused("sample folder/train/2: the query has 503 characters, and a prompt takes 500", samples.__getitem__, 1)


def test_all_bad_lines_stand_in_one_message(root):
    bad = [{"image": "a.png"}, GOOD | {"segmentation": "x"}, GOOD | {"mask": 3}, GOOD | {"maks": 1}, []]
    lines = [json.dumps(GOOD), "{", *map(json.dumps, bad), "1"]
    (root / "train.jsonl").write_text("\n".join(lines))
    text = refused("7 bad lines", load_folder, root)
    assert "line 2: not one JSON object" in text and "and 2 more" in text and "line 6: unknown field maks" in text
    assert "line 3: query must be text" in text and "line 4: there must be either mask or segmentation" in text
    (root / "train.jsonl").write_bytes('{"image": "a.png", "query": "café", "mask": null}'.encode("cp1252"))
    refused(r"line 1: 'utf-8' codec can't decode", load_folder, root)
    refused(r"cannot read .*val\.jsonl .* has: train\.jsonl", load_folder, root, "val")
    refused(r"data.split is the file's name without .jsonl", load_folder, root, "train.jsonl")


def test_ids_must_be_unique(root):
    refused(r"line 2: its id 'x' is that of line 1; .*every id must be unique", write, root, *[{"id": "x"}] * 2)
    refused(r"line 2: its id '2' is that of line 1; a line without an id has its num", write, root, {"id": 2}, {})
    assert write(root, *[{"id": None}] * 2).ids == ["folder/train/1", "folder/train/2"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (json.dumps([GOOD], indent=1), f"holds one JSON array; {FORM}"),
        (json.dumps([GOOD, GOOD]), f"holds one JSON array; {FORM}"),
        (json.dumps(GOOD, indent=2), f"holds one JSON object over several lines; {FORM}"),
        (json.dumps(GOOD).encode("utf-16"), "holds no records: UTF-16: save it as UTF-8"),
        (json.dumps(GOOD).encode("utf-16-le"), "holds no records: UTF-16: save it as UTF-8"),
        ("", "train.jsonl holds no records: an empty file"),
        ("<!DOCTYPE html><html>404", "holds no records: an HTML page"),
        ("version https://git-lfs.github.com/spec/v1", "holds no records: a Git-LFS pointer"),
        (json.dumps(GOOD) + ",", f"line 1: not one JSON object (no comma after it)\n{FORM}"),
        (str(GOOD), "line 1: not one JSON object (JSON takes double quotes)"),
        ("# mine\n" + json.dumps(GOOD), "line 1: not one JSON object (JSON has no comments)"),
        (json.dumps(GOOD)[:-9], "line 1: not one JSON object"),
        ("[" * 100_000, "line 1: not one JSON object (nested too deep)"),
        ('{"image": "a.png", "query": "a", "query": "b", "mask": null}', "line 1: field query stands twice"),
    ],
)
def test_a_file_that_is_no_json_lines_says_what_it_is(root, data, says):
    (root / "train.jsonl").write_bytes(data.encode() if isinstance(data, str) else data)
    refused(re.escape(says), load_folder, root)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask": ""}, "mask must be text, the path of a picture, or null for none"),
        ({"ignore": " "}, "ignore must be text, the path of a picture, or null for none"),
        ({"image": None}, "image must be text, the path of a picture"),
        ({"image": "https://example.org/a.jpg"}, "image must be the path of a file on this machine"),
        ({"image": "a\0.png"}, "image must be the path of a file"),
        ({"query": " \n"}, "query must be text, not blank"),
        ({"query": "\ud800"}, "query holds half a character"),
        *(({"id": bad}, "id must be text or a whole number; null, or no id, for the number of the line")
          for bad in ([1], float("nan"), True, "")),
        ({"mask": ...}, "there must be either mask or segmentation"),
        ({"segmentation": []}, "there must be either mask or segmentation"),
        *(({"mask": ..., "segmentation": bad}, "segmentation must be polygons [[x1, y1, x2, y2, x3, y3, …], …] in pix")
          for bad in ([], {}, None)),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_line_and_form(root, change, says):
    refused(f"line 1: {re.escape(says)}", write, root, change)


def test_lines_may_end_in_any_way(root):
    for end in ("\n", "\r\n", "\r"):
        (root / "train.jsonl").write_bytes(end.join([json.dumps(GOOD), "", json.dumps(GOOD)]).encode())
        assert load_folder(root).ids == ["folder/train/1", "folder/train/3"]


def test_what_cannot_be_read_names_its_line(root):
    faults = {
        "none.png is missing": {"image": "none.png"},
        "no.png is missing": {"mask": "no.png"},
        "is 5 x 5 pixels, its image .* 30 x 20": {"mask": "small.png"},
        r"RLE of size \[3, 3\]": {"mask": ..., "segmentation": {"size": [3, 3], "counts": [9]}},
    }
    Image.new("L", (5, 5)).save(root / "small.png")
    samples = write(root, *faults.values(), {})
    for i, says in enumerate(faults):
        refused(rf"{says}.*line {i + 1}|line {i + 1}.*{says}", samples.__getitem__, i)
    assert samples[4].gt_mask.sum() == 30  # the good part is kept


@settings(max_examples=80)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_a_data_error(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("bytes")
    (root / "train.jsonl").write_bytes(data)
    refused(".", load_folder, root)
