"""Small data sets of each format on disk, and what their readers say of broken ones."""

import json

import numpy as np
import pytest
from PIL import Image

from rsagent_jax.types import DataError


def refused(says: str, call, *args, **kwargs) -> str:
    """The message of the DataError that the call must raise; it matches `says`."""
    with pytest.raises(DataError, match=says) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def picture(path, seed=0, size=(9, 8)):
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
    picture(folder / f"{stem}.jpg", size=(40, 30))
    record = {"text": text, "is_sentence": True, "shapes": list(shapes)} | more
    (folder / f"{stem}.json").write_bytes(json.dumps(record, ensure_ascii=False).encode(encoding))
