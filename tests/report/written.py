"""Work directories as evaluate.py leaves them, from results that a test makes up."""

import json

import numpy as np
from pycocotools import mask as coco

from rsagent_jax.evals.metrics import summarize_results

FIELDS = ("id", "intersection", "union", "iou", "status", "turns")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(workdir, results, settings, examples, images=None, benchmark="toy", **more):
    """The three files; `images`: the picture of each id, its own without; `more`: keys of results.json."""
    workdir.mkdir(parents=True)
    (workdir / "results.json").write_text(json.dumps(summarize_results(results, settings, benchmark=benchmark) | more))
    named = images or {r.id: r.id for r in results}
    rows = [{"mask": None, "picture": named[r.id], "dropped": r.dropped or ""} for r in results]
    rows = [row | {key: getattr(r, key) for key in FIELDS} for row, r in zip(rows, results, strict=True)]
    write_lines(workdir / "predictions.jsonl", rows)
    write_lines(workdir / "trajectories.jsonl", examples)
    return workdir


def rle(mask):
    """COCO RLE of bool[h, w], ready for JSON."""
    value = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}
