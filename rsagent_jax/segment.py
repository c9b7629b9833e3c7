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

from rsagent_jax.agent.environment import EnvState, final_mask
from rsagent_jax.agent.overlay import draw_overlay
from rsagent_jax.agent.replay import state_to_json
from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.config.schema import SegmentConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl.load import policy_directory
from rsagent_jax.report.terminal import describe_ending, describe_turn
from rsagent_jax.rollout.driver import Driver
from rsagent_jax.rollout.open import open_engine
from rsagent_jax.rollout.policy import Policy, Task
from rsagent_jax.rollout.startup import check_disk, check_policy, check_segmenter
from rsagent_jax.runtime import processes
from rsagent_jax.runtime.image_files import png, read_image
from rsagent_jax.runtime.paths import open_path, remove_file, write_whole
from rsagent_jax.types import DataError, Sample, Status
from sam_bridge.types import Segmenter

FILES = ("mask.png", "overlay.png", "image.png", "trajectory.json")


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
    ask = lambda: ask_policy(image, query, config, out, weights or config.policy.weights)  # noqa: E731
    processes.all_or_none(lambda: ask() if processes.is_lead() else None)


def ask_policy(image_path: str, query: str, config: SegmentConfig, out: str, weights: str) -> None:
    """Checks, opens everything, plays."""
    if not open_path(image_path).exists():
        raise DataError(f"{image_path} does not exist")
    # The orientation is applied, unlike for COCO: a mask of a photograph should lie as its owner sees it.
    image, query = read_image(image_path, "name a picture file", upright=True), query.strip()
    if not query:
        raise DataError("the query is empty; say what to segment, such as 'the red circle'")
    out = command.make_workdir(out, "out")
    command.use_compilation_cache(config.cache_dir, out / "compiled")
    check_policy(weights, config.agent, config.sampling)
    check_disk(out)
    check_segmenter(config.segmenter)
    processor = Processor.load(policy_directory(weights))
    if pathlib.Path(weights).resolve().parts[-2:] == ("assets", "tiny-base"):
        print("note: assets/tiny-base does not know the tools: expect malformed calls and an empty mask.")
        print("      Give a checkpoint, such as --weights=runs/quickstart/train/checkpoints/grpo of `make quickstart`")
    engine = open_engine(weights, processor, config.sampling, config.agent, config.policy.dtype, config.seed)
    print(f'{image_path}: {image.shape[1]} x {image.shape[0]} pixels, "{query}"')
    with open_segmenter(config.segmenter) as segmenter:
        segment(engine, segmenter, processor, config, image, query, out)


def segment(
    policy: Policy,
    segmenter: Segmenter,
    processor: Processor,
    config: SegmentConfig,
    image: np.ndarray,
    query: str,
    out: pathlib.Path,
) -> EnvState:
    """Plays one trajectory on image u8[h, w, 3], prints its turns, writes FILES into `out`."""
    for name in FILES:  # a mask of an earlier question must not stand beside a failure of this one
        remove_file(out / name)
    since = time.perf_counter()

    def show(task: Task, state: EnvState) -> None:
        nonlocal since
        now = time.perf_counter()
        print("\n".join(describe_turn(state, now - since)), flush=True)
        since = now

    unknown = np.zeros(image.shape[:2], bool)  # nobody knows the true mask, and playing does not look at it
    task = Task(Sample("image", image, query, unknown, path=str(out / "image.png")), 0, 0)
    driver = Driver(policy, segmenter, processor, config.agent, workers=1, on_turn=show)
    ((_, state),) = driver.run([task])

    # Saved, not referred to: plain readers would not turn and flatten the user's file as this command did.
    write_whole(out / "image.png", png(image))
    write_whole(out / "trajectory.json", state_to_json(state, task.sample.path) + "\n")
    if state.status is Status.ENV_FAILED:
        raise DataError(f"segmenter: {state.failure.kind}: {state.failure.detail}; no mask is written")
    mask, mask_id = final_mask(state)
    write_whole(out / "mask.png", png(mask.astype(np.uint8) * 255))
    write_whole(out / "overlay.png", png(draw_overlay(image, mask, max(mask.shape))))
    print(describe_ending(state, mask, mask_id))
    print(f"{out / 'mask.png'}  {out / 'overlay.png'}  {out / 'trajectory.json'}")
    return state
