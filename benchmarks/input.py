"""Images per second and core of the whole image path: decode, resize, patches, positions.

  python benchmarks/input.py [--images=200] [--side=640x480] [--seconds=10] [--chips=64] [--step_seconds=…] [--batch=…]

Beside it transformers' own image processor on the same pictures (decode included), as one core runs it; where its
patches are others than ours, nothing is measured. With
--step_seconds and --batch (of a projected step: train.py --aot) it says how many host cores that step needs.
"""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # figures are per core
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from rsagent_jax.agent import environment  # noqa: E402
from rsagent_jax.config.schema import AgentConfig  # noqa: E402
from rsagent_jax.data.pipeline import Pipeline  # noqa: E402
from rsagent_jax.data.processor import Processor, image_patches  # noqa: E402
from rsagent_jax.data.sets.folder import load_folder  # noqa: E402
from rsagent_jax.models.qwen25_vl.config import hugging_face  # noqa: E402
from rsagent_jax.types import Prompt, Sample  # noqa: E402

BASE = ROOT / "assets/tiny-base"
LEAST, PIXELS = 3136, 1_003_520  # the limits of the published weights and of configs/grpo_tpu.py
WHOLE = "whole path, with mask and prompt"
TOLERANCE = 1e-6  # of normalised pixels
THEIRS = "transformers: decode, resize, patches"


def write_images(folder: pathlib.Path, count: int, width: int, height: int) -> None:
    """JPEGs with as much detail as photographs have: noise at several scales."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        image = np.full((height, width, 3), 128, np.float32)
        for cells, strength in ((6, 60), (24, 30), (96, 12)):
            noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
            image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        box = [width // 4, height // 4, width // 2, height // 4, width // 2, height // 2, width // 4, height // 2]
        lines.append(json.dumps({"image": f"{i}.jpg", "query": "the middle", "segmentation": [box]}))
    (folder / "train.jsonl").write_text("\n".join(lines))


def rate(step, seconds: float) -> float:
    """Calls of `step` per second of this process's processor time, after one to warm up."""
    step()
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        step()
        count += 1
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", default="640x480")
    parser.add_argument("--seconds", type=float, default=10, help="processor time per row")
    parser.add_argument("--step_seconds", type=float, default=0, help="a projected training step")
    parser.add_argument("--batch", type=int, default=128, help="trajectories of that step")
    parser.add_argument("--images_per_trajectory", type=float, default=4)
    options = parser.parse_args()
    width, height = map(int, options.side.split("x"))
    cv2.setNumThreads(1)
    processor = Processor.load(BASE)
    # the tiny base takes 112 x 112 pixels only
    limits = dataclasses.replace(processor.images.limits, min_pixels=LEAST, max_pixels=PIXELS)
    processor.images = dataclasses.replace(processor.images, limits=limits)
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(pathlib.Path(folder), options.images, width, height)
        samples = load_folder(folder)

        def prepare(sample: Sample) -> Prompt:
            """What opens a trajectory: resized, cut into patches, with positions."""
            state = environment.reset(sample.image, sample.query, AgentConfig(), limits)
            return processor.prompt(*environment.read_before(state, 0), limits=state.limits)[0]

        pipeline = Pipeline(samples, prepare, seed=0, threads=1)
        data = [(pathlib.Path(folder) / f"{i}.jpg").read_bytes() for i in range(min(options.images, 16))]
        at = iter(range(1 << 62))
        decode = lambda: np.asarray(Image.open(io.BytesIO(data[next(at) % len(data)])).convert("RGB"))  # noqa: E731
        decoded = [np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in data]
        sizes = dict(patch_size=processor.images.patch_size, merge_size=processor.images.merge_size)
        theirs = hugging_face("Qwen2VLImageProcessorPil")(min_pixels=LEAST, max_pixels=PIXELS, **sizes)
        for image in decoded:
            wanted = theirs(images=[Image.fromarray(image)], return_tensors="np")["pixel_values"]
            np.testing.assert_allclose(image_patches(image, processor.images)[0], wanted, rtol=0, atol=TOLERANCE)
        rows["decode"] = rate(decode, options.seconds)
        rows["resize, patches"] = rate(
            lambda: image_patches(decoded[next(at) % len(decoded)], processor.images), options.seconds
        )
        rows[WHOLE] = rate(lambda: pipeline.take(1), options.seconds)
        patches = lambda: theirs(images=[Image.fromarray(decode())], return_tensors="np")["pixel_values"]  # noqa: E731
        rows[THEIRS] = rate(patches, options.seconds)
    print(f"{width} x {height} JPEG, at most {PIXELS} pixels; one core")
    for name, value in rows.items():
        print(f"{name:52} {value:8.1f} images/s")
    ours = rows[WHOLE]
    result = {"images_per_s_core": ours, "rows": rows, "vs_transformers": ours / rows[THEIRS]}
    if options.step_seconds:
        images = options.batch * options.images_per_trajectory
        cores = images / options.step_seconds / ours
        print(f"{images:.0f} images every {options.step_seconds} s need {cores:.1f} cores over all hosts")
        result["cores"] = cores
    print(json.dumps(result))


if __name__ == "__main__":
    main()
