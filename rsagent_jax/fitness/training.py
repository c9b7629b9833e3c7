"""A training step of the config: the programs that train.py would run, compiled, weighed and timed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from rsagent_jax.aot.devices import chip_of
from rsagent_jax.aot.report import Job, analyse, needed_bytes
from rsagent_jax.aot.stages import attention_flops, stage_jobs, workload
from rsagent_jax.aot.topology import GIB, SLICES, Chip, Topology
from rsagent_jax.config.import_path import first_line
from rsagent_jax.config.schema import BatchConfig, TrainConfig
from rsagent_jax.data.packing import Item, pack
from rsagent_jax.fitness.finding import Examined, Finding, Verdict, device_memory, not_run
from rsagent_jax.fitness.made_up import random_policy, random_prompt
from rsagent_jax.fitness.speed import fastest, matmul_flops
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.train.state import (
    EMPTY,
    cast_frozen,
    create_state,
    init_adapters,
    make_optimizer,
    partition_params,
    state_shardings,
)
from rsagent_jax.train.step import Stage, make_stage
from rsagent_jax.types import Batch

SLOWER = 2.5  # times the projection, which is a bound: well-tuned models reach half of it
LEAST_MFU = 0.15  # of the peak measured, where nothing is projected
SMALLER = "policy.remat=full, fewer batch.rows, optim.offload, policy.lora, or a larger slice (docs/scaling.md)"
MICRO = ("tower", "gradients")
Compiled = dict[str, tuple[Job, jax.stages.Traced, jax.stages.Compiled]]  # by program: tower, gradients, update, …


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a step's programs on a micro-batch and of an update, and what they gave."""

    tower_s: float  # once a step, if it is frozen
    logprobs_s: float  # once a step: the reference's and the old ones, 0 without either
    gradients_s: float  # once an epoch
    update_s: float
    loss: float
    l2_grads: float

    @property
    def micro_s(self) -> float:
        return self.tower_s + self.gradients_s

    def step_s(self, stage: Stage, count: int) -> float:
        """Of a step with `count` micro-batches, without its rollouts."""
        parts = stage.minibatch_slices(count)
        passes = sum(part.stop - part.start for part in parts)
        return count * (self.tower_s + self.logprobs_s) + passes * self.gradients_s + len(parts) * self.update_s


def check_training(examined: Examined) -> list[Finding]:
    """All stages, each with rows that are full. Every host decides alike: the programs are those of all together."""
    if not isinstance(examined.config, TrainConfig):
        return not_run("training step", "this config trains nothing")
    mesh, found = sharding.make_mesh(examined.settled.mesh), []
    for stage in examined.config.stages:
        least = 8 * examined.numbers // mesh.size  # fp32 parameters and their gradients
        part = examined.config.policy.lora.rank or getattr(examined.config, stage).optim.freeze
        memory, programs = _memory(stage, 0 if part else least, "parameters and gradients alone"), {}
        if _nowhere_wrong(memory):
            memory, programs = _compiled(examined, stage, mesh)
        found.append(memory)
        if _nowhere_wrong(memory):
            found.append(judge_step(examined, stage, mesh.size, programs, _timed(examined, stage, mesh, programs)))
    return found


def _nowhere_wrong(finding: Finding) -> bool:
    return processes.allgather_sum([finding.verdict is Verdict.WRONG]) == [0]


def _compiled(examined: Examined, stage: str, mesh: jax.sharding.Mesh) -> tuple[Finding, Compiled]:
    """How much memory the fullest of a stage's programs needs, and all of them."""
    programs: Compiled = {}
    for job in stage_jobs(examined.settled, stage, examined.policy, mesh):
        try:
            traced = job.trace()
            programs[job.program.removeprefix(f"{stage} ")] = job, traced, traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:  # the compiler for TPU refuses what does not fit
            return Finding(f"memory, {stage}", Verdict.WRONG, f"{job.program}: {first_line(error)}", "", SMALLER), {}
    needed = ((needed_bytes(job, done, jax.default_backend()), job.program) for job, _, done in programs.values())
    return _memory(stage, *max(needed)), programs


def _memory(stage: str, needed: int, program: str) -> Finding:
    name, figure, have = f"memory, {stage}", f"{needed / GIB:.2f} GiB on each device ({program})", device_memory()
    if have is None:
        return Finding(name, Verdict.NOT_RUN, figure, "not known how much there is")
    against = f"{have / GIB:.2f} GiB" + (" free in this machine" if jax.default_backend() == "cpu" else "")
    return Finding.judged(name, needed <= have, Verdict.WRONG, figure, against, SMALLER)


def _timed(examined: Examined, stage: str, mesh: jax.sharding.Mesh, programs: Compiled) -> StepTimes:
    """Of the compiled programs, on a policy of random weights."""
    run = {name: compiled for name, (*_, compiled) in programs.items()}
    state, base, batch, ref = _arrays(examined, stage, mesh)
    tower_s = logprobs_s = 0.0
    if "tower" in run:
        tower_s, batch = fastest(lambda: run["tower"](base, batch)), run["tower"](base, batch)
    if "log-probs" in run:
        compared = EMPTY if examined.config.policy.lora.rank else state.params
        reference = jax.tree.map(lambda p: jnp.array(p, examined.config.policy.dtype, copy=True), compared)
        logprobs_s += fastest(lambda: run["log-probs"](reference, base, batch))
        del reference
    if "old log-probs" in run:
        logprobs_s += fastest(lambda: run["old log-probs"](state.params, base, batch))
    gradients_s = fastest(lambda: run["gradients"](state.params, base, batch, ref))
    sums = run["gradients"](state.params, base, batch, ref)

    def update():
        nonlocal state
        state, metrics = run["update"](state, sums)
        return metrics

    update_s, metrics = fastest(update), jax.device_get(update())
    return StepTimes(tower_s, logprobs_s, gradients_s, update_s, float(metrics["loss"]), float(metrics["l2_grads"]))


def judge_step(examined: Examined, stage: str, devices: int, programs: Compiled, times: StepTimes) -> Finding:
    """Against the projection of --aot where it knows these devices, else by MFU."""
    name, settings = f"step, {stage}", getattr(examined.settled, stage)
    if not np.isfinite((times.loss, times.l2_grads)).all():
        remedy = "--config.policy.attention=blocks, another jax or driver; see the attention kernels' lines"
        figure = f"loss {times.loss}, norm of the gradients {times.l2_grads}"
        return Finding(name, Verdict.WRONG, figure, "finite", remedy)
    sequences = settings.trajectories_per_step if stage == "sft" else settings.prompts * settings.group
    count, micro = math.ceil(sequences / settings.batch.rows), [programs[name] for name in MICRO if name in programs]
    flops = sum(job.model_flops for job, *_ in micro) / times.micro_s / devices
    chip, mfu = chip_of(jax.local_devices()[0]), flops / min(matmul_flops(examined.config.policy.dtype))
    made = make_stage(examined.settled, stage)
    figure = f"{times.step_s(made, count):.2f} s{' without rollouts' * (stage == 'grpo')}"
    figure += f", {count} full micro-batches of {times.micro_s:.3f}{f', {made.updates} updates' * (made.updates > 1)}"
    figure += f"; MFU {mfu:.0%} of the peak measured"
    figure += f", {flops / chip.bf16_flops:.0%} of the nominal" if chip else ""
    if projected := _projected(examined, settings.batch, devices, chip, micro):
        good, against = times.micro_s <= SLOWER * projected, f"{projected:.3g} s a micro-batch projected (--aot)"
    elif jax.default_backend() == "cpu":
        good, against = True, "nothing is projected for a CPU; not judged"
    else:
        good, against = mfu >= LEAST_MFU, f"{LEAST_MFU:.0%} at least; nothing is projected for this device"
    remedy = "another remat, longer rows, mesh.tensor; trace a step (--config.profiler_port, docs/tpu.md)"
    return Finding.judged(name, good, Verdict.SLOW, figure, against, remedy, value=flops)


def _projected(examined: Examined, batch: BatchConfig, devices: int, chip: Chip | None, micro: list) -> float:
    """Seconds of a micro-batch by the roofline of aot/report.py; 0 where it does not know these devices."""
    slices = (Topology(name, chip, shape) for name, (kind, shape) in SLICES.items() if chip and kind == chip.name)
    topology = next((slice for slice in slices if slice.devices == devices), None)
    if topology is None:
        return 0.0
    kernels = attention_flops(examined.policy, workload(batch, examined.policy, vision_trained=True))
    reports = [analyse(traced, compiled, job, topology, kernels) for job, traced, compiled in micro]
    return sum(report.projected_step_s or 0.0 for report in reports)


def _arrays(examined: Examined, stage: str, mesh: jax.sharding.Mesh):
    """(state, base, batch, reference log-probs) as train.run_stage has them when a step begins."""
    config, replicated = examined.settled, sharding.replicated(mesh)
    settings, lora = getattr(config, stage), config.policy.lora
    plain = random_policy(examined.policy, mesh, "float32")
    graphdef, params, base = partition_params(*plain, lora, settings.optim.freeze)
    base = cast_frozen(base, config.policy.dtype)
    if lora.rank:
        params = init_adapters(graphdef, params, base, jax.random.key(0), mesh)
    tx, _ = make_optimizer(settings.optim, 1000)
    where = state_shardings(params, tx, replicated, offload=settings.optim.offload)
    state = jax.jit(lambda p: create_state(p, tx), out_shardings=where, donate_argnums=0)(params)
    rows = processes.row_share(mesh).of(settings.batch.rows, f"{stage}.batch.rows")
    batch = full_batch(dataclasses.replace(settings.batch, rows=rows), examined.policy)
    return state, base, *processes.put_rows((batch, np.zeros(batch.tokens.shape, np.float32)), mesh)


def full_batch(batch: BatchConfig, policy: Qwen25VLConfig) -> Batch:
    """Rows without padding, of what aot/stages.py counts: images, and random words, half of them trained."""
    rng, items = np.random.default_rng(0), []
    grids = tuple((1, *grid) for grid in workload(batch, policy, vision_trained=True).images)
    words = batch.tokens - sum(h * w for _, h, w in grids) // policy.vision.merge_unit
    for _ in range(batch.rows):
        prompt, _ = random_prompt(policy, grids, words, rng)
        trained = np.arange(batch.tokens) >= batch.tokens - words // 2
        logprobs = -trained.astype(np.float32)
        items.append(Item(prompt.tokens, prompt.positions, trained, logprobs, prompt.patches, grids, advantage=1.0))
    (packed,) = pack(items, batch, policy)
    return packed
