"""One minute that tells whether a side-car works: python -m sam_bridge.check --address=HOST:PORT [--out=check.png].

Connects (protocol, identity, token, TLS), sends a picture once, asks it with a box, a click, both, and a refined mask,
looks whether equal prompts give equal masks and a bad one a typed refusal, measures, and draws what came back. Exit
status 0 when everything held, 1 when something did not, 2 when nobody answers.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import PIL.Image
import PIL.ImageDraw

from sam_bridge import images
from sam_bridge.backends import is_random
from sam_bridge.client import SamClient
from sam_bridge.types import FailureKind, SegmenterError, SegmentReply, SegmentRequest

CALLS = 20  # of the timed prompt
HEIGHT, WIDTH = 480, 640
CENTRE, RADIUS = (250.0, 210.0), 90.0  # of the disc in our own picture
GOOD_IOU = 0.7  # of a box around a plain disc, for any segmenter worth the name
PANEL = 320  # pixels, width of one in the result
TINT = np.array([255, 60, 60], np.uint8)
Answer = tuple[str, SegmentRequest, SegmentReply]  # to a prompt, with its title


def main() -> int:
    args = _arguments()
    addresses = [part.strip() for part in args.address.split(",") if part.strip()]
    try:
        if args.image:
            image, disc = images.read(args.image), None
            box = args.box or (0.0, 0.0, *image.shape[1::-1])
        else:
            image, disc = own_image()
            box = (CENTRE[0] - RADIUS, CENTRE[1] - RADIUS, CENTRE[0] + RADIUS, CENTRE[1] + RADIUS)
        secure = dict(token_file=args.token_file, tls_ca=args.tls_ca, tls=args.tls)
        with SamClient(addresses, timeout_s=args.timeout_s, wait_s=args.wait_s, **secure) as client:
            for address, info in zip(addresses, client.info(), strict=True):
                print(f"{address}: {info.identity}, protocol {info.protocol}, {info.segments} masks made so far")
            answers, held = _exercise(client, image, box, None if is_random(info.identity) else disc)
    except (SegmenterError, ValueError, OSError) as error:
        print(f"check failed: {error}", file=sys.stderr)
        return 2
    draw_answers(image, answers).save(args.out)
    print(f"{'all held' if held else 'SOMETHING DID NOT HOLD'}; the masks: {args.out}")
    return int(not held)


def own_image() -> tuple[np.ndarray, np.ndarray]:
    """u8[480, 640, 3]: a red disc on a green slope, slightly noisy; and where the disc is, bool[480, 640]."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    slope = 90 + 60 * columns / WIDTH + 40 * rows / HEIGHT
    image = np.stack([slope * 0.5, slope, slope * 0.4], axis=-1)
    disc = (columns + 0.5 - CENTRE[0]) ** 2 + (rows + 0.5 - CENTRE[1]) ** 2 < RADIUS**2
    image[disc] = (210, 50, 50)
    return (image + np.random.default_rng(0).normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8), disc


def _exercise(
    client: SamClient, image: np.ndarray, box: tuple[float, ...], disc: np.ndarray | None
) -> tuple[list[Answer], bool]:
    """(what to draw, whether all held), printed as it happens. `disc`: what the box must find."""
    middle, corner = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), (box[0] + 1, box[1] + 1)
    answers, holds = [], []

    def ask(title: str, request: SegmentRequest) -> SegmentReply:
        start = time.perf_counter()
        reply = client.segment(image, request)
        milliseconds = 1e3 * (time.perf_counter() - start)
        print(f"{title:22} {milliseconds:8.1f} ms  score {reply.score:.3f}  area {reply.mask.mean():.3f}")
        answers.append((title, request, reply))
        return reply

    def hold(what: str, true: bool) -> None:
        holds.append(true)
        print(f"{'holds' if true else 'FAILS':6} {what}")

    by_box = ask("box, picture is new", SegmentRequest(box=box))
    ask("click", SegmentRequest(points=(middle,), labels=(1,)))
    ask("box and background", SegmentRequest(box=box, points=(corner,), labels=(0,)))
    ask("refined with a click", SegmentRequest(points=(middle,), labels=(1,), refine_logits_id=by_box.logits_id))
    again = [client.segment(image, SegmentRequest(box=box)) for _ in range(CALLS)]
    hold(f"{CALLS} equal prompts give equal masks", all((reply.mask == by_box.mask).all() for reply in again))
    hold("the picture is not encoded again", all(reply.timings_s["encode"] == 0.0 for reply in again))
    try:
        client.segment(image, SegmentRequest(box=box, refine_logits_id="no such mask"))
        refused = False
    except SegmenterError as error:
        refused = error.kind is FailureKind.UNKNOWN_LOGITS
    hold("an unknown mask to refine is refused", refused)
    if disc is not None:
        iou = (by_box.mask & disc).sum() / (by_box.mask | disc).sum()
        hold(f"the box finds the disc: IoU {iou:.3f}, at least {GOOD_IOU}", iou >= GOOD_IOU)
    stages = {stage: [1e3 * reply.timings_s.get(stage, 0.0) for reply in again] for stage in again[0].timings_s}
    medians = ", ".join(f"{stage} {statistics.median(times):.2f}" for stage, times in stages.items())
    print(f"median ms of a prompt: {medians}")
    return answers, all(holds)


def draw_answers(image: np.ndarray, answers: list[Answer]) -> PIL.Image.Image:
    """Side by side: the picture with the mask in red, the box in yellow, clicks in green (object) and blue."""
    scale, bar = PANEL / image.shape[1], 18
    height = round(image.shape[0] * scale)
    sheet = PIL.Image.new("RGB", (PANEL * len(answers), height + bar), "black")
    for i, (title, request, reply) in enumerate(answers):
        shown = np.where(reply.mask[..., None], image // 2 + TINT // 2, image)
        panel = PIL.Image.fromarray(shown).resize((PANEL, height))
        pen = PIL.ImageDraw.Draw(panel)
        if request.box is not None:
            pen.rectangle([v * scale for v in request.box], outline="yellow", width=2)
        for (x, y), label in zip(request.points, request.labels, strict=True):
            pen.circle((x * scale, y * scale), 4, fill="lime" if label else "blue", outline="white")
        sheet.paste(panel, (i * PANEL, bar))
        PIL.ImageDraw.Draw(sheet).text((i * PANEL + 4, 3), f"{title}  score {reply.score:.2f}", fill="white")
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
