"""What the bridge costs, and what it survives. A table for each part; the last line is one JSON object.

  python benchmarks/bridge.py [--parts=overhead,path,throughput,decode,soak,kill] [--device=cuda]
                              [--model=sam2.1_large] [--toy]

overhead    a prompt on a cached 640 x 480 picture: through a side-car against SAM2ImagePredictor in this process
path        the same when the back end has a mask with an object's outline ready, stage by stage, in two ways: `near`,
            bits and a frozen picture; `far`, RLE as from another machine and a picture that is hashed every time
throughput  64 concurrent trajectories on 16 pictures: side-car against the predictor in a loop; pictures encoded
decode      16 prompts on 16 pictures: in batches against one by one
soak        10,000 calls: resident memory of server and client after the first 1,000 and at the end (GrabCut)
kill        32 trajectories at a time for 60 s while the side-car gets SIGKILL: GrabCut every 5 s, SAM 2 three times

SAM 2.1 tiny with random weights; medians; the two sides of a comparison take turns. Wants an idle machine: on a busy
one the threads of a team wait for each other, and --threads=1 says more. --toy: small and short, for a test.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import sys
import threading
import time

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import cv2
import numpy as np
import torch

from benchmarks._bridge_quick import RESOLUTION, object_mask
from benchmarks.bridge_exact import predict, predictor_on
from sam_bridge import wire
from sam_bridge.backends import RANDOM, Options, load_backend
from sam_bridge.backends.sam2 import DEFAULT_BATCH, Sam2, _Job
from sam_bridge.cpu_tuning import keep_freed_memory
from sam_bridge.frozen import freeze
from sam_bridge.local import LocalSegmenter, image_hash
from sam_bridge.spawn import SideCar
from sam_bridge.types import SegmenterError, SegmentRequest

PARTS = ("overhead", "path", "throughput", "decode", "soak", "kill")
BOX = SegmentRequest(box=(151.5, 90.2, 420.0, 333.3))
WIDTH, HEIGHT = 640, 480
TOLERANCE = 1e-4  # share of a mask's pixels: logits of batches are equal within rounding
TURNS = 4  # of a trajectory: box, click, refined, box and click


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", default="cpu", help="of SAM 2: cpu or cuda")
    parser.add_argument("--model", default="", help="of SAM 2, as sam2.1_large; tiny if not given")
    parser.add_argument("--threads", type=int, default=0, help="torch's, on both sides; 0 = all cores, 1 if busy")
    parser.add_argument("--calls", type=int, default=10_000, help="of the soak")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each rollout that is killed")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; options: {', '.join(PARTS)}")
    results: dict = {}
    for part in args.parts.split(","):
        print(f"\n== {part}", flush=True)
        found = globals()[part](args)
        results |= found
        for name, value in found.items():
            print(f"  {name:32} {value:.4g}" if isinstance(value, float) else f"  {name:32} {value}", flush=True)
    print(json.dumps(results))
    return 0


# ------------------------------------------------------------------------------------------ what is asked of whom


def random_image(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """u8[h, w, 3]: blobs of colour, some noise."""
    rng = np.random.default_rng(seed)
    blobs = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return (blobs + rng.normal(0, 4, blobs.shape)).clip(0, 255).astype(np.uint8)


def turn(step: int, seed: int, height: int, width: int, refine: str) -> SegmentRequest:
    """The prompt of a trajectory's step."""
    rng = np.random.default_rng((seed, step))
    x, y = rng.uniform(0.3, 0.6, 2) * (width, height)
    box = (x - 0.2 * width, y - 0.2 * height, x + 0.2 * width, y + 0.2 * height)
    match step % TURNS:
        case 0:
            return SegmentRequest(box=box)
        case 1:
            return SegmentRequest(points=((x, y),), labels=(1,))
        case 2:
            return SegmentRequest(points=((x + 9, y),), labels=(0,), refine_logits_id=refine)
        case _:
            return SegmentRequest(box=box, points=((x, y), (x + 5, y - 5)), labels=(1, 0))


def trajectory(segmenter, image: np.ndarray, seed: int) -> list[np.ndarray]:
    """The masks of its turns."""
    masks, refine = [], ""
    for step in range(TURNS):
        reply = segmenter.segment(image, turn(step, seed, *image.shape[:2], refine))
        masks.append(reply.mask)
        refine = reply.logits_id
    return masks


@contextlib.contextmanager
def side_car(args, backend: str = "sam2", arguments=(), alone: bool = False):
    """(supervisor, client) of a fresh side-car; `alone`: SAM 2 without batching, whose masks are the same bits."""
    options = Options()
    if backend == "sam2" and args.toy:
        backend = f"benchmarks._bridge_quick:sam2{'_alone' if alone else ''}"
    elif backend == "sam2":
        batch = 1 if alone else 0
        options = sam2_options(args, encode_batch=batch, decode_batch=batch)
    with SideCar(backend, options, arguments) as car, car.connect(timeout_s=600, wait_s=120) as client:
        yield car, client


def sam2_options(args, **changes) -> Options:
    return Options(checkpoint=RANDOM, model=args.model, device=args.device, threads=args.threads, **changes)


def own_sam2(args, options: Options):
    """The back end in this process."""
    return Sam2(dataclasses.replace(options, threads=1), RESOLUTION) if args.toy else Sam2(options)


def predictor(args):
    """SAM2ImagePredictor with the side-car's weights."""
    return predictor_on(own_sam2(args, sam2_options(args))._models[0]._net)


# -------------------------------------------------------------------------------------------------------- the parts


def overhead(args) -> dict:
    image, rounds, each = freeze(random_image(0)), 2 if args.toy else 8, 3 if args.toy else 8
    direct, times = predictor(args), {"direct": [], "bridge": []}
    direct.set_image(np.array(image))  # torchvision warns of one that cannot be written to
    stages: dict[str, list[float]] = {}
    with side_car(args) as (_, client):
        client.segment(image, BOX)
        wanted, *_ = predict(direct, BOX)
        assert (client.segment(image, BOX).mask == (wanted > 0)).all(), "the two sides give different masks"
        for _ in range(rounds):
            for side in times:
                time.sleep(0.2)  # torch's threads spin a while after their last work
                for _ in range(each):
                    start = time.perf_counter()
                    if side == "direct":
                        predict(direct, BOX)
                    else:
                        for stage, seconds in client.segment(image, BOX).timings_s.items():
                            stages.setdefault(stage, []).append(1e3 * seconds)
                    times[side].append(1e3 * (time.perf_counter() - start))
    direct_ms, bridge_ms = (statistics.median(times[side]) for side in times)
    medians = {f"{stage}_ms": statistics.median(values) for stage, values in stages.items()}
    return {
        "direct_ms_p50": direct_ms,
        "bridge_ms_p50": bridge_ms,
        "added_ms_p50": bridge_ms - direct_ms,
        "added_share": (bridge_ms - direct_ms) / direct_ms,
        **medians,
    }


def path(args) -> dict:
    plain, mask, rounds = random_image(0), object_mask(), 3 if args.toy else 20
    images = {"near": freeze(plain), "far": plain}
    spent = {way: collections.defaultdict(list) for way in images}  # stage -> milliseconds of each call
    busy = dict.fromkeys(images, 0.0)
    with contextlib.ExitStack() as stack:
        cars = {way: stack.enter_context(side_car(args, "benchmarks._bridge_quick:Ready")) for way in images}
        cars["far"][1].slots[0].packed = False
        for _ in range(rounds):
            for way, (car, client) in cars.items():
                packed = client.slots[0].packed
                data = wire.mask_to_bytes(mask, packed)
                reply = client.segment(images[way], BOX)  # the first sends the picture
                assert (reply.mask == mask).all()
                before = cpu_s(car.pid)
                for _ in range(10):
                    reply = timed(spent[way]["all"], lambda: client.segment(images[way], BOX))  # noqa: B023
                    for stage in ("queue", "decode", "rle"):
                        spent[way][stage].append(1e3 * reply.timings_s[stage])
                busy[way] += cpu_s(car.pid) - before
                for _ in range(10):
                    timed(spent[way]["hash"], lambda: image_hash(images[way]))  # noqa: B023
                    timed(spent[way]["empty call"], client.info)
                    timed(spent[way]["read mask"], lambda: wire.mask_from_bytes(data, mask.shape, packed))  # noqa: B023
    rows = {way: {stage: statistics.median(times) for stage, times in spent[way].items()} for way in images}
    for row in rows.values():
        row["rest"] = 2 * row["all"] - sum(row.values())  # "all" is among them
    print("  median ms   " + "".join(f"{way:>10}" for way in images))
    for stage in rows["near"]:
        print(f"  {stage:12}" + "".join(f"{row[stage]:10.3f}" for row in rows.values()))
    cpu_ms = {way: 1e3 * busy[way] / (10 * rounds) for way in images}
    print("  both processes' processor time" + "".join(f", {way} {ms:.3f}" for way, ms in cpu_ms.items()))
    return {f"{way}_path_ms": row["all"] for way, row in rows.items()} | {
        f"{way}_path_cpu_ms": ms for way, ms in cpu_ms.items()
    }


def timed(milliseconds: list[float], work):
    """What `work` returns; how long it took is appended."""
    start = time.perf_counter()
    result = work()
    milliseconds.append(1e3 * (time.perf_counter() - start))
    return result


def cpu_s(pid: int) -> float:
    """Processor time of this process and that one, all threads."""
    files = pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
    return time.process_time() + sum(int(file.read_text().split()[0]) for file in files) / 1e9


def throughput(args) -> dict:
    n_images, trajectories = (4, 8) if args.toy else (16, 64)
    images = [random_image(i) for i in range(n_images)]
    with side_car(args) as (_, client), concurrent.futures.ThreadPoolExecutor(trajectories) as pool:
        client.segment(random_image(99), BOX)  # the first call of a process is slower
        client_start = time.perf_counter()
        done = list(pool.map(lambda i: trajectory(client, images[i % n_images], i), range(trajectories)))
        bridge_s = time.perf_counter() - client_start
        encodes = client.info()[0].encodes - 1
    direct = predictor(args)
    direct.set_image(random_image(99))
    predict(direct, BOX)
    start, worst = time.perf_counter(), 0.0
    for p in range(n_images):
        direct.set_image(images[p])
        for i in range(p, trajectories, n_images):
            low = None
            for step in range(TURNS):
                request = turn(step, i, HEIGHT, WIDTH, "x")
                mask, _, low = predict(direct, request, low if step % TURNS == 2 else None)
                worst = max(worst, float(((mask > 0) != done[i][step]).mean()))
    direct_s = time.perf_counter() - start
    if not worst < TOLERANCE and args.device == "cpu":  # a GPU's batches may round otherwise
        raise SystemExit(f"the two sides give different masks: {worst:.1e} of a mask's pixels")
    return {
        "encodes": int(encodes),
        "pictures": n_images,
        "masks": trajectories * TURNS,
        "bridge_s": bridge_s,
        "direct_s": direct_s,
        "throughput_share": direct_s / bridge_s,
        "most_pixels_different": worst,
    }


def decode(args) -> dict:
    keep_freed_memory()  # as the side-car does
    back = own_sam2(args, sam2_options(args))
    (model,) = back._models
    images = [random_image(i) for i in range(2 if args.toy else 16)]
    encodings = [model.encode([model.prepare(image)], 0)[0] for image in images]
    jobs = [_Job(encodings[i % len(encodings)], turn((0, 1, 3)[i % 3], i, HEIGHT, WIDTH, ""), None) for i in range(16)]

    def decode_by(size: int) -> float:
        start = time.perf_counter()
        for i in range(0, len(jobs), size):
            model.decode(jobs[i : i + size])
        if args.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    sizes, found = (1, 2, 4, 8, 16), {}
    for _ in range(2 if args.toy else 4):
        for size in sizes:
            found.setdefault(size, []).append(decode_by(size))
    loop_s = statistics.median(found[1])
    default = DEFAULT_BATCH[model.device.type][1]
    speed = {f"decode_speedup_{size}": loop_s / statistics.median(found[size]) for size in sizes[1:]}
    back.close()
    return {"decode_loop_ms": 1e3 * loop_s / 16, "decode_default": default, **speed}


def soak(args) -> dict:
    calls = 300 if args.toy else args.calls
    first, side = calls // 10, 112
    resident: dict[str, list[int]] = {"server": [], "client": []}
    with side_car(args, "grabcut", ("--cache_mb=2", "--logits_mb=1")) as (car, client):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:

            def call(n: int) -> None:
                image = random_image(n // 10, side, side)  # a new picture every ten calls: the cache turns over
                client.segment(image, turn((0, 1, 3)[n % 3], n, side, side, ""))

            for start, stop in ((0, first), (first, calls)):
                list(pool.map(call, range(start, stop)))
                resident["server"].append(rss(car.pid))
                resident["client"].append(rss(os.getpid()))
        (info,) = client.info()
        assert info.segments == calls
    growth = {f"rss_growth_{who}": after / before - 1 for who, (before, after) in resident.items()}
    return {"soak_calls": calls, "evictions": int(info.evictions), **growth, "rss_growth": max(growth.values())}


def rss(pid: int) -> int:
    """Resident bytes."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kill(args) -> dict:
    total: dict = {"lost": 0, "wrong": 0, "hangs": 0}
    for backend in ("grabcut", "sam2"):
        found = killed(args, backend)
        for name in ("lost", "wrong", "hangs"):
            total[name] += found[name]
        total |= {f"{backend}_{name}": value for name, value in found.items()}
    return total


def killed(args, backend: str) -> dict:
    """32 trajectories at a time, every mask compared with the back end's own; the side-car is killed meanwhile."""
    seconds = 6.0 if args.toy else args.seconds
    every = seconds / 4 if backend == "sam2" else (2.0 if args.toy else 5.0)
    height, width = (112, 112) if backend == "grabcut" else (HEIGHT, WIDTH)
    images = [random_image(i, height, width) for i in range(8 if backend == "grabcut" else 2)]
    own = (
        own_sam2(args, sam2_options(args, encode_batch=1, decode_batch=1))
        if backend == "sam2"
        else load_backend("grabcut")
    )
    local = LocalSegmenter(own)
    wanted = {i: trajectory(local, images[i % len(images)], i) for i in range(8)}
    local.close()
    lost, wrong, played = [], [], []
    with side_car(args, backend, alone=True) as (car, client):
        stop = time.monotonic() + seconds

        def play(first: int) -> None:
            for i in range(first, 1 << 30, 32):
                if time.monotonic() > stop:
                    return
                try:
                    masks = trajectory(client, images[i % 8 % len(images)], i % 8)
                except SegmenterError as error:
                    lost.append(str(error))
                else:
                    wrong.extend(i for a, b in zip(masks, wanted[i % 8], strict=True) if (a != b).any())
                    played.append(i)

        players = [threading.Thread(target=play, args=(i,), daemon=True) for i in range(32)]
        for player in players:
            player.start()
        kills, last, due = 0, 0, time.monotonic() + every
        while time.monotonic() < stop - every / 2:
            time.sleep(0.05)
            if time.monotonic() >= due and car.pid != last:  # a restart under way is let finish, then it dies again
                last = car.pid
                os.kill(last, signal.SIGKILL)
                kills, due = kills + 1, due + every
        for player in players:
            player.join(max(0.0, stop - time.monotonic()) + 180)
        counts = client.counters()
        hangs = sum(player.is_alive() for player in players)
    for reason in lost[:3]:
        print("  lost:", reason)
    return {
        "played": len(played),
        "lost": len(lost),
        "wrong": len(wrong),
        "hangs": hangs,
        "kills": kills,
        "restarts": car.restarts,
        "remade": counts["remade"],
    }


if __name__ == "__main__":
    sys.exit(main())
