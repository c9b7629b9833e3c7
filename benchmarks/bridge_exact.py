"""Masks, scores and logits through client -> server against SAM2ImagePredictor called directly, on random prompts.

  python benchmarks/bridge_exact.py --models=sam2.1_tiny,sam2.1_base_plus --prompts=200

Random weights, saved as a checkpoint file in Meta's format; the mask head's last layer is enlarged, so that some single
masks are stable and both ways through the stability fallback are taken. Pictures go from 32 x 32 to 4000 x 3000. Two
passes: batching off, where everything must be equal bit for bit; batching on, where logits must be
within 1e-4 and a mask pixel may differ only where the enlarged logit is within 1e-4 of zero.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import cv2
import numpy as np

from sam_bridge import images
from sam_bridge.backends import Options
from sam_bridge.backends import sam2 as backend  # first: it makes torchvision importable
from sam_bridge.client import SamClient
from sam_bridge.local import LocalSegmenter, image_hash
from sam_bridge.server import Server
from sam_bridge.types import SegmentRequest

import torch  # isort: skip
from sam2.build_sam import build_sam2  # isort: skip
from sam2.sam2_image_predictor import SAM2ImagePredictor  # isort: skip

KINDS = ("box", "point", "points", "box+points", "refine", "refine+click", "refine+box")
SIZES = ((32, 32), (3000, 4000), (480, 640), (333, 97), (64, 900))
TOLERANCE = 1e-4
STABLE_SCALE = 80.0  # of random mask logits; see above


def predictor_on(net: torch.nn.Module) -> SAM2ImagePredictor:
    """The package's predictor with a model of any resolution."""
    predictor = SAM2ImagePredictor(net)
    predictor._bb_feat_sizes = [(net.image_size // n,) * 2 for n in (4, 8, 16)]  # written down for 1024 only
    return predictor


def predict(predictor, request: SegmentRequest, earlier: np.ndarray | None = None, multimask: str = "point", **how):
    """(mask [h, w], score, low logits f32[1, H, W]), the best of the predictor's, on the image that is set."""
    alone = len(request.points) == 1 and request.box is None and earlier is None
    masks, scores, low = predictor.predict(
        point_coords=np.array(request.points) if request.points else None,
        point_labels=np.array(request.labels) if request.points else None,
        box=None if request.box is None else np.array(request.box),
        mask_input=earlier,
        multimask_output=multimask == "always" or (multimask == "point" and alone),
        **how,
    )
    best = int(np.argmax(scores))
    return masks[best], float(scores[best]), low[best : best + 1]


class Reference:
    """The package's predictor, with random weights of its own seed."""

    def __init__(self, name: str, resolution: int = 1024, seed: int = 1):
        extra = [] if resolution == 1024 else [f"++model.image_size={resolution}"]
        torch.manual_seed(seed)
        self.net = build_sam2(backend.CONFIG_FILES[name], None, device="cpu", hydra_overrides_extra=extra)
        with torch.no_grad():
            for mlp in self.net.sam_mask_decoder.output_hypernetworks_mlps:
                mlp.layers[-1].weight.mul_(STABLE_SCALE)
        self.predictor = predictor_on(self.net)
        self.fallbacks = collections.Counter()
        decoder, stable = self.net.sam_mask_decoder, self.net.sam_mask_decoder._get_stability_scores

        def counted(logits):
            scores = stable(logits)
            self.fallbacks.update((scores >= decoder.dynamic_multimask_stability_thresh).flatten().tolist())
            return scores

        decoder._get_stability_scores = counted

    def save(self, path: pathlib.Path) -> str:
        torch.save({"model": self.net.state_dict()}, path)
        return str(path)

    def predict(self, request: SegmentRequest, earlier: np.ndarray | None, multimask: str = "point"):
        """As the function, with enlarged logits f32[h, w] in place of the mask."""
        return predict(self.predictor, request, earlier, multimask, return_logits=True)


def random_images(sizes=SIZES) -> list[np.ndarray]:
    """u8[h, w, 3] of every kind of input: RGB, grey, RGBA, 16 bits; smooth blobs and noise."""
    rng = np.random.default_rng(0)
    found = []
    for i, (height, width) in enumerate(sizes):
        coarse = rng.integers(0, 256, (6, 8, 4), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        image = (image + rng.integers(0, 16, image.shape)).clip(0, 255).astype(np.uint8)
        kinds = (image[..., :3], image[..., 0], image, image[..., :3].astype(np.uint16) * 250)
        found.append(images.to_rgb(kinds[i % len(kinds)]))
    return found


def random_request(rng: np.random.Generator, kind: str, height: int, width: int, refine: str) -> SegmentRequest:
    """A valid prompt of that kind on an image of that size, in fractions of pixels."""
    box, points, labels = None, (), ()
    if "box" in kind:
        x0, y0 = rng.uniform(-0.2, 0.8) * width, rng.uniform(-0.2, 0.8) * height
        box = (x0, y0, max(x0, 0) + rng.uniform(0.1, 0.5) * width, max(y0, 0) + rng.uniform(0.1, 0.5) * height)
    if "point" in kind or "click" in kind:
        count = int(rng.integers(2, 9)) if "points" in kind else 1
        points = tuple((rng.uniform(0, width), rng.uniform(0, height)) for _ in range(count))
        labels = (1, *(int(v) for v in rng.integers(0, 2, count - 1)))
    return SegmentRequest(box, points, labels, refine if "refine" in kind else "")


def compare(reference: Reference, options: Options, resolution: int, prompts: int, sizes=SIZES) -> dict:
    """Every prompt through client and server, and through the predictor. Counts, and the largest differences."""
    local = LocalSegmenter(backend.Sam2(options, resolution), logits_bytes=1 << 30)
    server = Server(local, workers=local.concurrency)
    exact = options.decode_batch == 1
    rng, shown = np.random.default_rng(prompts), random_images(sizes)
    keys = [image_hash(image) for image in shown]
    order = rng.permutation(prompts)
    where = [int(k) % len(shown) for k in order]  # the picture of each prompt
    kinds = [KINDS[int(k) // len(shown) % len(KINDS)] for k in order]
    refining = ["refine" in kind for kind in kinds]
    requests: list[SegmentRequest | None] = [None] * prompts
    replies: list = [None] * prompts
    earlier: list[np.ndarray | None] = [None] * prompts

    def send(chosen: list[int]) -> None:
        """All at once, so that prompts on different pictures meet in batches; one by one when batching is off."""
        with concurrent.futures.ThreadPoolExecutor(1 if exact else 16) as pool:
            done = pool.map(lambda k: client.segment(shown[where[k]], requests[k]), chosen)
            for k, reply in zip(chosen, done, strict=True):
                replies[k] = reply

    def kept(k: int) -> np.ndarray:
        return local.logits.get(f"{keys[where[k]]}/{replies[k].logits_id}").numpy()

    with SamClient([server.address], timeout_s=600) as client:
        first = [k for k in range(prompts) if not refining[k]]
        for k in first:
            requests[k] = random_request(rng, kinds[k], *shown[where[k]].shape[:2], "")
        send(first)
        later = [k for k in range(prompts) if refining[k]]
        for k in later:
            base = int(rng.choice([f for f in first if where[f] == where[k]]))
            # The predictor gets the logits that the server kept: with batching on they differ from its own.
            earlier[k] = kept(base)
            requests[k] = random_request(rng, kinds[k], *shown[where[k]].shape[:2], replies[base].logits_id)
        send(later)
    server.stop(0)
    result = dict(prompts=prompts, refined=len(later), equal_masks=0, equal_scores=0, equal_logits=0, unexplained=0)
    worst = dict(worst_logits=0.0, worst_score=0.0)
    for i, image in enumerate(shown):
        reference.predictor.set_image(image)
        for k in (k for k in range(prompts) if where[k] == i):
            enlarged, score, low = reference.predict(requests[k], earlier[k], options.multimask)
            different = replies[k].mask != (enlarged > 0)
            result["equal_masks"] += not different.any()
            result["equal_scores"] += replies[k].score == score
            result["equal_logits"] += bool((kept(k) == low).all())
            result["unexplained"] += int((np.abs(enlarged[different]) > TOLERANCE).sum())
            worst["worst_logits"] = max(worst["worst_logits"], float(np.abs(kept(k) - low).max()))
            worst["worst_score"] = max(worst["worst_score"], abs(replies[k].score - score))
    counters = local.counters()
    local.close()
    return result | worst | {"encodes": counters["encodes"], "mean_batch": prompts / counters["decode_batches"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="sam2.1_tiny,sam2.1_base_plus")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0 = all cores, 1 on a busy machine")
    args = parser.parse_args()
    results, failed = {}, False
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            reference = Reference(name, args.resolution)
            checkpoint = reference.save(pathlib.Path(folder) / "weights.pt")
            for batch in (1, 16):
                options = Options(
                    checkpoint=checkpoint, model=name, threads=args.threads, encode_batch=1, decode_batch=batch
                )
                start = time.perf_counter()
                result = compare(reference, options, args.resolution, args.prompts)
                failed |= result["unexplained"] > 0 or result["worst_logits"] > TOLERANCE
                failed |= batch == 1 and result["equal_logits"] < result["prompts"]
                results[f"{name} batch {batch}"] = result
                print(f"{name}, batches of at most {batch} ({time.perf_counter() - start:.0f} s):", result, flush=True)
            print(f"{name}: stable single masks {reference.fallbacks[True]}, fallbacks {reference.fallbacks[False]}")
            os.unlink(checkpoint)
    print(json.dumps(results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
