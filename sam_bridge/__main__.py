"""Runs a side-car until it is told to stop: python -m sam_bridge --backend=grabcut [--address=H:P] [--workers=N]."""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC loads: our own messages say it once and plainly

from sam_bridge import backends
from sam_bridge.local import IMAGE_CACHE_BYTES, LocalSegmenter
from sam_bridge.server import QUEUE, AddressError, Server
from sam_bridge.wire import READY

WATCH_EVERY_S = 1.0


def main() -> int:
    args = _arguments()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="sam_bridge %(levelname)s %(name)s: %(message)s")
    if args.parent_pid:
        threading.Thread(target=_exit_with_parent, args=(args.parent_pid,), daemon=True).start()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        segmenter = LocalSegmenter(backends.load(args.backend), image_bytes=args.cache_mb << 20)
        server = Server(segmenter, args.address, workers=args.workers, queue=args.queue, insecure=args.insecure)
    except (backends.BackendError, AddressError) as error:
        print(f"sam_bridge: {error}", file=sys.stderr)
        return 2
    print(f"{READY}{server.address} backend={segmenter.backend.name} pid={os.getpid()}", flush=True)
    stop.wait()
    server.stop()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sam_bridge", description="A segmenter behind gRPC.")
    parser.add_argument("--backend", required=True, help=f"{', '.join(backends.NAMES)}, or module:factory")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port; port 0 picks a free one")
    parser.add_argument("--workers", type=_positive, default=2, help="calls worked on at the same time")
    parser.add_argument("--queue", type=_positive, default=QUEUE, help="calls that may wait")
    parser.add_argument("--cache_mb", type=_positive, default=IMAGE_CACHE_BYTES >> 20, help="bound of the image cache")
    parser.add_argument("--insecure", action="store_true", help="allow an address that other machines can reach")
    parser.add_argument("--parent_pid", type=int, default=0, help="exit when this process does (used by spawn.py)")
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _exit_with_parent(parent_pid: int) -> None:
    """Ends this process when the parent is gone, however it went.

    Two signs, for either alone can fail: our stdin is its pipe (but a fork of the parent may keep that open), and our
    parent's pid changes (but only looking tells).
    """
    while os.getppid() == parent_pid:
        if select.select([0], [], [], WATCH_EVERY_S)[0] and not os.read(0, 4096):
            break
    os._exit(0)  # nobody is left to answer, so there is nothing to wind down


if __name__ == "__main__":
    sys.exit(main())
