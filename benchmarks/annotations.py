"""How much of an error is the annotation's: RefCOCO val's own masks held against RefCOCO-M's, which were drawn anew.

  python benchmarks/annotations.py --root=REFER [--workdir=EVALUATION]

Sentences are paired by picture and text; those that mean several objects of a picture are left out and counted. A
policy that drew RefCOCO's masks exactly would get the first row from RefCOCO-M. With a work directory of
`evaluate.py --config=configs/eval.py:refcoco-val` its predictions are judged by both, without being made again.
Figures are of LISA's kind, without its epsilon. REFER holds refcoco/, its pictures and refcoco_m/.
"""

import argparse
import collections
import json
import pathlib
import sys

import numpy as np
import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from rsagent_jax.data.sets.coco_questions import load_refcoco_m
from rsagent_jax.data.sets.index import SampleIndex, read_file
from rsagent_jax.data.sets.refcoco import load_refcoco
from rsagent_jax.masks import decode_rle, intersection_union
from rsagent_jax.types import DataError

BY_OLD, BY_NEW = "the policy, by RefCOCO", "the policy, by RefCOCO-M"


def pairs_of(old: SampleIndex, new: SampleIndex) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """(place in old, place in new) of the sentences that are in both once, and how many of new are not."""
    keys = [[(key, e.query.lower()) for key, e in zip(s.image_keys, s.entries, strict=True)] for s in (old, new)]
    counts, places = [collections.Counter(k) for k in keys], {key: i for i, key in enumerate(keys[0])}
    once = [(key, i) for i, key in enumerate(keys[1]) if max(c[key] for c in counts) == 1]
    pairs = [(places[key], i) for key, i in once if key in places]
    return pairs, {"pairs": len(pairs), "ambiguous": len(new) - len(once), "not_in_refcoco": len(once) - len(pairs)}


def figures(pixels: list[tuple[int, int]]) -> dict[str, float]:
    """gIoU and cIoU of (intersection, union) pixel counts."""
    both = np.array(pixels, np.float64)
    ious = np.where(both[:, 1] > 0, both[:, 0] / np.maximum(both[:, 1], 1), 1.0)
    return {"giou": float(ious.mean()), "ciou": float(both[:, 0].sum() / max(both[:, 1].sum(), 1))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parser.add_argument("--workdir", type=pathlib.Path, help="of evaluate.py on refcoco-val")
    options = parser.parse_args()
    predicted = {}
    if options.workdir:
        lines = read_file(options.workdir / "predictions.jsonl").splitlines()
        predicted = {row["id"]: row["mask"] for row in map(json.loads, lines)}
    old, new = load_refcoco(options.root, "refcoco", "unc", "val"), load_refcoco_m(options.root)
    pairs, result = pairs_of(old, new)
    if not pairs:
        raise DataError(f"{options.root}: no sentence of refcoco_m is one of refcoco val's")
    rows = collections.defaultdict(list)
    for i, k in tqdm.tqdm(pairs):
        before, after = old[i].gt_mask, new[k].gt_mask
        rows["RefCOCO's masks, by RefCOCO-M"].append(intersection_union(before, after))
        if rle := predicted.get(old.entries[i].id):
            mask = decode_rle(rle, before.shape)
            rows[BY_OLD].append(intersection_union(mask, before))
            rows[BY_NEW].append(intersection_union(mask, after))
    print(f"{len(pairs)} sentences; left out: {result}")
    for name, pixels in rows.items():
        result[name] = figures(pixels) | {"n": len(pixels)}
        print(f"{name:30s}  n {len(pixels):5d}  gIoU {result[name]['giou']:.3f}  cIoU {result[name]['ciou']:.3f}")
    if BY_OLD in rows:
        error = 1 - result[BY_OLD]["giou"]
        result["annotation_share"] = (result[BY_NEW]["giou"] - result[BY_OLD]["giou"]) / error if error else 0.0
        print(f"of its error by RefCOCO, {error:.3f}, RefCOCO-M takes away {result['annotation_share']:.0%}")
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
