"""Compiles what a stage would run for a TPU that is not there, and reports on it: `train.py --aot=v5e-16`.

The programs are those of train.py, made by the same functions from the same config; only the arrays are missing. A
row holds one sequence that fills it: a first view and as many overlays as fit the patches, then text.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rsagent_jax.aot import rollout
from rsagent_jax.aot.flops import Workload, model_flops
from rsagent_jax.aot.report import Job, ProgramReport, analyse, out_of_memory
from rsagent_jax.aot.rollout import device_bytes
from rsagent_jax.aot.topology import Topology, devices
from rsagent_jax.config import slices
from rsagent_jax.config.schema import BatchConfig, TrainConfig
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.attention import LANES, is_fused, tile, tiles_between
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, load_config, size_config
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.runtime import sharding
from rsagent_jax.train.state import (
    EMPTY,
    create_state,
    make_optimizer,
    partition_params,
    state_shardings,
    vision_frozen,
)
from rsagent_jax.train.step import Sums, grpo_objective, make_programs, sft_objective
from rsagent_jax.types import Batch, DataError


def policy_config(weights: str) -> Qwen25VLConfig:
    """The shape of the policy: from a directory of weights, or a published size that the name tells (…-7B-…)."""
    if pathlib.Path(weights).is_dir():
        inner = pathlib.Path(weights) / "policy"
        return load_config(inner if inner.is_dir() else weights)
    if match := re.search(r"(?<!\d)(3|7|32|72)b", weights.lower()):
        return size_config(match[0])
    raise DataError(
        f"policy.weights {weights!r} is no directory and names no published size; for --aot give a directory with a"
        " config.json, or 3b, 7b, 32b or 72b"
    )


def report_stage(
    config: TrainConfig, stage: str, topology: Topology, say: Callable[[str], None], only: str = ""
) -> list[ProgramReport]:
    """Compiles every program of a stage with `only` in its name; one that does not fit is a report like the others.

    The rollout's are for the devices of one host.
    """
    policy = policy_config(config.policy.weights)
    found = devices(topology)
    mesh = sharding.make_mesh(config.mesh, found)
    settings = config.sft if stage == "sft" else config.grpo
    host = None
    if stage == "grpo" and topology.host.devices % config.grpo.sampling.tensor == 0:
        alone = topology.host == topology  # then the policy lies on the same devices as the engine
        host = rollout.host_mesh(found if alone else devices(topology.host), config.grpo.sampling.tensor)
    reports = []
    for job in stage_jobs(config, stage, policy, mesh, host):
        if only not in job.program:
            continue
        fields = ("program", "model_flops", "resident_bytes", "decoding")
        given = {field: getattr(job, field) for field in fields}
        kernel_flops = attention_flops(policy, job.work or workload(settings.batch, policy, vision_trained=True))
        start = time.perf_counter()
        lowered = job.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            reports.append(out_of_memory(error, topology, **given))
        else:
            reports.append(analyse(compiled, topology, **given, kernel_flops=kernel_flops))
        say(f"{job.program} for {topology.name}: {time.perf_counter() - start:.0f} s")
    return reports


def stage_jobs(
    config: TrainConfig,
    stage: str,
    policy: Qwen25VLConfig,
    mesh: jax.sharding.Mesh,
    host: jax.sharding.Mesh | None = None,
) -> Iterator[Job]:
    """The stage's programs: the tower if it is not trained, a micro-batch's gradients, their sum if there are several,
    the update, log-probs for KL. With one host's rollout mesh, the engine's as well."""
    settings = config.sft if stage == "sft" else config.grpo
    temperature = 1.0 if stage == "sft" else config.grpo.sampling.temperature or 1.0
    objective = sft_objective if stage == "sft" else grpo_objective(config.grpo)
    plain, params = nnx.split(convert.abstract_model(policy), nnx.Param)
    lora, frozen = config.policy.lora, settings.optim.freeze
    graphdef, params, base = partition_params(plain, params, lora, frozen)
    placed = sharding.param_shardings(nnx.merge(graphdef, params, base), mesh)
    compute = Compute.of(config.policy, mesh)

    def shapes(tree, dtype):
        flat, where = convert.flat_state(tree), convert.flat_state(placed)
        return convert.with_values(
            tree, {name: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where[name]) for name, x in flat.items()}
        )

    params, half, base = shapes(params, jnp.float32), shapes(params, compute.dtype), shapes(base, compute.dtype)
    tx, _ = make_optimizer(settings.optim, 1000)
    rows, whole = sharding.rows(mesh), sharding.replicated(mesh)
    shardings = (state_shardings(params, tx, whole, offload=settings.optim.offload), rows, whole)
    compared = plain if lora.rank else None
    programs = make_programs(graphdef, tx, objective, compute, temperature, shardings, base, compared)
    state = jax.eval_shape(lambda p: create_state(p, tx), params)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings[0])
    given = abstract_batch(settings.batch, policy, rows)
    batch = jax.eval_shape(programs.embed, base, given)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    ref = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32, sharding=rows)

    count = micro_batches(config, stage)
    waiting = (count - 1) * device_bytes(batch)  # train.py puts all micro-batches of a step on the devices at once
    moments, grads = device_bytes(state.opt_state), device_bytes(params)  # offloaded moments are none
    half = EMPTY if lora.rank else half  # the reference is the base alone
    compares = stage == "grpo" and config.grpo.kl > 0
    reference = device_bytes(half) if compares else 0
    trained = step_workload(settings, policy, params, adapted=lora.rank > 0)
    forward = dataclasses.replace(trained, trained=False, vision_trained=False, embed_trained=False, adapters=0)
    if vision_frozen(params):  # the tower has a program of its own
        seen = model_flops(policy, forward).total
        trained, forward = (dataclasses.replace(work, images=()) for work in (trained, forward))
        tower = device_bytes(base["vision"])  # the compiler drops arguments that a program does not read
        held = moments + device_bytes(params) + reference + device_bytes(base) - tower + waiting
        flops = seen - model_flops(policy, forward).total
        yield Job(f"{stage} tower", lambda: programs.embed.lower(base, given), flops, held)
        waiting += tower
    flops = model_flops(policy, trained).total
    resident = moments + reference + (grads if count > 1 else 0) + waiting
    yield Job(f"{stage} gradients", lambda: programs.micro.lower(params, base, batch, ref), flops, resident)
    if compares:
        held = (
            moments + device_bytes(params) + waiting
        )  # the policy that is trained, while the reference reads the batch
        flops = model_flops(policy, forward).total
        yield Job(f"{stage} log-probs", lambda: programs.logprobs.lower(half, base, batch), flops, held)
    sums = jax.eval_shape(programs.micro, params, base, batch, ref)
    where = Sums(shardings[0].params, whole, whole, whole)
    # `where` is a prefix of `sums`: scalars and metrics lie whole on every device.
    spread = jax.tree.broadcast(where, sums)
    sums = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), sums, spread)
    held = reference + device_bytes(base) + count * device_bytes(batch)
    yield Job(f"{stage} update", lambda: programs.apply_gradients.lower(state, sums), 0.0, held)
    if host is not None:
        # While the engine plays, train.py holds the state, the reference and the base. A single process without
        # adapters hands over the parameters themselves, else a copy is made.
        held = moments + device_bytes(params) + reference + device_bytes(base)
        given = nnx.merge_state(params, base) if host.size == mesh.size and not lora.rank else None
        yield from rollout.rollout_jobs(config.grpo.sampling, policy, compute.dtype, host, held, given)


def micro_batches(config: TrainConfig, stage: str) -> int:
    """Micro-batches of a step whose sequences fill their rows."""
    if stage == "sft":
        return math.ceil(config.sft.trajectories_per_step / config.sft.batch.rows)
    return math.ceil(config.grpo.prompts * config.grpo.group / config.grpo.batch.rows)


def abstract_batch(batch: BatchConfig, policy: Qwen25VLConfig, rows: jax.sharding.Sharding) -> Batch:
    """types.Batch with shapes instead of arrays."""
    b, t, p = batch.rows, batch.tokens, batch.patches
    shapes = dict(
        tokens=((b, t), jnp.int32),
        positions=((b, 3, t), jnp.int32),
        segment_ids=((b, t), jnp.int32),
        loss_mask=((b, t), jnp.bool_),
        advantages=((b, t), jnp.float32),
        old_logprobs=((b, t), jnp.float32),
        patches=((b, p, policy.vision.patch_dim), jnp.float32),
        patch_segment_ids=((b, p), jnp.int32),
        patch_positions=((b, p, 2), jnp.int32),
        image_slots=((b, t), jnp.int32),
    )
    return Batch(**{k: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for k, (shape, dtype) in shapes.items()})


def workload(batch: BatchConfig, policy: Qwen25VLConfig, *, vision_trained: bool) -> Workload:
    """Rows without a place of padding: eight overlays of whole windows, 32 x 32 patches, and a view in what is left."""
    side = 32
    overlays = min(8, max(0, batch.patches // side**2 - 1))
    left = batch.patches - overlays * side**2
    width = max(w for w in range(8, int(math.sqrt(left)) + 1, 8) if left % w == 0 and left // w % 8 == 0)
    images = ((left // width, width),) + ((side, side),) * overlays
    return Workload(batch.rows, batch.tokens, (batch.tokens,), images, True, vision_trained)


def step_workload(settings: Any, policy: Qwen25VLConfig, params: nnx.State, *, adapted: bool) -> Workload:
    """What a micro-batch of a stage (its SftConfig or GrpoConfig) computes; `params` are the trained ones."""
    frozen = settings.optim.freeze
    return dataclasses.replace(
        workload(settings.batch, policy, vision_trained="vision" in params and "vision" not in frozen),
        trained=not adapted and "decoder" not in frozen,
        embed_trained=not adapted and not {"embed", "merger"} <= set(frozen),
        adapters=sum(math.prod(x.shape) for x in jax.tree.leaves(params)) if adapted else 0,
    )


def attention_flops(
    policy: Qwen25VLConfig, work: Workload
) -> Callable[[str, tuple[tuple[int, ...], ...]], float | None]:
    """What the splash kernel does in one execution, from its name and its operands' shapes (it carries no estimate).

    Which tiles it computes depends on the row's segments: here those of `work`. The forward pass has two matrix
    products per tile, the fused backward pass five, the divided one three (dq) and four (dkv).
    """
    lengths = [_padded(grid, policy) for grid in work.images]

    def flops(name: str, shapes: tuple[tuple[int, ...], ...]) -> float | None:
        queries = next((s for s in shapes if len(s) >= 3 and s[-1] >= 16 and s[-2] >= LANES), None)
        if "splash" not in name or queries is None:
            return None
        *batch, length, dim = queries
        text = dim == policy.text.head_dim
        ids = np.zeros(length, np.int32)
        ends = np.cumsum(work.segments if text else lengths)
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False), 1):
            ids[start:end] = number
        tiles = int(tiles_between(ids[None], tile(length), causal=text).sum())
        products = 3 if "_dq_" in name else 2 if "_fwd_" in name else 5 if is_fused(length) else 4
        return products * 2.0 * math.prod(batch) * tiles * tile(length) ** 2 * dim

    return flops


def _padded(grid: tuple[int, int], policy: Qwen25VLConfig) -> int:
    """Places of an image in the patch buffer."""
    return padded_patches(((1, *grid),), policy.vision)


def fill_topology_defaults(config: TrainConfig, topology: Topology, policy: Qwen25VLConfig) -> TrainConfig:
    """The config with what it leaves to the slice filled in for this topology."""
    named = config if config.slice else dataclasses.replace(config, slice=topology.name if "-" in topology.name else "")
    return slices.fill_slice_defaults(named, policy.text.hidden_size, topology.devices)
