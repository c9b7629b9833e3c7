"""Training state and the optimiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rsagent_jax.config import OptimConfig
from rsagent_jax.types import DataError

PARTS = {  # what `optim.freeze` may name -> the parameters' dotted prefixes
    "vision": ("vision.blocks", "vision.patch_embed"),
    "merger": ("vision.merger_norm", "vision.merger_in", "vision.merger_out"),
    "decoder": ("decoder.layers", "decoder.norm"),
    "embed": ("decoder.embed",),
    "head": ("decoder.lm_head",),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # i32[]
    params: nnx.State  # fp32
    opt_state: Any


def create_state(params: nnx.State, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), params, tx.init(params))


def state_shardings(
    params: nnx.State, tx: optax.GradientTransformation, whole: jax.sharding.Sharding, *, offload: bool = False
) -> TrainState:
    """Where the state lives: the optimiser's moments beside their parameters, all else on every device (`whole`).

    With `offload`, each device's part of the moments is in its host's memory; the update fetches it and sends it back.
    Left to itself, the compiler puts moments, which start as constants, on every device.
    """
    keystr = jax.tree_util.keystr
    beside = {keystr(path): leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, _):  # a moment's path ends in its parameter's path
        where = find(path)
        moment = isinstance(path[0], jax.tree_util.GetAttrKey) and path[0].name == "opt_state" and where is not whole
        return where.with_memory_kind("pinned_host") if offload and moment else where

    def find(path):
        return next((beside[s] for i in range(len(path)) if (s := keystr(path[i:])) in beside), whole)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(lambda p: create_state(p, tx), params))


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, Callable[[int], Any]]:
    """AdamW with global-norm clipping and frozen parts; also returns the schedule, for the log."""
    warmup = optax.linear_schedule(0.0, config.lr, max(config.warmup_steps, 1))
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.lr, max(steps - config.warmup_steps, 1))
    elif config.schedule == "constant":
        rest = optax.constant_schedule(config.lr)
    else:
        raise DataError(f"optim.schedule must be constant or cosine, got {config.schedule!r}")
    schedule = optax.join_schedules([warmup, rest], [config.warmup_steps]) if config.warmup_steps else rest
    adam = optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
    if config.freeze:
        labels = lambda params: jax.tree.map(lambda f: "frozen" if f else "train", is_frozen(params, config.freeze))  # noqa: E731
        tx = optax.partition({"train": tx, "frozen": optax.set_to_zero()}, labels)
    return tx, schedule


def is_frozen(params: nnx.State, parts: tuple[str, ...]) -> nnx.State:
    """True for every parameter that belongs to one of `parts` (PARTS)."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise DataError(f"optim.freeze: unknown {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    paths = [_dotted(path) for path, _ in nnx.to_flat_state(params)]
    if absent := [part for part in parts if not any(path.startswith(PARTS[part]) for path in paths)]:
        raise DataError(f"optim.freeze: this policy has no {', '.join(absent)} (a tied head is frozen with embed)")
    prefixes = tuple(prefix for part in parts for prefix in PARTS[part])
    flat = [(path, leaf.replace(_dotted(path).startswith(prefixes))) for path, leaf in nnx.to_flat_state(params)]
    return nnx.from_flat_state(flat)


def stop_frozen(params: nnx.State, parts: tuple[str, ...]) -> nnx.State:
    """The same parameters; no gradient is computed through the frozen ones."""
    if not parts:
        return params
    return jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, is_frozen(params, parts))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
