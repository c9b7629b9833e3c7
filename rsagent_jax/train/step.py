"""One optimiser step, for SFT and GRPO alike: gradients of sums over micro-batches, divided once, then the update.

The functions are pure; train.py jits them. `Objective` is all that differs between the stages.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rsagent_jax.config.schema import GrpoConfig, TrainConfig
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.logprobs import token_logprobs, token_logprobs_and_entropy
from rsagent_jax.runtime import sharding
from rsagent_jax.runtime.compiler_options import compiler_options
from rsagent_jax.train import losses
from rsagent_jax.train.state import EMPTY, TrainState, create_state, state_shardings, vision_frozen
from rsagent_jax.types import Batch

# (log-probs f32[B, T] aligned to their own token, batch, reference log-probs; where Stage.entropy, entropies f32[B, T])
# -> (loss sum, denominator, metric sums)
Objective = Callable[..., tuple[jax.Array, jax.Array, losses.LossMetrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What micro-batches add up to."""

    grads: nnx.State
    loss: jax.Array
    denominator: jax.Array
    metrics: losses.LossMetrics


def batch_logprobs(
    graphdef, params, batch: Batch, compute: Compute, temperature: float, *, embedded: bool = False
) -> jax.Array:
    """f32[B, T]: log p(token t | its segment so far) under the sampling temperature; 0 off the loss mask.

    `params` are all of the model's. `embedded`: the batch has the tower's merged tokens in place of its patches.
    """
    return _scores(graphdef, params, batch, compute, temperature, embedded=embedded, entropy=False)[0]


def _scores(
    graphdef, params, batch: Batch, compute: Compute, temperature: float, *, embedded: bool, entropy: bool
) -> list[jax.Array]:
    """The log-probs of `batch_logprobs`; if asked for, then the entropies of what the tokens were drawn from."""
    model = nnx.merge(graphdef, params)
    hidden = model(batch, compute, embedded=embedded)
    # Every place predicts the next token; the last one's is nobody's. Shifting the targets keeps T a round number.
    targets, wanted = (jnp.roll(a, -1, axis=1) for a in (batch.tokens, batch.loss_mask))
    wanted = wanted.at[:, -1].set(False)
    head, mesh = model.decoder.head_VD, compute.mesh
    how = dict(temperature=temperature, mesh=mesh)
    if entropy:
        found = token_logprobs_and_entropy(hidden, head, targets, wanted, **how)
    else:
        found = (token_logprobs(hidden, head, targets, wanted, **how),)
    return [jnp.roll(x, 1, axis=1) for x in found]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What tells the steps of SFT and GRPO apart."""

    objective: Objective
    temperature: float = 1.0  # of the log-probs
    kl: float = 0.0  # weight of the divergence from the policy that the stage began with
    epochs: int = 1  # passes over the batches of a step
    minibatches: int = 1  # parts of them, an optimiser step each
    entropy: bool = False  # the objective takes entropies as well
    tis_clip: float = 0.0  # above 0: correct_for_engine goes before a step's first update

    @property
    def updates(self) -> int:
        """Optimiser steps on the batches of a step."""
        return self.epochs * self.minibatches

    def minibatch_slices(self, count: int) -> list[slice]:
        """Which of a step's `count` micro-batches each update takes, in their order. Of fewer micro-batches than
        minibatches, which are too few trajectories to divide, every update takes all."""
        parts = self.minibatches if count >= self.minibatches else 1
        return [slice(i * count // parts, (i + 1) * count // parts) for _ in range(self.epochs) for i in range(parts)]


def micro_step(graphdef, stage: Stage, compute: Compute, params, base, batch, ref, *, embedded: bool = False) -> Sums:
    """Gradient sums of one micro-batch for `params`; the parameters of `base` are only read."""

    def loss_fn(p):
        both = nnx.merge_state(p, base)
        how = dict(embedded=embedded, entropy=stage.entropy)
        logprobs, *entropy = _scores(graphdef, both, batch, compute, stage.temperature, **how)
        loss, denominator, metrics = stage.objective(logprobs, batch, ref, *entropy)
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


def apply_gradients(
    tx: optax.GradientTransformation, state: TrainState, sums: Sums
) -> tuple[TrainState, losses.LossMetrics]:
    """The update and the step's metrics: means over trained tokens, and norms.

    That of the update is of what the parameters moved by: what the optimiser asked for, rounded as they are. It comes
    with the pass that writes them; what was asked for took passes of its own.
    """
    scale = 1.0 / jnp.maximum(sums.denominator, 1.0)
    grads = jax.tree.map(lambda g: g * scale, sums.grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = losses.mean_metrics(sums.metrics) | {
        "loss": sums.loss * scale,
        "l2_grads": optax.tree.norm(grads),
        "l2_updates": optax.tree.norm(jax.tree.map(jnp.subtract, params, state.params)),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


@dataclasses.dataclass(frozen=True)
class TrainPrograms:
    """The jitted programs of a stage; `train_step` runs those of a step. `base` is what is not trained."""

    shardings: TrainState  # where the state's arrays live
    create_state: Callable  # params -> TrainState, at the start of a stage; params are donated
    embed: Callable  # (base, batch) -> batch for all that follows; the tower's work done, if it is not trained
    micro: Callable  # (params, base, batch, ref) -> Sums
    add: Callable
    apply_gradients: Callable
    logprobs: Callable  # (params, base, batch) -> f32[B, T], of the reference, without gradients
    correct: Callable  # (params, base, batch) -> what correct_for_engine puts into the batch, and metric sums

    def correct_for_engine(self, params: nnx.State, base: nnx.State, batches: Sequence[Batch]):
        """(batches, metrics): before the first of several updates, what they have in common (decoupled PPO).

        The ratio is taken to the policy with which the updates begin, so `old_logprobs` become its own; how it differs
        from the policy that sampled, the engine's and maybe of older weights, weighs the advantages, truncated.
        """
        found = [self.correct(params, base, batch) for batch in batches]
        batches = [dataclasses.replace(b, **new) for b, (new, _) in zip(batches, found, strict=True)]
        return batches, losses.mean_metrics(functools.reduce(losses.merge_metrics, [sums for _, sums in found]))

    def train_step(self, state: TrainState, base: nnx.State, batches: Sequence[Batch], refs: Sequence[jax.Array]):
        """One optimiser step over micro-batches of one shape, as `embed` gave them. `state` is donated."""
        total = None
        for batch, ref in zip(batches, refs, strict=True):
            sums = self.micro(state.params, base, batch, ref)
            total = sums if total is None else self.add(total, sums)
        return self.apply_gradients(state, total)


def make_programs(
    graphdef,
    tx,
    stage: Stage,
    compute: Compute,
    params: nnx.State,
    base: nnx.State = EMPTY,
    *,
    offload: bool = False,
    reference=None,
) -> TrainPrograms:
    """The programs on the mesh of `compute`. The gradients have the parameters' shardings.

    `params` and `base` (arrays or shapes, with shardings) are what partition_params trains, and what it does not.
    `offload`: as state_shardings has it. `reference` is the graph of a reference policy that is the base alone, the
    plain one under fresh adapters; without it `logprobs` takes parameters as the state has them.
    """
    rows, replicated = sharding.rows(compute.mesh), sharding.replicated(compute.mesh)
    state = state_shardings(params, tx, replicated, offload=offload)
    base = jax.tree.map(lambda x: x.sharding, base)
    frozen_vision = vision_frozen(state.params)
    jit = functools.partial(jax.jit, compiler_options=compiler_options(compute.mesh))
    tower = nnx.graphdef(nnx.merge(graphdef, nnx.merge_state(state.params, base)).vision)

    def embed(base, batch):
        vision = nnx.merge(tower, base["vision"])
        merged = vision(batch.patches, batch.patch_segment_ids, batch.patch_positions, compute)
        return dataclasses.replace(batch, patches=merged)

    def micro(params, base, batch, ref):
        return micro_step(graphdef, stage, compute, params, base, batch, ref, embedded=frozen_vision)

    def logprobs(params, base, batch):
        params = nnx.merge_state(params, base)
        return batch_logprobs(reference or graphdef, params, batch, compute, stage.temperature, embedded=frozen_vision)

    def correct(params, base, batch):
        params = nnx.merge_state(params, base)
        own = batch_logprobs(graphdef, params, batch, compute, stage.temperature, embedded=frozen_vision)
        tis = losses.truncated_importance_weights
        weights, metrics = tis(own, batch.old_logprobs, batch.loss_mask, cap=stage.tis_clip)
        return dict(old_logprobs=own, advantages=batch.advantages * weights), metrics

    def update(old, sums):
        if any(s.memory_kind == "pinned_host" for s in jax.tree.leaves(state.opt_state)):
            here = jax.tree.map(lambda s: s.with_memory_kind("device"), state.opt_state)
            old = dataclasses.replace(old, opt_state=jax.device_put(old.opt_state, here))
        return apply_gradients(tx, old, sums)

    sums = Sums(state.params, replicated, replicated, replicated)
    compared = EMPTY if reference else state.params
    return TrainPrograms(
        shardings=state,
        create_state=jax.jit(lambda p: create_state(p, tx), out_shardings=state, donate_argnums=0),
        embed=jit(embed, in_shardings=(base, rows), out_shardings=rows) if frozen_vision else lambda base, batch: batch,
        micro=jit(micro, in_shardings=(state.params, base, rows, rows), out_shardings=sums),
        add=jax.jit(add, donate_argnums=0),
        apply_gradients=jax.jit(
            update, in_shardings=(state, sums), out_shardings=(state, replicated), donate_argnums=0
        ),
        logprobs=jit(logprobs, in_shardings=(compared, base, rows), out_shardings=rows),
        correct=jit(correct, in_shardings=(state.params, base, rows), out_shardings=(rows, replicated)),
    )


def sft_objective(logprobs: jax.Array, batch: Batch, ref: jax.Array):
    """Mean negative log-likelihood of sampled tokens: reasoning and tool calls, terminators included (paper)."""
    del ref
    loss, count = losses.sft_loss(logprobs, batch.loss_mask)
    metrics = {"tokens": count, "logprob": -jax.lax.stop_gradient(loss)}
    return loss, count, metrics


def grpo_objective(config: GrpoConfig) -> Objective:
    """The objective that the config's switches choose. Where a batch is seen by more than one update, its old log-probs
    and advantages are what `correct_for_engine` made of them."""

    def objective(logprobs, batch: Batch, ref, entropy=None):
        mask, segments, length = batch.loss_mask, batch.segment_ids, float(config.sampling.context)
        weights, denominator = losses.loss_weights(config.normalize, mask, segments, length=length)
        # KL is to the reference, not to the engine: it keeps the weights without the correction (as TRL).
        policy_weights, old, metrics = weights, batch.old_logprobs, {}
        if config.tis_clip > 0 and config.updates == 1:
            old = jax.lax.stop_gradient(logprobs)
            tis = losses.truncated_importance_weights
            correction, metrics = tis(old, batch.old_logprobs, mask, cap=config.tis_clip)
            policy_weights = weights * correction
        arrays = logprobs, old, batch.advantages, mask, segments, policy_weights
        bounds = {name: getattr(config, name) for name in ("clip_low", "clip_high", "tau_pos", "tau_neg")}
        loss, more = losses.policy_loss(config.ratio, *arrays, **bounds)
        metrics = metrics | more
        if config.kl > 0:
            penalty = dict(estimator=config.kl_estimator, coefficient=config.kl)
            kl, more = losses.kl_loss(logprobs, ref, mask, weights, **penalty)
            loss, metrics = loss + kl, metrics | more
        if config.entropy > 0:
            bonus, more = losses.entropy_bonus(entropy, mask, weights, coefficient=config.entropy)
            loss, metrics = loss + bonus, metrics | more
        return loss, denominator, metrics

    return objective


def make_stage(config: TrainConfig, name: str) -> Stage:
    if name == "sft":
        return Stage(sft_objective)
    grpo = config.grpo
    return Stage(
        grpo_objective(grpo),
        grpo.sampling.temperature or 1.0,
        grpo.kl,
        epochs=grpo.epochs,
        minibatches=grpo.minibatches,
        entropy=grpo.entropy > 0,
        tis_clip=grpo.tis_clip if grpo.updates > 1 else 0.0,
    )
