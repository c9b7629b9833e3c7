"""gIoU and cIoU of 5,000 masks of 640 x 480: ours beside LISA's way, a torch histogram per sample, with equal results.

  python benchmarks/metrics.py [--masks=5000] [--side=640x480]

Both get the masks that an evaluation has, bool arrays in memory; each figure is the processor time of one core.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from rsagent_jax.evals import metrics
from rsagent_jax.types import Sample, Status, Trajectory
from sam_bridge.frozen import freeze

TOLERANCE = 1e-6  # LISA divides in float32
DISTINCT = 64  # masks in memory; they are gone through again and again


def pairs(count: int, height: int, width: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """(prediction, truth, ignored): ellipses that overlap, some empty, every fourth with an ignored part."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]

    def ellipse() -> np.ndarray:
        cy, cx, ry, rx = rng.uniform((0, 0, 10, 10), (height, width, height / 2, width / 2))
        return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1

    out = []
    for i in range(count):
        gt = ellipse() if i % 16 else np.zeros((height, width), bool)
        said = gt ^ (ellipse() & ellipse()) if i % 8 else np.zeros_like(gt)
        out.append((said, gt, ellipse() if i % 4 == 0 else None))
    return out


def ours(masks, count: int) -> tuple[float, float]:
    nothing = np.zeros(0)
    image = freeze(np.zeros((*masks[0][1].shape, 3), np.uint8))  # once: a Sample copies one that is not
    results = []
    for i in range(count):
        said, gt, ignore = masks[i % len(masks)]
        sample = Sample(str(i), image, "", gt, ignore)
        parts = (nothing,) * 5
        trajectory = Trajectory(str(i), 0, "", (), (), said, None, Status.FINISHED, *parts, ())
        results.append(metrics.judge(metrics.count(trajectory, sample)))
    totals = metrics.total_results(results)
    return totals.giou, totals.ciou


def lisa(masks, count: int) -> tuple[float, float]:
    """LISA's definitions with torch.histc, one sample at a time, on the CPU."""
    sums, ious = np.zeros((2, 2)), 0.0
    for i in range(count):
        said, gt, ignore = masks[i % len(masks)]
        output = torch.from_numpy(said).int().reshape(-1)
        target = torch.from_numpy(gt).int().reshape(-1)
        if ignore is not None:
            hidden = torch.from_numpy(ignore).reshape(-1)
            target = target.masked_fill(hidden, 255)
            output = output.masked_fill(hidden, 255)
        both = output[output == target]
        bins = [torch.histc(t.float(), bins=2, min=0, max=1).numpy() for t in (both, output, target)]
        intersection, union = bins[0], bins[1] + bins[2] - bins[0]
        iou = intersection / (union + 1e-5)
        iou[union == 0] += 1.0
        sums += intersection, union
        ious += float(iou[1])
    return ious / count, float(sums[0, 1] / (sums[1, 1] + 1e-10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=5000)
    parser.add_argument("--side", default="640x480")
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, height = map(int, options.side.split("x"))
    masks = pairs(min(DISTINCT, options.masks), height, width)
    rows = {}
    for name, function in (("ours", ours), ("LISA, torch", lisa)):
        function(masks, 8)
        start = time.process_time()
        rows[name] = (*function(masks, options.masks), time.process_time() - start)
    print(f"{options.masks} masks of {width} x {height}, one core")
    for name, (giou, ciou, seconds) in rows.items():
        print(f"{name:12} gIoU {giou:.6f}  cIoU {ciou:.6f}  {seconds:7.2f} s  {options.masks / seconds:8.0f} masks/s")
    difference = max(abs(a - b) for a, b in zip(rows["ours"][:2], rows["LISA, torch"][:2], strict=True))
    if not difference < TOLERANCE:
        raise SystemExit(f"the two do not compute the same: they differ by {difference:.1e}")
    ratio = rows["LISA, torch"][2] / rows["ours"][2]
    print(f"{ratio:.1f} times as fast; largest difference {difference:.1e}")
    print(json.dumps({"vs_reference": ratio, "largest_difference": difference, "seconds": rows["ours"][2]}))


if __name__ == "__main__":
    main()
