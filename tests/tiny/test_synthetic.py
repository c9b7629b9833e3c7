"""The writer: what is read back is what was drawn, runs are repeatable, and nobody's files are overwritten."""

import json
import pickle
import pickletools

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from rsagent_jax import masks
from rsagent_jax.data.sets import refcoco
from rsagent_jax.runtime.command import run_command
from rsagent_jax.tiny import scenes, synthetic
from tests.refusals import refused

COUNTS = {"train": 24, "val": 6, "test": 4}  # of the `dataset` fixture, seed 5
CONFIG = scenes.SceneConfig()


def write(out, **more):
    return synthetic.write_dataset(out, **{"train": 1, "val": 0, "test": 0, "progress": False} | more)


def _read(root):
    refs = pickle.loads((root / "refcocog/refs(umd).p").read_bytes())
    return refs, json.loads((root / "refcocog/instances.json").read_text())


def drawn(split, photos):
    """(scene, its references) of what the fixture holds."""
    per_image = 2 if split == "train" else 1
    return [synthetic.scene_at(5, split, i, per_image, CONFIG, photos) for i in range(COUNTS[split])]


@pytest.mark.parametrize("split", COUNTS)
def test_write_then_read_gives_the_scene_back(dataset, photos, split):
    read = iter(refcoco.load_refcoco(dataset, split=split))
    for scene, references in drawn(split, photos):
        pixels = scenes.jpeg_roundtrip(scene.image, CONFIG.jpeg_quality)
        for reference in (r for r in references if r.objects):
            for text in reference.texts:
                sample = next(read)
                assert sample.query == text and (sample.image == pixels).all()
                assert masks.iou(sample.gt_mask, scene.objects[reference.objects[0]].mask) >= 0.97
                assert scenes.objects_described(scene.objects, text) == list(reference.objects)
    assert next(read, None) is None


def test_grefcoco_holds_the_same_references_and_absent_ones(dataset, photos):
    absent = total = 0
    for split in COUNTS:
        read = iter(refcoco.load_refcoco(dataset, "grefcoco", "unc", split))
        by_text = {(sample.path, sample.query): sample for sample in refcoco.load_refcoco(dataset, split=split)}
        for scene, references in drawn(split, photos):
            assert [r.objects for r in references[:-1]].count(()) == 0  # at most one, and last
            total += len(references)
            for reference, text in ((r, text) for r in references for text in r.texts):
                sample = next(read)
                assert sample.query == text
                if reference.objects:
                    assert (sample.gt_mask == by_text.pop((sample.path, text)).gt_mask).all()
                else:
                    assert not sample.gt_mask.any() and scenes.objects_described(scene.objects, text) == []
            absent += references[-1].objects == ()
        assert next(read, None) is None and not by_text
    assert 0.08 < absent / total < 0.25  # a sixth is meant
    refs = pickle.loads((dataset / "grefcoco/grefs(unc).p").read_bytes())
    assert sum(r["ann_id"] == [-1] and r["category_id"] == [-1] for r in refs) == absent
    assert len({r["ref_id"] for r in refs}) == len(refs) == total


def test_questions_about_several_are_for_all_of_a_kind(tmp_path, photos):
    """In gRefCOCO alone, after the others; without them the scenes and their other questions are the same."""
    wrote = synthetic.write_dataset(tmp_path / "x", 6, 0, 6, seed=5, several=1.0, progress=False)
    for split, per_image in (("train", 2), ("test", 1)):
        read = iter(refcoco.load_refcoco(tmp_path / "x", "grefcoco", "unc", split))
        for i in range(6):
            scene, references = synthetic.scene_at(5, split, i, per_image, CONFIG, photos, several=1.0)
            alone, others = synthetic.scene_at(5, split, i, per_image, CONFIG, photos)
            assert (scene.image == alone.image).all() and references[: len(others)] == others
            assert all(len(r.objects) in (2, 3) for r in references[len(others) :])
            for reference, text in ((r, text) for r in references for text in r.texts):
                sample = next(read)
                wanted = np.any([scene.objects[k].mask for k in reference.objects] or [0 * sample.gt_mask], axis=0)
                assert sample.query == text and masks.iou(sample.gt_mask, wanted) >= (0.97 if wanted.any() else 0)
                if len(reference.objects) > 1:
                    words = text.removeprefix("every ").removesuffix(" one").split()
                    kinds = [{o.color, o.shape} for o in scene.objects]
                    assert reference.objects == tuple(k for k, kind in enumerate(kinds) if kind.issuperset(words))
        assert next(read, None) is None
    assert wrote.several >= 6
    refused("between 0 and 4 references", synthetic.write_dataset, tmp_path / "y", 1, 0, 0, several=-1.0)
    refused("most must be 2 or 3", synthetic.write_dataset, tmp_path / "y", 1, 0, 0, several=1.0, most=1)


def test_some_scenes_have_more_questions_about_several(photos):
    counts = []
    for i in range(60):
        scene, references = synthetic.scene_at(5, "test", i, 1, CONFIG, photos, several=1.5, most=2)
        pairs = scenes.plurals_of(scene.objects, 2)
        asked = {r.texts[0]: r.objects for r in references if len(r.objects) > 1}
        assert asked.items() <= pairs.items() and all(len(members) == 2 for members in pairs.values())
        assert min(1, len(pairs)) <= len(asked) <= 2
        counts += [len(asked)] if len(pairs) > 1 else []
    assert 1.3 < np.mean(counts) < 1.7


def test_a_sixth_of_the_references_is_absent(photos):
    """Over many scenes, without writing them."""
    references = [r for i in range(400) for r in synthetic.scene_at(0, "train", i, 2, CONFIG, photos)[1]]
    assert np.mean([r.objects == () for r in references]) == pytest.approx(1 / 6, abs=0.03)
    assert all(1 <= len(r.texts) == len(set(r.texts)) <= 2 for r in references)


def test_masks_equal_pycocotools_on_the_same_file(dataset):
    coco = COCO(dataset / "refcocog/instances.json")
    checked = 0
    for split in COUNTS:
        index = refcoco.load_refcoco(dataset, split=split)
        refs = {ref["ref_id"]: ref for ref in _read(dataset)[0]}
        for sample in index:
            ann = coco.anns[refs[int(sample.id.split("/")[3])]["ann_id"]]
            assert (coco.annToMask(ann).astype(bool) == sample.gt_mask).all()
            assert ann["area"] == np.count_nonzero(sample.gt_mask)
            x, y, w, h = ann["bbox"]
            rows, columns = np.nonzero(sample.gt_mask)
            assert (x, y, x + w, y + h) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            checked += 1
    assert checked > 40


def test_layout_is_that_of_refer(dataset):
    refs, instances = _read(dataset)
    raw = (dataset / "refcocog/refs(umd).p").read_bytes()
    assert next(pickletools.genops(raw))[:2][1] == 2  # PROTO 2
    assert set(instances) >= {"images", "annotations", "categories"}
    images = {i["id"]: i for i in instances["images"]}
    annotations = {a["id"]: a for a in instances["annotations"]}
    assert len(images) == sum(COUNTS.values()) and len(annotations) == len(instances["annotations"])
    for ref in refs:
        assert set(ref) == {
            *("ref_id", "ann_id", "category_id", "file_name", "image_id", "sent_ids", "sentences", "split")
        }
        annotation, image = annotations[ref["ann_id"]], images[ref["image_id"]]
        assert annotation["image_id"] == image["id"] and annotation["category_id"] == ref["category_id"]
        assert image["file_name"] == f"COCO_train2014_{image['id']:012d}.jpg"
        assert (dataset / refcoco.IMAGES / image["file_name"]).is_file()
        assert not (dataset / refcoco.IMAGES / ref["file_name"]).exists()  # the trap of the real files
        assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]] and 1 <= len(ref["sentences"]) <= 2
        for s in ref["sentences"]:
            assert s["tokens"] == s["sent"].split() and s["raw"].lower().rstrip(".") == s["sent"]
    assert len({r["ref_id"] for r in refs}) == len(refs)
    sent_ids = [s for r in refs for s in r["sent_ids"]]
    assert len(set(sent_ids)) == len(sent_ids)
    per_image = {s: len([r for r in refs if r["split"] == s]) / n for s, n in COUNTS.items()}
    assert per_image == {"train": 2, "val": 1, "test": 1}


def test_more_scenes_keep_the_earlier_ones(dataset, tmp_path):
    write(tmp_path / "more", train=30, val=2, test=0, seed=5)
    few, many = _read(dataset), _read(tmp_path / "more")
    assert [r for r in few[0] if r["split"] == "train"] == [r for r in many[0] if r["split"] == "train"][:48]
    kept = {a["id"]: a for a in few[1]["annotations"]}
    assert sum(kept.get(a["id"]) == a for a in many[1]["annotations"]) > 70
    for image in few[1]["images"][:24]:
        name = refcoco.IMAGES / image["file_name"]
        assert (dataset / name).read_bytes() == (tmp_path / "more" / name).read_bytes()


def test_splits_and_seeds_differ(dataset, tmp_path):
    write(tmp_path / "other", train=24, val=6, test=4, seed=6)
    images = [p.read_bytes() for root in (dataset, tmp_path / "other") for p in sorted(root.rglob("*.jpg"))]
    assert len(set(images)) == len(images) == 2 * sum(COUNTS.values())


def test_second_run_finds_it_there(copied):
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    wrote = write(copied, **COUNTS, seed=5)
    assert wrote.already_there and wrote.scenes == 34 and wrote.references == 58
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before


@pytest.mark.parametrize(
    "lost", ["refcocog/instances.json", "refcocog/refs(umd).p", "grefcoco/grefs(unc).p", "picture"]
)
def test_a_damaged_copy_is_rebuilt(copied, dataset, lost):
    lost = next(copied.rglob("*.jpg")) if lost == "picture" else copied / lost
    whole = lost.read_bytes()
    lost.unlink()
    assert not write(copied, **COUNTS, seed=5).already_there
    assert lost.read_bytes() == whole
    assert [p.name for p in copied.parent.iterdir()] == [copied.name]  # no temporary directory stays


def test_foreign_directories_and_files_are_left_alone(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    refused("not empty and was not written by this command", write, home)
    for stamp in ("", "[]", "{}", '{"wrote": 5}'):
        (home / "synthetic.json").write_text(stamp)
        refused("was not written by this command", write, home)
    (home / "synthetic.json").unlink()
    refused("is a file", write, home / "thesis.tex")
    refused("cannot write", write, home / "thesis.tex" / "sub")
    assert [p.name for p in tmp_path.rglob("*")] == ["home", "thesis.tex"]


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_annotation", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_equal_run_that_was_faster_wins(tmp_path, monkeypatch):
    whole, out = synthetic._write, tmp_path / "out"

    def slower(*args):
        monkeypatch.setattr(synthetic, "_write", whole)
        write(out)
        return whole(*args)

    monkeypatch.setattr(synthetic, "_write", slower)
    assert write(out).already_there
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "wrong", [{"train": -1}, {"train": 0}, {"seed": -1}, {"refs_per_image": 0}, {"size": 8}, {"train": 10**7}]
)
def test_bad_numbers(tmp_path, wrong):
    refused(
        ".", synthetic.write_dataset, tmp_path / "out", **{"train": 1, "val": 0, "test": 0, **wrong}, progress=False
    )
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, capsys):
    arguments = [f"--out={tmp_path / 'out'}", "--train=2", "--val=1", "--test=0", "--seed=3", "--size=96"]
    assert run_command("rsagent_jax.tiny.synthetic", [*arguments, "--refs_per_image=3"]) == 0
    assert capsys.readouterr().out.startswith("3 scenes, 9 references to an object, 0 to several and ")
    assert refcoco.load_refcoco(tmp_path / "out", split="val")[0].image.shape == (96, 96, 3)
    assert run_command("rsagent_jax.tiny.synthetic", [*arguments, "--refs_per_image=3"]) == 0
    assert capsys.readouterr().out.startswith("already there: 3 scenes")
    assert run_command("rsagent_jax.tiny.synthetic", arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "refs_per_image" in captured.err and not captured.out


def test_segmentation_says_holes_and_parts_exactly():
    ring = np.zeros((40, 60), bool)
    ring[5:30, 10:50] = True
    ring[10:20, 20:30] = False
    parts = np.zeros((40, 60), bool)
    parts[0:4, 0:6] = parts[20:40, 30:60] = True
    parts[10, 10] = True  # a single pixel is a part too
    for mask, kind in ((ring, dict), (parts, list), (np.zeros((4, 5), bool), dict), (np.ones((4, 5), bool), list)):
        segmentation = json.loads(json.dumps(synthetic.segmentation_of(mask)))
        assert isinstance(segmentation, kind)
        assert (masks.decode_segmentation(segmentation, *mask.shape, "it") == mask).all()
        theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *mask.shape))
                                  if kind is list else coco_mask.frPyObjects(segmentation, *mask.shape))  # fmt: skip
        assert (theirs == mask).all()
    assert len(synthetic.segmentation_of(parts)) == 3
