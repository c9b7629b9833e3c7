"""One minute that tells whether a side-car works: python -m sam_bridge.check --address=HOST:PORT [--out=check.png].

Connects (protocol, identity, token, TLS), sends a picture once, asks it with a box, a click, both, and a refined mask,
looks whether equal prompts give equal masks and a bad one a typed refusal, measures, and draws what came back. Exit
status 0 when everything held, 1 when something did not, 2 when nobody answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time

import numpy as np
import PIL.Image
import PIL.ImageDraw

from sam_bridge import images
from sam_bridge.backends import RANDOM
from sam_bridge.client import SamClient
from sam_bridge.types import FailureKind, SegmenterError, SegmentReply, SegmentRequest

CALLS = 20  # of the timed prompt
HEIGHT, WIDTH = 480, 640
CENTRE, RADIUS = (250.0, 210.0), 90.0  # of the disc in our own picture
GOOD_IOU = 0.7  # of a box around a plain disc, for any segmenter worth the name
PANEL = 320  # pixels, width of one in the result
TINT = np.array([255, 60, 60])


@dataclasses.dataclass(frozen=True)
class Panel:
    """One prompt and its mask."""

    title: str
    request: SegmentRequest
    reply: SegmentReply


def main() -> int:
    args = _arguments()
    address = [part.strip() for part in args.address.split(",") if part.strip()]
    try:
        image, box = (images.read_image_file(args.image), args.box) if args.image else (own_picture(), None)
        secure = dict(token_file=args.token_file, tls_ca=args.tls_ca, tls=args.tls)
        with SamClient(address, timeout_s=args.timeout_s, wait_s=args.wait_s, **secure) as client:
            identity = _connect(client)
            panels, lines, held = _exercise(client, image, box, judged=not args.image and RANDOM not in identity)
            print("\n".join(lines))
    except (SegmenterError, ValueError, OSError) as error:
        print(f"check failed: {error}", file=sys.stderr)
        return 2
    draw_panels(image, panels).save(args.out)
    print(f"{'all held' if held else 'SOMETHING DID NOT HOLD'}; the masks: {args.out}")
    return int(not held)


def own_picture() -> np.ndarray:
    """u8[480, 640, 3]: a red disc on a green slope, slightly noisy."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    slope = 90 + 60 * columns / WIDTH + 40 * rows / HEIGHT
    image = np.stack([slope * 0.5, slope, slope * 0.4], axis=-1)
    image[_disc()] = (210, 50, 50)
    return (image + np.random.default_rng(0).normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def _disc() -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (columns - CENTRE[0]) ** 2 + (rows - CENTRE[1]) ** 2 < RADIUS**2


def _connect(client: SamClient) -> str:
    for info, slot in zip(client.info(), client._fleet.slots, strict=True):
        print(f"{slot.address}: {info.identity}, protocol {info.protocol}, {info.segments} masks made so far")
    return info.identity


def _exercise(client: SamClient, image: np.ndarray, box, judged: bool) -> tuple[list[Panel], list[str], bool]:
    """(what to draw, what to print, whether everything held). `judged`: the disc of our own picture must be found."""
    height, width = image.shape[:2]
    (x, y), r = CENTRE, RADIUS
    if box is None:
        box = (x - r, y - r, x + r, y + r) if (height, width) == (HEIGHT, WIDTH) else (0.0, 0.0, width, height)
    middle, corner = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), (box[0] + 1, box[1] + 1)
    panels, lines, held = [], [], True

    def ask(title: str, request: SegmentRequest) -> SegmentReply:
        start = time.perf_counter()
        reply = client.segment(image, request)
        seconds = time.perf_counter() - start
        lines.append(f"{title:22} {1e3 * seconds:8.1f} ms  score {reply.score:.3f}  area {reply.mask.mean():.3f}")
        panels.append(Panel(title, request, reply))
        return reply

    by_box = ask("box, picture is new", SegmentRequest(box=box))
    ask("click", SegmentRequest(points=(middle,), labels=(1,)))
    ask("box and background", SegmentRequest(box=box, points=(corner,), labels=(0,)))
    ask("refined with a click", SegmentRequest(points=(middle,), labels=(1,), refine_logits_id=by_box.logits_id))

    def hold(what: str, true: bool) -> None:
        nonlocal held
        held &= true
        lines.append(f"{'holds' if true else 'FAILS':6} {what}")

    times, same = [], True
    for _ in range(CALLS):
        reply = client.segment(image, SegmentRequest(box=box))
        times.append(reply.timings_s)
        same &= bool((reply.mask == by_box.mask).all())
    hold(f"{CALLS} equal prompts give equal masks", same)
    hold("the picture is not encoded again", all(t["encode"] == 0.0 for t in times))
    try:
        client.segment(image, SegmentRequest(box=box, refine_logits_id="no such mask"))
        hold("an unknown mask to refine is refused", False)
    except SegmenterError as error:
        hold("an unknown mask to refine is refused", error.kind is FailureKind.UNKNOWN_LOGITS)
    if judged:
        truth = _disc()
        iou = (by_box.mask & truth).sum() / (by_box.mask | truth).sum()
        hold(f"the box finds the disc: IoU {iou:.3f}, at least {GOOD_IOU}", bool(iou >= GOOD_IOU))
    stages = {stage: 1e3 * statistics.median(t.get(stage, 0.0) for t in times) for stage in times[0]}
    lines.append("median ms of a prompt: " + ", ".join(f"{stage} {ms:.2f}" for stage, ms in stages.items()))
    return panels, lines, held


def draw_panels(image: np.ndarray, panels: list[Panel]) -> PIL.Image.Image:
    """Side by side: the picture with the mask in red, the box in yellow, clicks in green (object) and blue."""
    height, width = image.shape[:2]
    scale, bar = PANEL / width, 18
    sheet = PIL.Image.new("RGB", (PANEL * len(panels), round(height * scale) + bar), "black")
    for i, panel in enumerate(panels):
        mask = panel.reply.mask[..., None]
        shown = np.where(mask, image // 2 + (TINT // 2).astype(np.uint8), image)
        picture = PIL.Image.fromarray(shown).resize((PANEL, round(height * scale)))
        pen = PIL.ImageDraw.Draw(picture)
        if panel.request.box is not None:
            pen.rectangle([v * scale for v in panel.request.box], outline="yellow", width=2)
        for (x, y), label in zip(panel.request.points, panel.request.labels, strict=True):
            spot = (x * scale - 4, y * scale - 4, x * scale + 4, y * scale + 4)
            pen.ellipse(spot, fill="lime" if label else "blue", outline="white")
        sheet.paste(picture, (i * PANEL, bar))
        PIL.ImageDraw.Draw(sheet).text(
            (i * PANEL + 4, 3), f"{panel.title}  score {panel.reply.score:.2f}", fill="white"
        )
    return sheet


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sam_bridge.check", description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port; several with commas")
    parser.add_argument("--image", default="", help="a picture of your own")
    parser.add_argument("--box", type=_box, default=None, help="x0,y0,x1,y1 in its pixels; else all of it")
    parser.add_argument("--out", default="check.png", help="the result")
    parser.add_argument("--timeout_s", type=float, default=60.0, help="deadline of one call")
    parser.add_argument("--wait_s", type=float, default=10.0, help="how long it is waited for")
    parser.add_argument("--token_file", default="")
    parser.add_argument("--tls_ca", default="", help="PEM file of the certificates to trust")
    parser.add_argument("--tls", action="store_true", help="encrypt, trusting the system's certificates")
    return parser.parse_args()


def _box(text: str) -> tuple[float, float, float, float]:
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not x0,y0,x1,y1")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
