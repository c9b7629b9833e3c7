"""Small data sets of each format on disk."""

import json
import pickle

import numpy as np
from PIL import Image

from rsagent_jax.data.sets import refcoco


def write_image(path, seed=0, size=(9, 8)):
    """Noise, `size` (w, h)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)


def write_lines(root, *records, split="train"):
    """The records of a folder, with what they lack."""
    lines = [{"image": "a.png", "query": "it"} | record for record in records]
    (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return root


def square(x, y, side, label="target"):
    return {"label": label, "points": [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]}


def write_reasonseg(folder, stem, *shapes, text=("What can one drink from?",), encoding="utf-8", **more):
    """A picture of 40 x 30 pixels with its JSON."""
    write_image(folder / f"{stem}.jpg", size=(40, 30))
    record = {"text": text, "is_sentence": True, "shapes": list(shapes)} | more
    (folder / f"{stem}.json").write_bytes(json.dumps(record, ensure_ascii=False).encode(encoding))


def write_refer(root, dataset, split_by, refs, polygons, size):
    """References in refer's layout, over the pictures 1 and 2 of `size` (w, h); `polygons` by annotation id, of which
    10 to 19 are on picture 1."""
    (root / dataset).mkdir(parents=True)
    kind = "grefs" if dataset == refcoco.GENERALIZED else "refs"
    (root / dataset / f"{kind}({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    names, (width, height) = {i: f"COCO_train2014_{i:012d}.jpg" for i in (1, 2)}, size
    images = [{"id": i, "file_name": name, "height": height, "width": width} for i, name in names.items()]
    annotations = [{"id": k, "image_id": k // 10, "segmentation": [polygon]} for k, polygon in polygons.items()]
    (root / dataset / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    for name in names.values():
        write_image(root / refcoco.IMAGES / name, size=size)
