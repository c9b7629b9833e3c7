"""Small data sets of each format on disk."""

import json

import numpy as np
from PIL import Image


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
