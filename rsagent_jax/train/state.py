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


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, Callable[[int], Any]]:
    """AdamW with global-norm clipping and frozen parts; also returns the schedule, for the log."""
    if unknown := [part for part in config.freeze if part not in PARTS]:
        raise DataError(f"optim.freeze: unknown {', '.join(unknown)}; parts are {', '.join(PARTS)}")
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
    frozen = tuple(prefix for part in config.freeze for prefix in PARTS[part])
    if frozen:
        tx = optax.partition({"train": tx, "frozen": optax.set_to_zero()}, lambda params: _labels(params, frozen))
    return tx, schedule


def _labels(params: nnx.State, frozen: tuple[str, ...]) -> nnx.State:
    def label(path: tuple, _) -> str:
        name = ".".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        return "frozen" if name.startswith(frozen) else "train"

    return jax.tree_util.tree_map_with_path(label, params)
