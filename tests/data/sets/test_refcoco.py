"""The loader: refer's rules on hand-made references, pycocotools' masks, and one clear message per bad input."""

import json
import pickle
import struct

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from rsagent_jax import masks
from rsagent_jax.data.sets import refcoco
from rsagent_jax.data.sets.refcoco import load_refcoco
from rsagent_jax.runtime import image_files
from sam_bridge.rle import mask_runs
from tests.refusals import refused

REFS, INSTANCES = "refcocog/refs(umd).p", "refcocog/instances.json"
REF = {"ref_id": 1, "ann_id": 2, "image_id": 3, "split": "val", "sentences": []}


def edit_refs(root, **change):
    """Of every reference of the validation split."""
    refs = pickle.loads((root / REFS).read_bytes())
    (root / REFS).write_bytes(pickle.dumps([ref | change if ref["split"] == "val" else ref for ref in refs], 2))


def edit_instances(root, change):
    path = root / INSTANCES
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def first_image(root):
    return root / refcoco.IMAGES / "COCO_train2014_000010000001.jpg"


# ------------------------------------------------------------------------------------------------ what is read


def test_units_ids_limit_and_text(dataset):
    refs = [r for r in pickle.loads((dataset / REFS).read_bytes()) if r["split"] == "train"]
    sentences = load_refcoco(dataset, split="train")
    references = load_refcoco(dataset, split="train", unit="reference")
    assert len(references) == len(refs) == 48 and len(sentences) == sum(len(r["sentences"]) for r in refs) > 48
    assert sentences.ids == [f"refcocog/umd/train/{r['ref_id']}/{i}" for r in refs for i in r["sent_ids"]]
    assert references.ids == [f"refcocog/umd/train/{r['ref_id']}/{r['sent_ids'][0]}" for r in refs]
    assert load_refcoco(dataset, split="train", limit=7).ids == sentences.ids[:7]
    assert len(load_refcoco(dataset, split="train", limit=10**9)) == len(sentences)
    assert [s.query for s in references] == [r["sentences"][0]["sent"] for r in refs]
    raw = load_refcoco(dataset, split="train", unit="reference", raw=True)
    assert raw[0].query == refs[0]["sentences"][0]["raw"] and raw[0].query[-1] == "."


def test_index_is_a_lazy_picklable_sequence(dataset):
    samples = load_refcoco(dataset)
    assert samples.name == "refcocog/umd/val" and samples[-1].id == samples.ids[-1]
    assert samples[np.int64(1)].id == samples.ids[1]
    with pytest.raises(IndexError):
        samples[len(samples)]
    again = pickle.loads(pickle.dumps(samples))
    assert [s.id for s in again] == samples.ids and (again[2].gt_mask == samples[2].gt_mask).all()


def test_queries_are_stripped_lower_cased_of_python_2_and_never_blank(copied):
    texts = (("  The BIG Man ", " Big Man! "), (" ", " "), ("café".encode().decode("latin1"), "x"))
    edit_refs(copied, sentences=[{"sent": sent, "raw": raw, "sent_id": k} for k, (sent, raw) in enumerate(texts)])
    samples, raw = load_refcoco(copied), load_refcoco(copied, raw=True)
    assert samples[0].query == "the big man" and raw[0].query == "Big Man!"
    refused(r"sample refcocog/umd/val/\S+: the query is empty", samples.__getitem__, 1)
    assert samples[2].query == "café"  # as unpickled from a byte string


def test_split_rules_of_refer():
    refs = [{"split": s} for s in ("train", "val", "testA", "testB", "testAB", "test")]
    wanted = {"train": "train", "val": "val", "testA": "testA testAB", "testB": "testB testAB"}
    for split, expected in (wanted | {"test": "testA testB testAB test"}).items():
        assert [r["split"] for r in refcoco._select_split(refs, split, "x")] == expected.split()
    for split in ("testC", "valid", ""):
        says = r"x has nothing in split .* It has: test \(1 references\), testA"
        refused(says, refcoco._select_split, refs, split, "x")


# ------------------------------------------------------------------------------------------------ masks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_rle_equals_pycocotools_in_both_forms(height, width, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.random()
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = {"size": [height, width], "counts": compressed["counts"].decode()}
    assert masks.encode_rle(mask) == text
    for rle in (compressed, text, {"size": [height, width], "counts": mask_runs(compressed["counts"]).tolist()}):
        assert (masks.decode_segmentation(rle, height, width, "it") == mask).all()


def test_overlapping_polygons_are_united():
    square, other = [1, 1, 6, 1, 6, 6, 1, 6], [4, 4, 9, 4, 9, 9, 4, 9]
    mask = masks.decode_segmentation([square, other], 10, 12, "it")
    # 5 x 5 pixels twice, 2 x 2 of them shared
    assert mask.dtype == bool and mask.shape == (10, 12) and mask.sum() == 25 + 25 - 4
    assert (coco_mask.decode(coco_mask.frPyObjects([square, other], 10, 12)).sum(2).max()) == 2


def test_a_polygon_that_covers_no_pixel_is_a_fault_and_an_rle_may_be_empty():
    for polygon in ([4, 5, 20, 5, 10, 5], [4.1, 5.1, 4.3, 5.1, 4.3, 5.3]):
        says = "the segmentation of it covers no pixel of its 30 x 20 image"
        refused(says, masks.decode_segmentation, [polygon], 20, 30, "it")
    assert not masks.decode_segmentation({"size": [20, 30], "counts": [600]}, 20, 30, "it").any()


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ([], "it is empty.*polygons .*x3, y3.* or RLE"),
        (7, "it is int"),
        ([[10, 5, 20, 15, 3]], "at least 3 finite x, y pairs"),
        ([[1, 1, 2, 2, float("nan"), 3]], "finite"),
        ([[1, 1, 1e12, 1, 1, 1e12]], "far outside"),  # pycocotools would reserve memory for its outline
        ([["a", 1, 2, 2, 3, 3]], ""),
        ([None], ""),
        ([10, 5, 20, 5, 20, 15], r"one flat list of numbers.*The form is polygons \[\[x1"),
        ([10, 5, 20, 15], "4 numbers are a box"),
        ([[10, 5, 20, 15]], "4 numbers: a box is no outline"),
        ([[[10, 5], [20, 5], [20, 15]]], "a list of pairs, where a flat list is due"),
        ([{"size": [20, 30], "counts": [600]}], "a list of RLE"),
        ([[0.1, 0.1, 0.5, 0.1, 0.5, 1]], "shares of the sides.*multiply by width and height"),
        ("[[1, 2]]", "it is text"),
        ({"counts": [600]}, "RLE without size.*height, width"),
        ({"size": [30, 20], "counts": [600]}, "width and height are swapped"),
        ({"size": [20, 30], "counts": [300.4, 299.6]}, "whole numbers"),
        ({"size": [20, 30], "counts": [True, 599]}, "whole numbers"),
        ({"size": [20, 30], "counts": "10 20 570"}, "neither COCO's compressed text"),
        # for the first three pycocotools decodes uninitialised memory
        *(({"size": [20, 30], "counts": counts}, "") for counts in (
            "", "zzzz", "0" * 50, [3, -3, 600], [500, 101], [2**62, 2**62, 2**62, 2**62, 600], [2**70], 5, "\u20ac")),
        ({"size": [5, 120], "counts": [600]}, ""),
        ({"size": [20, 30]}, "RLE without counts"),
    ],
)  # fmt: skip
def test_the_form_that_is_right_is_named(segmentation, says):
    says = f"the segmentation of line 3 is malformed: .*{says}"
    refused(says, masks.decode_segmentation, segmentation, 20, 30, "line 3")


# ------------------------------------------------------------------------------------------------ pictures


def test_exif_rotation_is_not_applied(copied):
    path = first_image(copied)
    before = load_refcoco(copied)[0]
    stored = PIL.Image.open(path)
    stored.load()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    stored.resize((140, 112)).save(path, exif=exif)
    assert image_files.read_image(path).shape == (112, 140, 3)  # as stored, not 140 x 112
    stored.save(path, exif=exif)
    after = load_refcoco(copied)[0]
    assert np.abs(after.image.astype(int) - before.image).mean() < 10  # saved again, not turned
    assert (after.gt_mask == before.gt_mask).all()


# ------------------------------------------------------------------------------------------------ bad inputs


def test_missing_files_are_marked(copied, tmp_path):
    message = refused("no refcocog under", load_refcoco, tmp_path / "nowhere")
    assert message.count("MISSING") == 3 and "refs(umd).p" in message and "instances.json" in message
    assert "train2014" in message and "rsagent_jax.tiny.synthetic" in message
    (copied / REFS).rename(copied / "refcocog/refs(google).p")
    message = refused(r"(?s)MISSING .*refs\(umd\)\.p\n  found .*split_by = google", load_refcoco, copied)
    assert message.count("MISSING") == 1
    assert load_refcoco(copied, split_by="google").name == "refcocog/google/val"
    refused(r"no refcoco\+ under", load_refcoco, copied, "refcoco+", "unc")


def test_unreadable_pickles_are_named(copied):
    """What else a pickle may try: test_unpickle.py."""
    path = copied / REFS
    path.write_bytes(path.read_bytes()[:3000])
    refused(r"refs\(umd\)\.p is cut short", load_refcoco, copied)
    path.unlink()
    path.mkdir()
    refused(r"cannot read .*refs\(umd\)\.p: Is a directory", load_refcoco, copied)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        ({"a": 1}, "must hold a list of references, not dict"),
        ([], "or an empty one"),
        ([3], "reference number 0 is not a dict"),
        ([REF | {"ann_id": [2]}], "with proper ann_id"),
        ([REF | {"sentences": ["a"]}], "without 'sent' and 'raw'"),
        ([REF | {"sentences": [{"sent": "", "raw": ""}]}], "'sent_id'"),
    ],
)
def test_pickles_that_are_not_references(copied, refs, message):
    (copied / REFS).write_bytes(pickle.dumps(refs, 2))
    refused(message, load_refcoco, copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"images": [', "is not JSON .*cut short"),
        (b"", "is not JSON .*an empty file"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "is not a COCO instances file"),
        (b'{"images": []}', "is not a COCO instances file: missing or ill-typed 'annotations'"),
        (b'{"images": [{"id": 1, "file_name": "a.jpg", "width": 3}]}', "is not a COCO .*missing or ill-typed 'height'"),
    ],
)
def test_broken_json(copied, content, message):
    (copied / INSTANCES).write_bytes(content)
    refused(rf"instances\.json {message}", load_refcoco, copied)


def test_references_to_nothing_or_to_another_picture(copied, dataset):
    edit_instances(copied, lambda d: d | {"annotations": d["annotations"][:5]})
    says = r"reference 100000010 in .* names annotation 10000001\d, which .*instances\.json"
    refused(says, load_refcoco, copied)
    edit_instances(copied, lambda d: d | {"images": []})
    refused("names image 10000001, which", load_refcoco, copied)
    (copied / INSTANCES).write_bytes((dataset / INSTANCES).read_bytes())
    edit_refs(copied, image_id=1)
    refused("is about image 1, but its annotation .* is on image 10000001", load_refcoco, copied)


def test_missing_broken_and_resized_pictures_are_named(copied):
    samples, path = load_refcoco(copied), first_image(copied)
    whole = path.read_bytes()
    jpeg_head = b"\xff\xd8\xff\xe0" + struct.pack(">H", 9)
    for content in (b"", b"no picture", whole[:600], whole[: len(whole) // 2], jpeg_head):
        path.write_bytes(content)
        refused(rf"{path.name} is not a readable picture", samples.__getitem__, 0)
    path.unlink()
    refused(rf"{path.name} is missing", samples.__getitem__, 0)
    assert samples[len(samples) - 1].image.shape == (112, 112, 3)  # the others are fine
    PIL.Image.new("RGB", (56, 60)).save(path)
    says = rf"{path.name} is 56 x 60 pixels, but .* for 112 x 112 \(sample refcocog/umd/val/"
    refused(says, samples.__getitem__, 0)


def test_malformed_masks_name_the_annotation(copied):
    edit_instances(copied, lambda d: d | {"annotations": [a | {"segmentation": [[1, 2]]} for a in d["annotations"]]})
    says = r"segmentation of annotation 10000001\d \(sample refcocog/umd/val/.* malformed"
    refused(says, load_refcoco(copied).__getitem__, 0)


def test_ids_that_stand_twice_for_different_things(copied):
    def twice(key, **change):
        return lambda instances: instances | {key: [*instances[key], instances[key][0] | change]}

    edit_instances(copied, twice("annotations"))  # a copy does no harm
    assert len(load_refcoco(copied))
    whole = (copied / INSTANCES).read_bytes()
    edit_instances(copied, twice("images", file_name="other.jpg"))
    refused(r"instances\.json: picture id \d+ stands twice, .* for different pictures", load_refcoco, copied)
    (copied / INSTANCES).write_bytes(whole)
    edit_instances(copied, twice("annotations", segmentation=[[1, 1, 5, 1, 5, 5]]))
    refused(r"annotation id \d+ stands twice", load_refcoco, copied)
