"""Training state and the optimiser; which parameters are trained, and which are only read.

What is only read, the base, is no part of the state: it has no gradients and no moments, is kept in the dtype of the
activations (what the forward pass casts it to anyway) and is lent to the programs as an argument of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rsagent_jax.config.schema import LoraConfig, OptimConfig
from rsagent_jax.models.qwen25_vl import convert, lora
from rsagent_jax.models.qwen25_vl.layers import LoraParam
from rsagent_jax.runtime import sharding
from rsagent_jax.types import DataError

PARTS = {  # what `optim.freeze` may name -> the parameters' dotted prefixes
    "vision": ("vision.blocks", "vision.patch_embed"),
    "merger": ("vision.merger_norm", "vision.merger_in", "vision.merger_out"),
    "decoder": ("decoder.layers", "decoder.norm"),
    "embed": ("decoder.embed",),
    "head": ("decoder.lm_head",),
}
EMPTY = nnx.State({})  # the base of a policy that is trained whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    # i32[]: updates that the steps so far had room for. It names the checkpoints and says which step is next, so it
    # counts a step in which nothing taught, too; the optimiser's own count, which the schedule follows, does not.
    step: jax.Array
    params: nnx.State  # fp32, the trained ones
    opt_state: Any


def create_state(params: nnx.State, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.int32(0), params, tx.init(params))


def skip(state: TrainState, updates: int) -> TrainState:
    """The state after a step in which nothing taught: not a bit of parameters and moments moves, not by momentum, nor
    by weight decay or KL; warm-up and schedule wait, as they are the optimiser's."""
    return dataclasses.replace(state, step=state.step + updates)


def updates_made(state: TrainState) -> int:
    """How many updates the optimiser has made."""
    # the schedule's count: Adam has one as well, for its bias
    mine = lambda path, _: any(getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path)  # noqa: E731
    return int(optax.tree_utils.tree_get(state.opt_state, "count", filtering=mine))


def state_shardings(
    params: nnx.State, tx: optax.GradientTransformation, whole: jax.sharding.Sharding, *, offload: bool = False
) -> TrainState:
    """Where the state lives: the optimiser's moments beside their parameters, all else on every device (`whole`).

    With `offload`, each device's part of the moments is in its host's memory; the update fetches it and sends it back.
    Left to itself, the compiler puts moments, which start as constants, on every device.
    """
    state = jax.eval_shape(lambda p: create_state(p, tx), params)
    where = jax.tree.map(lambda p: p.sharding, params)
    moments = jax.tree.map(lambda s: s.with_memory_kind("pinned_host") if offload else s, where)
    beside = dict(transform_non_params=lambda _: whole)
    return TrainState(whole, where, optax.tree_map_params(tx, lambda _, s: s, state.opt_state, moments, **beside))


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, Callable[[int], Any]]:
    """AdamW with global-norm clipping; also returns the schedule, for the log."""
    warmup, rest = optax.linear_schedule(0.0, config.lr, config.warmup_steps), optax.constant_schedule(config.lr)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.lr, max(steps - config.warmup_steps, 1))
    schedule = optax.join_schedules([warmup, rest], [config.warmup_steps])
    adam = optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adam), schedule


def partition_params(graphdef, params: nnx.State, adapters: LoraConfig, freeze: tuple[str, ...]):
    """(graph of the trained model, what is trained, the base) of a plain policy; for arrays or for shapes.

    Without adapters all is trained but the parts `freeze` (PARTS) and the graph is the plain one. With adapters they
    alone are trained; they come as shapes, for `init_adapters`. DataError for parts that this policy does not have, or
    that are all of it.
    """
    if adapters.rank:
        model = nnx.merge(graphdef, params)
        lora.declare(model, adapters)
        return nnx.split(model, LoraParam, nnx.Param)
    paths = {path: ".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    if absent := [part for part in freeze if not any(name.startswith(PARTS[part]) for name in paths.values())]:
        raise DataError(f"optim.freeze: this policy has no {', '.join(absent)} (a tied head is frozen with embed)")
    prefixes = tuple(prefix for part in freeze for prefix in PARTS[part])
    frozen = {path for path, name in paths.items() if name.startswith(prefixes)}
    flat = nnx.to_flat_state(params)
    trained, base = (nnx.from_flat_state([(k, v) for k, v in flat if (k in frozen) == part]) for part in (False, True))
    if not jax.tree.leaves(trained):
        raise DataError(f"optim.freeze: {', '.join(freeze)} are all there is; nothing is left to train")
    return graphdef, trained, base


def vision_frozen(trained: nnx.State) -> bool:
    """Whether the whole tower, merger included, is only read: a batch's images need to be embedded only once."""
    return "vision" not in trained


def init_adapters(graphdef, adapters: nnx.State, base: nnx.State, key: jax.Array, mesh: jax.sharding.Mesh) -> nnx.State:
    """Fresh adapters on the mesh: the model says what the base says. The same numbers on every mesh."""
    where = sharding.param_shardings(nnx.merge(graphdef, adapters, base), mesh)
    return jax.jit(lambda k: lora.init(adapters, k), out_shardings=nnx.filter_state(where, LoraParam))(key)


def cast_frozen(base: nnx.State, dtype: str) -> nnx.State:
    """The base in the dtype of the activations. What is cast here is deleted: two copies would not fit."""

    def one(value):
        cast = value.astype(dtype)
        if cast is not value:
            value.delete()
        return cast

    return jax.tree.map(one, base)


def make_plain(base: nnx.State, adapters: LoraConfig, dtype: str) -> Callable[[nnx.State, nnx.State], nnx.State]:
    """(trained, base) -> parameters of the plain policy, as rollouts and the next stage read them.

    Adapters are merged into the base and all is in `dtype`; without adapters, only the base is cast.
    """
    if not adapters.rank:
        return lambda trained, base: nnx.merge_state(trained, jax.tree.map(lambda p: p.astype(dtype), base))

    scale = adapters.alpha / adapters.rank

    def merge(trained, base):
        merged = lora.merge_adapters(convert.flat_state(base), convert.flat_state(trained), scale, dtype)
        return convert.with_values(base, merged)

    return jax.jit(merge, out_shardings=jax.tree.map(lambda p: p.sharding, base))
