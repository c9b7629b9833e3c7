"""Memory of an SFT step as its rows grow longer: XLA's own accounting, attention by blocks against whole scores.

  python benchmarks/memory.py [--lengths=1024,2048,4096,8192,16384] [--toy]

Compiles `programs.micro` of train.py's SFT stage (forward, backward, remat full, fp32) for one row with one image of
32 x 32 patches, at every length, with policy.attention = blocks (what auto takes beyond 1024 tokens) and = plain
(scores of the whole row), and prints what `compiled.memory_analysis()` says. Only the shortest is run, once, to show
that it is the real program and that both give one loss; the others need no memory here.

temp      buffers inside the program: activations, scores, workspace; parameters, batch and gradients are not in it
exponent  log2 of the growth of `temp` at one doubling: 1 is linear, 2 quadratic; below 1 while what does not depend on
          the length (the image, a piece of the logits) still counts. The last doubling is what is reported
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks._policy_step import SPECIAL, make_sequence, raw_config, to_items  # noqa: E402
from benchmarks.train_step import random_model  # noqa: E402
from rsagent_jax.aot import stages  # noqa: E402
from rsagent_jax.config.schema import BatchConfig, MeshConfig, PolicyConfig, SftConfig, TrainConfig  # noqa: E402
from rsagent_jax.data.packing import pack  # noqa: E402
from rsagent_jax.models.qwen25_vl import convert  # noqa: E402
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig  # noqa: E402
from rsagent_jax.runtime import sharding  # noqa: E402
from rsagent_jax.train.state import EMPTY  # noqa: E402

GRID = (1, 32, 32)  # of the one image: 256 tokens
MIB = 2**20
TOLERANCE = 1e-4  # of the loss per token
# A fifth of the time to compile, and the same buffers: 92,036,528 bytes of temp, not 92,048,496 (toy, 2048 tokens).
QUICK = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # from which on there are no other emitters
    QUICK["xla_cpu_use_fusion_emitters"] = False


def small_policy(*, toy: bool) -> Qwen25VLConfig:
    """Hidden size 256, 4 layers, a vocabulary of 32,000, 4 vision blocks; the toy is half of that or less."""
    raw = raw_config()
    hidden, layers = (128, 2) if toy else (256, 4)
    raw |= dict(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        vocab_size=2_000 if toy else 32_000,
        rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
    )
    raw["vision_config"] |= dict(
        hidden_size=128, intermediate_size=512, out_hidden_size=hidden, depth=4, fullatt_block_indexes=[3]
    )
    return Qwen25VLConfig.from_hf(raw)


def lower(policy: Qwen25VLConfig, attention: str, length: int):
    """The gradients' program of train.py's SFT stage, of one row."""
    batch = BatchConfig(rows=1, tokens=length, patches=math.prod(GRID))
    config = TrainConfig(
        policy=PolicyConfig(weights="", dtype="float32", remat="full", attention=attention),
        sft=SftConfig(trajectories_per_step=1, batch=batch),
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    return next(stages.stage_jobs(config, "sft", policy, mesh)).trace().lower(), batch


def run_once(compiled, policy: Qwen25VLConfig, batch: BatchConfig) -> float:
    """Loss per token of a random policy on a random row that fills the shapes."""
    from flax import nnx

    raw = {**SPECIAL, "vocab_size": policy.text.vocab_size}
    sequence = make_sequence(np.random.default_rng(1), raw, batch.tokens, GRID)
    (row,) = pack(to_items([sequence], policy), batch, policy)
    params = nnx.state(random_model(policy), nnx.Param)
    arguments = (params, EMPTY, row, np.zeros(row.tokens.shape, np.float32))
    sums = compiled(*jax.device_put(arguments, compiled.input_shardings[0]))
    if not all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(sums.grads)):
        raise SystemExit("a gradient is not finite")
    return float(sums.loss / sums.denominator)


def exponents(sizes: list[int]) -> list[float]:
    """log2 of the ratio at every doubling."""
    return [math.log2(b / a) for a, b in itertools.pairwise(sizes)]


def measure(lengths: list[int], policy: Qwen25VLConfig) -> dict[str, list[int]]:
    """Bytes of `temp` by kind of attention, length by length."""
    columns, losses = {"blocks": [], "plain": []}, {}
    for length in lengths:
        for name in columns:
            start = time.perf_counter()
            lowered, batch = lower(policy, name, length)
            compiled = lowered.compile(QUICK)
            columns[name].append(compiled.memory_analysis().temp_size_in_bytes)
            print(f"{name} {length}: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            if length == lengths[0]:
                losses[name] = run_once(compiled, policy, batch)
                print(f"{name}: run once at {length} tokens, loss per token {losses[name]:.4f}")
    if not abs(losses["blocks"] - losses["plain"]) < TOLERANCE:
        raise SystemExit(f"the two do not compute the same: {losses}")
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(n) for n in text.split(",")],
        default=[1024, 2048, 4096, 8192, 16384],
        help="tokens of the row, each twice the one before",
    )
    parser.add_argument("--toy", action="store_true", help="a smaller model")
    options = parser.parse_args()
    if len(options.lengths) < 2 or any(b != 2 * a for a, b in itertools.pairwise(options.lengths)):
        parser.error("--lengths needs two or more, each twice the one before")
    policy = small_policy(toy=options.toy)
    count = sum(math.prod(leaf.shape) for leaf in convert.flat_params(convert.abstract_model(policy)).values())
    columns = measure(options.lengths, policy)
    print(f"\n{count / 1e6:.1f}M parameters, fp32, a row with one image of {GRID[1]} x {GRID[2]} patches")
    print(f"{'tokens':>8}" + "".join(f"{n + ' temp MiB':>20}{'exponent':>10}" for n in columns))
    grown = {name: exponents(temp) for name, temp in columns.items()}
    for i, length in enumerate(options.lengths):
        cells = ""
        for name, temp in columns.items():
            exponent = f"{grown[name][i - 1]:.2f}" if i else ""
            cells += f"{temp[i] / MIB:20.1f}{exponent:>10}"
        print(f"{length:8}{cells}")
    print()
    summary = {f"exponent_{name}": values[-1] for name, values in grown.items()}
    summary |= {"lengths": options.lengths, "parameters": count, "temp": columns}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
