"""The TFDS reader against files and values that tensorflow-datasets itself wrote (tests/golden/make_ref_coco.py)."""

import functools
import itertools
import json
import pathlib
import pickle
import re
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsagent_jax.data.sets import refcoco_tfds
from rsagent_jax.data.sets.refcoco import load_refcoco
from rsagent_jax.types import DataError
from tests.refusals import refused

load_refcoco_tfds = functools.partial(load_refcoco, layout="tfds")
GOLDEN = pathlib.Path(__file__).parents[2] / "golden/ref_coco"
VERSION = "ref_coco/refcocog_umd/1.1.0"
NAME = "ref_coco-validation.tfrecord-00000-of-00001"


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
@pytest.mark.parametrize("below", ["", "ref_coco", VERSION])
def test_equal_to_what_tensorflow_datasets_reads(kind, below):
    wanted, samples = np.load(GOLDEN / "read_by_tfds.npz"), load_refcoco_tfds(GOLDEN / kind / below)
    rows = []
    for n in range(3):
        raws, sent_ids = (json.loads(str(wanted[f"{n}/{key}"])) for key in ("raw", "sent_ids"))
        for k, ann_id in enumerate(wanted[f"{n}/ids"]):
            rows += [(n, k, ann_id, text, sent) for text, sent in zip(raws[k], sent_ids[k], strict=True)]
    assert samples.ids == [f"refcocog/umd/val/ann{ann}/{sent}" for _, _, ann, _, sent in rows]
    assert sum("Größe" in text for _, _, _, text, _ in rows) == 3
    for sample, key, (n, k, _, text, _) in zip(samples, samples.image_keys, rows, strict=True):
        assert sample.query == text.strip().lower() and key == f"coco/{wanted[f'{n}/image_id']}"
        np.testing.assert_array_equal(sample.gt_mask, wanted[f"{n}/masks"][k])
        # TensorFlow's JPEG decoder rounds its cosine transform more coarsely than Pillow's: a few levels of 255.
        difference = np.abs(sample.image.astype(int) - wanted[f"{n}/image"])
        assert difference.max() <= 6


def test_units_limit_text_and_pickling():
    sentences, references = (load_refcoco_tfds(GOLDEN / "tfrecord", unit=unit) for unit in ("sentence", "reference"))
    assert len(sentences) == 5 and [i for i in sentences.ids if i in references.ids] == references.ids
    assert len(references) == 3
    assert load_refcoco_tfds(GOLDEN / "tfrecord", limit=2).ids == sentences.ids[:2]
    assert load_refcoco_tfds(GOLDEN / "tfrecord", raw=True)[1].query == "The red object."
    again = pickle.loads(pickle.dumps(sentences))
    assert again[3].query == sentences[3].query and (again[3].image == sentences[3].image).all()


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(GOLDEN / "tfrecord", tmp_path / "copy")
    return tmp_path / "copy"


def test_what_is_not_there_is_named(copied):
    says = r"no prepared TFDS ref_coco/refcocoplus_unc under .* tfds build"
    refused(says, load_refcoco_tfds, copied, "refcoco+", "unc")
    refused(r"nothing in split 'train'. It has: validation", load_refcoco_tfds, copied, split="train")
    path = copied / VERSION / NAME
    path.rename(path.with_name("ref_coco-validation.tfrecord-00000-of-00002"))
    refused("1 of the 2 files", load_refcoco_tfds, copied)


def test_the_newest_version_is_read_and_one_without_masks_refused(copied):
    old = copied / "ref_coco/refcocog_umd/1.0.0"
    old.mkdir()
    assert len(load_refcoco_tfds(copied)) == 5
    path = copied / VERSION / NAME
    data = path.read_bytes()
    path.write_bytes(data.replace(b"objects/mask", b"objects/musk"))
    refused(r"has no masks: this is ref_coco 1\.0\.0", load_refcoco_tfds, copied)
    path.write_bytes(data.replace(b"objects/id", b"objects/ix"))
    refused(r"has no proper objects/id: this is not a record of TFDS ref_coco", load_refcoco_tfds, copied)


@settings(max_examples=40)
@given(st.integers(0, 10**9))
def test_a_file_cut_inside_a_record_is_one_data_error(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / NAME
    whole = GOLDEN / "tfrecord" / VERSION / NAME
    size = whole.stat().st_size
    ends = list(itertools.accumulate(16 + len(record) for record in refcoco_tfds._records(whole)))
    path.write_bytes(whole.read_bytes()[: cut % size])
    hypothesis.assume(cut % size not in ends[:-1])  # a file that lacks whole records cannot be told from a short one
    refused("damaged or cut short|cannot read", load_refcoco_tfds, path.parent)


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "an empty file"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "a Git-LFS pointer"),
    ],
)
def test_a_shard_that_is_none_is_a_fault_by_name(tmp_path, kind, damage, says):
    name = f"ref_coco-validation.{kind}-00000-of-00001"
    (tmp_path / name).write_bytes(damage((GOLDEN / kind / VERSION / name).read_bytes()))
    says = rf"{re.escape(name)}.*{says}.*; copy it again or prepare the data set again"
    refused(says, load_refcoco_tfds, tmp_path)


@settings(max_examples=60)
@given(st.sampled_from(["tfrecord", "array_record"]), st.integers(0, 10**9), st.integers(1, 255))
def test_a_flipped_byte_is_a_data_error_or_a_readable_sample(tmp_path_factory, kind, where, change):
    folder, name = tmp_path_factory.mktemp("flip"), NAME.replace("tfrecord", kind)
    data = bytearray((GOLDEN / kind / VERSION / name).read_bytes())
    data[where % len(data)] ^= change
    (folder / name).write_bytes(data)
    try:
        for sample in load_refcoco_tfds(folder):
            assert sample.gt_mask.shape == sample.image.shape[:2]
    except DataError:
        pass
