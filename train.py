"""Trains a policy: SFT on stored trajectories, then GRPO with tools. One loop for both.

  python train.py --config=configs/quickstart.py --workdir=runs/mine [--config.a.b=v]
  python train.py --config=configs/sft_tpu.py --aot=v5e-16     compiles the programs for a TPU that is not there

Run the same command again and it goes on from the newest checkpoint. SIGTERM saves at once, with what has come of a
rollout, and ends with status 75 (docs/training.md, Preemption): start it again.
"""

from rsagent_jax.runtime import command

if __name__ == "__main__":
    command.start_command()

import contextlib
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.aot.devices import chip_of
from rsagent_jax.aot.remat import remat_for_topology, settle_remat
from rsagent_jax.config.build import to_dict
from rsagent_jax.config.schema import TrainConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.data.trajectories import check_collected
from rsagent_jax.models.qwen25_vl.compute import Compute
from rsagent_jax.models.qwen25_vl.load import load_policy, pin_step, policy_directory, processor_directory
from rsagent_jax.rollout.driver import Driver, pixel_limits
from rsagent_jax.rollout.mock import MockEngine
from rsagent_jax.rollout.open import engine_layout, open_engine
from rsagent_jax.rollout.startup import check_weights
from rsagent_jax.runtime import preemption, processes, sharding
from rsagent_jax.runtime.listening import serve_profiler
from rsagent_jax.runtime.loggers import open_loggers
from rsagent_jax.runtime.progress import PROGRESS
from rsagent_jax.runtime.train_log import MetricsLog
from rsagent_jax.runtime.workdir_lock import hold_workdir
from rsagent_jax.train import run_identity, startup
from rsagent_jax.train.alarms import Alarms
from rsagent_jax.train.batch_source import BatchSource, GrpoSource, SftSource
from rsagent_jax.train.checkpoint import Checkpoints
from rsagent_jax.train.first_batch import save_first_batch
from rsagent_jax.train.judged import ReplaySource, dump_rollouts, replays, rollout_figures
from rsagent_jax.train.losses import mean_over_updates
from rsagent_jax.train.reference import check_reference
from rsagent_jax.train.run_identity import STAGES
from rsagent_jax.train.state import (
    EMPTY,
    cast_frozen,
    init_adapters,
    make_optimizer,
    make_plain,
    partition_params,
    skip,
    updates_made,
)
from rsagent_jax.train.step import make_programs, make_stage
from rsagent_jax.train.throughput import CompileCounter, StepClock, WorkCounter
from rsagent_jax.train.under_way import UnderWay
from rsagent_jax.train.validation import Validator, overlaps


@dataclasses.dataclass(frozen=True)
class Policy:
    """The policy as a stage begins: `params` are those of a plain model, on the mesh."""

    weights: pathlib.Path  # directory of its config, tokenizer and image settings
    processor: Processor
    mesh: Mesh
    graphdef: nnx.GraphDef
    params: nnx.State


def main(
    config: TrainConfig,
    *,
    workdir: str = "",  # directory for everything this command leaves behind
    aot: str = "",  # a TPU slice or topology to compile for instead of training; all: each with a preset
    aot_quick: bool = False,  # with --aot: a fifth of the time, by leaving out what only makes it fast
    aot_only: str = "",  # with --aot: only programs with this in their name, such as rollout; or a,b
    replay: str = "",  # a directory that grpo.dump_every wrote: one GRPO update from it, and nothing is played
) -> int | None:
    if aot or aot_only or aot_quick:
        return compile_ahead(config, aot, aot_quick, aot_only)

    ############################## Checks, before a file is touched ##############################
    processes.initialize_distributed()
    workdir = command.make_workdir(workdir, own="checkpoints")
    processes.on_lead(lambda: hold_workdir(workdir))
    if replay:
        config = processes.all_or_none(lambda: startup.replay_config(config, workdir, replay))
    config = processes.all_or_none(lambda: startup.check_train(config, workdir, replay=bool(replay)))
    processes.all_or_none(lambda: run_identity.check_config(workdir, config))
    command.use_compilation_cache(config.cache_dir, workdir / "compiled")
    policy = dataclasses.replace(config.policy, weights=pin_step(config.policy.weights))
    config = dataclasses.replace(config, policy=policy)
    processor = Processor.load(processor_directory(config.policy.weights))
    inputs = processes.all_or_none(lambda: check_inputs(config, workdir, processor, replay))
    processes.check_same(inputs)
    remat = config.policy.remat
    config = settle_remat(config, processor.config, run_identity.last_remat(workdir, config))

    ############################## Work directory, log ##############################
    processes.on_lead(lambda: run_identity.record_start(workdir, config, inputs, remat))
    if config.profiler_port:
        serve_profiler(config.profiler_port)
    own = processes.own_directory(workdir)
    loggers = lambda: open_loggers(config.loggers, own, to_dict(config), lead=processes.is_lead())  # noqa: E731
    log = MetricsLog(own, processes.all_or_none(loggers))
    for name in set(STAGES) - run_identity.saved_steps(workdir).keys():  # of a start that left no checkpoint
        processes.all_or_none(lambda name=name: log.rewind(name, -1))

    ############################## Mesh, policy ##############################
    mesh = sharding.make_mesh(config.mesh)
    graphdef, params = nnx.split(load_policy(config.policy.weights, mesh), nnx.Param)
    policy = Policy(policy_directory(config.policy.weights), processor, mesh, graphdef, params)

    ############################## Stages ##############################
    for name in config.stages:
        with contextlib.ExitStack() as stack:
            policy = run_stage(name, config, workdir, log, policy, stack, replay)
    log.close()
    for line in log.failures():
        print(line)
    if not log.counts["steps"]:
        print(f"nothing was trained: {' and '.join(config.stages)} had been done before; see {workdir}/checkpoints")


def compile_ahead(config: TrainConfig, name: str, quick: bool, only: str) -> int:
    """Compiles each stage's programs, or those with `only` in the name, for a TPU that is not there. 3 if one of them
    does not fit, else 0."""
    from rsagent_jax.aot import stages  # loads the TPU compiler

    stages.begin_compiling()
    targets, reports = stages.topologies(name, config), []
    if quick:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    for target in targets:
        settled, why = remat_for_topology(config, target)
        print(why, end="\n" * bool(why), file=sys.stderr)
        reports += [dataclasses.replace(r, quick=quick) for r in stages.report_stages(settled, target, only)]
    return stages.print_reports(reports)


def check_inputs(config: TrainConfig, workdir: pathlib.Path, processor: Processor, replay: str) -> dict[str, str]:
    """Fingerprints of what the run is given, once it is known to be what the run in `workdir` was given."""
    inputs = {}
    if "sft" in config.stages:
        check_collected(config.sft.trajectories, config.agent, pixel_limits(config.agent, processor))
        inputs["sft.trajectories"] = run_identity.trajectories_fingerprint(config.sft.trajectories)
    if "grpo" in config.stages and not replay:
        inputs["grpo.data"] = run_identity.samples_fingerprint(open_samples(config.grpo.data, "grpo.data").ids)
        with open_segmenter(config.segmenter) as segmenter:
            inputs["segmenter"] = f"{segmenter.about.backend}: {segmenter.about.identity}"
    run_identity.check_same_inputs(workdir, inputs)
    for warning in overlaps(config):
        print(warning)
    check_weights(config.policy.weights)  # last: it may download them
    inputs["policy.weights"] = run_identity.weights_fingerprint(config.policy.weights)
    run_identity.check_same_inputs(workdir, inputs)
    return inputs


def open_source(
    config: TrainConfig, stage: str, workdir: pathlib.Path, policy: Policy, replay: str, stack: contextlib.ExitStack
) -> BatchSource:
    """Stored trajectories; groups of them that this process's own engine plays with the tools; or the dump `replay`."""
    share, processor = processes.row_share(policy.mesh), policy.processor
    if replay:
        return ReplaySource(config.grpo, replay, processor, share)
    if stage == "sft":
        return SftSource(config.sft, processor, config.seed, share)
    driver = open_player(config, policy, stack)
    samples, own = open_samples(config.grpo.data), processes.own_directory(workdir)
    return GrpoSource(config.grpo, samples, driver, processor, config.seed, share, own)


def open_player(config: TrainConfig, policy: Policy, stack: contextlib.ExitStack) -> Driver:
    """Plays through an engine on this process's devices, without weights until it is given some. `stack` closes it."""
    c, dtype, processor = config.grpo, config.policy.dtype, policy.processor
    segmenter = stack.enter_context(open_segmenter(config.segmenter))
    if c.mock.trajectories:
        mocked = MockEngine(c.mock, engine_layout(c.sampling, processor.config)[0], processor)
        return Driver(mocked, segmenter, processor, config.agent, workers=config.segmenter.workers)
    local = functools.partial(processes.local_copy, mesh=policy.mesh, dtype=dtype) if jax.process_count() > 1 else None
    model, key = nnx.merge(policy.graphdef, policy.params), stage_key(config, "grpo")
    engine = open_engine(model, processor, c.sampling, config.agent, dtype, key, local)
    engine.warm_up()
    engine.release_memory()  # the state is made beside nothing of the engine's
    return Driver(engine, segmenter, processor, config.agent, workers=config.segmenter.workers)


def open_validator(
    config: TrainConfig, stage: str, workdir: pathlib.Path, policy: Policy, source: BatchSource, stack
) -> Validator:
    """Through GRPO's engine, or SFT's own; without either where the config names no set."""
    if not config.validation.sets:
        return Validator(config, stage, None, workdir)
    player = source.driver if isinstance(source, GrpoSource) else open_player(config, policy, stack)
    # A driver of its own: GRPO's may have trajectories under way.
    workers = config.segmenter.workers
    driver = Driver(player.policy, player.segmenter, policy.processor, config.agent, workers=workers)
    return Validator(config, stage, driver, workdir)


def stage_key(config: TrainConfig, name: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), STAGES.index(name))


def run_stage(
    name: str,
    config: TrainConfig,
    workdir: pathlib.Path,
    log: MetricsLog,
    policy: Policy,
    stack: contextlib.ExitStack,
    replay: str = "",
) -> Policy:
    """Trains one stage to its end, from its newest checkpoint if it has one; or from the dump `replay`."""
    PROGRESS.enter(f"start of {name}")
    stage, settings = make_stage(config, name), getattr(config, name)
    source = open_source(config, name, workdir, policy, replay, stack)
    steps, updates, key, mesh = source.steps, stage.updates, stage_key(config, name), policy.mesh
    validator = open_validator(config, name, workdir, policy, source, stack)

    ############################## What is trained, what is only read ##############################
    compute, lora = Compute.of(config.policy, mesh), config.policy.lora
    graphdef, params, base = partition_params(policy.graphdef, policy.params, lora, settings.optim.freeze)
    # In the dtype of the activations: the parameters are cast to it wherever they are used. With adapters the base
    # alone is the reference.
    copied = EMPTY if lora.rank else params
    reference = jax.tree.map(lambda p: jnp.array(p, compute.dtype, copy=True), copied) if stage.kl > 0 else None
    base = cast_frozen(base, compute.dtype)
    if lora.rank:
        params = init_adapters(graphdef, params, base, jax.random.fold_in(key, 0), mesh)

    ############################## State, programs ##############################
    tx, schedule = make_optimizer(settings.optim, steps * updates)
    reference_graph = policy.graphdef if lora.rank else None
    options = dict(offload=settings.optim.offload, reference=reference_graph)
    programs = make_programs(graphdef, tx, stage, compute, params, base, **options)
    state = programs.create_state(params)
    to_plain = make_plain(base, lora, compute.dtype)
    kept = dict(keep_last=config.keep_last, keep_every=config.keep_every * updates, minutes=config.checkpoint_minutes)
    checkpoints = Checkpoints(workdir / "checkpoints" / name, policy.weights, lora, validator.measure, **kept)
    stack.callback(checkpoints.close)
    under_way = UnderWay(checkpoints, source, updates, log.flush)
    done = 0
    restored = checkpoints.restore(state)
    if jax.tree.leaves(reference):
        before = [f"{workdir}/checkpoints/{stage}" for stage in config.stages[: config.stages.index(name)]]
        weights = (config.policy.weights, *before)[-1]
        check_reference(checkpoints.directory, reference, weights, compute.dtype, begins=restored is None)
    if restored is not None:
        state, position = restored
        base = checkpoints.restore_base(base)
        source.restore(position)
        done = int(state.step) // updates
        if done < steps and not run_identity.is_followed(workdir, name):
            print(f"{name}: goes on after step {done} of {steps}")
        else:
            print(f"{name}: done, {done} of {steps} steps; nothing to do")
            steps = done  # it may have stopped early, by settings that are others now
    processes.all_or_none(lambda: log.rewind(name, done or -1))
    open_alarms = lambda: Alarms(config.alarms, log.path.parent, name, done, lead=processes.is_lead())  # noqa: E731
    alarms = stack.enter_context(contextlib.closing(processes.all_or_none(open_alarms)))

    def policy_for_rollouts() -> nnx.State:  # with adapters a copy, which no name holds
        return to_plain(state.params, base)

    preemption.defer(config.preemption_s, interrupts=True)
    validator.begin(done)
    if (validator.sets and not done) or validator.was_stopped(done, steps):
        log.write(name, done, validator.run(policy_for_rollouts, done))
    if done < steps and validator.stop(done):
        steps = done

    ############################## Train loop ##############################
    made, clock, chip = updates_made(state), StepClock(), chip_of(jax.local_devices()[0])
    compiles = CompileCounter()
    promised = (chip.bf16_flops, chip.devices_per_chip) if chip else ()
    work = WorkCounter(policy.processor.config.text, mesh, *promised)
    bar = dict(initial=done, total=steps, desc=name, unit="step", mininterval=2.0, disable=None)  # on a terminal
    under_way.take_up(done)
    for step in tqdm(range(done + 1, steps + 1), **bar):
        PROGRESS.enter("batch", step)
        batches = refs = None  # the last step's give their memory to the rollouts
        with under_way.making(step, state, base):
            batches, metrics = source.next(policy_for_rollouts, jax.random.fold_in(key, step))
        clock.lap("batch", metrics)
        metrics |= rollout_figures(source.judged)
        clock.lap("reward")
        work.begin(batches)
        PROGRESS.enter("update", step)
        if batches and not made:
            save_first_batch(processes.own_directory(workdir), name, batches[0], policy.processor, log)
        if batches:
            zeros = processes.put_rows(np.zeros(batches[0].tokens.shape, np.float32), mesh)
            batches = [programs.embed(base, processes.put_rows(batch, mesh)) for batch in batches]
            jax.block_until_ready(batches)  # a frozen tower's pass is no part of the update
            clock.lap("images")
            refs = [programs.logprobs(reference, base, batch) if stage.kl > 0 else zeros for batch in batches]
            if stage.tis_clip > 0:
                batches, corrected = programs.correct_for_engine(state.params, base, batches)
                metrics |= jax.device_get(corrected)
            jax.block_until_ready((batches, refs))
            clock.lap("logprobs")
            said = []
            for part in stage.minibatch_slices(len(batches)):
                state, update = programs.train_step(state, base, batches[part], refs[part])
                said.append(update)
            state = state if len(said) == updates else skip(state, updates - len(said))
            made += len(said)
            metrics |= mean_over_updates(jax.device_get(said)) | {"lr": schedule(made - 1)}
        else:  # nothing teaches, on no process: sums over nothing
            state = skip(state, updates)
            metrics |= dict.fromkeys(("loss", "l2_grads", "l2_updates"), 0.0)
        clock.lap("update")
        PROGRESS.enter("validation", step)
        if validated := validator.due(step, steps):
            batches = refs = None
            metrics |= validator.run(policy_for_rollouts, step)
            clock.lap("validation")
        if source.judged and settings.dump_every and step % settings.dump_every == 0:
            dump = processes.own_directory(workdir) / "dumps" / f"step_{step:06d}"
            dump_rollouts(dump, step, source.judged, source.driver, source.share, settings.dump_keep)
        metrics |= clock.read() | compiles.read()
        log.write(name, step, metrics | work.figures(metrics, passes=stage.epochs))
        log.examples(step, source.examples | replays(source.judged))
        alarms.add(step, metrics, source.examples)
        PROGRESS.enter("checkpoint", step)
        every, ended = settings.checkpoint_every, validated and validator.stop(step)
        planned = step == steps or ended or (every and step % every == 0)
        if planned or (validated and config.validation.keep_best) or checkpoints.due():
            clock.lap("other")
            log.flush()
            checkpoints.save(state, source.state(), base, validator.score(step) if validated else None)
            clock.lap("checkpoint")  # of the next step's time
        if ended:
            break
    processes.all_or_none(preemption.check)  # the last step's validation, if a signal stopped it, is the next start's
    under_way.forget(steps)
    PROGRESS.enter(f"end of {name}")
    return dataclasses.replace(policy, params=make_plain(base, lora, "float32")(state.params, base))
