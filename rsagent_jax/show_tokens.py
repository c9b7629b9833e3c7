"""Shows what SFT learns from a stored trajectory: every token, coloured by whether it is trained.

  python -m rsagent_jax.show_tokens --trajectories=runs/x --processor=assets/tiny-base --out=tokens.html [--samples=4]

Green tokens are in the loss (reasoning, tool calls and their terminators), grey ones are context (prompt, observations,
images). The tokens are those that training reads, through the same code.
"""

from __future__ import annotations

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib
from collections.abc import Iterator

import numpy as np

from rsagent_jax.config.ranges import CountOrZero
from rsagent_jax.data import trajectories
from rsagent_jax.data.packing import Item
from rsagent_jax.data.processor import Processor, pictures
from rsagent_jax.data.sets.index import spread
from rsagent_jax.models.qwen25_vl.load import policy_directory
from rsagent_jax.models.qwen25_vl.positions import merged_tokens
from rsagent_jax.report.html import Html, html_page, picture, tag
from rsagent_jax.types import DataError

TRAINED = "background: var(--good-ground); color: var(--good); border-bottom: 2px solid var(--good);"
CONTEXT = "color: var(--soft); border-bottom: 1px dotted var(--rule);"


def runs(item: Item, processor: Processor) -> Iterator[tuple[str, list[int]]]:
    """("trained" | "context", the ids of single tokens) and ("image", its ids) in order."""
    grids = iter(item.grids)
    at = 0
    while at < len(item.tokens):
        if item.tokens[at] == processor.image_id and not item.loss_mask[at]:
            count = merged_tokens(next(grids), processor.images.merge_size)
            yield "image", item.tokens[at : at + count].tolist()
        else:
            count, here = 1, bool(item.loss_mask[at])
            is_image = (item.tokens == processor.image_id) & ~item.loss_mask
            while at + count < len(item.tokens) and item.loss_mask[at + count] == here and not is_image[at + count]:
                count += 1
            yield "trained" if here else "context", item.tokens[at : at + count].tolist()
        at += count


def shown_pictures(item: Item, processor: Processor) -> list[np.ndarray]:
    """The images as the policy sees them, u8[h, w, 3] each."""
    merge, out, first = processor.images.merge_size, [], 0
    for t, h, w in item.grids:
        count = t * h * w
        rows, columns = np.mgrid[:h, :w]
        # patches lie in merge blocks: block row, block column, row, column
        order = np.stack([rows, columns], -1).reshape(h // merge, merge, w // merge, merge, 2).transpose(0, 2, 1, 3, 4)
        segment = np.ones(count, np.int32)
        out += pictures(item.patches[first : first + count], segment, order.reshape(-1, 2), processor.images)
        first += count
    return out


def render_item(item: Item, header: dict, processor: Processor) -> Html:
    parts, images = [], iter(shown_pictures(item, processor))
    for kind, ids in runs(item, processor):
        if kind == "image":
            note = tag("div", f"{len(ids)} image tokens, not trained", class_="note")
            parts.append(tag("div", picture(next(images), "image of the policy"), note, style="margin: .4rem 0"))
            continue
        style = TRAINED if kind == "trained" else CONTEXT
        for id in ids:
            text = processor.decode([id])
            shown = text.replace("\n", "⏎\n") if text.strip(" ") else text.replace(" ", "␣")
            parts.append(tag("span", shown, style=style, title=f"{id}, {kind}"))
    trained = int(item.loss_mask.sum())
    head = f"{header.get('id', '')}: {trained} of {len(item.tokens)} tokens are trained"
    body = tag("div", *parts, style="white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.9 monospace")
    return tag("article", tag("header", tag("h3", head)), body, class_="card")


def tokens_page(directory: pathlib.Path, processor: Processor, samples: int) -> str:
    records = trajectories.open_records(directory)
    cards, trained, total = [], 0, 0
    for i in spread(len(records), samples):
        record = records[i]
        item = trajectories.decode_record(record, processor)
        cards.append(render_item(item, trajectories.record_header(record), processor))
        trained, total = trained + int(item.loss_mask.sum()), total + len(item.tokens)
    share = f"{trained} of {total} tokens of these {len(cards)} trajectories are trained ({trained / total:.1%})."
    legend = tag("p", tag("span", "trained", style=TRAINED), " ", tag("span", "context", style=CONTEXT), f"  {share}")
    return html_page("What SFT is trained on", legend, *cards)


def main(
    *,
    trajectories: pathlib.Path,  # a directory written by collect
    processor: str,  # a Hugging Face directory with the tokenizer
    out: pathlib.Path,  # an HTML file
    samples: CountOrZero = 4,  # how many, evenly spread; 0 = all
) -> None:
    text = tokens_page(trajectories, Processor.load(policy_directory(processor)), samples)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out={out} cannot be written ({error.strerror or error})") from None
    print(out)
