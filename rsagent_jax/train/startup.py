"""What train.py needs, looked at before weights are fetched and programs compiled; the cheapest first."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.config import slices
from rsagent_jax.config.schema import SftConfig, TrainConfig
from rsagent_jax.config.validation import ValidationConfig
from rsagent_jax.data.sets.open import open_samples
from rsagent_jax.data.trajectories import STAMP, open_records
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.rewards import make_scorer
from rsagent_jax.rollout.startup import check_budget, check_disk, check_rollout, check_segmenter, policy_shape
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.runtime.paths import open_path
from rsagent_jax.train.batch_source import steps_of
from rsagent_jax.train.state import partition_params
from rsagent_jax.types import DataError


def check_train(config: TrainConfig, workdir: pathlib.Path, *, replay: bool = False) -> TrainConfig:
    """Everything that the stages need. Returns the config with what it leaves to the slice filled in.

    replay: nothing is played, and what rollouts need is not looked at.
    """
    if "grpo" in config.stages:
        make_scorer(config.grpo.reward)
    _nothing_left_open(config)
    shape, processor = policy_shape(config.policy.weights)
    config = slices.fill_slice_defaults(config, shape.text.hidden_size, len(jax.devices()))
    mesh, model = sharding.make_mesh(config.mesh), convert.abstract_model(shape)
    sharding.param_shardings(model, mesh)
    share, needed, window = processes.row_share(mesh), 0, shape.vision.window_patches
    for stage in config.stages:
        settings = getattr(config, stage)
        if odd := settings.batch.patches % window:
            raise DataError(
                f"{stage}.batch.patches must be a multiple of the vision tower's window of {window} patches, got"
                f" {settings.batch.patches}; the next is {settings.batch.patches - odd + window}"
            )
        share.of(settings.batch.rows, f"{stage}.batch.rows")
        if ocp.utils.checkpoint_steps(workdir / "checkpoints" / stage):
            continue  # its room is taken already
        needed += checkpoint_bytes(model, config, stage)
    check_disk(workdir, needed)
    if "sft" in config.stages:
        share.of(config.sft.trajectories_per_step, "sft.trajectories_per_step")
        print(check_budget(config.agent, processor, batch=config.sft.batch, name="sft"))
        _check_trajectories(config.sft)
    if "grpo" in config.stages:
        share.of(config.grpo.prompts, "grpo.prompts")
        if share.count != jax.process_count():  # those that hold the same rows would play and count them several times
            raise DataError(
                f"grpo: mesh.tensor = {config.mesh.tensor} spreads a tensor group over several processes, which is for"
                f" SFT alone; give at most the {jax.local_device_count()} devices of one"
            )
    if "grpo" in config.stages and not replay:
        for note in open_samples(config.grpo.data, "grpo.data").notes:  # what was left out, and why
            print(note)
        if mocked := config.grpo.mock.trajectories:
            open_records(mocked)
            print(f"grpo: its turns are those stored in {mocked}: what is learned means nothing")
    if config.plays and not replay:
        batch = config.grpo.batch if "grpo" in config.stages else None
        print(check_rollout(config.agent, config.grpo.sampling, shape, processor, "grpo", batch))
        check_segmenter(config.segmenter)
        if config.segmenter.mode != "connect" and "grpo" not in config.stages:  # whose segmenter is asked who it is
            with open_segmenter(config.segmenter):
                pass
    return config


def replay_config(config: TrainConfig, workdir: pathlib.Path, replay: str) -> TrainConfig:
    """One step of GRPO, and nothing that is played. DataError where `replay` is no dump, or `workdir` has checkpoints
    of GRPO already."""
    if not (open_path(replay) / STAMP).exists():
        raise DataError(f"--replay={replay} holds no stored step: give one of dumps/, as grpo.dump_every writes them")
    if ocp.utils.checkpoint_steps(workdir / "checkpoints" / "grpo"):
        raise DataError(f"--replay: {workdir} has checkpoints of GRPO; give the update a --workdir of its own")
    grpo = dataclasses.replace(config.grpo, steps=1, dump_every=0)
    return dataclasses.replace(config, stages=("grpo",), grpo=grpo, validation=ValidationConfig())


def checkpoint_bytes(model: nnx.Module, config: TrainConfig, stage: str) -> int:
    """Of one checkpoint: fp32 parameters with both moments, and the base in the dtype of the activations."""
    freeze = getattr(config, stage).optim.freeze
    _, trained, base = partition_params(*nnx.split(model, nnx.Param), config.policy.lora, freeze)
    return 12 * _numbers(trained) + jnp.dtype(config.policy.dtype).itemsize * _numbers(base)


def _check_trajectories(config: SftConfig) -> None:
    if not config.trajectories:
        raise DataError("sft.trajectories is not given: --config.sft.trajectories=DIR, which rsagent_jax.collect wrote")
    try:
        steps = steps_of(config, len(open_records(config.trajectories)))
    except DataError as error:
        raise DataError(f"sft.trajectories: {error}") from error
    if steps < config.optim.warmup_steps:
        raise DataError(
            f"sft.optim.warmup_steps must be at most the stage's {steps} updates, got {config.optim.warmup_steps}"
        )


def _nothing_left_open(config: TrainConfig) -> None:
    """What a slice's preset decides has to be said where no slice is named."""
    left = {"mesh.tensor": config.mesh.tensor, "policy.remat": config.policy.remat}
    left |= {f"{stage}.batch.rows": getattr(config, stage).batch.rows for stage in config.stages}
    if config.plays:
        left |= {f"grpo.sampling.{name}": getattr(config.grpo.sampling, name) for name in ("tensor", "slots")}
    if not config.slice and (names := [name for name, value in left.items() if not value]):
        raise DataError(f"{', '.join(names)}: left to the slice's preset, and no slice is named; give them, or slice")


def _numbers(tree: nnx.State) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
