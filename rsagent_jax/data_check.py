"""Verifies the data that a config names, before anybody burns an hour on it.

  python -m rsagent_jax.data_check --config=configs/grpo_tpu.py --out=DIR [--samples=200] [--config.grpo.data.root=…]

Takes the config of train.py (grpo.data), evaluate.py, collect or problems (data). Opens the set, holds the counts
against the published ones, decodes pictures and masks, and draws a contact sheet. Exit status 1 if a sample cannot be
read, or shown to a policy, or a count differs; 2 if the set cannot be opened.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import json
import pathlib
import textwrap

import numpy as np
from PIL import Image, ImageDraw
from tqdm.contrib.concurrent import thread_map

from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.config.ranges import CountOrZero
from rsagent_jax.config.schema import CollectConfig, DataConfig, EvalConfig, ProblemsConfig, TrainConfig
from rsagent_jax.data.sets.index import SampleIndex, spread
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.runtime.image_files import png
from rsagent_jax.runtime.paths import open_path, write_whole
from rsagent_jax.tiny.synthetic import STAMP
from rsagent_jax.types import DataError, Sample

# (references, pictures, sentences) of the files that refer's authors distribute, not counted here: tensorflow-datasets'
# table; of sentences the papers' totals (RefCOCO 142,210, RefCOCO+ 141,564, RefCOCOg/umd 95,010).
PUBLISHED = {
    "refcoco/unc/train": (42404, 16994, 120624), "refcoco/unc/val": (3811, 1500, 10834),
    "refcoco/unc/testA": (1975, 750, 5657), "refcoco/unc/testB": (1810, 750, 5095),
    "refcoco+/unc/train": (42278, 16992, 120191), "refcoco+/unc/val": (3805, 1500, 10758),
    "refcoco+/unc/testA": (1975, 750, 5726), "refcoco+/unc/testB": (1798, 750, 4889),
    "refcocog/umd/train": (42226, 21899, 80512), "refcocog/umd/val": (2573, 1300, 4896),
    "refcocog/umd/test": (5023, 2600, 9602),
    "refcocog/google/train": (44822, 24698, None), "refcocog/google/val": (5000, 4650, None),
    "reasonseg/train": (239, 239, None), "reasonseg/val": (200, 200, None), "reasonseg/test": (779, 779, None),
    "refcoco_m/val": (2080, 1190, 5598), "mmr/val": (8194, None, None),  # its card; the paper
    "gseval/all": (3715, 2727, None),  # counted in the file of its repository; the paper says 3,800
}  # fmt: skip
SHOWN, COLUMNS, SIDE, TEXT = 24, 4, 280, 48  # pictures of the contact sheet, in a row, pixels of one and of its text
LISTED = 20  # unreadable samples named on the terminal; all of them stand in check.json


def main(
    config: TrainConfig | EvalConfig | CollectConfig | ProblemsConfig,
    *,
    out: str = "",  # directory for check.json and the contact sheet
    samples: CountOrZero = 200,  # how many samples to decode, evenly spread; 0 = all
) -> int:
    out, wanted = command.make_workdir(out, "out"), samples
    data, field = (config.grpo.data, "grpo.data") if isinstance(config, TrainConfig) else (config.data, "data")
    samples = open_samples(data, field)
    print(f"{samples.name}: {len(samples)} samples")
    rows = [count_row(index, data) for index in samples.parts or (samples,)]
    for line in (*samples.notes, *("  ".join(f"{key} {value}" for key, value in row.items()) for row in rows)):
        print(f"  {line}")
    chosen = spread(len(samples), wanted)
    found, ids = examine(samples, chosen), samples.ids
    bad = {ids[i]: problem for i, problem in found.items() if isinstance(problem, str)}
    good = [i for i in chosen if not isinstance(found[i], str)]
    contact_sheet([samples[good[k]] for k in spread(len(good), SHOWN)], out / "contact_sheet.png")
    ignored, covered = sum(found[i][0] for i in good), [found[i][1] for i in good if found[i][1]]
    read, empty = len(good), len(good) - len(covered)
    report = {
        "name": samples.name, "samples": len(samples), "notes": list(samples.notes), "counts": rows,
        "looked_at": len(chosen), "read": read, "empty_masks": empty, "with_ignore": ignored, "unreadable": bad,
    }  # fmt: skip
    write_whole(out / "check.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(
        f"  {read} of {len(chosen)} samples looked at were read; {empty} have an empty mask, {ignored} ignored"
        f" pixels; a mask covers {np.mean(covered) if covered else 0:.1%} of its picture on average"
    )
    for id, problem in list(bad.items())[:LISTED]:
        print(f"  UNREADABLE {id}: {problem}")
    print(f"  {out / 'contact_sheet.png'}")
    return 1 if bad or any(row["verdict"] == "DIFFERS" for row in rows) else 0


def count_row(samples: SampleIndex, data: DataConfig) -> dict:
    """Counted and published numbers of one set. They are compared only where the whole split was opened."""
    images = len(set(samples.pictures))
    row: dict = {"set": samples.name, "samples": len(samples), "pictures": images}
    refs, wanted_images, sentences = PUBLISHED.get(samples.name, (None, None, None))
    part = next((p.data for p in data.mix if p.data.dataset == samples.name.split("/")[0]), data)
    wanted = sentences if part.unit == "sentence" and samples.name.startswith("refcoco") else refs
    if (open_path(part.root or data.root) / STAMP).exists():
        return row | {"verdict": "synthetic scenes: not compared"}
    if part.limit or data.limit or samples.notes or part.texts != "first":
        return row | {"verdict": "part of the split: not compared"}
    if wanted is None:
        return row | {"verdict": "no published number known here"}
    same = len(samples) == wanted and wanted_images in (None, images)
    published = f"{wanted} samples" + (f", {wanted_images} pictures" if wanted_images else "")
    return row | {"published": published, "verdict": "ok" if same else "DIFFERS"}


def examine(samples: SampleIndex, chosen: list[int]) -> dict[int, str | tuple[bool, float]]:
    """Decodes the pictures and masks at these places, in order: (whether it has ignored pixels, share of it that the
    mask covers), or what is wrong with what evaluate, collect and train call unreadable."""

    def look(i: int) -> str | tuple[bool, float]:
        try:
            sample = samples[i]
        except DataError as error:
            return str(error)
        return sample.ignore_mask is not None and bool(sample.ignore_mask.any()), float(sample.gt_mask.mean())

    return dict(zip(chosen, thread_map(look, chosen, desc="check", unit="sample"), strict=True))


def contact_sheet(samples: list[Sample], path: pathlib.Path) -> None:
    """Pictures with their masks (blue, outlined yellow), ignored pixels in grey, and the text below each."""
    rows = max(1, -(-len(samples) // COLUMNS))
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 8), rows * (SIDE + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, sample in enumerate(samples):
        x, y = n % COLUMNS * (SIDE + 8), n // COLUMNS * (SIDE + TEXT)
        image = sample.image
        if sample.ignore_mask is not None:
            image = np.where(sample.ignore_mask[..., None], image // 4 + 96, image)
        sheet.paste(Image.fromarray(draw_overlay(image, sample.gt_mask, SIDE)), (x, y))
        text = textwrap.fill(sample.query.encode("latin-1", "replace").decode("latin-1"), 40, max_lines=3)
        draw.multiline_text((x, y + SIDE + 2), text, fill="black", font_size=12, spacing=2)
    write_whole(path, png(np.asarray(sheet)))
