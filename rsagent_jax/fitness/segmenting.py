"""The segmenter that the config names: a mask that is known beforehand, and how long a prompt is on its way."""

import statistics
import time

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, not_run
from rsagent_jax.masks import iou as mask_iou
from sam_bridge import check
from sam_bridge.backends import is_random
from sam_bridge.types import SegmentRequest

CALLS = 9
SLOW_WAY_S = 0.05  # of one prompt, beside the segmenter's own work


def check_masks(examined: Examined) -> list[Finding]:
    """Opened as a run opens it: started as a child of ours, in this process, or connected to."""
    config = examined.config.segmenter
    if isinstance(examined.config, TrainConfig) and not examined.config.plays:
        return not_run("segmenter", "this config plays no rollouts")
    (image, disc), (x, y), r = check.own_image(), check.CENTRE, check.RADIUS
    request = SegmentRequest(box=(x - r, y - r, x + r, y + r))
    with open_segmenter(config) as segmenter:
        identity, first = segmenter.about.identity, segmenter.segment(image, request)
        seconds, way, same = [], [], True
        for _ in range(CALLS):
            start = time.perf_counter()
            reply = segmenter.segment(image, request)
            seconds.append(time.perf_counter() - start)
            way.append(reply.timings_s.get("transport", 0.0))
            same &= bool((reply.mask == first.mask).all())
    judged, iou = not is_random(identity), mask_iou(first.mask, disc)
    figure = f"IoU {iou:.3f} with a disc" + "; equal prompts give unequal masks" * (not same) + f"; {identity}"
    against = f"{check.GOOD_IOU} at least" if judged else "random weights: not judged"
    remedy = "python -m sam_bridge.check draws its masks; look at its checkpoint and model (docs/sidecar.md)"
    good, more = same and (iou >= check.GOOD_IOU or not judged), dict(alike=identity)
    mask = Finding.judged("segmenter, mask", good, Verdict.WRONG, figure, against, remedy, **more)
    total, on_way = statistics.median(seconds), statistics.median(way)
    figure = f"{1e3 * total:.1f} ms a prompt, {1e3 * on_way:.1f} of them on the way"
    remedy = "put the side-cars nearer: same zone, or on the hosts themselves (docs/sidecar.md)"
    against, more = f"{1e3 * SLOW_WAY_S:.0f} ms on the way", dict(value=total, higher_is_better=False)
    good = on_way <= SLOW_WAY_S
    return [mask, Finding.judged("segmenter, round trip", good, Verdict.SLOW, figure, against, remedy, **more)]
