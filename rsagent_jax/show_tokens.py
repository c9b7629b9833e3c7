"""Shows what SFT learns from a stored trajectory: every token, coloured by whether it is trained.

  python -m rsagent_jax.show_tokens --trajectories=runs/x --processor=assets/tiny-base --out=tokens.html [--samples=4]

Green tokens are in the loss (reasoning, tool calls and their terminators), grey ones are context (prompt, observations,
images). The tokens are those that training reads, through the same code.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rsagent_jax.config.ranges import CountOrZero
from rsagent_jax.data import trajectories
from rsagent_jax.data.packing import Item
from rsagent_jax.data.processor import Processor, unpatchify
from rsagent_jax.data.sets.index import spread
from rsagent_jax.models.qwen25_vl.load import processor_directory
from rsagent_jax.models.qwen25_vl.positions import fill_patch_buffer, merged_tokens, padded_patches
from rsagent_jax.report.page import render_page
from rsagent_jax.runtime.paths import make_directory, write_whole, writing


def shown_tokens(item: Item, processor: Processor) -> Iterator[tuple[str, int, Any]]:
    """In order ("trained" | "context", id, text) of a token and ("image", its number of tokens, u8[h, w, 3])."""
    images, at = zip(item.grids, item_images(item, processor), strict=True), 0
    while at < len(item.tokens):
        id, trained = int(item.tokens[at]), bool(item.loss_mask[at])
        if id == processor.image_id and not trained:
            grid, image = next(images)
            count = merged_tokens(grid, processor.images.merge_size)
            yield "image", count, image
        else:
            count, text = 1, processor.decode([id])
            shown = text.replace("\n", "⏎\n") if text.strip(" ") else text.replace(" ", "␣")
            yield "trained" if trained else "context", id, shown
        at += count


def item_images(item: Item, processor: Processor) -> list[np.ndarray]:
    """The images as the policy sees them, u8[h, w, 3] each."""
    is_image, vision = (item.tokens == processor.image_id) & ~item.loss_mask, processor.config.vision
    buffer = fill_patch_buffer(item.patches, item.grids, is_image, padded_patches(item.grids, vision), vision)
    return unpatchify(buffer.patches, buffer.segment_ids, buffer.positions, processor.images)


def tokens_page(directory: pathlib.Path, processor: Processor, samples: int) -> str:
    """The page of so many trajectories of a set, evenly spread; 0 = all."""
    records = trajectories.open_records(directory)
    cards, trained, total = [], 0, 0
    for record in (records[i] for i in spread(len(records), samples)):
        item = trajectories.decode_record(record, processor)
        here, tokens = int(item.loss_mask.sum()), list(shown_tokens(item, processor))
        cards.append((trajectories.record_header(record).get("id", ""), here, len(item.tokens), tokens))
        trained, total = trained + here, total + len(item.tokens)
    title = "What SFT is trained on"
    return render_page("tokens.html", title=title, cards=cards, trained=trained, total=total)


def main(
    *,
    trajectories: pathlib.Path,  # a directory written by collect
    processor: str,  # a Hugging Face directory with the tokenizer
    out: pathlib.Path,  # an HTML file
    samples: CountOrZero = 4,  # how many, evenly spread; 0 = all
) -> None:
    text = tokens_page(trajectories, Processor.load(processor_directory(processor)), samples)
    with writing(f"--out={out}"):
        make_directory(out.parent)
        write_whole(out, text)
    print(out)
