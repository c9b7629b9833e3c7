"""One optimiser step, for SFT and GRPO alike: gradients of sums over micro-batches, divided once, then the update.

The functions are pure; train.py jits them. `Objective` is all that differs between the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rsagent_jax.config import GrpoConfig
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.language import token_logprobs
from rsagent_jax.train import losses
from rsagent_jax.train.state import TrainState, stop_frozen
from rsagent_jax.types import Batch, DataError

# (log-probs f32[B, T] aligned to their own token, batch, reference log-probs) -> (loss sum, denominator, metric sums)
Objective = Callable[[jax.Array, Batch, jax.Array], tuple[jax.Array, jax.Array, losses.Metrics]]

jax.tree_util.register_dataclass(Batch, [f.name for f in dataclasses.fields(Batch)], [])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What micro-batches add up to."""

    grads: nnx.State
    loss: jax.Array
    denominator: jax.Array
    metrics: losses.Metrics


def batch_logprobs(graphdef, params, batch: Batch, compute: Compute, temperature: float) -> jax.Array:
    """f32[B, T]: log p(token t | its segment so far) under the sampling temperature; 0 at t = 0."""
    model = nnx.merge(graphdef, params)
    hidden = model(
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        batch.patches,
        batch.patch_segment_ids,
        batch.patch_positions,
        batch.image_slots,
        compute,
    )
    # Every place predicts the next token; the last one's is nobody's. Shifting the targets keeps T a round number.
    targets = jnp.roll(batch.tokens, -1, axis=1)
    logprobs = token_logprobs(hidden, model.decoder.head_VD, targets, temperature=temperature, mesh=compute.mesh)
    return jnp.pad(logprobs[:, :-1], ((0, 0), (1, 0)))


def micro_step(graphdef, objective: Objective, compute: Compute, temperature, freeze, params, batch, ref) -> Sums:
    """Gradient sums of one micro-batch; those of `freeze`d parts are zeros that cost nothing."""

    def loss_fn(p):
        logprobs = batch_logprobs(graphdef, stop_frozen(p, freeze), batch, compute, temperature)
        loss, denominator, metrics = objective(logprobs, batch, ref)
        return loss, (denominator, metrics)

    (loss, (denominator, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return Sums(grads, loss, denominator, metrics)


def add(a: Sums, b: Sums) -> Sums:
    return Sums(
        jax.tree.map(jnp.add, a.grads, b.grads),
        a.loss + b.loss,
        a.denominator + b.denominator,
        losses.merge_metrics(a.metrics, b.metrics),
    )


def apply(tx: optax.GradientTransformation, state: TrainState, sums: Sums) -> tuple[TrainState, losses.Metrics]:
    """The update and the step's metrics: means over trained tokens, and norms."""
    scale = 1.0 / jnp.maximum(sums.denominator, 1.0)
    grads = jax.tree.map(lambda g: g * scale, sums.grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = losses.mean_metrics(sums.metrics) | {
        "loss": sums.loss * scale,
        "l2_grads": optax.global_norm(grads),
        "l2_updates": optax.global_norm(updates),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a stage; `train_step` is the whole of a step."""

    micro: Callable
    add: Callable
    apply: Callable
    logprobs: Callable  # (params, batch) -> f32[B, T], without gradients

    def train_step(self, state: TrainState, batches: Sequence[Batch], refs: Sequence[jax.Array]):
        """One optimiser step over micro-batches of one shape. `state` is donated."""
        total = None
        for batch, ref in zip(batches, refs, strict=True):
            sums = self.micro(state.params, batch, ref)
            total = sums if total is None else self.add(total, sums)
        return self.apply(state, total)


def make_programs(
    graphdef,
    tx,
    objective: Objective,
    compute: Compute,
    temperature: float,
    shardings,
    freeze: tuple[str, ...] = (),
) -> Programs:
    """`shardings` is (state, rows, replicated) of sharding.py. The gradients have the parameters' shardings."""
    state, rows, whole = shardings

    def micro(params, batch, ref):
        return micro_step(graphdef, objective, compute, temperature, freeze, params, batch, ref)

    def logprobs(params, batch):
        return batch_logprobs(graphdef, params, batch, compute, temperature)

    def update(old, sums):
        if any(s.memory_kind == "pinned_host" for s in jax.tree.leaves(state.opt_state)):
            here = jax.tree.map(lambda s: s.with_memory_kind("device"), state.opt_state)
            old = dataclasses.replace(old, opt_state=jax.device_put(old.opt_state, here))
        return apply(tx, old, sums)

    sums = Sums(state.params, whole, whole, whole)
    return Programs(
        micro=jax.jit(micro, in_shardings=(state.params, rows, rows), out_shardings=sums),
        add=jax.jit(add, donate_argnums=0),
        apply=jax.jit(update, in_shardings=(state, sums), out_shardings=(state, whole), donate_argnums=0),
        logprobs=jax.jit(logprobs, in_shardings=(state.params, rows), out_shardings=rows),
    )


def sft_objective(logprobs: jax.Array, batch: Batch, ref: jax.Array):
    """Mean negative log-likelihood of sampled tokens: reasoning and tool calls, terminators included (paper)."""
    del ref
    loss, count = losses.sft_loss(logprobs, batch.loss_mask)
    metrics = {"tokens": count, "logprob": -jax.lax.stop_gradient(loss)}
    return loss, count, metrics


def grpo_objective(config: GrpoConfig) -> Objective:
    """The objective that the config's switches choose."""
    for name, value, table in (
        ("ratio", config.ratio, losses.OBJECTIVES),
        ("kl_estimator", config.kl_estimator, losses.KL_ESTIMATORS),
        ("normalize", config.normalize, ("token", "sequence", "constant")),
    ):
        if value not in table:
            raise DataError(f"grpo.{name} must be one of {', '.join(table)}, got {value!r}")
    if config.updates > 1 and config.tis_clip > 0:
        raise DataError("grpo.tis_clip needs updates = 1: with more, the ratio is taken to the engine's log-probs")

    def objective(logprobs, batch: Batch, ref):
        if config.normalize == "token":
            weights, denominator = losses.token_weights(batch.loss_mask, batch.segment_ids)
        elif config.normalize == "sequence":
            weights, denominator = losses.sequence_weights(batch.loss_mask, batch.segment_ids)
        else:
            length = float(config.sampling.context)
            weights, denominator = losses.constant_weights(batch.loss_mask, batch.segment_ids, length=length)
        old, metrics = batch.old_logprobs, {}
        if config.tis_clip > 0:
            old = jax.lax.stop_gradient(logprobs)
            correction, metrics = losses.truncated_importance_weights(
                old, batch.old_logprobs, batch.loss_mask, cap=config.tis_clip
            )
            weights = weights * correction
        loss, more = losses.OBJECTIVES[config.ratio](
            logprobs,
            old,
            batch.advantages,
            batch.loss_mask,
            batch.segment_ids,
            weights,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        metrics = metrics | more
        if config.kl > 0:
            kl, more = losses.kl_loss(
                logprobs,
                ref,
                batch.loss_mask,
                weights,
                estimator=losses.KL_ESTIMATORS[config.kl_estimator],
                coefficient=config.kl,
            )
            loss, metrics = loss + kl, metrics | more
        return loss, denominator, metrics

    return objective
