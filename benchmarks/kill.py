"""Runs that are killed at many points, started again, and compared with a run that was left alone.

  python benchmarks/kill.py [--quickstart=runs/quickstart] [--workdir=runs/kill] [--points=20] [--jobs=1]
      [--parts=sft,rollout,reward,update,checkpoint,evaluate,preemption]

SFT and GRPO of configs/debug.py, and an evaluation of 12 scenes, with what `make quickstart` has left: its scenes, its
trajectories and its policy after SFT. `--points` in SFT and in the evaluation, half as many in each phase of GRPO; they
are spread evenly over the changes of files and over the calls (_kill_point.py) that an uninterrupted run makes. About
every fourth is a SIGTERM, the others SIGKILL.

What is compared: metrics.jsonl but for times and the counters of compiler, engine and segmenter, which count from a
process's start; rollouts.jsonl, parameters and optimiser; of an evaluation results.json, predictions.jsonl and
trajectories.jsonl. All of it must be equal to the bit. After SIGTERM in GRPO trajectories under way are read into the
cache anew, in other pieces (docs/training.md, Preemption): there numbers may differ by ROUNDING, and nothing else may.

preemption: SIGTERM at the quickstart's own size, seconds to the exit, and how many turns of the rollout were lost.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Imported once, and forked: until then no device is used.
import _kill_point  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from _kill_point import Point  # noqa: E402

import evaluate  # noqa: E402, F401
import train  # noqa: E402, F401
from rsagent_jax.data.processor import Processor  # noqa: E402

Processor.load(ROOT / "assets/tiny-base")  # transformers is imported within

FORK = multiprocessing.get_context("fork")
ROUNDING = 1e-4
TIMES = re.compile(r"seconds|timings_s|compiles$|tokens_per_s$|^perf/(throughput|mfu)|^rollout/|^segmenter/")
GRPO = ("rollout", "reward", "update", "checkpoint")
PARTS = {"sft": "sft", **dict.fromkeys(GRPO, "grpo"), "evaluate": "evaluate"}  # and whose they are
STOPS = (  # where SIGTERM comes at the quickstart's size
    ("sft", Point("update", "work", 10, "SIGTERM")),
    ("sft", Point("checkpoint", "work", 1, "SIGTERM")),
    *(("grpo", Point("rollout", "work", at, "SIGTERM")) for at in (10, 60, 120)),
    ("grpo", Point("update", "work", 5, "SIGTERM")),
    ("grpo", Point("checkpoint", "work", 1, "SIGTERM")),
)
KEPT = re.compile(r"stopped by SIGTERM.* trajectories \(\d+ of them whole, (\d+) turns\)")


def commands(quickstart: pathlib.Path, cache: pathlib.Path, config: str) -> dict[str, tuple[str, ...]]:
    """Of each part, with a training config: the console script and its flags."""
    common = (f"--config.cache_dir={cache}", "--config.segmenter.mode=inprocess")
    policy, data = quickstart / "train/checkpoints/sft", f"data.root={quickstart / 'data'}"
    training = ("train", f"--config={ROOT / config}", *common)
    sft = (*training, "--config.stages=('sft',)", f"--config.sft.trajectories={quickstart / 'collect'}")
    grpo = (*training, "--config.stages=('grpo',)", f"--config.grpo.{data}", f"--config.policy.weights={policy}")
    scenes = (f"--config={ROOT / 'configs/eval_quickstart.py'}", f"--config.{data}", "--config.data.limit=12")
    evaluation = ("evaluate", *scenes, f"--weights={policy}", "--config.sampling.slots=8", *common)
    return {"sft": sft, "grpo": grpo, "evaluate": evaluation}


def spread(counts: dict[str, int], phase: str, points: int) -> list[Point]:
    """Half of them over the changes of files, half over the calls, if the phase has both."""
    kinds = [kind for kind in ("file", "work") if counts.get(f"{phase} {kind}")]
    out = []
    for i in range(points):
        kind = kinds[i % len(kinds)]
        of_kind, number = len(range(kinds.index(kind), points, len(kinds))), i // len(kinds)
        at = 1 + int((number + 0.5) * counts[f"{phase} {kind}"] / of_kind)
        out.append(Point(phase, kind, at, "SIGTERM" if i % 8 in (3, 6) else "SIGKILL"))
    return out


def outcome(folder: pathlib.Path) -> dict[str, object]:
    """What a run leaves behind that must be the same, by name."""
    lines = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]  # noqa: E731
    if (folder / "results.json").exists():
        whole = {"results": json.loads((folder / "results.json").read_text())}
        return _leaves(whole | {name: lines(f"{name}.jsonl") for name in ("predictions", "trajectories")})
    whole = {name: lines(f"{name}.jsonl") for name in ("metrics", "rollouts") if (folder / f"{name}.jsonl").exists()}
    for stage in (folder / "checkpoints").iterdir():
        newest = max((step for step in stage.iterdir() if step.name.isdigit()), key=lambda step: int(step.name))
        for tree in ("params", "optimizer"):
            whole[f"{stage.name}/{newest.name}/{tree}"] = ocp.StandardCheckpointer().restore(newest / tree)
    return _leaves(whole)


def _leaves(value: object, name: str = "") -> dict[str, object]:
    """By path, without times."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if name.endswith("/record"):  # of a trajectory, for its replay: JSON within JSON
        return _leaves(json.loads(value), f"{name}s")
    if items is None:
        return {name: np.asarray(value) if hasattr(value, "shape") else value}
    return {k: v for key, x in items if not TIMES.search(str(key)) for k, v in _leaves(x, f"{name}/{key}").items()}


def difference(one: dict[str, object], other: dict[str, object]) -> tuple[float, str]:
    """The largest of two numbers, and where; infinite where anything else differs, and where only one is no number."""
    worst = (0.0, "") if one.keys() == other.keys() else (np.inf, str(sorted(one.keys() ^ other.keys())[:3]))
    for name in one.keys() & other.keys():
        a, b = np.asarray(one[name]), np.asarray(other[name])
        if a.shape != b.shape or (a.dtype.kind != "f" and not np.array_equal(a, b)):
            worst = max(worst, (np.inf, name))
        elif a.dtype.kind == "f" and not np.array_equal(a, b, equal_nan=True):
            apart = float(np.abs(a - b).max())
            worst = max(worst, (np.inf if np.isnan(apart) else apart, name))
    return worst


def compare(one: pathlib.Path, other: pathlib.Path) -> tuple[float, str]:
    """In a fork: it opens a device."""
    with ProcessPoolExecutor(1, FORK) as pool:
        return pool.submit(_compare, one, other).result()


def _compare(one: pathlib.Path, other: pathlib.Path) -> tuple[float, str]:
    return difference(outcome(one), outcome(other))


def try_point(case: tuple[str, tuple[str, ...], Point, pathlib.Path, pathlib.Path]) -> dict[str, object]:
    """The run that is ended at the point, the same command again, and what differs."""
    part, (name, *flags), point, folder, reference = case
    shutil.rmtree(folder, ignore_errors=True)
    ended = _kill_point.run(name, flags, folder, point)
    row = {"part": part, "point": f"{point.kind} {point.at} {point.signal}"}
    row |= {"reached": ended.signalled, "exit_s": ended.seconds}
    (folder.with_suffix(".log")).rename(folder.with_suffix(".first.log"))
    again = _kill_point.run(name, flags, folder)
    row["status"], (row["difference"], row["where"]) = again.status, (np.inf, "")
    if again.status == 0:
        row["difference"], row["where"] = compare(reference, folder)
    allowed = ROUNDING if part in GRPO and point.signal == "SIGTERM" else 0.0
    row["resumed"] = row["reached"] and row["difference"] <= allowed
    print(json.dumps(row), flush=True)
    if row["resumed"]:
        shutil.rmtree(folder)
    return row


def kill(options: argparse.Namespace, parts: list[str]) -> dict[str, object]:
    work = pathlib.Path(options.workdir).absolute()
    every = commands(pathlib.Path(options.quickstart), work / "compiled", "configs/debug.py")
    steps = {"sft": ("--config.sft.checkpoint_every=2",), "evaluate": ()}
    steps["grpo"] = ("--config.grpo.steps=3", "--config.grpo.checkpoint_every=2", "--config.grpo.min_spread=0")
    cases, apart = [], {}
    for stage in dict.fromkeys(PARTS[part] for part in parts):
        command, folders = (*every[stage], *steps[stage]), [work / f"{stage}-{i}" for i in (1, 2)]
        for folder in folders:  # the first one compiles
            shutil.rmtree(folder, ignore_errors=True)
            alone = _kill_point.run(command[0], list(command[1:]), folder)
            if alone.status:
                sys.exit(f"{folder}: the run that nobody ends has ended with {alone.status}\n{alone.text[-2000:]}")
        apart[stage] = compare(*folders)
        print(f"{stage}: two runs that were left alone differ by {apart[stage][0]:g} {apart[stage][1]}", flush=True)
        for part in [part for part in parts if PARTS[part] == stage]:
            phase, n = ("", options.points) if part == stage else (part, max(1, options.points // 2))
            for i, point in enumerate(spread(alone.counts, phase, n)):
                cases.append((i / n, (part, command, point, work / f"{part}-{i:02d}", folders[0])))
    ordered = [case for _, case in sorted(cases, key=lambda case: case[0])]
    with ProcessPoolExecutor(options.jobs, FORK) as pool:
        rows = list(pool.map(try_point, ordered))
    print_table(rows)
    return {"resumed": sum(row["resumed"] for row in rows), "points": len(rows), "apart": apart, "rows": rows}


def print_table(rows: list[dict[str, object]]) -> None:
    print(f"\n{'':20} {'points':>6} {'SIGTERM':>8} {'resumed':>8} {'equal to the bit':>17} {'largest difference':>19}")
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        stopped, resumed = sum("SIGTERM" in row["point"] for row in own), sum(row["resumed"] for row in own)
        equal, worst = sum(row["resumed"] and not row["difference"] for row in own), max(r["difference"] for r in own)
        print(f"{part:20} {len(own):6} {stopped:8} {resumed:8} {equal:17} {worst:19.3g}")


def preempt(options: argparse.Namespace) -> dict[str, object]:
    """SIGTERM at the quickstart's own size."""
    work, rows = pathlib.Path(options.workdir).absolute(), []
    every = commands(pathlib.Path(options.quickstart), work / "compiled", "configs/quickstart.py")
    every["grpo"] += ("--config.grpo.checkpoint_every=1",)
    every["sft"] += ("--config.sft.checkpoint_every=4",)
    print(f"\n{'SIGTERM in':34} {'exit s':>7} {'status':>7} {'turns drawn':>12} {'lost':>5}")
    for part, point in STOPS:
        name, *flags = every[part]
        shutil.rmtree(work / "preempted", ignore_errors=True)
        ended = _kill_point.run(name, flags, work / "preempted", point)
        found = KEPT.search(ended.text)  # else the step was finished, where it says that this one is saved
        kept = int(found[1]) if found else ended.turns if " is saved" in ended.text else 0
        row = {"where": f"{part}, {point.phase}, call {point.at}", "exit_s": ended.seconds, "status": ended.status}
        row |= {"turns": ended.turns, "lost": ended.turns - kept}
        rows.append(row)
        print(f"{row['where']:34} {ended.seconds:7.1f} {ended.status:7} {ended.turns:12} {row['lost']:5}", flush=True)
    return {"exit_s": max(r["exit_s"] for r in rows), "lost_turns": max(r["lost"] for r in rows), "preempted": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", default="runs/quickstart", help="what make quickstart has left")
    parser.add_argument("--workdir", default="runs/kill")
    parser.add_argument("--parts", default=",".join((*PARTS, "preemption")))
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="points side by side")
    options = parser.parse_args()
    pathlib.Path(options.workdir).mkdir(parents=True, exist_ok=True)
    parts = options.parts.split(",")
    result = kill(options, killed) if (killed := [part for part in parts if part in PARTS]) else {}
    if "preemption" in parts:
        result |= preempt(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
