"""Writes synthetic scenes to disk in the exact RefCOCO layout, so that the same loader reads both.

    python -m rsagent_jax.tiny.synthetic --out=DIR --train=200 --val=50 --test=50 --seed=0

The references stand there twice: as RefCOCOg (`refcocog/refs(umd).p`), and as gRefCOCO (`grefcoco/grefs(unc).p`) with
further ones about things that are not in the picture and, with --several, about all objects of a kind, which only that
layout can say.

Scene `index` of a split depends on (seed, split, index) only: asking for more keeps the earlier ones, ids included.
The directory appears whole or not at all.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import tempfile
from collections.abc import Callable

import cv2
import numpy as np
import tqdm

from rsagent_jax.data.sets.refcoco import IMAGES, NO_TARGET
from rsagent_jax.masks import draw_polygons, iou
from rsagent_jax.runtime.local_copies import local_directory
from rsagent_jax.runtime.paths import read_bytes
from rsagent_jax.tiny import absent, scenes
from rsagent_jax.types import DataError
from sam_bridge.rle import encode_mask, mask_runs

REFS = {"refcocog": "refs(umd).p", "grefcoco": "grefs(unc).p"}  # data set: its file of references
SPLITS = ("train", "val", "test")
REFS_PER_IMAGE = {"train": 2, "val": 1, "test": 1}
ABSENT = 0.2  # references about nothing for each of the others, so a sixth of gRefCOCO's
STAMP = "synthetic.json"
_FORMAT = 4  # raised whenever the same arguments would write other bytes
_MAX_PER_SPLIT = 10_000_000  # room for image ids: split s holds s * 10^7 + 1 ...


@dataclasses.dataclass(frozen=True)
class Reference:
    objects: tuple[int, ...]  # their indices; (): nothing in the scene is meant
    texts: tuple[str, ...]  # one or two different sentences


@dataclasses.dataclass(frozen=True)
class Written:
    scenes: int
    references: int  # to an object
    several: int  # to several of them, in gRefCOCO only
    absent: int  # references to nothing, in gRefCOCO only
    sentences: int  # of all of them
    already_there: bool


def scene_at(
    seed: int,
    split: str,
    index: int,
    refs_per_image: int,
    config: scenes.SceneConfig,
    photos: tuple[np.ndarray, ...],
    several: float = 0.0,
    most: int = 3,
) -> tuple[scenes.Scene, tuple[Reference, ...]]:
    """Scene `index` of a split with its references, as the dataset on disk has it (before JPEG).

    After those to an object comes one to nothing, in every few scenes only, and then `several`, on average, to all
    objects of a kind, if so many kinds have two to `most`.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = scenes.make_scene(rng, config, photos)
    named = sorted({e.object_index for e in scene.expressions})

    def reference(objects: tuple[int, ...], draw: Callable[[], str | None]) -> Reference:
        drawn = [draw() for _ in range(1 + int(rng.random() < 0.5))]
        return Reference(objects, tuple(dict.fromkeys(filter(None, drawn))))

    references = [
        reference((k,), lambda k=k: scenes.sample_expression(rng, scene, config, k).text)
        for k in rng.permutation(named)[:refs_per_image].tolist()
    ]
    if rng.random() < ABSENT * len(references):
        references.append(reference((), lambda: absent.sample_absent(rng, scene, config)))
    if several:
        plurals = sorted(scenes.plurals_of(scene.objects, most).items())
        count = int(several) + int(rng.random() < several % 1)
        for k in rng.permutation(len(plurals))[:count].tolist():
            text, members = plurals[k]
            references.append(Reference(members, (text,)))
    return scene, tuple(r for r in references if r.texts)


def write_dataset(
    out: str | pathlib.Path,
    train: int,
    val: int,
    test: int,
    seed: int = 0,
    size: int = 112,
    refs_per_image: int | None = None,
    several: float = 0.0,
    most: int = 3,
    progress: bool = True,
) -> Written:
    """Writes `train` + `val` + `test` scenes of `size` px under `out`; does nothing if they are there already.

    refs_per_image: for every split; None means 2 in train, 1 in val and test. A scene with fewer nameable objects has
    fewer. several: references of a scene to several objects, 2 to `most` of them, on average. Raises DataError for bad
    numbers, or where `out` holds anything else than this very data set.
    """
    out, counts = pathlib.Path(out).expanduser().resolve(), {"train": train, "val": val, "test": test}
    per_image = {s: REFS_PER_IMAGE[s] if refs_per_image is None else refs_per_image for s in SPLITS}
    if min(counts.values()) < 0 or max(counts.values()) >= _MAX_PER_SPLIT or sum(counts.values()) == 0:
        raise DataError(f"ask for at least one scene, and 0 to 9999999 per split; got {counts}")
    if seed < 0 or min(per_image.values()) < 1:
        raise DataError(f"seed must be >= 0 and refs_per_image >= 1; got {seed} and {refs_per_image}")
    if not 0 <= several <= 4:  # an image has ten ids for its references
        raise DataError(f"several must be between 0 and 4 references of a scene, got {several}")
    if not 2 <= most <= 3:
        raise DataError(f"most must be 2 or 3 objects, got {most}")
    config = scenes.SceneConfig(size=size)
    stamp = {"format": _FORMAT, "seed": seed, "scenes": counts, "refs_per_image": per_image, "several": several}
    stamp |= {"most": most, "config": dataclasses.asdict(config)}
    if found := _check_target(out, stamp):
        return found
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as partial:
            written = _write(pathlib.Path(partial) / out.name, stamp, config, progress)
            if (out / STAMP).exists():  # damaged, or another process was faster
                if found := _check_target(out, stamp):
                    return found
                shutil.rmtree(out)
            os.rename(pathlib.Path(partial) / out.name, out)  # fails where somebody else has put files meanwhile
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error} ({error.filename})") from None
    return written


def _check_target(out: pathlib.Path, stamp: dict) -> Written | None:
    """What `out` already holds, if it is this data set; None if it may be (re)written; DataError if it is not ours."""
    if out.is_file():
        raise DataError(f"{out} is a file: --out must name a directory")
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        there = json.loads((out / STAMP).read_text())
        wrote = Written(**there.pop("wrote"), already_there=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{out} is not empty and was not written by this command: choose another --out") from None
    if there != stamp:
        differing = [key for key in stamp if there.get(key) != stamp[key]]
        raise DataError(
            f"{out} holds synthetic scenes made with other settings ({', '.join(differing)}):"
            " choose another --out, or delete it first"
        )
    files = [out / dataset / name for dataset, refs in REFS.items() for name in (refs, "instances.json")]
    is_whole = len(list((out / IMAGES).glob("*.jpg"))) == wrote.scenes and all(file.is_file() for file in files)
    return wrote if is_whole else None  # ours, but files are gone: written again


def _write(folder: pathlib.Path, stamp: dict, config: scenes.SceneConfig, progress: bool) -> Written:
    photos = scenes.load_photos()
    (folder / IMAGES).mkdir(parents=True)
    refs, images, annotations = [], [], []
    jobs = [(split, index) for split in SPLITS for index in range(stamp["scenes"][split])]
    for split, index in tqdm.tqdm(jobs, desc="scenes", unit="scene", disable=not progress):
        per_image, several, most = stamp["refs_per_image"][split], stamp["several"], stamp["most"]
        scene, chosen = scene_at(stamp["seed"], split, index, per_image, config, photos, several, most)
        image_id = SPLITS.index(split) * _MAX_PER_SPLIT + index + 1
        file_name = f"COCO_train2014_{image_id:012d}.jpg"
        (folder / IMAGES / file_name).write_bytes(scenes.encode_jpeg(scene.image, config.jpeg_quality))
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        annotations += [_annotation(o, image_id, k) for k, o in enumerate(scene.objects)]
        refs += [_ref(r, scene, split, image_id, n) for n, r in enumerate(chosen)]
    categories = [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(scenes.SHAPES)]
    info = {"description": "synthetic scenes of RSAgent-JAX, in the layout of RefCOCO"}
    instances = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    only_one = [r for r in refs if len(r["ann_id"]) == 1 and r["ann_id"][0] != NO_TARGET]  # what RefCOCOg can say
    of_one = [r | {key: r[key][0] for key in ("ann_id", "category_id")} for r in only_one]
    for (dataset, name), content in zip(REFS.items(), (of_one, refs), strict=True):
        (folder / dataset).mkdir()
        (folder / dataset / "instances.json").write_text(json.dumps(instances))
        # Protocol 2, as in the files that refer ships.
        (folder / dataset / name).write_bytes(pickle.dumps(content, protocol=2))
    absent_ones = sum(r["ann_id"] == [NO_TARGET] for r in refs)
    counts = {"references": len(of_one), "several": len(refs) - len(of_one) - absent_ones, "absent": absent_ones}
    wrote = {"scenes": len(images), **counts, "sentences": sum(len(r["sentences"]) for r in refs)}
    (folder / STAMP).write_text(json.dumps({**stamp, "wrote": wrote}, indent=2) + "\n")
    return Written(**wrote, already_there=False)


def _annotation(obj: scenes.SceneObject, image_id: int, object_index: int) -> dict:
    x1, y1, x2, y2 = obj.box
    return {
        "id": image_id * 10 + object_index,  # an image has fewer than ten objects
        "image_id": image_id,
        "category_id": scenes.SHAPES.index(obj.shape) + 1,
        "segmentation": segmentation_of(obj.mask),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": float(np.count_nonzero(obj.mask)),
        "iscrowd": 0,
    }


def _ref(reference: Reference, scene: scenes.Scene, split: str, image_id: int, number: int) -> dict:
    ref_id = image_id * 10 + number
    ann_ids = [image_id * 10 + k for k in reference.objects] or [NO_TARGET]
    categories = [scenes.SHAPES.index(scene.objects[k].shape) + 1 for k in reference.objects] or [NO_TARGET]
    sentences = [
        {"raw": f"{text[0].upper()}{text[1:]}.", "sent": text, "sent_id": ref_id * 10 + k, "tokens": text.split()}
        for k, text in enumerate(reference.texts)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_ids,
        "category_id": categories,
        "image_id": image_id,
        # As in the real files, with the annotation's id at the end: it names no file, and loaders must not use it.
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_ids[0]}.jpg",
        "split": split,
        "sent_ids": [s["sent_id"] for s in sentences],
        "sentences": sentences,
    }


def segmentation_of(mask: np.ndarray) -> list[list[float]] | dict:
    """bool[h, w] -> COCO polygons, or uncompressed RLE where polygons cannot say it (holes, or more than 2% lost)."""
    # Each pixel becomes 3 x 3, so that contours run 1/6 px inside its edge and not through its centre.
    fine = np.repeat(np.repeat(mask.view(np.uint8), 3, 0), 3, 1)
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) and (hierarchy[0, :, 3] < 0).all():
        polygons = [np.round((c.reshape(-1) + 0.5) / 3, 2).tolist() for c in contours]
        if iou(draw_polygons(polygons, *mask.shape), mask) >= 0.98:
            return polygons
    return {"size": list(mask.shape), "counts": mask_runs(encode_mask(mask)).tolist()}


def main(
    *,
    out: pathlib.Path,  # directory to make
    train: int = 200,  # scenes in train
    val: int = 50,  # scenes in val
    test: int = 50,  # scenes in test
    seed: int = 0,
    size: int = 112,  # side of the square images, pixels
    refs_per_image: int | None = None,  # 2 in train, 1 in val and test where it is not given
    several: float = 0.0,  # questions of a scene, on average, for all objects of a kind
    most: int = 3,  # objects that such a question is for: two to this many
) -> None:
    with local_directory(out) as here:
        wrote = write_dataset(here, train, val, test, seed, size, refs_per_image, several, most)
        if here != out and (out / STAMP).exists() and read_bytes(out / STAMP) != (here / STAMP).read_bytes():
            raise DataError(f"{out} holds synthetic scenes made with other settings: choose another --out")
    head = "already there: " if wrote.already_there else ""
    print(
        f"{head}{wrote.scenes} scenes, {wrote.references} references to an object, {wrote.several} to several"
        f" and {wrote.absent} to what is absent, {wrote.sentences} sentences in {out}"
    )
