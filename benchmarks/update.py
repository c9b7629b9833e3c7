"""The optimiser's update: train.step.apply_gradients beside the same with the norm of what the optimiser asked for.

  python benchmarks/update.py [--aot=v5p:2x2x1] [--millions=100] [--rounds=7]

passes      over memory of the size of the parameters, in a program compiled for one device of that TPU (needs libtpu).
            The fewest are 8: the gradients for their norm, then gradients, parameters and two moments read, and
            parameters and moments written.
cpu_s       processor time of an update of a state of so many million parameters on this machine; the sides take turns

The parameters and moments of both sides are the same to the bit and the norms within a thousandth, or it fails.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from rsagent_jax.aot.compiled import Program
from rsagent_jax.aot.topology import devices, parse_topology
from rsagent_jax.config.schema import OptimConfig
from rsagent_jax.train.state import create_state, make_optimizer
from rsagent_jax.train.step import Sums, apply_gradients

FEWEST = 8
TX, _ = make_optimizer(OptimConfig(lr=2e-5, weight_decay=0.01, schedule="cosine"), 1000)


def ours(state, sums):
    return apply_gradients(TX, state, sums)


def asked(state, sums):
    """As it was until November 2026."""
    new, metrics = apply_gradients(TX, state, sums)
    scale = 1.0 / jnp.maximum(sums.denominator, 1.0)
    updates, _ = TX.update(jax.tree.map(lambda g: g * scale, sums.grads), state.opt_state, state.params)
    return new, metrics | {"l2_updates": optax.global_norm(updates)}


SIDES: dict[str, Callable] = {"ours": ours, "asked": asked}


def shapes(millions: float) -> dict[str, tuple[int, ...]]:
    """Of stacked layers and a table, a quarter each."""
    width = 64 * max(1, round(math.sqrt(millions * 1e6 / 4 / 8) / 64))
    return {"in": (8, width, width), "out": (8, width, width), "qkv": (8, width, width), "table": (8 * width, width)}


def state_and_sums(sizes: dict[str, tuple[int, ...]]):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(s, np.float32)) * 0.02 for name, s in sizes.items()}
    grads = {name: jnp.asarray(rng.standard_normal(s, np.float32)) for name, s in sizes.items()}
    return create_state(params, TX), Sums(grads, jnp.float32(1.0), jnp.float32(64.0), {"tokens": jnp.float32(64.0)})


def passes(side: Callable, where: str, sizes: dict[str, tuple[int, ...]]) -> float:
    device = jax.sharding.SingleDeviceSharding(devices(parse_topology(where))[0])
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in sizes.items()}
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    both = jax.eval_shape(lambda p: create_state(p, TX), params), Sums(params, scalar, scalar, {"tokens": scalar})
    both = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), both)
    text = jax.jit(side, donate_argnums=0).lower(*both).compile().as_text()
    return Program(text).hbm_traffic_bytes() / (4 * sum(math.prod(s) for s in sizes.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aot", default="v5p:2x2x1", help='a TPU to compile for; "" = none')
    parser.add_argument("--millions", type=float, default=100.0, help="of parameters, on this machine")
    parser.add_argument("--rounds", type=int, default=7, help="updates by each side")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    sizes, found = shapes(args.millions), {}
    state, sums = state_and_sums(sizes)
    programs = {name: jax.jit(side) for name, side in SIDES.items()}
    (new, mine), (other, theirs) = (programs[name](state, sums) for name in SIDES)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert mine["l2_updates"] > 0
    np.testing.assert_allclose(mine["l2_updates"], theirs["l2_updates"], rtol=1e-3)
    del new, other
    times = {name: [] for name in SIDES}
    for _ in range(args.rounds):
        for name, program in programs.items():
            start = time.process_time()
            jax.block_until_ready(program(state, sums))
            times[name].append(time.process_time() - start)
    print(f"{sum(math.prod(s) for s in sizes.values()) / 1e6:.0f} million parameters")
    for name, side in SIDES.items():
        found[name] = {"cpu_s": statistics.median(times[name])}
        if args.aot:
            found[name]["passes"] = passes(side, args.aot, sizes)
        print(name, *(f"{key} {value:.3f}" for key, value in found[name].items()))
    print(json.dumps(found | {"fewest_passes": FEWEST, "aot": args.aot}))


if __name__ == "__main__":
    main()
