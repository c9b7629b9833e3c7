"""What a machine with an accelerator gives: training, rollouts and masks beside transformers with torch and SAM 2's own
predictor on the same work, with random weights of the real shapes, on one device.

  python benchmarks/device.py --out=DIR [--pieces=train-3b,decode-7b-1k,...] [--side=ours|torch|both] [--seconds=520]
                              [--kernels] [--toy]

Each side of each row is a process of its own, so that memory is given back; one that fails or lacks a package costs a
cell, and the table says why. The two sides of a row of SAM 2 share a process and take turns (benchmarks/bridge.py).
What a row gave is appended to DIR/results.jsonl and not run again by a second start with the same DIR; what failed is.
A DIR of other versions or of toys is refused; one of another machine or another version of this project is not told.
`limits`, a large product and a pass over memory, always comes first: it says what the device is. On a CPU, or with
--toy, every row is a toy that times nothing of interest. DIR also gets table.md and summary.json, and the latter is the
last line of what is printed.

theirs / ours   their seconds / ours: above 1 we are faster
share           of the data sheet's and of the measured FLOP/s or bytes/s; of model FLOPs (rsagent_jax/aot/flops.py), or
                of weights and live keys and values
peak            of the device's memory in GB since the process began, set-up included; on a CPU of the process

--kernels adds our kernels' times by jax.profiler. A row takes up to 90 s on an H100; --seconds starts none later.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._device_pieces import PIECES, Piece  # noqa: E402
from benchmarks._policy_step import QUICK  # noqa: E402
from rsagent_jax.runtime.json_lines import keep_lines  # noqa: E402

PACKAGES = "jax jaxlib flax optax numpy torch transformers peft sam2".split()
SIDES = ("ours", "torch")
ONE_PROCESS = ("limits", "parity", "sam")  # kinds without a side of torch's own
LIMITS = ("limits", "ours")
CELL_S, TOY_CELL_S = 180, 900  # then a process is killed; the toy's may share its cores
LEAST_S = 20  # what is left of --seconds for a process to start
KEPT = 1500  # characters of what a process that failed had said last
BRIDGE = {"overhead": ("bridge_ms_p50", "direct_ms_p50", 1e-3), "throughput": ("bridge_s", "direct_s", 1.0)}
Results = dict[tuple[str, str], dict[str, Any]]  # by row and side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/device", help="a directory for what one machine gives")
    parser.add_argument("--pieces", default=",".join(PIECES), help=f"of {', '.join(PIECES)}")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--seconds", type=float, default=0.0, help="no process starts or lives later; 0 = no such end")
    parser.add_argument("--kernels", action="store_true", help="our kernels' times")
    parser.add_argument("--toy", action="store_true", help="small, on any device")
    parser.add_argument("--cell", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        return print(json.dumps(one_cell(args)))
    names = list(dict.fromkeys(["limits", *args.pieces.split(",")]))
    if unknown := set(names) - set(PIECES):
        parser.error(f"--pieces: {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, late = run_all(out, names, args)
    text, summary = report(results, late)
    (out / "table.md").write_text(text)
    (out / "summary.json").write_text(json.dumps(summary) + "\n")
    print(text)
    print(json.dumps(summary))


def one_cell(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: the figures of a row's side."""
    piece, side = PIECES[args.cell], args.side
    if side == "torch":
        from benchmarks import _device_torch

        return getattr(_device_torch, piece.kind)(piece.toy() if args.toy else piece)
    import jax

    from benchmarks import _device_ours

    toy = args.toy or jax.default_backend() == "cpu"
    return getattr(_device_ours, piece.kind)(piece.toy() if toy else piece, args.kernels) | {"toy": toy}


############################## The processes ##############################


def run_all(out: pathlib.Path, names: list[str], args: argparse.Namespace) -> tuple[Results, list[str]]:
    """(all results of the directory, what --seconds left no time for). SystemExit where the limits were not found."""
    file, start, late = out / "results.jsonl", time.monotonic(), []
    results = read_results(file)
    check_same(results.get(LIMITS, {}), args, out)
    sides = SIDES if args.side == "both" else (args.side,)
    for name, side in dict.fromkeys((n, "ours" if alone(n) else s) for n in names for s in sides):
        done = results.get((name, side), {"error": ""})
        profiled = side != "ours" or PIECES[name].kind in ONE_PROCESS or "kernels" in done
        if "error" not in done and (profiled or not args.kernels):
            continue
        left = args.seconds - (time.monotonic() - start) if args.seconds else float("inf")
        if left < LEAST_S:
            late.append(f"{name} {side}")
            continue
        print(f"{name}, {side} ...", file=sys.stderr, flush=True)
        for one, figures in run_cell(PIECES[name], side, results.get(LIMITS, {}), left, args).items():
            results[name, one] = figures
            with file.open("a") as lines:
                lines.write(json.dumps({"piece": name, "side": one, **figures}) + "\n")
        print("   ", told(results[name, side]), file=sys.stderr, flush=True)
        if "error" in results[LIMITS]:
            raise SystemExit(f"nothing is known of the device: {results[LIMITS]['error']}")
    return results, late


def alone(name: str) -> bool:
    """Whether a row has no process of torch's."""
    return PIECES[name].kind in ONE_PROCESS or PIECES[name].attention != "auto"


def read_results(file: pathlib.Path) -> Results:
    """The latest line of each row and side; what a kill left half written is dropped, and said."""
    keep_lines(file, lambda line: {"piece", "side"} <= {*line})
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(line.pop("piece"), line.pop("side")): line for line in lines}


def check_same(limits: dict[str, Any], args: argparse.Namespace, out: pathlib.Path) -> None:
    """SystemExit where a directory's results are of other versions than those of now, or are toys where none were
    asked for, or the reverse. A package that was not there before is no difference."""
    now, then = installed(), limits.get("versions", {})
    other = {name: (then[name], now[name]) for name in PACKAGES if "none" not in (then.get(name, "none"), now[name])}
    differs = [f"{name} {a} there, {b} here" for name, (a, b) in other.items() if a != b]
    if limits and args.toy != limits.get("asked_toy", args.toy):
        differs.append("toys there" if limits["asked_toy"] else "no toys there")
    if differs:
        raise SystemExit(f"{out} has results of another kind ({'; '.join(differs)}); name another --out")


def run_cell(piece: Piece, side: str, limits: dict, left_s: float, args: argparse.Namespace) -> Results:
    """Figures by side, or an `error`: the end of what the process said."""
    toy = limits.get("toy", args.toy)
    command = [sys.executable, __file__, f"--cell={piece.name}", f"--side={side}"]
    command += ["--kernels"] * args.kernels + ["--toy"] * toy
    if piece.kind == "sam":
        device = "cuda" if limits["backend"] == "gpu" else "cpu"
        command = [sys.executable, str(ROOT / "benchmarks/bridge.py"), f"--parts={piece.part}", f"--device={device}"]
        command += ["--toy"] if toy else ["--model=sam2.1_large"]
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94", **os.environ, "HF_HUB_OFFLINE": "1"}
    if limits.get("backend") == "cpu" and "XLA_FLAGS" not in env:
        env["XLA_FLAGS"] = QUICK
    begin = time.monotonic()
    said, error = last_words(command, env, min(left_s, TOY_CELL_S if toy else CELL_S))
    took = {"process_s": time.monotonic() - begin}
    sides = SIDES if piece.kind == "sam" else (side,)
    if error:
        return {one: {"error": error, **took} for one in sides}
    found = json.loads(said)
    if piece.kind == "sam":
        *keys, unit = BRIDGE[piece.part]
        masks, seconds = found.get("masks", 1), {s: found[key] * unit for s, key in zip(SIDES, keys, strict=True)}
        return {s: {"seconds": t, "rate": masks / t, "unit": "masks/s", **took} for s, t in seconds.items()}
    if piece.kind == "limits":
        found |= {"versions": {"python": sys.version.split()[0]} | installed(), "asked_toy": args.toy}
    return {side: found | took}


def last_words(command: list[str], env: dict[str, str], seconds: float) -> tuple[str, str]:
    """(the last line of stdout, "") of a process, or ("", why there is none). It is killed with all that it started."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"no end within {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().strip())
    if status == 0 and texts[0]:
        return texts[0].splitlines()[-1], ""
    reason = status if isinstance(status, str) else f"status {status}"
    return "", f"{texts[1][-KEPT:]}\n{reason}".strip() if isinstance(status, str) else f"{reason}\n{texts[1][-KEPT:]}"


def installed() -> dict[str, str]:
    """Versions of what is compared."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


############################## The table ##############################


def report(results: Results, late: list[str]) -> tuple[str, dict[str, Any]]:
    """(Markdown, the same as values). SystemExit without the device's limits."""
    if LIMITS not in results:
        raise SystemExit(f"nothing was begun: --seconds has to leave {LEAST_S} for each process")
    limits = results[LIMITS]
    rows = [row_of(p, results, limits) for p in PIECES.values() if {(p.name, s) for s in SIDES} & {*results}]
    rows = [row for row in rows if row["piece"] not in ("limits", "parity")]
    columns = ["", "ours", "theirs", "theirs / ours", "of the data sheet", "of the measured", "peak GB, both"]
    lines = [heading(limits), "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        shares = [f"{row[key]:.1%}" if row[key] else "" for key in ("share_nominal", "share_measured")]
        peaks = ", ".join(f"{row[side]['peak_gb']:.1f}" if "peak_gb" in row[side] else "-" for side in SIDES)
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        lines.append(f"| {' | '.join([row['title'], *(told(row[s]) for s in SIDES), ratio, *shares, peaks])} |")
    compared = results.get(("parity", "ours"), {}).get("rows", [])
    lines += ["", "| numbers that have to agree | largest difference | mean | |", "|---|---|---|---|"] * bool(compared)
    lines += [f"| {r['name']} | {r['max']:.1e} | {r['mean']:.1e} | {r['unit']} |" for r in compared]
    for (name, side), figures in results.items():
        if kernels := figures.get("kernels"):
            whole = f"{kernels['busy_ms']:.2f} of {kernels['span_ms']:.2f} ms {kernels.get('error', '')}"
            lines += ["", f"{name}, {side}: kernels {whole}", ""]
            lines += [f"    {ms:9.2f} ms x{count:6} {kernel}" for kernel, ms, count in kernels["top"]]
    failed = {" ".join(key): figures["error"] for key, figures in results.items() if "error" in figures}
    lines += [f"\n{name} failed: {error}" for name, error in failed.items()]
    lines += [f"\nnot begun, for want of time: {', '.join(late)}"] * bool(late)
    return "\n".join(lines), dict(limits=limits, rows=rows, parity=compared, failed=failed, not_begun=late)


def row_of(piece: Piece, results: Results, limits: dict[str, Any]) -> dict[str, Any]:
    """Both sides of a row; the ratio and the shares are None where a figure is missing."""
    sides = {side: results.get((piece.name, side), {}) for side in SIDES}
    mine, theirs = (sides[side].get("seconds") for side in SIDES)
    row = {"piece": piece.name, "title": piece.title, **sides, "ratio": theirs / mine if mine and theirs else None}
    work = "bytes" if "bytes" in sides["ours"] else "flops"
    for share, limit in (("share_nominal", f"nominal_{work}_per_s"), ("share_measured", f"{work}_per_s")):
        known = mine and work in sides["ours"] and limits[limit]
        row[share] = sides["ours"][work] / mine / limits[limit] if known else None
    return row


def heading(limits: dict[str, Any]) -> str:
    """The device, the versions, and the limits."""
    versions = ", ".join(f"{name} {version}" for name, version in limits["versions"].items())
    toy = " (toys: no time means anything)" * limits["toy"]
    found = []
    for prefix, name in (("", f"measured, {limits['dtype']}"), ("nominal_", "data sheet")):
        if limits[f"{prefix}flops_per_s"]:
            rates = (limits[f"{prefix}{work}_per_s"] / 1e12 for work in ("flops", "bytes"))
            found.append("{}: {:.3g} TFLOP/s, {:.3g} TB/s".format(name, *rates))
    return f"{limits['device']}{toy}; {limits['runtime']}; {versions}\n\nLimits {'; '.join(found)}"


def told(figures: dict[str, Any]) -> str:
    """A cell of the table."""
    if "error" in figures:
        return "failed: " + figures["error"].strip().splitlines()[-1][:100].replace("|", "/")
    if "rate" not in figures:
        return "done" if figures else ""
    seconds = figures["seconds"]
    return (
        f"{1e3 * seconds:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
    ) + f", {figures['rate']:,.0f} {figures['unit']}"


if __name__ == "__main__":
    main()
