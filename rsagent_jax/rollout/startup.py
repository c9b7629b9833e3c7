"""What each command needs, looked at before weights are loaded and programs compiled; the cheapest first.

Values of the config are right when this starts (config/build.py). A mistake is one DataError within seconds, not a
traceback after the first stage. Nothing here imports torch: a back end of our own is looked for, not loaded.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil

from rsagent_jax.agent.segmenter import open_segmenter
from rsagent_jax.config.import_path import import_path
from rsagent_jax.config.schema import AgentConfig, BatchConfig, SamplingConfig, SegmentConfig, SegmenterConfig
from rsagent_jax.data.processor import Processor
from rsagent_jax.models.qwen25_vl import convert
from rsagent_jax.models.qwen25_vl.config import Qwen25VLConfig, load_config
from rsagent_jax.models.qwen25_vl.load import local_weights, policy_directory
from rsagent_jax.rollout.budget_check import check_budget
from rsagent_jax.rollout.engine import fill_sampling_defaults
from rsagent_jax.runtime import processes, sharding
from rsagent_jax.types import DataError
from sam_bridge.backends import NAMES, BackendError, local_checkpoint

SPACE = 64 << 20  # bytes for logs, reports and compiled programs
GIB = 1 << 30


def check_segment(config: SegmentConfig, weights: str, out: pathlib.Path) -> None:
    """`weights`: those that will be played, --weights included."""
    check_policy(weights, config.agent, config.sampling)
    check_disk(out)
    check_segmenter(config.segmenter)


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
    shape, path = load_config(directory), local_weights(weights)
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
        try:  # downloaded now, not while a side-car is waited for
            local_checkpoint(config.checkpoint)
        except BackendError as error:
            raise DataError(f"segmenter.checkpoint: {error}") from error
        if missing := [name for name in ("torch", "sam2") if importlib.util.find_spec(name) is None]:
            raise DataError(f"segmenter.backend sam2 needs {' and '.join(missing)}: see docs/sidecar.md")
    elif config.backend not in NAMES:
        module, _, name = config.backend.rpartition(":")
        if config.mode == "inprocess":
            import_path(config.backend, ())
        elif not (pathlib.Path(module).is_file() if module.endswith(".py") else _is_module(module)):
            raise DataError(f"segmenter.backend {config.backend!r}: there is no {module}, whose {name} is to be called")


def check_policy(weights: str, agent: AgentConfig, sampling: SamplingConfig, group: str = "") -> str:
    shape = check_weights(weights)
    return check_rollout(agent, sampling, shape, Processor.load(policy_directory(weights)), group)


def check_rollout(
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
    fill_sampling_defaults(sampling, shape.vision.window_patches, sharding.parts("rows", mesh))
    return budget


def _is_module(name: str) -> bool:
    """Whether the side-car will find it; its package is imported for that, the module itself is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
