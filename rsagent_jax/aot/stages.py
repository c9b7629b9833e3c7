"""Compiles what a stage would run for a TPU that is not there, and reports on it: `train.py --aot=v5e-16`.

The programs are those of train.py, made by the same functions from the same config; only the arrays are missing. A
row holds one sequence that fills it: a first view and as many overlays as fit the patches, then text.
"""

import dataclasses
import math
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from rsagent_jax.aot import rollout
from rsagent_jax.aot.flops import Workload, model_flops
from rsagent_jax.aot.report import Job, ProgramReport, report_job, reports_table, reports_to_json
from rsagent_jax.aot.rollout import device_bytes, place_shapes
from rsagent_jax.aot.topology import SLICES, Topology, devices, parse_topology
from rsagent_jax.aot.traced import KernelFlops
from rsagent_jax.config import slices
from rsagent_jax.config.schema import BatchConfig, SamplingConfig, TrainConfig
from rsagent_jax.data.packing import empty_batch
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.attention import LANES, is_fused, tile, tiles_between
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, load_config, size_config
from rsagent_jax.models.qwen25_vl.load import policy_directory
from rsagent_jax.models.qwen25_vl.positions import padded_patches
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.train.state import EMPTY, make_optimizer, partition_params, vision_frozen
from rsagent_jax.train.step import Sums, make_programs, make_stage
from rsagent_jax.types import Batch, DataError


def policy_config(weights: str) -> Qwen25VLConfig:
    """The shape of the policy: from a directory of weights, or a published size that the name tells (…-7B-…)."""
    if pathlib.Path(weights).is_dir():
        return load_config(policy_directory(weights))
    if match := re.search(r"(?<!\d)(3|7|32|72)b", weights.lower()):
        return size_config(match[0])
    raise DataError(
        f"policy.weights {weights!r} is no directory and names no published size; for --aot give a directory with a"
        " config.json, or 3b, 7b, 32b or 72b"
    )


def topologies(name: str, config: TrainConfig) -> list[Topology]:
    """Of this name; of `all`, each with a preset for the config's policy and stages. DataError where there is none."""
    if name != "all":
        return [parse_topology(name)]
    size = slices.SIZES.get(policy_config(config.policy.weights).text.hidden_size)
    presets = slices.PRESETS.get(size, {}).items()
    if not presets:
        raise DataError(f"--aot=all: no slice has a preset for {config.policy.weights!r}; name one: --aot=v5e:2x2")
    return [parse_topology(where) for where, preset in presets if preset.slots or "grpo" not in config.stages]


def report_stages(config: TrainConfig, topology: Topology, only: str = "") -> list[ProgramReport]:
    """Compiles every program of the config's stages with `only` in its name, or one of several with commas between
    them; one that does not fit is a report like the others. DataError where no name has it.

    The rollout's are for the devices of one host. Says on stderr how long each program took.
    """
    policy = policy_config(config.policy.weights)
    config = fill_topology_defaults(config, topology, policy)
    return _report_jobs(_config_jobs(config, topology, policy), topology, policy, only)


def _config_jobs(config: TrainConfig, topology: Topology, policy: Qwen25VLConfig) -> Iterator[Job]:
    found, tensor = devices(topology), config.grpo.sampling.tensor
    mesh = sharding.make_mesh(config.mesh, found)
    for stage in config.stages:
        host = None
        if (stage == "grpo" or config.validation.sets) and topology.host.devices % tensor == 0:  # SFT's validation
            alone = topology.host == topology  # then the policy lies on the same devices as the engine
            host = rollout.host_mesh(found if alone else devices(topology.host), tensor)
        micro_batch = workload(getattr(config, stage).batch, policy, vision_trained=True)
        for job in stage_jobs(config, stage, policy, mesh, host):
            theirs = "validation " if stage == "sft" and job.program.startswith("rollout") else ""
            yield dataclasses.replace(job, work=job.work or micro_batch, program=f"{theirs}{job.program}")


def _report_jobs(jobs: Iterable[Job], topology: Topology, policy: Qwen25VLConfig, only: str) -> list[ProgramReport]:
    reports, names, wanted = [], [], [part for part in only.split(",") if part] or [""]
    for job in jobs:
        names.append(job.program)
        if any(part in job.program for part in wanted):
            start = time.perf_counter()
            reports.append(report_job(job, topology, attention_flops(policy, job.work)))
            print(f"{job.program} for {topology.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not reports:
        raise DataError(f"--aot_only={only}: no program has this in its name; there are {', '.join(names)}")
    return reports


def begin_compiling() -> None:
    PROGRESS.limit(0.0, 0.0)  # it may take hours
    jax.config.update("jax_platforms", "cpu")  # the compiler is asked for, not a TPU


def print_reports(reports: Sequence[ProgramReport]) -> int:
    """Exit status: 3 if a program does not fit, else 0."""
    print(reports_table(reports))
    print(reports_to_json(reports))
    return 0 if all(report.fits for report in reports) else 3


def compile_engine(sampling: SamplingConfig, weights: str, dtype: str, name: str, only: str = "") -> int:
    """For evaluate.py, collect and segment: compiles the engine that a host of a slice has to itself, or its programs
    with `only` in the name (DataError where none has it), and prints the table. 3 if a program does not fit, else 0."""
    begin_compiling()
    policy, topology = policy_config(weights), parse_topology(name)
    found = devices(topology.host)
    sampling = slices.fill_engine_defaults(sampling, policy.text.hidden_size, found)
    mesh = rollout.host_mesh(found[: sampling.tensor * sampling.slots], sampling.tensor)
    row = Workload(1, sampling.context, (sampling.context,))
    jobs = (
        dataclasses.replace(job, work=job.work or row) for job in rollout.rollout_jobs(sampling, policy, dtype, mesh, 0)
    )
    return print_reports(_report_jobs(jobs, topology, policy, only))


def stage_jobs(
    config: TrainConfig, stage: str, policy: Qwen25VLConfig, mesh: Mesh, host: Mesh | None = None
) -> Iterator[Job]:
    """The stage's programs: the tower if it is not trained, a micro-batch's gradients, their sum if there are several,
    the update, log-probs for KL. With one host's rollout mesh, the engine's as well."""
    settings, sampling, lora = getattr(config, stage), config.grpo.sampling, config.policy.lora
    made = make_stage(config, stage)
    compute, rows, whole = Compute.of(config.policy, mesh), sharding.rows(mesh), sharding.replicated(mesh)
    plain, params = nnx.split(convert.abstract_model(policy), nnx.Param)
    graphdef, params, base = partition_params(plain, params, lora, settings.optim.freeze)
    where = convert.flat_state(sharding.param_shardings(nnx.merge(graphdef, params, base), mesh))

    def shapes(tree, dtype):
        flat = convert.flat_state(tree).items()
        return convert.with_values(tree, {n: jax.ShapeDtypeStruct(x.shape, dtype, sharding=where[n]) for n, x in flat})

    params, half, base = shapes(params, jnp.float32), shapes(params, compute.dtype), shapes(base, compute.dtype)
    half = EMPTY if lora.rank else half  # of the reference, which is the base alone
    tx, _ = make_optimizer(settings.optim, 1000)
    options = dict(offload=settings.optim.offload, reference=plain if lora.rank else None)
    programs = make_programs(graphdef, tx, made, compute, params, base, **options)
    state = place_shapes(jax.eval_shape(programs.create_state, params), programs.shardings)
    pixels = abstract_batch(settings.batch, policy, rows)
    batch = place_shapes(jax.eval_shape(programs.embed, base, pixels), rows)
    ref = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.float32, sharding=rows)
    sums = jax.eval_shape(programs.micro, params, base, batch, ref)
    sums = place_shapes(sums, Sums(programs.shardings.params, whole, whole, whole))  # metrics lie whole on every device

    sequences = settings.trajectories_per_step if stage == "sft" else settings.prompts * settings.group
    count = math.ceil(sequences / settings.batch.rows)  # micro-batches, if every sequence fills its row
    summed = math.ceil(count / made.minibatches)  # of an update
    waiting = (count - 1) * device_bytes(batch)  # train.py puts all micro-batches of a step on the devices at once
    moments, grads = device_bytes(state.opt_state), device_bytes(params)  # offloaded moments are none
    reference = device_bytes(half) if made.kl > 0 else 0
    trained = step_workload(settings, policy, params, adapted=lora.rank > 0)
    forward = dataclasses.replace(trained, trained=False, vision_trained=False, embed_trained=False, adapters=0)
    held = moments + device_bytes(params) + reference + device_bytes(base)  # what a step leaves on the devices
    if vision_frozen(params):  # the tower has a program of its own
        seen = model_flops(policy, forward).total
        trained, forward = (dataclasses.replace(work, images=()) for work in (trained, forward))
        tower = device_bytes(base["vision"])  # the compiler drops arguments that a program does not read
        flops = seen - model_flops(policy, forward).total
        yield Job(f"{stage} tower", lambda: programs.embed.trace(base, pixels), flops, held - tower + waiting)
        waiting += tower
    resident = moments + reference + (grads if summed > 1 else 0) + waiting
    flops = model_flops(policy, trained).total
    yield Job(f"{stage} gradients", lambda: programs.micro.trace(params, base, batch, ref), flops, resident)
    if made.kl > 0:  # the policy that is trained stays, while the reference reads the batch
        resident = moments + device_bytes(params) + waiting
        flops = model_flops(policy, forward).total
        yield Job(f"{stage} log-probs", lambda: programs.logprobs.trace(half, base, batch), flops, resident)
    if made.tis_clip > 0:  # the policy that several updates begin with reads the batch
        resident, flops = moments + reference + waiting, model_flops(policy, forward).total
        yield Job(f"{stage} old log-probs", lambda: programs.correct.trace(params, base, batch), flops, resident)
    resident = reference + device_bytes(base) + count * device_bytes(batch)
    yield Job(f"{stage} update", lambda: programs.apply_gradients.trace(state, sums), 0.0, resident)
    if host is not None:
        # A single process without adapters hands over the parameters themselves, else a copy is made.
        several = host.size != mesh.size
        given = None if several or lora.rank else nnx.merge_state(params, base)
        merged = device_bytes(base) if several and lora.rank else 0  # with adapters: there while weights are made
        for job in rollout.rollout_jobs(sampling, policy, compute.dtype, host, held, given, several):
            beside = merged if job.program.startswith("rollout weights") else 0
            yield dataclasses.replace(job, resident_bytes=job.resident_bytes + beside)


def abstract_batch(batch: BatchConfig, policy: Qwen25VLConfig, rows: NamedSharding) -> Batch:
    """types.Batch with shapes instead of arrays."""
    one = empty_batch(dataclasses.replace(batch, rows=1), policy)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch.rows, *x.shape[1:]), x.dtype, sharding=rows), one)


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


def attention_flops(policy: Qwen25VLConfig, work: Workload) -> KernelFlops:
    """What the splash kernel does in one execution, from its name and its operands' shapes (it carries no estimate).

    Which tiles it computes depends on the row's segments: here those of `work`. The forward pass has two matrix
    products per tile, the fused backward pass five, the divided one three (dq) and four (dkv).
    """
    lengths = [padded_patches(((1, *grid),), policy.vision) for grid in work.images]

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


def fill_topology_defaults(config: TrainConfig, topology: Topology, policy: Qwen25VLConfig) -> TrainConfig:
    """The config with what it leaves to the slice filled in for this topology. DataError where it names another slice,
    or its hosts cannot share a step of GRPO."""
    if config.slice in SLICES and parse_topology(config.slice).compiler_name != topology.compiler_name:
        said = f"--aot={topology.name}, but slice is {config.slice}"
        raise DataError(f"{said}, whose presets would be compiled for another one: leave it out, or give the same")
    named = config if config.slice else dataclasses.replace(config, slice=topology.name if "-" in topology.name else "")
    if "grpo" in config.stages:  # as train/startup.py refuses it on the slice
        processes.Share(count=topology.hosts).of(config.grpo.prompts, "grpo.prompts")
    return slices.fill_slice_defaults(named, policy.text.hidden_size, topology.devices)
