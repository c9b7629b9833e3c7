"""One training step on the CPU: ours beside transformers with torch, same weights, same batch, same optimiser.

  python benchmarks/train_step.py [--sequences=4] [--steps=7] [--threads=N] [--toy]

A random Qwen2.5-VL of about 100 million parameters in fp32 (vocabulary 32,000, tied head) is written once as a Hugging
Face directory. Two processes load it and take turns, step by step (ours, theirs, ours, ...), so that other work on the
machine meets both:

  ours   rsagent_jax's own programs as train.py calls them: packing, make_programs with sft_objective, make_optimizer
  torch  Qwen2_5_VLForConditionalGeneration with sdpa attention, clip_grad_norm_, torch.optim.AdamW (fused)

A step is forward, backward, clipping to norm 1 and AdamW, from host arrays to updated parameters. Neither side
recomputes activations (policy.remat = none, no gradient checkpointing); ours runs its layers one after the other, as
torch does (policy.scan_layers = False). Every sequence has 384 tokens with one image,
so torch pads nothing; every second image is 28 x 36 patches, whose left-over windows share bins on our side.

The run fails unless loss and gradient norm of steps 1 to 3 agree within 1e-3, and unless log-probabilities change when
all pixels are 0: a model that does not look would agree by accident.

Both processes get the glibc settings of `make quickstart` (GLIBC, below: freed memory is kept, in huge pages, whichever
thread freed it) and the same cores: sched_setaffinity, from which XLA and OpenMP take their number of threads.

seconds  wall time, the median over the timed steps of a side; min and max beside it
cpu_s    processor time of a step, the median: on a busy machine and with --threads=1 the better measure
compile  ours: the first step less the median; the first two steps are not timed on either side
vs_torch torch's median / ours: above 1 we are faster
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import numpy as np  # noqa: E402

from benchmarks._policy_step import QUICK, OurStep, import_torch, make_sequence, raw_config, torch_step  # noqa: E402

WARM, COMPARED, TOLERANCE = 2, 3, 1e-3
LR = 1e-4
GLIBC = {
    "MALLOC_ARENA_MAX": "1",  # other arenas map large buffers whatever the next line says, and give them back
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


############################## The model and the batch, for both ##############################


def random_model(config):
    """Weights of variance 1 / fan-in, norms around 1, biases around 0: no part is without effect on the loss."""
    from flax import nnx

    from rsagent_jax.fitness.made_up import random_policy
    from rsagent_jax.models.qwen25_vl import convert

    model, rng = nnx.merge(*random_policy(config, None, "float32")), np.random.default_rng(0)
    values = convert.flat_params(model)
    for path, value in values.items():
        if path.endswith(("scale", "bias")):
            values[path] = value + 0.1 * rng.standard_normal(value.shape, np.float32)
    return convert.with_params(model, values)


def write(directory: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """The Hugging Face directory and the sequences; returns what there is to say of them."""
    from rsagent_jax.models.qwen25_vl import convert
    from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig

    raw = raw_config(toy=options.toy)
    config = Qwen25VLConfig.from_hf(raw)
    model = random_model(config)
    convert.save_model(model, directory, raw)
    rng = np.random.default_rng(1)
    length, grids = (96, ((1, 16, 16), (1, 12, 20))) if options.toy else (384, ((1, 32, 32), (1, 28, 36)))
    for i in range(options.sequences):
        np.savez(directory / f"sequence_{i}.npz", **make_sequence(rng, raw, length, grids[i % 2]))
    count = sum(int(np.prod(leaf.shape)) for leaf in convert.flat_params(model).values())
    return {"parameters": count, "length": length, "grids": grids}


def read_sequences(directory: pathlib.Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted(directory.glob("sequence_*.npz"))]


############################## The two sides, each in its own process ##############################


def ours(directory: pathlib.Path):
    """(what there is to say before the first step, step): step() -> (loss, norm of the gradient)."""
    from flax import nnx

    from rsagent_jax.config.schema import MeshConfig, PolicyConfig
    from rsagent_jax.models.qwen25_vl import convert
    from rsagent_jax.models.qwen25_vl.config import load_config
    from rsagent_jax.runtime import processes, sharding
    from rsagent_jax.train.state import EMPTY

    config = load_config(directory)
    mesh = sharding.make_mesh(MeshConfig())
    placed = sharding.param_shardings(convert.abstract_model(config), mesh)
    graphdef, params = nnx.split(convert.load_model(directory, config, placed), nnx.Param)
    policy = PolicyConfig(weights="", dtype="float32", remat="none", scan_layers=False)
    step = OurStep(config, graphdef, params, EMPTY, read_sequences(directory), policy, mesh, LR)
    batch = step.batch

    blind = dataclasses.replace(batch, patches=np.zeros_like(batch.patches))
    seen, unseen = (
        np.asarray(step.programs.logprobs(step.state.params, EMPTY, processes.put_rows(b, mesh)))[batch.loss_mask]
        for b in (batch, blind)
    )
    about = {
        "token_waste": 1 - float((batch.segment_ids > 0).mean()),
        "patch_waste": 1 - float((batch.patch_segment_ids > 0).mean()),
        "images_matter": float(np.abs(seen - unseen).mean()),  # nats per trained token
    }

    return about, step


def theirs(directory: pathlib.Path):
    """As `ours`, with transformers and torch."""
    torch = import_torch()
    from transformers import Qwen2_5_VLForConditionalGeneration

    kind = dict(dtype=torch.float32, attn_implementation="sdpa")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, **kind)
    step = torch_step(model, read_sequences(directory), raw_config(), LR)
    return {"parameters": sum(p.numel() for p in model.parameters())}, step


def serve(side: str, directory: pathlib.Path) -> None:
    """A step for every line on stdin; answers are JSON lines on the stdout that this process was given."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    about, step = (ours if side == "ours" else theirs)(directory)
    print(json.dumps(about), file=answers)
    for _ in sys.stdin:
        start, cpu, system = time.perf_counter(), time.process_time(), os.times().system
        loss, norm = step()
        took = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        took["system_s"] = os.times().system - system
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({**took, "loss": loss, "norm": norm, "peak_gb": peak}), file=answers)


############################## The table ##############################


class Side:
    """One of the two processes."""

    def __init__(self, name: str, directory: pathlib.Path, *, toy: bool):
        command = [sys.executable, __file__, f"--side={name}", f"--dir={directory}"]
        env = {**os.environ, **GLIBC, "HF_HUB_OFFLINE": "1", **({"XLA_FLAGS": QUICK} if toy else {})}
        self.name, self.steps = name, []
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name} failed; what it said stands above")
        return json.loads(line)

    def step(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(self._answer())
        said = "{seconds:.2f} s, {cpu_s:.2f} s of processor time, {system_s:.2f} of it in the kernel"
        print(f"{self.name} step {len(self.steps)}: {said.format(**self.steps[-1])}", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> list[float]:
        return [s["seconds"] for s in self.steps[WARM:]]

    def median(self, key: str = "seconds") -> float:
        """Over the timed steps."""
        return statistics.median(s[key] for s in self.steps[WARM:])


def compare(a: Side, b: Side) -> float:
    """Prints the first steps of both; the largest relative difference, SystemExit when that is too much."""
    worst = 0.0
    print(f"{'step':6}{'loss ours':>14}{'torch':>14}{'norm ours':>14}{'torch':>14}")
    for i, (x, y) in enumerate(zip(a.steps[:COMPARED], b.steps[:COMPARED], strict=True), 1):
        print(f"{i:<6}{x['loss']:14.6f}{y['loss']:14.6f}{x['norm']:14.5f}{y['norm']:14.5f}")
        worst = max(worst, *(abs(x[key] - y[key]) / abs(y[key]) for key in ("loss", "norm")))
    matter = a.about["images_matter"]
    print(
        f"largest relative difference {worst:.1e}; with all pixels 0, log-probabilities move by {matter:.3f} on average"
    )
    if not worst <= TOLERANCE:
        raise SystemExit(f"the two do not compute the same: {worst:.1e} > {TOLERANCE}")
    if matter < 10 * TOLERANCE:
        raise SystemExit("the images hardly matter: the comparison says nothing of the vision tower")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=4, help="of 384 tokens with an image each")
    parser.add_argument("--steps", type=int, default=7, help=f"timed ones, after {WARM} others")
    parser.add_argument("--threads", type=int, default=0, help="cores for both sides; 0 = all that this process has")
    parser.add_argument("--toy", action="store_true", help="a tiny model: checks that the losses agree, times nothing")
    for name in ("side", "dir"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return serve(options.side, pathlib.Path(options.dir))
    cores = sorted(os.sched_getaffinity(0))[: options.threads or None]
    os.sched_setaffinity(0, cores)  # the two sides inherit it
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        made = write(directory, options)
        sides = []
        try:
            sides += [Side("ours", directory, toy=options.toy)]
            sides += [Side("torch", directory, toy=options.toy)]
            for _ in range(WARM + options.steps):
                for side in sides:
                    side.step()
        finally:
            for side in sides:
                side.process.kill()
    us, them = sides
    if made["parameters"] != them.about["parameters"]:
        raise SystemExit(f"{made['parameters']} parameters here, {them.about['parameters']} in torch")
    print(
        f"{made['parameters'] / 1e6:.1f}M parameters, fp32; {options.sequences} sequences of {made['length']} tokens,"
        f" images of {' and '.join(f'{h} x {w}' for _, h, w in made['grids'])} patches; {len(cores)} cores, load"
        f" {os.getloadavg()[0]:.1f}; glibc keeps freed memory in huge pages on both sides\n"
    )
    worst = compare(us, them)
    print(f"\n{'':8}{'seconds':>10}{'min':>10}{'max':>10}{'cpu_s':>10}{'peak_gb':>10}")
    for side in sides:
        cells = (side.median(), min(side.seconds), max(side.seconds), side.median("cpu_s"), side.steps[-1]["peak_gb"])
        print(f"{side.name:8}" + "".join(f"{cell:10.3f}" for cell in cells))
    summary = {
        "vs_torch": them.median() / us.median(),
        "vs_torch_min": min(them.seconds) / min(us.seconds),
        "vs_torch_cpu": them.median("cpu_s") / us.median("cpu_s"),
        "seconds": us.median(),
        "torch_seconds": them.median(),
        "compile_seconds": us.steps[0]["seconds"] - us.median(),
        "token_waste": us.about["token_waste"],
        "patch_waste": us.about["patch_waste"],
        "largest_difference": worst,
        "losses": [s["loss"] for s in us.steps[:COMPARED]],
        "torch_losses": [s["loss"] for s in them.steps[:COMPARED]],
        "parameters": made["parameters"],
        "cores": len(cores),
        "load": os.getloadavg()[0],
        "rows": {side.name: side.seconds for side in sides},
    }
    ratios = (summary[key] for key in ("vs_torch", "vs_torch_min", "vs_torch_cpu"))
    print("\nvs_torch {:.2f} (of the minima {:.2f}, of cpu_s {:.2f})".format(*ratios))
    print(
        f"compile {summary['compile_seconds']:.1f} s; padding {summary['token_waste']:.1%} of the token places and"
        f" {summary['patch_waste']:.1%} of the patch places"
    )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
