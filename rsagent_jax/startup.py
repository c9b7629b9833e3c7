"""What each command needs, looked at before weights are loaded and programs compiled; the cheapest first.

Values of the config are right when this starts (config_files.build). A mistake is one DataError within seconds, not a
traceback after the first stage. Nothing here imports torch: a back end of our own is looked for, not loaded.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
from flax import nnx

from rsagent_jax import processes, sharding, slices
from rsagent_jax.agent import remote
from rsagent_jax.checkpoint import policy_directory
from rsagent_jax.config import (
    AgentConfig,
    BatchConfig,
    CollectConfig,
    EvalConfig,
    ProblemsConfig,
    SamplingConfig,
    SegmentConfig,
    SegmenterConfig,
    SftConfig,
    TrainConfig,
)
from rsagent_jax.data.processor import Processor
from rsagent_jax.data.samples import open_samples
from rsagent_jax.data.trajectories import open_records
from rsagent_jax.evals import bounds
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, load_config
from rsagent_jax.resolve import resolve
from rsagent_jax.rewards import make_reward
from rsagent_jax.rollout.budget_check import check_budget
from rsagent_jax.rollout.driver import pixel_limits
from rsagent_jax.rollout.engine import settled
from rsagent_jax.rollout.segmenter import open_segmenter
from rsagent_jax.train.sources import steps_of
from rsagent_jax.train.state import divide
from rsagent_jax.types import DataError
from sam_bridge.backends import NAMES, RANDOM

SPACE = 64 << 20  # bytes for logs, reports and compiled programs
GIB = 1 << 30


def train(config: TrainConfig, workdir: pathlib.Path) -> TrainConfig:
    """Everything that the stages need. Returns the config with what it leaves to the slice filled in."""
    if "grpo" in config.stages:
        make_reward(config.grpo.reward)
    _nothing_left_open(config)
    shape = check_weights(config.policy.weights)
    config = slices.settle(config, shape.text.hidden_size, len(jax.devices()))
    mesh, model = sharding.make_mesh(config.mesh), convert.abstract_model(shape)
    sharding.param_shardings(model, mesh)
    share, needed = processes.row_share(mesh), 0
    for stage in config.stages:
        settings = getattr(config, stage)
        _, trained, base = divide(*nnx.split(model, nnx.Param), config.policy.lora, settings.optim.freeze)
        share.of(settings.batch.rows, f"{stage}.batch.rows")
        if any(p.name.isdecimal() for p in (workdir / "checkpoints" / stage).glob("*")):
            continue  # its room is taken already
        # fp32 parameters with both moments, and the base in the dtype of the activations
        needed += 12 * _numbers(trained) + jnp.dtype(config.policy.dtype).itemsize * _numbers(base)
    check_disk(workdir, needed)
    processor = Processor.load(policy_directory(config.policy.weights))
    if "sft" in config.stages:
        share.of(config.sft.trajectories_per_step, "sft.trajectories_per_step")
        print(check_budget(config.agent, processor, batch=config.sft.batch, name="sft"))
        _check_trajectories(config.sft)
    if "grpo" in config.stages:
        share.of(config.grpo.prompts, "grpo.prompts")
        print(_check_rollout(config.agent, config.grpo.sampling, shape, processor, "grpo", config.grpo.batch))
        for note in open_samples(config.grpo.data).notes:  # what was left out, and why
            print(note)
        check_segmenter(config.segmenter)
        if config.segmenter.mode != "connect":  # seconds; a stage of SFT may come before it is opened again
            with open_segmenter(config.segmenter):
                pass
    return config


def evaluate(config: EvalConfig, workdir: pathlib.Path) -> None:
    """`config.policy.weights` are those that will be played, --weights included. Data is evaluate.py's to open."""
    check_disk(workdir)
    weights = config.policy.weights
    if config.bound.row == bounds.UNTRAINED and policy_directory(weights) != pathlib.Path(weights):
        raise DataError(f"bound.row is {bounds.UNTRAINED}, but {weights} is a checkpoint of train.py; give the weights")
    if config.bound.row not in bounds.ORACLES:
        print(_check_policy(weights, config.agent, config.sampling))
    check_segmenter(config.segmenter)


def collect(config: CollectConfig, workdir: pathlib.Path) -> None:
    """The same of collect, with its teacher."""
    own = config.teacher.own
    if own.weights:
        print(_check_policy(own.weights, config.agent, own.sampling, "teacher.own"))
    else:
        if resolve(config.teacher.function, ("config", "rng")) is remote.Remote:
            remote.check(config.teacher.remote)
        pixel_limits(config.agent, Processor.load(policy_directory(config.processor)))
    check_disk(workdir)
    check_segmenter(config.segmenter)


def segment(config: SegmentConfig, weights: str, out: pathlib.Path) -> None:
    """`weights`: those that will be played, --weights included."""
    _check_policy(weights, config.agent, config.sampling)
    check_disk(out)
    check_segmenter(config.segmenter)


def problems(config: ProblemsConfig, workdir: pathlib.Path) -> None:
    remote.check(config.writer, "writer")
    check_disk(workdir)


# ---------------------------------------------------------------------------------------------- one thing each


def check_disk(directory: pathlib.Path, more: int = 0) -> None:
    """DataError unless `more` bytes and a little have room where `directory` is."""
    free = shutil.disk_usage(directory).free
    if free < more + SPACE:
        raise DataError(
            f"{directory} has {free / GIB:.2f} GiB of free space, and {(more + SPACE) / GIB:.2f} are needed for what is"
            " written there; make room, or choose another directory"
        )


def check_weights(weights: str) -> Qwen25VLConfig:
    """The policy's shape. DataError for a directory without weights, or with those of another model."""
    directory = policy_directory(weights)
    shape, path = load_config(directory), pathlib.Path(weights)
    Processor.load(directory)
    if directory == path:
        convert.check_files(directory, shape)
    elif not any(step.name.isdecimal() for step in path.iterdir()):
        raise DataError(f"{path} holds no finished checkpoint; run train.py until one is saved")
    return shape


def check_segmenter(config: SegmenterConfig) -> None:
    """A side-car that runs is asked who it is; of one of our own the files are looked for."""
    if config.mode == "connect":
        with open_segmenter(config):
            return
    if config.backend == "sam2":
        if config.checkpoint != RANDOM and not pathlib.Path(config.checkpoint).is_file():
            raise DataError(f"segmenter.checkpoint {config.checkpoint} does not exist; give sam2's .pt file")
        if missing := [name for name in ("torch", "sam2") if importlib.util.find_spec(name) is None]:
            raise DataError(f"segmenter.backend sam2 needs {' and '.join(missing)}: see docs/sidecar.md")
    elif config.backend not in NAMES:
        module, _, name = config.backend.rpartition(":")
        if config.mode == "inprocess":
            resolve(config.backend, ())
        elif not (pathlib.Path(module).is_file() if module.endswith(".py") else _is_module(module)):
            raise DataError(f"segmenter.backend {config.backend!r}: there is no {module}, whose {name} is to be called")


def _check_policy(weights: str, agent: AgentConfig, sampling: SamplingConfig, group: str = "") -> str:
    shape = check_weights(weights)
    return _check_rollout(agent, sampling, shape, Processor.load(policy_directory(weights)), group)


def _check_rollout(
    agent: AgentConfig,
    sampling: SamplingConfig,
    shape: Qwen25VLConfig,
    processor: Processor,
    group: str,
    batch: BatchConfig | None = None,
) -> str:
    """The budget of a trajectory as a line for people, where this process's devices can play such ones.

    group: of the config that holds `sampling`, and `batch` where they are trained on; "" where they stand at its root.
    """
    where, budget = f"{group}.sampling".lstrip("."), check_budget(agent, processor, sampling, batch, group)
    mesh = processes.local_mesh(sampling.tensor)
    if shape.text.num_key_value_heads % sampling.tensor:
        heads = shape.text.num_key_value_heads
        raise DataError(f"{where}.tensor = {sampling.tensor} must divide the policy's {heads} key-value heads")
    settled(sampling, shape.vision.window_patches, sharding.parts("rows", mesh))
    return budget


def _check_trajectories(config: SftConfig) -> None:
    steps = steps_of(config, len(open_records(config.trajectories)))
    if steps < config.optim.warmup_steps:
        raise DataError(
            f"sft.optim.warmup_steps must be at most the stage's {steps} updates, got {config.optim.warmup_steps}"
        )


def _nothing_left_open(config: TrainConfig) -> None:
    """What a slice's preset decides has to be said where no slice is named."""
    left = {"mesh.tensor": config.mesh.tensor, "policy.remat": config.policy.remat}
    left |= {f"{stage}.batch.rows": getattr(config, stage).batch.rows for stage in config.stages}
    if "grpo" in config.stages:
        left |= {f"grpo.sampling.{name}": getattr(config.grpo.sampling, name) for name in ("tensor", "slots")}
    if not config.slice and (names := [name for name, value in left.items() if not value]):
        raise DataError(f"{', '.join(names)}: left to the slice's preset, and no slice is named; give them, or slice")


def _is_module(name: str) -> bool:
    """Whether the side-car will find it; its package is imported for that, the module itself is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _numbers(tree: nnx.State) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
