"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO as `Sample`s, in the layout of github.com/lichengunc/refer.

    <root>/refcocog/refs(umd).p                  references: which annotation, which sentences, which split
    <root>/refcocog/instances.json               COCO style: images and annotations
    <root>/grefcoco/grefs(unc).p                 or .json; its references name several annotations, or none (-1)
    <root>/images/mscoco/images/train2014/       the pictures

Nothing but text is held in memory: pictures and masks are decoded when a sample is asked for. Every problem with the
files is a DataError that names the path and the remedy.
"""

import collections
import dataclasses
import itertools
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

from rsagent_jax.data.sets.index import SampleIndex, SegmentedEntry, parse_json, read_file
from rsagent_jax.data.sets.unpickle import loads_data
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.types import DataError

IMAGES = pathlib.PurePath("images/mscoco/images/train2014")
GENERALIZED = "grefcoco"  # several targets, or none
NO_TARGET = -1  # its ann_id where nothing in the picture is meant


@dataclasses.dataclass(frozen=True)
class _Entry(SegmentedEntry):
    image_id: int  # COCO's, wherever the picture is stored
    ann_ids: tuple[int, ...]  # of the targets

    remedy = "unpack all of COCO train2014 (train2014.zip) into its folder"

    @property
    def image_key(self) -> str:
        return f"coco/{self.image_id}"

    def parts(self) -> Iterator[tuple[list | dict, str]]:
        for ann_id, segmentation in zip(self.ann_ids, self.targets, strict=True):
            yield segmentation, f"annotation {ann_id} (sample {self.id})"


def load_refcoco(
    root: str | pathlib.Path,
    dataset: str = "refcocog",
    split_by: str = "umd",
    split: str = "val",
    unit: str = "sentence",
    limit: int | None = None,
    raw: bool = False,
    layout: str = "refer",
) -> SampleIndex:
    """Indexes one split.

    unit: "sentence", every sentence of every reference is a sample (LISA's rule); or "reference", only its first one.
    limit: keep the first so many samples. raw: the annotator's own text (`raw`, stripped) for the query, not the
    normalised `sent` (stripped, lower case). Sample ids read "<dataset>/<split_by>/<split>/<ref_id>/<sent_id>".
    layout: "refer", or "tfds" for the files of refcoco_tfds.py.
    Raises DataError where files are missing or broken, or where the split does not exist.
    """
    read_entries = _read_entries
    if layout == "tfds":
        from rsagent_jax.data.sets.refcoco_tfds import read_entries  # not above: Grain imports JAX
    entries = read_entries(open_path(root), dataset, split_by, split, unit, raw)
    return SampleIndex(f"{dataset}/{split_by}/{split}", list(itertools.islice(entries, limit)))


def _read_entries(
    root: pathlib.Path, dataset: str, split_by: str, split: str, unit: str, raw: bool
) -> Iterator[_Entry]:
    refs_path, instances_path = _check_layout(root, dataset, split_by)
    several = dataset == GENERALIZED
    refs = _select_split(_read_refs(refs_path, several), split, refs_path)
    images, annotations = _read_instances(instances_path, root / IMAGES)
    for ref in refs:
        # ref["file_name"] carries an annotation suffix and names no file: the picture comes from its image_id.
        where = f"reference {ref['ref_id']} in {refs_path}"
        image, size = _look_up(images, ref["image_id"], "image", where, instances_path)
        targets = []
        ann_ids = [a for a in ref["ann_id"] if a != NO_TARGET] if several else [ref["ann_id"]]
        for ann_id in ann_ids:
            image_id, segmentation = _look_up(annotations, ann_id, "annotation", where, instances_path)
            if image_id != ref["image_id"]:
                raise DataError(
                    f"{where} is about image {ref['image_id']}, but its annotation {ann_id} is on image"
                    f" {image_id}: {refs_path.name} and {instances_path.name} are not from one download"
                )
            targets.append(segmentation)
        for sentence in ref["sentences"] if unit == "sentence" else ref["sentences"][:1]:
            query = _text(sentence["raw"]) if raw else _text(sentence["sent"]).lower()
            sample_id = f"{dataset}/{split_by}/{split}/{ref['ref_id']}/{sentence['sent_id']}"
            yield _Entry(sample_id, query, image, size, tuple(targets), ref["image_id"], tuple(ann_ids))


def _text(text: str) -> str:
    """Of a python-2 pickle, whose byte strings come in as latin1: where the bytes are UTF-8, that was meant."""
    try:
        return text.encode("latin1").decode("utf-8").strip()
    except UnicodeError:
        return text.strip()


# ---------------------------------------------------------------------------------------------------- files


def _check_layout(root: pathlib.Path, dataset: str, split_by: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Paths of the reference file and of instances.json; one DataError lists everything that is missing."""
    folder, kind = root / dataset, "grefs" if dataset == GENERALIZED else "refs"
    refs_path, instances_path = folder / f"{kind}({split_by}).p", folder / "instances.json"
    if kind == "grefs" and not refs_path.exists() and refs_path.with_suffix(".json").exists():
        refs_path = refs_path.with_suffix(".json")
    expected = (refs_path, instances_path, root / IMAGES)
    if all(path.exists() for path in expected):
        return refs_path, instances_path
    lines = [f"  {'found  ' if path.exists() else 'MISSING'}  {path}" for path in expected]
    others = [path.name[len(kind) + 1 : -len(").p")] for path in sorted(folder.glob(f"{kind}(*).p"))]
    hint = f"This folder has split_by = {' or '.join(others)}. " if others and not refs_path.exists() else ""
    raise DataError(
        f"no {dataset} under '{root}'. Expected:\n" + "\n".join(lines) + f"\n{hint}Get the data as docs/data.md says"
        " (Getting it), or make a stand-in: python -m rsagent_jax.tiny.synthetic"
        f" --out={shlex.quote(str(root))} --train=200 --val=50"
    )


def _read_refs(path: pathlib.Path, several: bool) -> list[dict]:
    """References as they stand in the file; with `several`, ann_id is a list (gRefCOCO)."""
    data = read_file(path)
    refs = parse_json(data, path) if path.suffix == ".json" else loads_data(data, str(path))
    ann_id: Any = (list, tuple) if several else int
    kinds = {"ref_id": int, "ann_id": ann_id, "image_id": int, "split": str, "sentences": list}
    if not isinstance(refs, list) or not refs:
        raise DataError(f"{path} must hold a list of references, not {type(refs).__name__} (or an empty one)")
    for k, ref in enumerate(refs):
        wrong = not isinstance(ref, dict) or [f for f, kind in kinds.items() if not isinstance(ref.get(f), kind)]
        if wrong:
            fields = "a dict" if wrong is True else f"with proper {', '.join(wrong)}"
            raise DataError(f"{path}: reference number {k} is not {fields}: this is not a file of the refer layout")
        if several and not all(isinstance(a, int) for a in ref["ann_id"]):
            raise DataError(f"{path}: reference {ref['ref_id']} has an ann_id that is no list of numbers")
        for s in ref["sentences"]:
            texts = isinstance(s, dict) and all(isinstance(s.get(field), str) for field in ("sent", "raw"))
            if not texts or "sent_id" not in s:
                lacks = "'sent_id'" if texts else "'sent' and 'raw' text"
                raise DataError(f"{path}: reference {ref['ref_id']} has a sentence without {lacks}")
    return refs


def _select_split(refs: list[dict], split: str, path: pathlib.Path) -> list[dict]:
    """refer's rules: "testA" takes every split with an A in it ("testA", "testAB"), "test" all tests, others exact."""
    if split in ("testA", "testB", "testC"):
        chosen = [ref for ref in refs if split[-1] in ref["split"]]
    elif split == "test":
        chosen = [ref for ref in refs if "test" in ref["split"]]
    else:
        chosen = [ref for ref in refs if ref["split"] == split]
    if not chosen:
        counts = collections.Counter(ref["split"] for ref in refs)
        there = ", ".join(f"{name} ({counts[name]} references)" for name in sorted(counts))
        raise DataError(f"{path} has nothing in split {split!r}. It has: {there}")
    return chosen


def _read_instances(path: pathlib.Path, folder: pathlib.Path) -> tuple[dict[int, tuple], dict[int, tuple]]:
    """instances.json -> (path, (h, w)) by image id, (image id, segmentation) by annotation id. Raises DataError."""
    instances = parse_json(read_file(path), path)
    try:
        images = {
            row["id"]: (str(folder / row["file_name"]), (int(row["height"]), int(row["width"])))
            for row in instances["images"]
        }
        annotations = {row["id"]: (row["image_id"], row["segmentation"]) for row in instances["annotations"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a COCO instances file: missing or ill-typed {error}") from None
    for kind, rows in (("picture", instances["images"]), ("annotation", instances["annotations"])):
        first = {}
        for number, row in enumerate(rows):
            if first.setdefault(row["id"], row) != row:  # whole copies do no harm
                raise DataError(
                    f"{path}: {kind} id {row['id']} stands twice, the second time in row {number}, for different"
                    f" {kind}s: give each an id of its own, or take the file from one download"
                )
    return images, annotations


def _look_up(table: dict, key: int, what: str, where: str, instances_path: pathlib.Path):
    try:
        return table[key]
    except KeyError:
        raise DataError(
            f"{where} names {what} {key}, which {instances_path} does not have: take both files from one download"
        ) from None
