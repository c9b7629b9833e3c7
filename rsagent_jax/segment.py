"""One picture, one sentence, one mask, with the turns printed as they happen.

  python -m rsagent_jax.segment IMAGE "query" --out=DIR [--weights=HF_DIR_OR_CHECKPOINT] [--config=configs/segment.py]

Leaves mask.png (0 or 255, the picture's own size), overlay.png, image.png (the very pixels that were segmented) and
trajectory.json, which agent/replay.py plays again.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import pathlib
import time

import numpy as np

from rsagent_jax.agent.prompts import check_query
from rsagent_jax.api import FILES, Agent, Result
from rsagent_jax.config.schema import SegmentConfig
from rsagent_jax.report.terminal import describe_ending, describe_turn
from rsagent_jax.rollout.startup import check_disk
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.image_files import read_image
from rsagent_jax.runtime.paths import open_path, remove_file
from rsagent_jax.tiny import scenes
from rsagent_jax.types import DataError


def main(
    image: str,  # the picture's file
    query: str,  # what to segment, such as "the red circle"
    /,
    config: SegmentConfig = "configs/segment.py",
    *,
    out: str = "",  # directory for the mask, the overlay and the trajectory
    weights: str = "",  # a Hugging Face directory, org/name or checkpoints/<stage>[@best]; in place of policy.weights
) -> None:
    processes.initialize_distributed()
    # A slice's hosts all start it, and one of them has all that it takes.
    processes.on_lead(lambda: ask_policy(image, query, config, out, weights or config.policy.weights))


def ask_policy(image_path: str, query: str, config: SegmentConfig, out: str, weights: str) -> None:
    """Checks, opens everything, plays."""
    if not open_path(image_path).exists():
        raise DataError(f"{image_path} does not exist")
    # The orientation is applied, unlike for COCO: a mask of a photograph should lie as its owner sees it.
    image, query = read_image(image_path, "name a picture file", upright=True), query.strip()
    check_query(query)
    out = command.make_workdir(out, "out")
    command.use_compilation_cache(config.cache_dir, out / "compiled")
    check_disk(out)
    with Agent.load(weights, config=config, slots=config.sampling.slots) as agent:
        print(f'{image_path}: {image.shape[1]} x {image.shape[0]} pixels, "{query}"')
        segment(agent, image, query, out)


def segment(agent: Agent, image: np.ndarray, query: str, out: pathlib.Path) -> Result:
    """Plays one trajectory on image u8[h, w, 3], prints its turns, writes FILES into `out`."""
    for name in FILES:  # a mask of an earlier question must not stand beside a failure of this one
        remove_file(out / name)
    since = time.perf_counter()
    with agent.stream(image, query) as turns:
        for _ in turns:
            now = time.perf_counter()
            print("\n".join(describe_turn(turns.state, now - since)), flush=True)
            since = now
        result = turns.result()
    result.save(out)
    t = result.trajectory
    print(describe_ending(result.state, t.final_mask, t.final_mask_id))
    if agent.is_tiny and (unknown := scenes.unknown_words(query)):
        print(unknown)
    print("  ".join(str(out / name) for name in FILES))
    return result
