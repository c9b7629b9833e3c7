"""What training is given first, for a person to look at."""

import pathlib

import numpy as np

from rsagent_jax.data.processor import Processor, unpatchify
from rsagent_jax.runtime.image_files import png
from rsagent_jax.runtime.paths import write_whole
from rsagent_jax.runtime.train_log import MetricsLog
from rsagent_jax.types import Batch


def save_first_batch(workdir: pathlib.Path, stage: str, batch: Batch, processor: Processor, log: MetricsLog) -> None:
    """The first row, for a person to see what is learned from: its text, trained tokens between [[ ]], its images."""
    out, inside = [], False
    for token, trained, segment in zip(batch.tokens[0], batch.loss_mask[0], batch.segment_ids[0], strict=True):
        if segment == 0:
            break
        if trained != inside:
            out.append("[[" if trained else "]]")
            inside = bool(trained)
        out.append(processor.decode([token]))
    path = workdir / f"first_batch_{stage}.txt"
    write_whole(path, "".join(out) + ("]]" if inside else "") + "\n")
    images = unpatchify(batch.patches[0], batch.patch_segment_ids[0], batch.patch_positions[0], processor.images)
    if images:
        height = max(len(image) for image in images)
        strip = np.concatenate([np.pad(i, ((0, height - len(i)), (0, 4), (0, 0))) for i in images], axis=1)
        write_whole(path.with_suffix(".png"), png(strip))
        log.image(f"{stage}/first_batch", strip, 1)
