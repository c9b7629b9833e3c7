"""Work directories as evaluate.py leaves them, from results that a test makes up; what every page must be."""

import base64
import hashlib
import html
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
from pycocotools import mask as coco

from rsagent_jax.evals.metrics import summarize_results

FIELDS = ("id", "intersection", "union", "iou", "status", "turns")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(workdir, results, settings, examples, images=None, benchmark="toy", version="1", **more):
    """The three files; `images`: the picture of each id, its own without; `version`: of the samples, "" = unknown;
    `more`: keys of results.json."""
    workdir.mkdir(parents=True)
    (workdir / "results.json").write_text(json.dumps(summarize_results(results, settings, benchmark=benchmark) | more))
    named = images or {r.id: r.id for r in results}
    rows = [{"mask": None, "picture": named[r.id], "dropped": r.dropped or ""} for r in results]
    rows = [row | ({"sample_checksum": version} if version else {}) for row in rows]
    rows = [row | {key: getattr(r, key) for key in FIELDS} for row, r in zip(rows, results, strict=True)]
    write_lines(workdir / "predictions.jsonl", rows)
    write_lines(workdir / "trajectories.jsonl", examples)
    return workdir


def rle(mask):
    """COCO RLE of bool[h, w], ready for JSON."""
    value = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": value["size"], "counts": value["counts"].decode()}


def check_markup(text):
    """Well-formed, on its own, and with no markup but ours. Its elements."""
    found = list(ET.fromstring(text).iter())
    for element in found:
        assert element.tag not in ("link", "iframe", "b onerror")
        assert not any(name.startswith("on") for name in element.attrib)
        assert all(element.get(name, "data:").startswith(("data:", "#")) for name in ("src", "href"))
    return found


def check_script(text):
    """The page's only script, which its policy names as the only one that may run."""
    policy = html.unescape(re.search(r'content="(default-src.*?)"', text)[1])
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and policy.endswith(f"; script-src 'sha256-{checksum}'")
    assert "unsafe-eval" not in policy and script.startswith("//<![CDATA[")
