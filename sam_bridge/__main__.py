"""Runs a side-car until it is told to stop: python -m sam_bridge --backend=sam2 --checkpoint=FILE.pt [--device=cuda].

SIGTERM and SIGINT drain it: new calls are refused, those under way get --grace_s seconds. Exit status: 0 after that, 2
for a command line that cannot work, 3 when its device is gone and a supervisor should start it anew.
"""

import argparse
import dataclasses
import os
import select
import signal
import sys
import threading

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC loads: our own messages say it once and plainly

from sam_bridge import backends, telemetry
from sam_bridge.cpu_tuning import keep_freed_memory
from sam_bridge.local import IMAGE_CACHE_BYTES, LOGITS_CACHE_BYTES, LocalSegmenter
from sam_bridge.security import SetupError, check_address, is_loopback, read_token
from sam_bridge.server import QUEUE, Server
from sam_bridge.wire import READY

WATCH_EVERY_S = 1.0


def main() -> int:
    args = _arguments()
    keep_freed_memory()
    telemetry.set_up_logs(args.log)
    if args.parent_pid:
        threading.Thread(target=_exit_with_parent, args=(args.parent_pid,), daemon=True).start()
    stop, dead = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        token = read_token(args.token_file)
        # Before a checkpoint is read, which takes a while; the server looks again.
        check_address(args.address, token=token, tls=bool(args.tls_cert), insecure=args.insecure)
        options = {f.name: getattr(args, f.name) for f in dataclasses.fields(backends.Options)}
        backend = backends.load_backend(args.backend, backends.Options(**options))
        segmenter = LocalSegmenter(backend, image_bytes=args.cache_mb << 20, logits_bytes=args.logits_mb << 20)
        segmenter.on_dead = lambda: (dead.set(), stop.set())
        secure = dict(token=token, tls_cert=args.tls_cert, tls_key=args.tls_key, insecure=args.insecure)
        workers = args.workers or segmenter.concurrency
        server = Server(segmenter, args.address, workers=workers, queue=args.queue, **secure)
        if args.metrics_address:
            telemetry.serve_metrics(args.metrics_address, server.metrics.registry, **secure)
    except (backends.BackendError, SetupError) as error:
        print(f"sam_bridge: {error}", file=sys.stderr)
        return 2
    for address in filter(None, (server.address, args.metrics_address)):
        if not is_loopback(address) and not (token and args.tls_cert):
            said = "can be reached from other machines without TLS and a token, as --insecure allows"
            print(f"sam_bridge: {address} {said}", file=sys.stderr, flush=True)
    print(f"{READY}{server.address} backend={segmenter.backend.name} pid={os.getpid()}", flush=True)
    stop.wait()
    server.stop(0.0 if dead.is_set() else args.grace_s)
    if dead.is_set():
        os._exit(3)  # threads may hang in a device that answers nothing
    segmenter.close()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m sam_bridge", description="A segmenter behind gRPC.")
    parser.add_argument("--backend", required=True, help=f"{', '.join(backends.NAMES)}, or module:factory")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port; port 0 picks a free one")
    parser.add_argument("--workers", type=int, default=0, help="calls worked on at a time; 0 = as the back end wants")
    parser.add_argument("--queue", type=_positive, default=QUEUE, help="calls that may wait")
    parser.add_argument("--cache_mb", type=_positive, default=IMAGE_CACHE_BYTES >> 20, help="bound of the image cache")
    parser.add_argument(
        "--logits_mb", type=_positive, default=LOGITS_CACHE_BYTES >> 20, help="bound of the masks that can be refined"
    )
    parser.add_argument("--grace_s", type=float, default=20.0, help="for calls under way when it is told to stop")
    parser.add_argument("--token_file", default="", help="file with the token that callers must show")
    parser.add_argument("--tls_cert", default="", help="PEM file; with --tls_key")
    parser.add_argument("--tls_key", default="", help="PEM file")
    parser.add_argument("--insecure", action="store_true", help="allow other machines without TLS and a token")
    parser.add_argument("--metrics_address", default="", help="host:port for Prometheus, such as 127.0.0.1:9464")
    parser.add_argument("--log", choices=telemetry.LOG_FORMATS, default="text", help="lines on stderr")
    for field in dataclasses.fields(backends.Options):
        kind = type(field.default)
        parser.add_argument(
            f"--{field.name}", type=kind, default=field.default, help=f"of sam2: {field.metadata['help']}"
        )
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
