"""MUSE, MMR, GSEval and RefCOCO-M as `Sample`s: questions with masks of their own about pictures of COCO.

    <root>/muse/muse_<split>.json               val, test_less, test_many           (MaverickRen/PixelLM)
    <root>/MMR/MMR_<split>.json                 val, test_mixed, test_obj_only, test_part_only      (jdg900/MMR)
    <root>/gseval/GroundingSuite-Eval.jsonl     one question a line                 (hustvl/GroundingSuite)
    <root>/images/mscoco/images/<folder>/       their pictures: train2014, train2017, val2017, unlabeled2017
    <root>/refcoco_m/validation*.jsonl, images/ moondream/refcoco-m, as `rsagent_jax.data.get` unpacks its parquet

What was seen: GSEval's file, the loaders of MUSE and MMR and MMR's table of fields, RefCOCO-M's card. Not seen: a file
of MUSE, MMR or RefCOCO-M itself. `python -m rsagent_jax.data.get` says where each is had.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from rsagent_jax.data.sets.index import SampleIndex, SegmentedEntry, parse_json, read_file
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.types import DataError

COCO_FOLDERS = pathlib.PurePath("images/mscoco/images")
# class_id by kind. The file only numbers them; which is which was told from the texts of each and the paper's names.
GSEVAL_KINDS = {"all": (1, 2, 3, 4), "stuff": (1,), "part": (2,), "multi": (3,), "single": (4,)}


class _Entry(SegmentedEntry):
    remedy = "docs/data.md says which pictures this data set is about, and how they are had"


def load_multi_target(
    root: str | pathlib.Path, dataset: str = "muse", split: str = "val", limit: int | None = None
) -> SampleIndex:
    """Indexes a split of "muse" or "mmr": one sample per question, whose mask is the union of its answer's targets.

    The authors' own figures count a mask per target, in the order of the answer's text; a figure of unions is another
    one. Questions without a target are left out and counted in `notes`.
    Sample ids read "<dataset>/<split>/<number of the record>/<number of the question>". DataError as `load_refcoco`.
    """
    folder = open_path(root)
    path = folder / {"muse": f"muse/muse_{split}.json", "mmr": f"MMR/MMR_{split}.json"}[dataset]
    entries, total = [], 0
    for number, where, record in _records(path, dataset):
        kinds = {"height": int, "width": int, "questions": list, "answers": list}
        height, width, questions, answers = _fields(record, where, kinds)
        if len(questions) != len(answers):
            raise DataError(f"{where} has {len(questions)} questions and {len(answers)} answers: download it again")
        image = str(folder / COCO_FOLDERS / _coco_path(record, where))
        for n, (query, answer) in enumerate(zip(questions, answers, strict=True)):
            if not isinstance(query, str) or not isinstance(answer, list):
                raise DataError(f"{where}: question {n} is no text, or its answer no list of annotations")
            targets = tuple(
                _fields(target, f"{where}, answer {n}", {"segmentation": list | dict})[0] for target in answer
            )
            total += 1
            if targets:
                id = f"{dataset}/{split}/{number}/{n}"
                entries.append(_Entry(id, query.strip(), image, (height, width), targets))
        if limit is not None and len(entries) >= limit:
            break
    left_out = total - len(entries)
    notes = (f"{left_out} of {total} questions have no target and were left out",) if left_out else ()
    return SampleIndex(f"{dataset}/{split}", entries[:limit], notes=notes)


def load_gseval(root: str | pathlib.Path, split: str = "all", limit: int | None = None) -> SampleIndex:
    """Indexes GSEval: "all", or one of its kinds "stuff", "part", "multi", "single". The text is the caption.

    Sample ids read "gseval/<idx>", the same in all of them. DataError as `load_refcoco`.
    """
    folder = open_path(root)
    if split not in GSEVAL_KINDS:
        raise DataError(f"data.split of gseval is one of {', '.join(GSEVAL_KINDS)}, not {split!r}")
    kinds = {"idx": int, "image_path": str, "class_id": int, "caption": str, "segmentation": dict}
    entries = []
    for _, where, record in _records(folder / "gseval/GroundingSuite-Eval.jsonl", "gseval"):
        idx, image, kind, caption, rle = _fields(record, where, kinds)
        if kind in GSEVAL_KINDS[split]:
            image = str(folder.joinpath(*COCO_FOLDERS.parts, *pathlib.PurePosixPath(image).parts[-2:]))
            entries.append(_Entry(f"gseval/{idx}", caption.strip(), image, _rle_size(rle, where), (rle,)))
    return SampleIndex(f"gseval/{split}", entries[:limit])


def load_refcoco_m(root: str | pathlib.Path, split: str = "val", limit: int | None = None) -> SampleIndex:
    """Indexes RefCOCO-M: sentences of RefCOCO (unc) val with masks drawn anew; there is no other split.

    Sample ids read "refcoco_m/val/<id of the object>/<number of the sentence>". DataError as `load_refcoco`.
    """
    folder = open_path(root) / "refcoco_m"
    if split != "val":
        raise DataError(f"refcoco_m has the split val only, not {split!r}")
    entries = []
    for path in sorted(folder.glob("validation*.jsonl")) or [folder / "validation.jsonl"]:
        for _, where, record in _records(path, "refcoco_m"):
            name, samples = _fields(record, where, {"file_name": str, "samples": list})
            for sample in samples:
                id, sentences, rle = _fields(sample, where, {"id": int, "sentences": list, "mask": dict})
                size, image = _rle_size(rle, where), str(folder / "images" / pathlib.PurePosixPath(name).name)
                if not all(isinstance(text, str) for text in sentences):
                    raise DataError(f"{where} has a sentence that is no text: unpack the data set again")
                for n, text in enumerate(sentences):
                    entries.append(_Entry(f"refcoco_m/val/{id}/{n}", text.strip(), image, size, (rle,)))
    return SampleIndex("refcoco_m/val", entries[:limit])


# ---------------------------------------------------------------------------------------------------- records


def _records(path: pathlib.Path, dataset: str) -> Iterator[tuple[int, str, Any]]:
    """(number, where it stands, record) of a JSON list, or of the lines of a .jsonl file."""
    if not path.exists():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.json*"))) or "no such file"
        raise DataError(
            f"{path} is missing; {path.parent} has: {there}. python -m rsagent_jax.data.get {dataset} gets it, or says"
            " how it is had"
        )
    data = read_file(path)
    if path.suffix == ".jsonl":
        records = [parse_json(line, path) for line in data.splitlines() if line.strip()]
    else:
        records = parse_json(data, path)
    if not isinstance(records, list):
        raise DataError(f"{path} holds no list of records: this is not a file of {dataset}")
    for number, record in enumerate(records):
        yield number, f"{path}, record {number}", record


def _fields(record: Any, where: str, kinds: dict[str, Any]) -> list[Any]:
    """The fields of a record, in this order; DataError names those that are missing or of another type."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object: this is not a file of this data set")
    if wrong := [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]:
        raise DataError(f"{where} lacks a proper {', '.join(wrong)}: this is not a file of this data set")
    return [record[name] for name in kinds]


def _rle_size(rle: dict, where: str) -> tuple[int, int]:
    size = rle.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise DataError(f"{where} has a mask without its size [height, width]: download it again")
    return size[0], size[1]


def _coco_path(record: dict, where: str) -> pathlib.PurePosixPath:
    """folder/name of the picture, by the rules of PixelLM's and MMR's loaders."""
    name, url = (record.get(key) if isinstance(record.get(key), str) else "" for key in ("file_name", "coco_url"))
    if name and ("/" in name or not url):
        return pathlib.PurePosixPath(name if "/" in name else f"train2014/{name}")
    if not url:
        raise DataError(f"{where} names no picture: it has neither file_name nor coco_url")
    return pathlib.PurePosixPath(*pathlib.PurePosixPath(url).parts[-2:])
