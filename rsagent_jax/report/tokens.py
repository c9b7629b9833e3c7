"""The tokens of a stored trajectory as training reads them, through the same code, for a page."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rsagent_jax.data.packing import Item
from rsagent_jax.data.processor import Processor, unpatchify
from rsagent_jax.models.qwen25_vl.positions import fill_patch_buffer, merged_tokens, padded_patches


def shown_tokens(item: Item, processor: Processor) -> Iterator[tuple[str, int, Any, float | None]]:
    """In order ("trained" | "context", id, text, log-prob) of a token and ("image", its number of tokens, u8[h, w, 3],
    None). Only tokens that were drawn have a log-prob, and those alone whose record keeps them."""
    images, at = zip(item.grids, item_images(item, processor), strict=True), 0
    kept = item.logprobs.any()
    while at < len(item.tokens):
        id, trained = int(item.tokens[at]), bool(item.loss_mask[at])
        if id == processor.image_id and not trained:
            grid, image = next(images)
            count = merged_tokens(grid, processor.images.merge_size)
            yield "image", count, image, None
        else:
            count, text = 1, processor.decode([id])
            shown = text.replace("\n", "⏎\n") if text.strip(" ") else text.replace(" ", "·")
            logprob = float(item.logprobs[at]) if trained and kept else None
            yield "trained" if trained else "context", id, shown, logprob
        at += count


def item_images(item: Item, processor: Processor) -> list[np.ndarray]:
    """The images as the policy sees them, u8[h, w, 3] each."""
    is_image, vision = (item.tokens == processor.image_id) & ~item.loss_mask, processor.config.vision
    buffer = fill_patch_buffer(item.patches, item.grids, is_image, padded_patches(item.grids, vision), vision)
    return unpatchify(buffer.patches, buffer.segment_ids, buffer.positions, processor.images)
