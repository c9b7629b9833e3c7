"""What a sample is made of, hashed: every ingredient changes it, nothing else does, and nothing is decoded."""

import json
import os
import pathlib
import pickle
import shutil

import pytest

from rsagent_jax.config.schema import DataConfig
from rsagent_jax.data.sets import refcoco
from rsagent_jax.data.sets.open import open_samples
from tests.data.sets.small_sets import square, write_image, write_lines, write_reasonseg

TFDS = pathlib.Path(__file__).parents[2] / "golden/ref_coco"


def prints(root, by="content", **more):
    samples = open_samples(DataConfig(root=str(root), **({"dataset": "folder"} | more), fingerprint=by))
    return [samples.fingerprint(i) for i in range(len(samples))]


def folder(root, *records, seeds=(0, 1, 2)):
    """`seeds` of the picture, the mask and the ignore mask."""
    for name, seed in zip(("a.png", "m.png", "i.png"), seeds, strict=True):
        write_image(root / name, seed)
    return prints(write_lines(root, *({"id": "x"} | record for record in records)))


def test_each_ingredient_of_a_folder_changes_it_and_nothing_else_does(tmp_path):
    record = {"mask": "m.png", "ignore": "i.png"}
    (before,) = folder(tmp_path / "one", record)
    assert len(before) == 16 and int(before, 16) >= 0
    polygons = ({"segmentation": [[0, 0, 5, 0, 5, y]], "ignore": "i.png"} for y in (5, 6))
    changes = {"id": "y"}, {"query": "that"}, {"ignore": None}, {"mask": None}
    changed = [folder(tmp_path / "2", record, seeds=seeds) for seeds in ((9, 1, 2), (0, 9, 2), (0, 1, 9))]
    changed += [folder(tmp_path / "2", other) for other in (*(record | change for change in changes), *polygons)]
    assert len({before, *(only for (only,) in changed)}) == 10
    # another place, another time of change, another sample before it, a field's order: the same sample
    moved = folder(tmp_path / "three", {"mask": None, "id": "other"}, dict(reversed(record.items())))
    os.utime(tmp_path / "three/m.png", (1, 1))
    os.utime(tmp_path / "three/a.png", (1, 1))
    assert prints(tmp_path / "three") == moved and moved[1] == before != moved[0]  # two samples on one picture


def test_pictures_by_content_or_by_stat_masks_always_by_content(tmp_path):
    (content,) = folder(tmp_path / "d", {"mask": "m.png"})
    (stat,) = prints(tmp_path / "d", "stat")
    os.utime(tmp_path / "d/m.png", (1, 1))
    assert prints(tmp_path / "d", "stat") == [stat] != [content]
    os.utime(tmp_path / "d/a.png", (1, 1))
    assert prints(tmp_path / "d", "stat") != [stat] and prints(tmp_path / "d") == [content]
    write_image(tmp_path / "d/m.png", 7)
    assert prints(tmp_path / "d") != [content]


def test_a_missing_file_counts_as_missing(tmp_path):
    (before,) = folder(tmp_path / "d", {"mask": "m.png"})
    for name in ("a.png", "m.png"):
        shutil.move(tmp_path / "d" / name, tmp_path / name)
        assert prints(tmp_path / "d") != [before] and prints(tmp_path / "d", "stat") != [before]
        shutil.move(tmp_path / name, tmp_path / "d" / name)
        assert prints(tmp_path / "d") == [before]


def test_reasonseg(tmp_path):
    def write(shape=square(1, 1, 3), text=("it", "that"), **more):  # noqa: B008
        write_reasonseg(tmp_path / "val", "a", shape, text=text, **more)
        return read()

    def read():
        return prints(tmp_path, dataset="reasonseg", split="val", texts="all")

    before = write(version="5")
    assert len(set(before)) == 2 and write(version="6") == before
    other_text, other_shape = write(text=["it", "those"]), write(square(1, 1, 3, "ignore"))
    assert other_text[0] == before[0] and other_text[1] != before[1]
    assert not set(other_shape) & set(before)
    write()
    write_image(tmp_path / "val/a.jpg", 1)
    assert not set(read()) & set(before)


def test_refcoco(copied):
    def read(split="val"):
        return prints(copied, dataset="refcocog", split=split)

    before = read()
    assert len(set(before)) == len(before) and before == read()
    path, refs_path = copied / "refcocog/instances.json", copied / "refcocog/refs(umd).p"
    instances, refs = json.loads(path.read_text()), pickle.loads(refs_path.read_bytes())
    first = next(ref for ref in refs if ref["split"] == "val")
    mine = [k for k in range(len(before)) if k < len(first["sentences"])]
    next(a for a in instances["annotations"] if a["id"] == first["ann_id"])["segmentation"][0][0] += 1
    path.write_text(json.dumps(instances))
    assert [k for k, (a, b) in enumerate(zip(before, read(), strict=True)) if a != b] == mine
    before = read()
    first["sentences"][0]["sent"] += " there"
    refs_path.write_bytes(pickle.dumps(refs, 2))
    assert [k for k, (a, b) in enumerate(zip(before, read(), strict=True)) if a != b] == [0]
    before = read()
    images = {i["id"]: i["file_name"] for i in instances["images"]}
    (copied / refcoco.IMAGES / images[first["image_id"]]).unlink()
    changed = [k for k, (a, b) in enumerate(zip(before, read(), strict=True)) if a != b]
    samples = refcoco.load_refcoco(copied, split="val")
    assert changed == [k for k, key in enumerate(samples.image_keys) if key == f"coco/{first['image_id']}"]


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_tfds(kind):
    before = prints(TFDS / kind, dataset="refcocog", layout="tfds", split="val")
    other = prints(TFDS / "tfrecord", dataset="refcocog", layout="tfds", split="val", raw=True)
    assert len(set(before)) == 5 and before[1] != other[1]
    assert before == prints(TFDS / "tfrecord", dataset="refcocog", layout="tfds", split="val")


def test_a_part_of_a_set_hashes_as_the_whole(tmp_path):
    folder(tmp_path / "d", {"mask": "m.png"}, {"mask": None, "id": "y"})
    samples = open_samples(DataConfig(root=str(tmp_path / "d"), dataset="folder", fingerprint="stat"))
    assert samples.keep([1]).fingerprint(0) == samples.fingerprint(1)
